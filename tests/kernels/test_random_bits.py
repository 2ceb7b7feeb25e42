"""Random bits are balanced, and neighbours in any direction know nothing of each other."""

import math

import pytest
import torch
from elmo_kernels import random_bits
from elmo_kernels import rounding as rd
from torch import Tensor

LABEL = torch.arange(1024) + 8_000_000
FEATURE = torch.arange(1024)
LAGS = (1, 2, 3, 4, 8, 16, 64, 256, 512)


def _bits(seed: int = 1, step: int = 1) -> Tensor:
    return random_bits(seed, step, LABEL, FEATURE)


def _excess(a: Tensor, b: Tensor) -> float:
    """Chi-square of the joint distribution of the top 6 bits, in standard deviations from its expectation.

    It sees any dependence between the two, of which a correlation is only the linear part.
    """
    cells = ((a >> 26) << 6 | (b >> 26)).flatten()
    expected = cells.numel() / 4096
    chi2 = ((torch.bincount(cells, minlength=4096) - expected) ** 2 / expected).sum().item()
    return abs(chi2 - 4095) / math.sqrt(2 * 4095)


def _correlation(a: Tensor, b: Tensor) -> float:
    """Correlation in standard errors."""
    pair = torch.stack([a.flatten(), b.flatten()]).double()
    return abs(torch.corrcoef(pair)[0, 1].item()) * math.sqrt(a.numel())


def _assert_independent(a: Tensor, b: Tensor) -> None:
    assert _excess(a, b) < 4.5
    assert _correlation(a, b) < 4.5


def test_each_bit_is_set_half_of_the_time() -> None:
    bits = _bits()
    for place in range(12, 32):
        share = ((bits >> place) & 1).double().mean().item()
        assert abs(share - 0.5) < 4.5 * 0.5 / math.sqrt(bits.numel()), place


@pytest.mark.parametrize("lag", LAGS)
def test_features_and_labels_at_any_distance_are_independent(lag: int) -> None:
    bits = _bits()
    _assert_independent(bits[:, :-lag], bits[:, lag:])
    _assert_independent(bits[:-lag], bits[lag:])
    _assert_independent(bits[:-lag, :-lag], bits[lag:, lag:])


@pytest.mark.parametrize("change", [1, 2, 64, 1 << 32])
def test_steps_and_seeds_at_any_distance_are_independent(change: int) -> None:
    bits = _bits()
    _assert_independent(bits, _bits(step=1 + change))
    _assert_independent(bits, _bits(seed=1 + change))
    _assert_independent(bits[1:], _bits(step=1 + change)[:-1])


def test_pairs_of_features_are_independent_over_a_million_rows() -> None:
    label = torch.arange(1 << 20)
    for first, second in ((0, 1), (3, 7), (0, 256), (511, 512)):
        pair = random_bits(2, 3, label, torch.tensor([first, second]))
        _assert_independent(pair[:, 0], pair[:, 1])


def test_the_bits_of_a_weight_do_not_depend_on_who_asks() -> None:
    bits = random_bits(-1, 1 << 62, LABEL, FEATURE)
    assert torch.equal(bits[100:200, 7:8], random_bits(-1, 1 << 62, LABEL[100:200], FEATURE[7:8]))
    assert torch.equal(bits, random_bits((1 << 64) - 1, 1 << 62, LABEL, FEATURE))


@pytest.mark.parametrize("share", [0.03, 0.25, 0.5, 0.9])
def test_whether_a_weight_is_rounded_up_tells_nothing_of_its_neighbours_or_its_next_step(share: float) -> None:
    between = torch.tensor([1 + share / 8])  # codes near 1 are 1/8 apart
    now, then = (rd.fp8_value(rd.fp8_stochastic(between, _bits(step=step))) > 1 for step in (1, 2))
    for a, b in ((now[:, :-1], now[:, 1:]), (now[:-1], now[1:]), (now, then)):
        assert _correlation(a, b) < 4
