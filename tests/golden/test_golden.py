"""What an earlier version wrote is read by this one: stores in both backends, runs in all formats of weights."""

import json
import shutil
from pathlib import Path

import pytest

from elmo_stream.inspection import verify
from elmo_stream.training.trainer import resume
from tests.golden.make import run_facts, store_facts

PLACES = sorted(
    (version, name)
    for version in Path(__file__).parent.glob("v*")
    for name in json.loads((version / "facts.json").read_text())
)


@pytest.mark.parametrize(("version", "name"), PLACES, ids=[f"{version.name}-{name}" for version, name in PLACES])
def test_stores_and_runs_of_every_version_are_still_read(version: Path, name: str, tmp_path: Path) -> None:
    expected = json.loads((version / "facts.json").read_text())[name]
    place = shutil.copytree(version / name, tmp_path / name)
    verify(place)
    if name.startswith("store"):
        assert store_facts(place) == expected
        return
    found = run_facts(place)
    for mine, theirs in zip(found.pop("probabilities"), expected.pop("probabilities"), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)
    assert found == expected
    heard: list[str] = []
    assert resume(place, version / "store-zarr", report=heard.append) == 0 and "finished already" in heard[0]
