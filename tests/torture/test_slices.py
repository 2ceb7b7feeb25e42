"""A short slice of every attack: what a user would lose if a promise broke is lost here first."""

from pathlib import Path

import pytest

from tests.torture.promises import PROMISES
from tests.torture.tally import Promise


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.name.split()[0])
def test_promise(promise: Promise, tmp_path: Path) -> None:
    tally = promise.attack(promise.slice_tries, tmp_path, 1)
    assert tally.tries >= 1
    assert not tally.failed, tally.notes
