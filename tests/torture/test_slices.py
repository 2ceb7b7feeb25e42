"""A short slice of every attack: what a user would lose if a promise broke is lost here first."""

from pathlib import Path

import pytest

from tests.torture.promises import PROMISES
from tests.torture.tally import Promise, Unavailable


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.name.split()[0])
def test_promise(promise: Promise, tmp_path: Path) -> None:
    try:
        tally = promise.attack(promise.slice_tries, tmp_path, 1)
    except Unavailable as error:
        pytest.skip(str(error))
    assert tally.tries >= 1
    assert not tally.failed, tally.notes
