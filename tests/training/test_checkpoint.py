"""A checkpoint is whole or it is none; damage is named and never loaded."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from elmo_stream.errors import CorruptError, UserError
from elmo_stream.training.checkpoint import (
    checkpoint_steps,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def _save(run: Path, step: int) -> Path:
    chunks = [(0, 3, {"weight": torch.arange(6.0).reshape(3, 2) + step}), (3, 5, {"weight": torch.ones(2, 2) * step})]
    return save_checkpoint(
        run,
        step,
        state={"total_steps": 9},
        encoder={"a": torch.full((4,), float(step))},
        optimizer={"0.exp_avg": torch.ones(4)},
        classifier=iter(chunks),
    )


def _heard(run: Path) -> tuple[int, list[str]]:
    lines: list[str] = []
    checkpoint = load_checkpoint(run, report=lines.append)
    assert checkpoint is not None
    return checkpoint.step, lines


def test_what_was_saved_is_loaded_in_any_cut_of_the_labels(tmp_path: Path) -> None:
    _save(tmp_path, 7)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 7
    assert torch.equal(checkpoint.tensors("encoder")["a"], torch.full((4,), 7.0))
    whole = checkpoint.rows("weight", 0, 5)
    assert whole[:, 0].tolist() == [7, 9, 11, 7, 7]
    assert torch.equal(checkpoint.rows("weight", 2, 4), whole[2:4])
    with pytest.raises(CorruptError, match="another classifier"):
        checkpoint.rows("weight", 0, 6)


def test_a_run_without_checkpoints_has_none_and_an_absent_step_is_refused(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    _save(tmp_path, 3)
    with pytest.raises(UserError, match=r"step 4; it has 3"):
        load_checkpoint(tmp_path, 4)


def test_any_damaged_byte_or_missing_file_sends_the_run_to_the_checkpoint_before(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    newest = _save(tmp_path, 2)
    names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(names) == 6
    for name in names:
        path = newest / name
        good = path.read_bytes()
        for bad in (
            good[:-2],
            bytes([good[0] ^ 1]) + good[1:],
            good[: len(good) // 2] + b"?" + good[len(good) // 2 + 1 :],
            None,
        ):
            if bad is None:
                path.unlink()
            else:
                path.write_bytes(bad)
            step, lines = _heard(tmp_path)
            assert step == 1, name
            assert len(lines) == 1 and "step-00000002" in lines[0]
            with pytest.raises(CorruptError, match=r"step-00000002"):
                load_checkpoint(tmp_path, 2)
            path.write_bytes(good)
    assert _heard(tmp_path) == (2, [])


def test_when_all_are_damaged_nothing_is_loaded(tmp_path: Path) -> None:
    (_save(tmp_path, 1) / "state.json").write_text("{}")
    with pytest.raises(CorruptError, match="no checkpoint is whole"):
        load_checkpoint(tmp_path, report=lambda line: None)


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    folder = _save(tmp_path, 1)
    (folder / "encoder.safetensors").write_bytes(b"")
    _save(tmp_path, 1)
    assert _heard(tmp_path) == (1, [])


def test_old_checkpoints_and_leftovers_of_kills_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 40):
        _save(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / "step-00000050.tmp-123")
    assert checkpoint_steps(tmp_path) == [1, 2, 3, 40]
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000040"]


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../outside": {"bytes": 1, "sha256": "0"}}},
        {"files": {}},
        {"files": {"state.json": {"bytes": 2}}},
        {"files": 3},
        {"version": 99},
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = _save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = {**{key: value for key, value in manifest.items() if key != "sha256"}, **change}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**changed, "sha256": digest}))
    with pytest.raises(CorruptError, match=r"manifest\.json"):
        load_checkpoint(tmp_path, 1)


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_debris(tmp_path: Path) -> None:
    _save(tmp_path, 1)

    def chunks() -> object:
        yield 0, 3, {"weight": torch.zeros(3, 2)}
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, state={"total_steps": 9}, encoder={}, optimizer={}, classifier=chunks())  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
