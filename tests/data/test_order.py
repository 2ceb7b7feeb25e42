"""Every instance is trained once an epoch, in an order that any position can be resumed from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmo_stream.data.order import WINDOW_SHARDS, ShuffledOrder, StoredOrder, batch_permutation

SHARDS = [7, 1, 30, 12, 12, 5, 64, 3, 9]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_an_epoch_holds_every_instance_once(shards: list[int], seed: int, epoch: int) -> None:
    order = ShuffledOrder(shards, seed=seed, epoch=epoch)
    assert sorted(order.ids(0, len(order)).tolist()) == list(range(sum(shards)))


@pytest.mark.parametrize("piece", [1, 5, 17, 1000])
def test_any_position_gives_what_a_walk_would_have_given(piece: int) -> None:
    order = ShuffledOrder(SHARDS, seed=3, epoch=2)
    whole = order.ids(0, len(order))
    for start in reversed(range(0, len(order), piece)):
        fresh = ShuffledOrder(SHARDS, seed=3, epoch=2)
        assert np.array_equal(fresh.ids(start, start + piece), whole[start : start + piece])
    assert len(order.ids(len(order), len(order) + 5)) == 0


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(ShuffledOrder(SHARDS, seed=seed, epoch=epoch).ids(0, 143)) for seed in range(3) for epoch in range(3)
    }
    assert len(orders) == 9
    assert len({tuple(batch_permutation(16, seed=0, epoch=0, group=group)) for group in range(9)}) == 9


def test_neighbours_in_the_store_do_not_stay_neighbours() -> None:
    ids = ShuffledOrder([1000] * 8, seed=0, epoch=0).ids(0, 8000)
    assert np.mean(np.abs(np.diff(ids)) == 1) < 0.01


def test_the_order_never_changes_between_releases() -> None:
    assert ShuffledOrder([4, 3, 5], seed=1, epoch=2).ids(0, 12).tolist() == FROZEN_ORDER


FROZEN_ORDER = [10, 8, 0, 6, 3, 4, 1, 7, 5, 2, 9, 11]


def test_evaluation_reads_the_stored_order() -> None:
    order = StoredOrder(SHARDS, 5, 9)
    assert len(order) == 4
    assert order.ids(1, 10).tolist() == [6, 7, 8]


@pytest.mark.parametrize("order", [ShuffledOrder(SHARDS, seed=3, epoch=2), StoredOrder(SHARDS, 3, 140)])
def test_the_shards_of_a_position_are_known_before_its_instances(order: ShuffledOrder | StoredOrder) -> None:
    for start in range(0, len(order), 3):
        for stop in (start + 1, start + 20, 1000):
            touched = np.searchsorted(np.cumsum(SHARDS), order.ids(start, stop), side="right")
            named = order.shards(start, stop)
            assert set(touched.tolist()) <= named
            assert len(named) <= len(set(touched.tolist())) + 2 * (WINDOW_SHARDS - 1)
