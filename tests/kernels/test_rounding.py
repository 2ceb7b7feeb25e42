"""Rounding loses no update on average, and every backend rounds to the same bytes."""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import elmo_kernels as ek
import numba
import numpy as np
import pytest
import torch
from elmo_kernels import rounding as rd
from elmo_kernels import rounding_numba as rn
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
FINITE_CODES = torch.tensor([code for code in range(256) if code & 0x7F != rd.FP8_NAN_CODE])
RULES = ("bf16_stochastic", "bf16_nearest", "fp8_stochastic", "fp8_nearest", "fp8_value", "bits")


def _draws() -> Tensor:
    return ek.random_bits(7, 1, torch.arange(1024), torch.arange(1024)).flatten()


def _check_unbiased(
    encode: Callable[[Tensor, Tensor], Tensor], decode: Callable[[Tensor], Tensor], magnitudes: Tensor
) -> None:
    random = _draws()
    for v in magnitudes:
        codes = encode(v[None], random)
        ends = torch.stack([codes.min(), codes.max()])
        assert ends[1] - ends[0] <= 1, "only the two neighbours of a value may be drawn"
        (low, high), exact = decode(ends).double().tolist(), v.item()
        share = (exact - low) / (high - low) if high != low else 0.0
        assert 0 <= share <= 1
        drawn = (codes == ends[1]).double().mean().item() if high != low else 0.0
        assert abs(drawn - share) <= 4 * math.sqrt(share * (1 - share) / len(random)), exact


def test_stochastic_fp8_is_unbiased_from_tiny_to_the_largest_magnitude() -> None:
    magnitudes = torch.logspace(math.log2(2e-5), math.log2(447.0), 64, base=2)
    magnitudes[::2] *= -1
    _check_unbiased(rd.fp8_stochastic, rd.fp8_value, magnitudes)


def test_stochastic_bf16_is_unbiased_over_its_range() -> None:
    magnitudes = torch.logspace(-126, 126, 64, base=2)
    magnitudes[1::2] *= -1.2345
    _check_unbiased(rd.bf16_stochastic, rd.bf16_value, magnitudes)


def test_a_weight_that_fp8_can_hold_never_moves_by_itself() -> None:
    random = _draws()[: 1 << 14][:, None]
    v = rd.fp8_value(FINITE_CODES)
    assert (rd.fp8_stochastic(v, random) == FINITE_CODES).all()
    assert (rd.fp8_stochastic(v, torch.tensor([[0], [rd.MASK_32]])) == FINITE_CODES).all()
    assert (rd.fp8_nearest(v) == FINITE_CODES).all()


def test_fp8_codes_mean_what_the_rest_of_the_world_reads() -> None:
    codes = torch.arange(256)
    theirs = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(rd.fp8_value(codes).nan_to_num(nan=1e9), theirs.nan_to_num(nan=1e9))


def test_nearest_rounding_equals_the_framework_cast_where_that_is_right() -> None:
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(1 << 18, generator=generator) * 2.0 ** torch.randint(-14, 6, (1 << 18,), generator=generator)
    ties = (rd.fp8_value(FINITE_CODES)[:126] + rd.fp8_value(FINITE_CODES)[1:127]) / 2
    v = torch.cat([v, ties, -ties]).clamp(-448, 448)
    assert torch.equal(rd.fp8_nearest(v).to(torch.uint8), v.to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(rd.bf16_nearest(v).to(torch.int16), v.bfloat16().view(torch.int16))


def test_fp8_saturates_at_448_and_keeps_nan() -> None:
    v = torch.tensor([448.0, 1e4, torch.inf, -torch.inf, torch.nan])
    for code in (rd.fp8_nearest(v), rd.fp8_stochastic(v, torch.tensor(rd.MASK_32))):
        assert code[:4].tolist() == [0x7E, 0x7E, 0x7E, 0xFE]
        assert code[4].item() & 0x7F == rd.FP8_NAN_CODE


def test_the_largest_weight_of_a_group_always_fits_and_keeps_its_three_bits() -> None:
    largest = torch.logspace(-92.9, 13.9, 400, base=2)
    scaled = largest * rd.power_of_two(-rd.fp8_exponent(largest))
    assert (scaled >= 128).all() and (scaled < 256).all()
    assert (rd.fp8_exponent(torch.tensor([0.0, 1e-45, 3e38])) == torch.tensor([-100, -100, 6])).all()


def test_updates_far_below_a_quantum_add_up(cpu_backend: str) -> None:
    dim, labels, steps = 16, 64, 300
    w = ek.make_chunk("fp8", labels, dim, 0, seed=0, std=1.0)
    assert w.exponent_LG is not None
    w.data_LD.zero_()
    w.exponent_LG.zero_()
    g_LB, x_BD = torch.full((labels, 1), -9e-4), torch.ones(1, dim)
    flags = torch.zeros(2, dtype=torch.int64)
    for step in range(steps):
        ek.update_(
            w, g_LB, x_BD, torch.zeros(1, dim), lr=1.0, weight_decay=0.0, rounding="stochastic", seed=5, step=step,
            flags=flags,
        )  # fmt: skip
    values = ek.dequantize(w).double()
    assert abs(values.mean() - 0.270) < 3 * values.std() / math.sqrt(values.numel())
    assert flags.tolist() == [0, 0]


def _million_pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    n = 1 << 20
    random = torch.randint(0, 1 << 32, (n,), generator=generator)
    any_bits = torch.randint(0, 1 << 32, (n // 2,), generator=generator).to(torch.int32).view(torch.float32)
    in_range = torch.randn(n // 2, generator=generator) * 2.0 ** torch.randint(-14, 9, (n // 2,), generator=generator)
    v = torch.cat([any_bits, in_range])
    edges = [0.0, -0.0, 1e-45, -1e-45, 1.17549435e-38, 2.0**-6, 2.0**-9, 2.0**-10, 448.0, 464.0, 479.9, 480.0, 3.4e38]
    edges += [-edge for edge in edges] + [torch.inf, -torch.inf, torch.nan]
    v[: len(edges) * 64] = torch.tensor(edges).repeat(64)
    return v, random


def _twin(v: Tensor, random: Tensor) -> dict[str, Tensor]:
    place = torch.arange(len(v))
    return {
        "bf16_stochastic": rd.bf16_stochastic(v, random),
        "bf16_nearest": rd.bf16_nearest(v),
        "fp8_stochastic": rd.fp8_stochastic(v, random),
        "fp8_nearest": rd.fp8_nearest(v),
        "fp8_value": rd.fp32_bits(rd.fp8_value(random & 0xFF)),
        "bits": rd.weight_bits(rd.row_key(random, place), rd.feature_key(place)),
    }


@numba.njit
def _numba_rules(v, random, feature, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for i in range(len(v)):
        word = np.uint32(random[i])
        out[0, i] = rn.bf16_stochastic(v[i], word)
        out[1, i] = rn.bf16_nearest(v[i])
        out[2, i] = rn.fp8_stochastic(v[i], word)
        out[3, i] = rn.fp8_nearest(v[i])
        out[4, i] = rn.fp32_bits(rn.fp8_value(word & np.uint32(0xFF)))
        out[5, i] = rn.weight_bits(rn.row_key(random[i], i), feature[i])


def test_numba_rounds_a_million_pairs_to_the_bytes_of_the_twin() -> None:
    v, random = _million_pairs()
    feature = rd.feature_key(torch.arange(len(v))).to(torch.uint32).numpy()
    out = np.empty((len(RULES), len(v)), np.uint32)
    _numba_rules(v.numpy(), random.numpy(), feature, out)
    twin = _twin(v, random)
    for rule, code in zip(RULES, out, strict=True):
        assert np.array_equal(code, twin[rule].numpy()), rule


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux only")
def test_triton_rounds_a_million_pairs_to_the_bytes_of_the_twin(tmp_path: Path, run_python: Callable) -> None:
    # Kernels take care of other values where they are rare: tests/kernels/test_backends.py.
    v, random = _million_pairs()
    v = torch.where(v.isfinite(), v, 0.0)
    save_file({"v": v, "random": random}, tmp_path / "in.safetensors")
    done = run_python(
        HERE / "interpreted.py", "rounding", tmp_path / "in.safetensors", tmp_path / "out.safetensors",
        TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mine = load_file(tmp_path / "out.safetensors")
    twin, in_range = _twin(v, random), _twin(v.clamp(-rd.FP8_MAX, rd.FP8_MAX), random)
    no_nan = (random & 0x7F) != rd.FP8_NAN_CODE  # no weight has that code
    for rule in RULES:
        codes = (in_range if rule.startswith("fp8") else twin)[rule]
        keep = no_nan if rule == "fp8_value" else slice(None)
        assert torch.equal(mine[rule][keep], codes[keep]), rule
