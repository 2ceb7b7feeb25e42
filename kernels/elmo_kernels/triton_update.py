"""The Triton kernels of an update: new weights and the gradient of the embeddings, in one pass where the batch
fits a tile, and the rare rows that rounding cannot take. Sums have a fixed order; atomics are on integers only.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from elmo_kernels import rounding_triton as rt
from elmo_kernels import triton_tiles as tt
from elmo_kernels import types

# A kernel moves its own pointers: Triton 3.6 passes no absent one through a call and back.
_BLOCK = tl.constexpr(types.BLOCK_LABELS)


@triton.jit
def _count(flag_ptr, which):  # pragma: no cover
    tl.atomic_add(flag_ptr, tl.sum(which.to(tl.int32)).to(tl.int64))


@triton.jit
def _new_weights(
    data_ptr, exponent_ptr, comp_ptr, g_ptr, x_ptr, x, total, keep, lr, row, inside_row, head, first_col, B,
    D: tl.constexpr, FMT: tl.constexpr, DOT_FP32: tl.constexpr, FUSED: tl.constexpr, CHAINED: tl.constexpr,
    TILES_B: tl.constexpr, TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr, EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """New and old FP32 weights of a tile, dealt, and with ``FUSED`` ``total + g^T W``; x is the first batch tile."""
    instance = tl.arange(0, TILE_B)
    g = tt.load(g_ptr + row[:, None] * B + instance[None, :], inside_row[:, None] & (instance < B)[None, :], EVEN)
    u = tt.dot(g, x, tl.zeros((TILE_L, TILE_D), tl.float32), DOT_FP32)
    for tile in range(1, TILES_B):
        i = tile * TILE_B + instance
        g_tile = tt.load(g_ptr + row[:, None] * B + i[None, :], inside_row[:, None] & (i < B)[None, :], EVEN)
        x_tile = tt.operand_tile(x_ptr, i, i < B, first_col, D, TILE_D, EVEN)
        u = tt.dot(g_tile, tt.dealt(x_tile, TILE_B, TILE_D), u, DOT_FP32)
    w = tt.weights(data_ptr, exponent_ptr, row, inside_row, first_col, D, FMT, TILE_L, TILE_D, EVEN, True)
    if FUSED:
        if CHAINED:
            # It is w. That u takes part gives w the layout of u, so the weights are decoded once, not twice.
            w = tl.inline_asm_elementwise("mov.f32 $0, $1;", "=f,f,f", [w, u], tl.float32, is_pure=True, pack=1)
        total = tt.dot(tl.trans(g), w, total, DOT_FP32)
    v = keep * w - lr * u
    if comp_ptr is not None:
        col = first_col + tl.arange(0, TILE_D)
        kahan = (inside_row & (row < head))[:, None] & (col < D)[None, :]
        comp = tl.load(comp_ptr + row[:, None] * D + col[None, :], mask=kahan, other=0)
        v += tt.bf16_pattern_value(tt.dealt(comp, TILE_L, TILE_D))
    return v, w, total


@triton.jit
def _store(
    data_ptr, exponent_ptr, comp_ptr, feature_ptr, v, rounded, largest, stream, label, row, wanted, head, first_col,
    D: tl.constexpr, FMT: tl.constexpr, STOCHASTIC: tl.constexpr, DOT_FP32: tl.constexpr, TILE_L: tl.constexpr,
    TILE_D: tl.constexpr, EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """Round a tile of new weights to the format and store the wanted rows.

    ``rounded`` is ``v`` without what rounding cannot take, ``largest`` its largest magnitude in each row.
    """
    col = first_col + tl.arange(0, TILE_D)
    place = row[:, None] * D + col[None, :]
    inside = wanted[:, None] if EVEN else wanted[:, None] & (col < D)[None, :]
    kahan_row = (row < head)[:, None]
    if FMT != "fp32" and STOCHASTIC:
        # A load, for keys that are made once stay in registers, which are full.
        feature = tl.load(feature_ptr + col, mask=col < D, other=0).to(tl.uint32, bitcast=True)[None, :]
        random = rt.weight_bits(rt.row_key(stream, label)[:, None], tt.dealt(feature, 1, TILE_D))
    if FMT == "fp8":
        exponent = rt.fp8_exponent(largest)
        if STOCHASTIC:
            placed = rt.fp8_stochastic(rounded * rt.power_of_two(-exponent + rt.FP8_SHIFT)[:, None], random)
        if comp_ptr is not None or not STOCHASTIC:
            nearest = rt.fp8_nearest(rounded * rt.power_of_two(-exponent)[:, None])
            placed = tl.where(kahan_row, nearest, placed) if STOCHASTIC else nearest
        new = rt.fp8_kept(placed) * rt.power_of_two(exponent - rt.FP8_SHIFT)[:, None]
        code = rt.fp8_code(placed, not DOT_FP32)
        tl.store(tt.exponent_place(exponent_ptr, row, first_col, D), exponent.to(tl.int8), mask=wanted)
    elif FMT == "bf16":
        if STOCHASTIC:
            code = rt.bf16_stochastic(rounded, random)
        if comp_ptr is not None or not STOCHASTIC:
            nearest = rt.bf16_nearest(rounded)
            code = tl.where(kahan_row, nearest, code) if STOCHASTIC else nearest
        new = rt.bf16_value(code)
        code = tt.bf16_pattern(code)
    else:
        code = v
    tl.store(data_ptr + place, tt.undealt(code, TILE_L, TILE_D), mask=inside)
    if comp_ptr is not None:
        # Kahan's sum: keep what rounding took; where that is not finite, keep the old.
        lost = tt.undealt(v - new, TILE_L, TILE_D)
        kept = inside & kahan_row & rt.is_finite(lost)
        tl.store(comp_ptr + place, tt.bf16_pattern(rt.bf16_nearest(lost)), mask=kept)


@triton.jit
def _scalars(scalars_ptr):  # pragma: no cover
    """(key of the random stream, learning rate, what decay keeps of a weight)."""
    lr = rt.fp32_value(tl.load(scalars_ptr + 1).to(tl.uint32))
    keep = rt.fp32_value(tl.load(scalars_ptr + 2).to(tl.uint32))
    return tl.load(scalars_ptr), lr, keep


@triton.jit
def _trains(scalars_ptr):  # pragma: no cover
    """Whether the learning rate is not 0."""
    return tl.load(scalars_ptr + 1) != 0


@triton.jit
def update_kernel(
    data_ptr, exponent_ptr, comp_ptr, g_ptr, x_ptr, partial_ptr, scalars_ptr, skipped_ptr, feature_ptr,
    label_offset, L, B, H,
    D: tl.constexpr, FMT: tl.constexpr, STOCHASTIC: tl.constexpr, DOT_FP32: tl.constexpr, FUSED: tl.constexpr,
    CHAINED: tl.constexpr, TILES_B: tl.constexpr, TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr,
    EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """Step, round and store one group of features of a label block; the first H rows of the chunk have comp.

    ``FUSED``, where one batch tile holds the batch: also partial_NBD, ``g^T W`` of the block with the weights from
    before.

    A weight costs no test. A row that holds what is not finite or saturates, seen by its largest magnitude, is
    left as it was and marked in skipped, 1,024 int8 a program, for ``mend_kernel``.
    """
    limit: tl.constexpr = rt.LARGEST_BITS if FMT == "fp8" else rt.INF_BITS - 1
    groups: tl.constexpr = (D + TILE_D - 1) // TILE_D
    block, first_col = tl.program_id(0) // groups, tl.program_id(0) % groups * TILE_D
    first = block * _BLOCK
    data_ptr += first.to(tl.int64) * D
    g_ptr += first.to(tl.int64) * B
    if FMT == "fp8":
        exponent_ptr += first.to(tl.int64) * groups
    if comp_ptr is not None:
        comp_ptr += first.to(tl.int64) * D
    stream, lr, keep = _scalars(scalars_ptr)
    instance = tl.arange(0, TILE_B)
    x = tt.dealt(tt.operand_tile(x_ptr, instance, instance < B, first_col, D, TILE_D, EVEN), TILE_B, TILE_D)
    total = tl.zeros((TILE_B, TILE_D), tl.float32)
    for start in range(0, _BLOCK, TILE_L):
        row = start + tl.arange(0, TILE_L)
        inside_row = row < L - first
        v, _, total = _new_weights(
            data_ptr, exponent_ptr, comp_ptr, g_ptr, x_ptr, x, total, keep, lr, row, inside_row, H - first, first_col,
            B, D, FMT, DOT_FP32, FUSED, CHAINED and not DOT_FP32, TILES_B, TILE_L, TILE_B, TILE_D, EVEN,
        )  # fmt: skip
        largest = tl.max(rt.magnitude_bits(v), 1)
        tl.store(skipped_ptr + tl.program_id(0) * _BLOCK + row, (largest > limit).to(tl.int8))
        # A load each time: registers are full.
        trains = _trains(scalars_ptr)
        wanted = (largest <= limit) & trains if EVEN else inside_row & (largest <= limit) & trains
        _store(
            data_ptr, exponent_ptr, comp_ptr, feature_ptr, v, v, largest, stream, label_offset + (first + row), row,
            wanted, H - first, first_col, D, FMT, STOCHASTIC, DOT_FP32, TILE_L, TILE_D, EVEN,
        )  # fmt: skip
    if FUSED:
        col = first_col + tl.arange(0, TILE_D)
        place = partial_ptr + (block.to(tl.int64) * B + instance[:, None]) * D + col[None, :]
        tt.store(place, tt.undealt(total, TILE_B, TILE_D), (instance < B)[:, None] & (col < D)[None, :], EVEN)


@triton.jit
def mend_kernel(
    data_ptr, exponent_ptr, comp_ptr, g_ptr, x_ptr, scalars_ptr, skipped_ptr, flags_ptr, feature_ptr,
    label_offset, L, B, H,
    D: tl.constexpr, FMT: tl.constexpr, STOCHASTIC: tl.constexpr, DOT_FP32: tl.constexpr,
    TILES_B: tl.constexpr, TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """Update the rows of one group of features of a label block that ``update_kernel`` skipped; mostly none.

    They still have their old weights. What is not finite and what saturates is counted here.
    """
    groups: tl.constexpr = (D + TILE_D - 1) // TILE_D
    block, first_col = tl.program_id(0) // groups, tl.program_id(0) % groups * TILE_D
    first = block * _BLOCK
    skipped_ptr += tl.program_id(0) * _BLOCK
    if (tl.max(tl.load(skipped_ptr + tl.arange(0, _BLOCK)).to(tl.int32), 0) > 0) & _trains(scalars_ptr):
        data_ptr += first.to(tl.int64) * D
        g_ptr += first.to(tl.int64) * B
        if FMT == "fp8":
            exponent_ptr += first.to(tl.int64) * groups
        if comp_ptr is not None:
            comp_ptr += first.to(tl.int64) * D
        stream, lr, keep = _scalars(scalars_ptr)
        instance = tl.arange(0, TILE_B)
        x = tt.dealt(tt.operand_tile(x_ptr, instance, instance < B, first_col, D, TILE_D, False), TILE_B, TILE_D)
        for start in range(0, _BLOCK, TILE_L):
            row = start + tl.arange(0, TILE_L)
            inside_row = row < L - first
            wanted = inside_row & (tl.load(skipped_ptr + row) != 0)
            v, w, _ = _new_weights(
                data_ptr, exponent_ptr, comp_ptr, g_ptr, x_ptr, x, 0, keep, lr, row, inside_row, H - first, first_col,
                B, D, FMT, DOT_FP32, False, False, TILES_B, TILE_L, TILE_B, TILE_D, False,
            )  # fmt: skip
            finite = rt.is_finite(v)
            # Infinity times the zeros outside is NaN.
            inside = wanted[:, None] & tt.dealt((first_col + tl.arange(0, TILE_D) < D)[None, :], 1, TILE_D)
            _count(flags_ptr + 1, inside & (finite == 0))
            rounded = v
            if FMT == "fp8":
                v = tl.where(finite, v, w)
                rounded = rt.mend_fp8(v)
                _count(flags_ptr, inside & (rounded != v))
            elif FMT == "bf16":
                rounded = rt.mend_bf16(v)
            largest = tl.max(rt.magnitude_bits(rounded), 1)
            _store(
                data_ptr, exponent_ptr, comp_ptr, feature_ptr, v, rounded, largest, stream,
                label_offset + (first + row), row, wanted, H - first, first_col,
                D, FMT, STOCHASTIC, DOT_FP32, TILE_L, TILE_D, False,
            )  # fmt: skip


@triton.jit
def input_grad_kernel(
    data_ptr, exponent_ptr, g_ptr, partial_ptr, L, B,
    D: tl.constexpr, FMT: tl.constexpr, DOT_FP32: tl.constexpr,
    TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr, EVEN: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """partial_NBD: ``g^T W`` of each of N label blocks of the chunk."""
    groups: tl.constexpr = (D + TILE_D - 1) // TILE_D
    block, first_col = tl.program_id(0) // groups, tl.program_id(0) % groups * TILE_D
    first = block * _BLOCK
    data_ptr += first.to(tl.int64) * D
    g_ptr += first.to(tl.int64) * B
    if FMT == "fp8":
        exponent_ptr += first.to(tl.int64) * groups
    instance, col = tl.program_id(1) * TILE_B + tl.arange(0, TILE_B), first_col + tl.arange(0, TILE_D)
    total = tl.zeros((TILE_B, TILE_D), tl.float32)
    for start in range(0, _BLOCK, TILE_L):
        row = start + tl.arange(0, TILE_L)
        inside_row = row < L - first
        g = tt.load(g_ptr + row[:, None] * B + instance[None, :], inside_row[:, None] & (instance < B)[None, :], EVEN)
        w = tt.weights(data_ptr, exponent_ptr, row, inside_row, first_col, D, FMT, TILE_L, TILE_D, EVEN)
        total = tt.dot(tl.trans(g), w, total, DOT_FP32)
    place = partial_ptr + (block.to(tl.int64) * B + instance[:, None]) * D + col[None, :]
    tt.store(place, total, (instance < B)[:, None] & (col < D)[None, :], EVEN)


@triton.jit
def add_partials_kernel(dx_ptr, partial_ptr, size, N: tl.constexpr, TILE: tl.constexpr):  # pragma: no cover
    """``dx += partial[0] + ... + partial[N - 1]``, added in this order; size = B * D."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = place < size
    total = tl.load(dx_ptr + place, mask=inside, other=0.0)
    for _ in tl.range(N, loop_unroll_factor=8):  # so that eight loads are under way at a time
        total += tl.load(partial_ptr + place, mask=inside, other=0.0)
        partial_ptr += size
    tl.store(dx_ptr + place, total, mask=inside)
