"""The global shuffle reaches every position once, and mixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_stream.data.shuffle import permute


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_every_position_is_hit_exactly_once(size, seed):
    assert np.array_equal(np.sort(permute(np.arange(size), size, seed)), np.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 2**40 + 1, 2**62])
def test_large_sizes_stay_in_range_and_collide_nowhere(size):
    positions = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    images = permute(positions, size, seed=3)
    assert images.min() >= 0 and images.max() < size and len(np.unique(images)) == len(images)


def test_a_row_gets_the_same_position_whichever_part_asks():
    whole = permute(np.arange(10_000), 10_000, seed=5)
    assert np.array_equal(whole[1234:5678], permute(np.arange(1234, 5678), 10_000, seed=5))


def test_neighbours_are_torn_apart_and_seeds_differ():
    size = 20_000
    one, other = (permute(np.arange(size), size, seed) for seed in (0, 1))
    for images in (one, other):
        assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05
        quarters = np.histogram2d(np.arange(size), images, bins=8)[0]
        assert np.abs(quarters / (size / 64) - 1).max() < 0.25
    assert np.mean(one == other) < 0.01


@pytest.mark.parametrize(("positions", "size"), [([5], 5), ([-1], 5), ([0], 0)])
def test_positions_outside_are_refused(positions, size):
    with pytest.raises(ValueError, match="not"):
        permute(np.array(positions), size, 0)
