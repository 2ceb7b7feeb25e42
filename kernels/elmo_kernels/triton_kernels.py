"""The Triton kernels. Correct and deterministic first: fixed tiles, fixed-order sums, atomics on integers
only.

Weights are read and written as integers (bf16 as int16 patterns, fp8 as uint8 codes). Offsets are 64-bit: a
chunk may hold more than 2**31 weights. ``DOT_FP32`` keeps FP32 operands in matrix products: for the fp32
format, and in the interpreter, whose bfloat16 arithmetic is wrong. Loops have compile-time bounds, which
every supported interpreter can run.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

import triton
import triton.language as tl

from elmo_kernels import rounding as rd
from elmo_kernels import rounding_triton as rt

_FP8_MAX, _TOP_BINADE = tl.constexpr(rd.FP8_MAX), tl.constexpr(rd.FP8_TOP_BINADE)
_MAX_EXPONENT = tl.constexpr(rd.MAX_EXPONENT)


@triton.jit
def _tile(axis: tl.constexpr, SIZE: tl.constexpr):  # pragma: no cover
    return tl.program_id(axis).to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def _weights(data_ptr, exponent_ptr, row, col, inside_row, D: tl.constexpr, FMT: tl.constexpr):  # pragma: no cover
    """FP32 weights of a tile; 0 outside."""
    mask = inside_row[:, None] & (col < D)[None, :]
    raw = tl.load(data_ptr + row[:, None] * D + col[None, :], mask=mask, other=0)
    if FMT == "fp8":
        exponent = tl.load(exponent_ptr + row, mask=inside_row, other=0).to(tl.int32)
        value = rt.fp8_value(raw.to(tl.uint32)) * rt.power_of_two(exponent)[:, None]
    elif FMT == "bf16":
        value = rt.bf16_value(raw.to(tl.uint16, bitcast=True).to(tl.uint32))
    else:
        value = raw
    return value


@triton.jit
def _compensation(comp_ptr, offset, mask):  # pragma: no cover
    raw = tl.load(comp_ptr + offset, mask=mask, other=0)
    return rt.bf16_value(raw.to(tl.uint16, bitcast=True).to(tl.uint32))


@triton.jit
def _pattern(code):  # pragma: no cover
    return code.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _random(stream, label, col):  # pragma: no cover
    return rt.weight_bits(rt.row_key(stream, label)[:, None], rt.feature_key(col)[None, :])


@triton.jit
def _dot(a, b, total, DOT_FP32: tl.constexpr):  # pragma: no cover
    if DOT_FP32:
        total = tl.dot(a, b, total, input_precision="ieee")
    else:
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    return total


@triton.jit
def _slope(z, LOSS: tl.constexpr):  # pragma: no cover
    if LOSS == "bce":
        slope = 1.0 / (1.0 + tl.exp(-z))
    elif LOSS == "squared_hinge":
        slope = 2.0 * tl.maximum(1.0 + z, 0.0)
    else:
        slope = z
    return slope


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
def logit_kernel(
    data_ptr, exponent_ptr, x_ptr, out_ptr, loss_ptr, prior, L, B,
    D: tl.constexpr, FMT: tl.constexpr, LOSS: tl.constexpr, WANT_LOSS: tl.constexpr, DOT_FP32: tl.constexpr,
    TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """out_LB: gradients as if all pairs were negatives; logits if ``LOSS`` is "none". loss: a sum a tile."""
    row, instance = _tile(0, TILE_L), _tile(1, TILE_B)
    z = tl.zeros((TILE_L, TILE_B), tl.float32)
    for start in range(0, D, TILE_D):
        col = start + tl.arange(0, TILE_D)
        w = _weights(data_ptr, exponent_ptr, row, col, row < L, D, FMT)
        inside_x = (col < D)[:, None] & (instance < B)[None, :]
        x = tl.load(x_ptr + instance[None, :] * D + col[:, None], mask=inside_x, other=0.0)
        z = _dot(w, x, z, DOT_FP32)
    z += prior
    inside = (row < L)[:, None] & (instance < B)[None, :]
    tl.store(out_ptr + row[:, None] * B + instance[None, :], _slope(z, LOSS), mask=inside)
    if WANT_LOSS:
        tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(loss_ptr + tile, tl.sum(tl.sum(tl.where(inside, _value(z, LOSS), 0.0), 1), 0))


@triton.jit
def positive_kernel(
    data_ptr, exponent_ptr, x_ptr, g_ptr, loss_ptr, label_ptr, instance_ptr, target_ptr,
    prior, label_offset, P, L, B,
    D: tl.constexpr, FMT: tl.constexpr, LOSS: tl.constexpr, WANT_LOSS: tl.constexpr, DOT_FP32: tl.constexpr,
    TILE_P: tl.constexpr, TILE_D: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """Write the gradients of positives over those of ``logit_kernel``; loss: the difference, a sum per tile.

    Their few logits are computed again, so the big kernel needs no search, and no position is read on the
    host.
    """
    place = _tile(0, TILE_P)
    row = tl.load(label_ptr + place, mask=place < P, other=-1) - label_offset
    inside = (place < P) & (row >= 0) & (row < L)
    instance = tl.load(instance_ptr + place, mask=inside, other=0)
    y = tl.load(target_ptr + place, mask=inside, other=0.0)
    z = tl.zeros((TILE_P,), tl.float32)
    for start in range(0, D, TILE_D):
        col = start + tl.arange(0, TILE_D)
        w = _weights(data_ptr, exponent_ptr, row, col, inside, D, FMT)
        mask = inside[:, None] & (col < D)[None, :]
        x = tl.load(x_ptr + instance[:, None] * D + col[None, :], mask=mask, other=0.0)
        if not DOT_FP32:
            x = x.to(tl.bfloat16).to(tl.float32)
        z += tl.sum(w * x, 1)
    z += prior
    g = (1.0 - y) * _slope(z, LOSS) - y * _slope(-z, LOSS)
    tl.store(g_ptr + row * B + instance, g, mask=inside)
    if WANT_LOSS:
        change = y * (_value(-z, LOSS) - _value(z, LOSS))
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.where(inside, change, 0.0), 0))


@triton.jit
def input_grad_kernel(
    data_ptr, exponent_ptr, g_ptr, partial_ptr, first_block, L, B,
    D: tl.constexpr, FMT: tl.constexpr, DOT_FP32: tl.constexpr, BLOCK: tl.constexpr,
    TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """partial_NBD: ``g^T W`` of each of N label blocks from ``first_block`` of the chunk on."""
    block = tl.program_id(0).to(tl.int64)
    instance, col = _tile(1, TILE_B), _tile(2, TILE_D)
    total = tl.zeros((TILE_B, TILE_D), tl.float32)
    for start in range(0, BLOCK, TILE_L):
        row = (block + first_block) * BLOCK + start + tl.arange(0, TILE_L)
        inside_g = (instance < B)[:, None] & (row < L)[None, :]
        g = tl.load(g_ptr + row[None, :] * B + instance[:, None], mask=inside_g, other=0.0)
        total = _dot(g, _weights(data_ptr, exponent_ptr, row, col, row < L, D, FMT), total, DOT_FP32)
    inside = (instance < B)[:, None] & (col < D)[None, :]
    tl.store(partial_ptr + (block * B + instance[:, None]) * D + col[None, :], total, mask=inside)


@triton.jit
def add_partials_kernel(dx_ptr, partial_ptr, size, N: tl.constexpr, TILE: tl.constexpr):  # pragma: no cover
    """``dx += partial[0] + ... + partial[N - 1]``, added in this order; size = B * D."""
    place = _tile(0, TILE)
    total = tl.load(dx_ptr + place, mask=place < size, other=0.0)
    for _ in range(N):
        total += tl.load(partial_ptr + place, mask=place < size, other=0.0)
        partial_ptr += size
    tl.store(dx_ptr + place, total, mask=place < size)


@triton.jit(do_not_specialize=["stream"])
def update_kernel(
    data_ptr, exponent_ptr, comp_ptr, top_ptr, g_ptr, x_ptr, flags_ptr,
    lr, decay, stream, label_offset, L, B, H,
    D: tl.constexpr, FMT: tl.constexpr, STOCHASTIC: tl.constexpr, DOT_FP32: tl.constexpr,
    TILES_B: tl.constexpr, TILE_L: tl.constexpr, TILE_B: tl.constexpr, TILE_D: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """Step, round and store a tile of weights; H rows have comp. top_L: the largest code of an fp8 row."""
    row, col = _tile(0, TILE_L), _tile(1, TILE_D)
    u = tl.zeros((TILE_L, TILE_D), tl.float32)
    for tile in range(TILES_B):
        instance = tile * TILE_B + tl.arange(0, TILE_B)
        inside_g = (row < L)[:, None] & (instance < B)[None, :]
        inside_x = (instance < B)[:, None] & (col < D)[None, :]
        g = tl.load(g_ptr + row[:, None] * B + instance[None, :], mask=inside_g, other=0.0)
        x = tl.load(x_ptr + instance[:, None] * D + col[None, :], mask=inside_x, other=0.0)
        u = _dot(g, x, u, DOT_FP32)
    w = _weights(data_ptr, exponent_ptr, row, col, row < L, D, FMT)
    v = w - lr * (u + decay * w)
    inside = (row < L)[:, None] & (col < D)[None, :]
    offset = row[:, None] * D + col[None, :]
    kahan = inside & (row < H)[:, None]
    if FMT == "fp32":
        broken = inside & (rt.is_finite(v) == 0)
        tl.store(data_ptr + offset, v, mask=inside)
    else:
        if comp_ptr is not None:
            v = tl.where(kahan, v + _compensation(comp_ptr, offset, kahan), v)
        random = _random(stream, row + label_offset, col)
        if FMT == "bf16":
            code = rt.bf16_nearest(v)
            if STOCHASTIC:
                code = tl.where(kahan, code, rt.bf16_stochastic(v, random))
            new = rt.bf16_value(code)
            broken = inside & (rt.is_finite(new) == 0)
            tl.store(data_ptr + offset, _pattern(code), mask=inside)
        else:
            exponent = tl.load(exponent_ptr + row, mask=row < L, other=0).to(tl.int32)
            scaled = v * rt.power_of_two(-exponent)[:, None]
            code = rt.fp8_nearest(scaled)
            if STOCHASTIC:
                code = tl.where(kahan, code, rt.fp8_stochastic(scaled, random))
            finite = rt.is_finite(v)
            broken = inside & (finite == 0)
            saturated = tl.sum(tl.sum((inside & finite & (tl.abs(scaled) > _FP8_MAX)).to(tl.int32), 1), 0)
            tl.atomic_add(flags_ptr, saturated.to(tl.int64), mask=saturated > 0)
            old = tl.load(data_ptr + offset, mask=inside, other=0).to(tl.uint32)
            code = tl.where(finite, code, old)
            new = rt.fp8_value(code) * rt.power_of_two(exponent)[:, None]
            tl.store(data_ptr + offset, code.to(tl.uint8), mask=inside)
            top = tl.max(tl.where(inside, code & 0x7F, 0).to(tl.int32), 1)
            tl.atomic_max(top_ptr + row, top, mask=row < L)
        if comp_ptr is not None:
            lost = v - new
            tl.store(comp_ptr + offset, _pattern(rt.bf16_nearest(lost)), mask=kahan & rt.is_finite(lost))
    count = tl.sum(tl.sum(broken.to(tl.int32), 1), 0)
    tl.atomic_add(flags_ptr + 1, count.to(tl.int64), mask=count > 0)


@triton.jit(do_not_specialize=["stream"])
def raise_exponent_kernel(
    data_ptr, exponent_ptr, comp_ptr, top_ptr, stream, label_offset, L, H,
    D: tl.constexpr, TILE_L: tl.constexpr, TILE_D: tl.constexpr,
):  # pragma: no cover  # fmt: skip
    """Halve the codes of fp8 rows that reached the top binade. Other rows are not read: it costs little."""
    row = _tile(0, TILE_L)
    exponent = tl.load(exponent_ptr + row, mask=row < L, other=0).to(tl.int32)
    top = tl.load(top_ptr + row, mask=row < L, other=0)
    full = (row < L) & (top >= _TOP_BINADE) & (exponent < _MAX_EXPONENT)
    for start in range(0, D, TILE_D):
        col = start + tl.arange(0, TILE_D)
        offset = row[:, None] * D + col[None, :]
        mask = full[:, None] & (col < D)[None, :]
        old = tl.load(data_ptr + offset, mask=mask, other=0).to(tl.uint32)
        code = rt.fp8_halve(old, _random(stream, row + label_offset, col))
        tl.store(data_ptr + offset, code.to(tl.uint8), mask=mask)
        if comp_ptr is not None:
            kahan = mask & (row < H)[:, None]
            before = rt.fp8_value(old) * rt.power_of_two(exponent)[:, None]
            after = rt.fp8_value(code) * rt.power_of_two(exponent + 1)[:, None]
            lost = _compensation(comp_ptr, offset, kahan) + (before - after)
            tl.store(comp_ptr + offset, _pattern(rt.bf16_nearest(lost)), mask=kahan)
    tl.debug_barrier()  # another warp may still have to read the exponents that this one replaces
    tl.store(exponent_ptr + row, (exponent + 1).to(tl.int8), mask=full)
