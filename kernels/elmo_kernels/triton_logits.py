"""The Triton kernels of the logits: gradients of the loss, and candidates of the top-k."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from elmo_kernels import rounding_triton as rt
from elmo_kernels import triton_tiles as tt

NO_LABEL = tl.constexpr(0xFFFFFFFF)
NOTHING = tl.constexpr(-(2**63) + 1)
"""Sorts behind every key, and its negative is an int64 too."""


@triton.jit
def _slope(z, LOSS: tl.constexpr):  # pragma: no cover
    return 1.0 / (1.0 + tl.exp(-z)) if LOSS == "bce" else 2.0 * tl.maximum(1.0 + z, 0.0)


@triton.jit
def _value(z, LOSS: tl.constexpr):  # pragma: no cover
    if LOSS == "bce":
        small = tl.exp(-tl.abs(z))
        u = 1.0 + small
        # log(1 + small) with the rounding error of 1 + small divided out, since most negatives have a tiny
        # loss.
        log1p = tl.where(u == 1.0, small, tl.log(u) * (small / tl.where(u == 1.0, 1.0, u - 1.0)))
        value = tl.maximum(z, 0.0) + log1p
    else:
        hinge = tl.maximum(1.0 + z, 0.0)
        value = hinge * hinge
    return value


@triton.jit
def _logits(
    data_ptr, exponent_ptr, x_ptr, first, L, B,
    D: tl.constexpr, FMT: tl.constexpr, DOT_FP32: tl.constexpr,
    TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr, EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """z_LB ``= W x`` in FP32 of a tile whose first row is ``first``; 0 where a row or an instance does not exist."""
    data_ptr += first * D
    if FMT == "fp8":
        exponent_ptr += first * ((D + tt.GROUP - 1) // tt.GROUP)
    row, instance = tl.arange(0, TILE_L), tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    z = tl.zeros((TILE_L, TILE_B), tl.float32)
    for start in range(0, D, TILE_D):
        col = start + tl.arange(0, TILE_D)
        w = tt.weights(data_ptr, exponent_ptr, row, row < L - first, start, D, FMT, TILE_L, TILE_D, EVEN)
        inside_x = (col < D)[:, None] & (instance < B)[None, :]
        x = tt.load(x_ptr + instance[None, :] * D + col[:, None], inside_x, EVEN)
        z = tt.dot(w, x, z, DOT_FP32)
    return z


@triton.jit
def _fp8_logits(
    data_ptr, exponent_ptr, code_ptr, instance_exponent_ptr, first, L, B, D: tl.constexpr, DOT_FP32: tl.constexpr,
    TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr, EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """As ``_logits``, with the codes of weights and embeddings as operands; scaled in FP32, by powers of two."""
    data_ptr += first * D
    exponent_ptr += first * ((D + tt.GROUP - 1) // tt.GROUP)
    row, instance = tl.arange(0, TILE_L), tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    inside_row, inside_b = row < L - first, instance < B
    z = tl.zeros((TILE_L, TILE_B), tl.float32)
    for start in range(0, D, TILE_D):
        col = start + tl.arange(0, TILE_D)
        w = tt.load(data_ptr + row[:, None] * D + col[None, :], inside_row[:, None] & (col < D)[None, :], EVEN)
        x = tt.load(code_ptr + instance[None, :] * D + col[:, None], (col < D)[:, None] & inside_b[None, :], EVEN)
        exponent = tt.load(tt.exponent_place(exponent_ptr, row, start, D), inside_row, EVEN).to(tl.int32)
        z += tt.fp8_dot(w, x, DOT_FP32) * rt.power_of_two(exponent)[:, None]
    return z * rt.power_of_two(tt.load(instance_exponent_ptr + instance, inside_b, EVEN).to(tl.int32))[None, :]


@triton.jit
def fp8_operand_kernel(
    x_ptr, value_ptr, code_ptr, exponent_ptr, D: tl.constexpr, TILE: tl.constexpr
):  # pragma: no cover
    """Round an instance to E4M3; TILE holds its features."""
    instance, col = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    place, inside = instance * D + col, col < D
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    is_number = x == x
    x = rt.mend_fp8(tl.where(is_number, x, 0.0))
    exponent = rt.fp8_exponent(tl.max(rt.magnitude_bits(x), 0))
    placed = rt.fp8_nearest(x * rt.power_of_two(-exponent))
    value = rt.fp8_kept(placed) * rt.power_of_two(exponent - rt.FP8_SHIFT)
    tl.store(value_ptr + place, tl.where(is_number, value, float("nan")), mask=inside)
    tl.store(code_ptr + place, tl.where(is_number, rt.fp8_code(placed, False), 0x7F).to(tl.uint8), mask=inside)
    tl.store(exponent_ptr + instance, exponent.to(tl.int8))


@triton.jit
def slope_kernel(
    data_ptr, exponent_ptr, x_ptr, instance_exponent_ptr, g_ptr, loss_ptr, prior, L, B,
    D: tl.constexpr, FMT: tl.constexpr, LOSS: tl.constexpr, WANT_LOSS: tl.constexpr, DOT_FP32: tl.constexpr,
    TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr, EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """g_LB: gradients as if all pairs were negatives. loss: the sum of a tile.

    With instance_exponent, x are codes of E4M3, as the weights are.
    """
    first = tl.program_id(0).to(tl.int64) * TILE_L
    if instance_exponent_ptr is not None:
        z = _fp8_logits(
            data_ptr, exponent_ptr, x_ptr, instance_exponent_ptr, first, L, B, D, DOT_FP32,
            TILE_L, TILE_B, TILE_D, EVEN,
        )  # fmt: skip
    else:
        z = _logits(data_ptr, exponent_ptr, x_ptr, first, L, B, D, FMT, DOT_FP32, TILE_L, TILE_B, TILE_D, EVEN)
    z += prior
    row, instance = tl.arange(0, TILE_L), tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    inside = (row < L - first)[:, None] & (instance < B)[None, :]
    tt.store(g_ptr + first * B + row[:, None] * B + instance[None, :], _slope(z, LOSS), inside, EVEN)
    if WANT_LOSS:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(loss_ptr + tile, tl.sum(tl.where(inside, _value(z, LOSS), 0.0)))


@triton.jit
def positive_kernel(
    data_ptr, exponent_ptr, x_ptr, g_ptr, loss_ptr, label_ptr, instance_ptr, target_ptr,
    prior, label_offset, P, L, B,
    D: tl.constexpr, FMT: tl.constexpr, DOT_FP32: tl.constexpr, LOSS: tl.constexpr, WANT_LOSS: tl.constexpr,
    TILE_P: tl.constexpr, TILE_D: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """Write the gradients of positives over those of ``slope_kernel``; loss: the difference, a sum per tile.

    Their few logits are computed again, so the big kernel needs no search, and no position is read on the
    host.
    """
    place = tl.program_id(0) * TILE_P + tl.arange(0, TILE_P)
    row = tl.load(label_ptr + place, mask=place < P, other=-1) - label_offset
    inside = (place < P) & (row >= 0) & (row < L)
    change = tl.zeros((TILE_P,), tl.float32)
    if tl.max(inside.to(tl.int32), 0) > 0:
        instance = tl.load(instance_ptr + place, mask=inside, other=0)
        y = tl.load(target_ptr + place, mask=inside, other=0.0)
        z = tl.zeros((TILE_P,), tl.float32)
        for start in range(0, D, TILE_D):
            col = start + tl.arange(0, TILE_D)
            w = tt.weights(data_ptr, exponent_ptr, row, inside, start, D, FMT, TILE_P, TILE_D, False)
            mask = inside[:, None] & (col < D)[None, :]
            x = tl.load(x_ptr + instance[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
            z += tl.sum(w * x, 1)
        z += prior
        g = (1.0 - y) * _slope(z, LOSS) - y * _slope(-z, LOSS)
        tl.store(g_ptr + row * B + instance, g, mask=inside)
        if WANT_LOSS:
            change = tl.where(inside, y * (_value(-z, LOSS) - _value(z, LOSS)), 0.0)
    if WANT_LOSS:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(change, 0))


@triton.jit
def candidate_kernel(
    data_ptr, exponent_ptr, x_ptr, scores_ptr, ids_ptr, key_ptr, count_ptr, label_offset, L, B, K, LABELS,
    D: tl.constexpr, FMT: tl.constexpr, DOT_FP32: tl.constexpr,
    TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr, EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """key_BL: the sort keys of the labels that beat the K-th of the running top-k, in any order; count_B of them.

    LABELS: columns of key_BL.
    """
    first = tl.program_id(0).to(tl.int64) * TILE_L
    z = _logits(data_ptr, exponent_ptr, x_ptr, first, L, B, D, FMT, DOT_FP32, TILE_L, TILE_B, TILE_D, EVEN)
    z = tl.where(z == z, z, float("-inf"))
    row, instance = tl.arange(0, TILE_L), tl.program_id(1) * TILE_B + tl.arange(0, TILE_B)
    inside_b = instance < B
    last = instance.to(tl.int64) * K + K - 1
    worst = tl.load(scores_ptr + last, mask=inside_b, other=float("inf"))[None, :]
    worst_id = tl.load(ids_ptr + last, mask=inside_b, other=0) & NO_LABEL
    label = (label_offset + first + row)[:, None]
    better = (z > worst) | ((z == worst) & (label < worst_id[None, :]))
    better = better & (row < L - first)[:, None] & inside_b[None, :]
    place = tl.atomic_add(count_ptr + instance[None, :] + row[:, None] * 0, 1, mask=better, sem="relaxed")
    tl.store(key_ptr + instance.to(tl.int64)[None, :] * LABELS + place, sort_key(z, label), mask=better)


@triton.jit
def sort_key(score, label):  # pragma: no cover
    """An int64 that sorts by score, then by lower label; -1 is the last label. Scores are no NaN."""
    # Adding zero makes -0.0 and 0.0 one pattern, which are equal scores.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) + (NO_LABEL - (label & NO_LABEL))


@triton.jit
def _sort_descending(key, FIRST: tl.constexpr, STAGES: tl.constexpr):  # pragma: no cover
    """Bitonic sort (Batcher, 1968) of 2**STAGES keys from stage FIRST on: 1, or STAGES for bitonic keys."""
    place = tl.arange(0, 1 << STAGES)
    for stage in tl.static_range(FIRST, STAGES + 1):
        for step in tl.static_range(stage):
            pairs = tl.reshape(key, (1 << (STAGES - stage + step), 2, 1 << (stage - 1 - step)))
            other = tl.reshape(tl.sum(pairs, 1, keep_dims=True) - pairs, (1 << STAGES,))
            wants_larger = ((place & (1 << (stage - 1 - step))) == 0) == ((place & (1 << stage)) == 0)
            key = tl.where(wants_larger, tl.maximum(key, other), tl.minimum(key, other))
    return key


@triton.jit
def merge_kernel(
    scores_ptr, ids_ptr, key_ptr, count_ptr, LABELS, K, TILE_K: tl.constexpr, STAGES: tl.constexpr
):  # pragma: no cover
    """Merge the candidates of an instance into its running top-k of K <= TILE_K = 2**STAGES, best first."""
    instance = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, TILE_K)
    inside = place < K
    scores_ptr += instance * K
    ids_ptr += instance * K
    score = tl.load(scores_ptr + place, mask=inside, other=0.0)
    best = tl.where(inside, sort_key(score, tl.load(ids_ptr + place, mask=inside, other=-1)), NOTHING)
    count = tl.load(count_ptr + instance)
    start = count * 0
    while start < count:
        key = tl.load(key_ptr + instance * LABELS + start + place, mask=start + place < count, other=NOTHING)
        # One ascends and the other descends, so the larger of each pair are the best of both, and bitonic.
        best = _sort_descending(tl.maximum(-_sort_descending(-key, 1, STAGES), best), STAGES, STAGES)
        start += TILE_K
    ordered = (best >> 32).to(tl.int32)
    score = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    label = NO_LABEL - (best & NO_LABEL)
    tl.store(scores_ptr + place, score, mask=inside)
    tl.store(ids_ptr + place, tl.where(label == NO_LABEL, -1, label), mask=inside)
