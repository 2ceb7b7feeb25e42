"""The CPU backend: matrix products by torch, block by block as in ``reference``, and the row operations by
Numba.

One pass over a row steps it, chooses its exponents, rounds and encodes; the bytes are those of the twin. The
loops over features are written so that LLVM turns each into vector instructions.
"""

from functools import cache, partial

import numba
import numpy as np
import torch
from torch import Tensor

from elmo_kernels import reference
from elmo_kernels import rounding as rd
from elmo_kernels import rounding_numba as rn
from elmo_kernels.numba_jit import compiled
from elmo_kernels.reference import RowOps, Step, fp8_operand, topk_bytes, update_bytes  # noqa: F401 - a backend has them
from elmo_kernels.types import GROUP_FEATURES, ChunkWeights, Fp8Operand, Positives

_parallel = partial(compiled, parallel=True)
_ZERO, _INF, _INF_BITS = np.float32(0), np.float32(np.inf), np.uint32(rd.FP32_INF)
_LARGEST = np.float32(rd.FP8_MAX * 2.0**rd.MAX_EXPONENT)
_HALF = np.uint32(16)
_LARGEST_BITS = _LARGEST.view(np.uint32)

# Numba, where it starts, sets the number of threads of the OpenMP that it shares with torch.
_threads = torch.get_num_threads()
numba.set_num_threads(min(_threads, numba.config.NUMBA_NUM_THREADS))
torch.set_num_threads(_threads)


@_parallel
def _decode_bf16(data, out):  # pragma: no cover
    for row in numba.prange(data.shape[0]):
        for j in range(data.shape[1]):
            out[row, j] = rn.bf16_value(data[row, j])


@compiled
def _decode_group(out, code, exponent):  # pragma: no cover
    scale = rn.power_of_two(exponent)
    for j in range(len(out)):
        out[j] = rn.fp8_value(code[j]) * scale


@_parallel
def _decode_fp8(data, exponent, out):  # pragma: no cover
    for row in numba.prange(data.shape[0]):
        for group in range(exponent.shape[1]):
            begin = group * GROUP_FEATURES
            end = min(begin + GROUP_FEATURES, data.shape[1])
            _decode_group(out[row, begin:end], data[row, begin:end], exponent[row, group])


@compiled
def _step(v, w, comp, lr, keep):  # pragma: no cover
    """Over the gradient in ``v`` write the new values; returns the bits of the largest magnitude."""
    for j in range(len(v)):
        v[j] = keep * w[j] - lr * v[j]
    for j in range(len(comp)):
        v[j] += rn.bf16_value(comp[j])
    largest = np.uint32(0)
    for j in range(len(v)):
        largest = max(largest, rn.fp32_bits(abs(v[j])))
    return largest


@compiled
def _count_broken(v):  # pragma: no cover
    count = 0
    for j in range(len(v)):
        count += not rn.is_finite(v[j])
    return count


@compiled
def _keep_broken(v, w):  # pragma: no cover
    """Put back what is not finite; returns the bits of the largest magnitude and how many saturate."""
    largest, saturated = np.uint32(0), 0
    for j in range(len(v)):
        v[j] = v[j] if rn.is_finite(v[j]) else w[j]
        largest = max(largest, rn.fp32_bits(abs(v[j])))
        saturated += abs(v[j]) > _LARGEST
    return largest, saturated


@compiled
def _compensate(comp, v, new):  # pragma: no cover
    for j in range(len(comp)):
        lost = v[j] - new[j]
        comp[j] = rn.bf16_nearest(lost) if rn.is_finite(lost) else comp[j]


@compiled
def _encode_bf16(code, v, nearest, key, features):  # pragma: no cover
    if nearest:
        for j in range(len(v)):
            code[j] = rn.bf16_nearest(v[j])
    else:
        for j in range(len(v)):
            code[j] = rn.bf16_stochastic(v[j], rn.weight_bits(key, features[j]))


@compiled
def _encode_fp8(code, v, power, nearest, key, features):  # pragma: no cover
    scale = rn.power_of_two(-power)
    if nearest:
        for j in range(len(v)):
            code[j] = rn.fp8_nearest(v[j] * scale)
    else:
        for j in range(len(v)):
            code[j] = rn.fp8_stochastic(v[j] * scale, rn.weight_bits(key, features[j]))


@_parallel
def _update_bf16(data, w, u, comp, lr, keep, nearest, stream, first, features, bad):  # pragma: no cover
    for row in numba.prange(data.shape[0]):
        v, kahan = u[row], row < comp.shape[0]
        rest = comp[row] if kahan else comp.reshape(-1)[:0]
        if _step(v, w[row], rest, lr, keep) >= _INF_BITS:
            bad[row, 1] = _count_broken(v)
        _encode_bf16(data[row], v, nearest or kahan, rn.row_key(stream, first + row), features)
        if kahan:
            new = w[row]
            for j in range(len(v)):
                new[j] = rn.bf16_value(data[row, j])
            _compensate(rest, v, new)


@_parallel
def _update_fp8(data, exponent, w, u, comp, lr, keep, nearest, stream, first, features, bad):  # pragma: no cover
    for row in numba.prange(data.shape[0]):
        kahan, key = row < comp.shape[0], rn.row_key(stream, first + row)
        for group in range(exponent.shape[1]):
            begin = group * GROUP_FEATURES
            end = min(begin + GROUP_FEATURES, data.shape[1])
            v, old, code = u[row, begin:end], w[row, begin:end], data[row, begin:end]
            rest = comp[row, begin:end] if kahan else comp.reshape(-1)[:0]
            largest = _step(v, old, rest, lr, keep)
            if largest > _LARGEST_BITS:
                bad[row, 1] += _count_broken(v)
                largest, saturated = _keep_broken(v, old)
                bad[row, 0] += saturated
            power = rn.fp8_exponent(largest)
            exponent[row, group] = power
            _encode_fp8(code, v, power, nearest or kahan, key, features[begin:end])
            if kahan:
                _decode_group(old, code, power)
                _compensate(rest, v, old)


@_parallel
def _normal(out, stream, first, features):  # pragma: no cover
    dim = out.shape[1]
    for row in numba.prange(out.shape[0]):
        key, v = rn.row_key(stream, first + row), out[row]
        a, b, c, d = features[:dim], features[dim : 2 * dim], features[2 * dim : 3 * dim], features[3 * dim :]
        for j in range(len(v)):
            low = (rn.weight_bits(key, a[j]) >> _HALF) + (rn.weight_bits(key, b[j]) >> _HALF)
            high = (rn.weight_bits(key, c[j]) >> _HALF) + (rn.weight_bits(key, d[j]) >> _HALF)
            v[j] = np.float32(np.int32(low + high) - np.int32(2 * 0xFFFF))


@_parallel
def _merge(scores, ids, z, first):  # pragma: no cover
    last = scores.shape[1] - 1
    for instance in numba.prange(z.shape[0]):
        for j in range(z.shape[1]):
            # Adding zero makes -0.0 and 0.0, which are equal scores, one pattern.
            score, label = z[instance, j] + _ZERO, first + j
            if score < scores[instance, last]:
                continue
            if np.isnan(score):
                score = -_INF
            place = last + 1
            while place > 0 and (
                score > scores[instance, place - 1]
                or (score == scores[instance, place - 1] and not 0 <= ids[instance, place - 1] < label)
            ):
                place -= 1
            for k in range(last, place, -1):
                scores[instance, k] = scores[instance, k - 1]
                ids[instance, k] = ids[instance, k - 1]
            if place <= last:
                scores[instance, place] = score
                ids[instance, place] = label


def _patterns(tensor: Tensor) -> np.ndarray:
    """bfloat16 as its uint16 patterns, sharing memory."""
    return tensor.view(torch.uint16).numpy()


@cache
def _feature_keys(count: int) -> np.ndarray:
    return rd.feature_key(torch.arange(count)).to(torch.uint32).numpy()


def _decode(w: ChunkWeights, rows: slice, scratch: Tensor) -> Tensor:
    if w.fmt == "fp32":
        return reference.decode_rows(w, rows)
    if w.exponent_LG is None:
        _decode_bf16(_patterns(w.data_LD[rows]), scratch.numpy())
    else:
        _decode_fp8(w.data_LD[rows].numpy(), w.exponent_LG[rows].numpy(), scratch.numpy())
    return scratch


def _update(w: ChunkWeights, rows: slice, w_LD: Tensor, u_LD: Tensor, step: Step, rounding: str, flags: Tensor) -> None:
    if w.fmt == "fp32":
        reference.update_rows_(w, rows, w_LD, u_LD, step, rounding, flags)
        return
    none = torch.empty(0, w_LD.shape[1], dtype=torch.bfloat16)
    comp = _patterns(none if w.comp_HD is None else w.comp_HD[rows])
    lr, keep = np.float32(step.lr), np.float32(step.keep)
    bad = torch.zeros(w_LD.shape[0], 2, dtype=torch.int64)
    first, features = w.label_offset + rows.start, _feature_keys(w_LD.shape[1])
    rest = (comp, lr, keep, rounding == "nearest", step.stream, first, features, bad.numpy())
    if w.exponent_LG is None:
        _update_bf16(_patterns(w.data_LD[rows]), w_LD.numpy(), u_LD.numpy(), *rest)
    else:
        code_LD, exponent_LG = w.data_LD[rows].numpy(), w.exponent_LG[rows].numpy()
        _update_fp8(code_LD, exponent_LG, w_LD.numpy(), u_LD.numpy(), *rest)
    flags += bad.sum(0)


def _merge_(scores_BK: Tensor, ids_BK: Tensor, z_BL: Tensor, first_label: int) -> None:
    _merge(scores_BK.numpy(), ids_BK.numpy(), z_BL.numpy(), first_label)


def _normal_rows(w: ChunkWeights, rows: slice, stream: int) -> Tensor:
    dim = w.data_LD.shape[1]
    out_LD = torch.empty(rows.stop - rows.start, dim)
    _normal(out_LD.numpy(), stream, w.label_offset + rows.start, _feature_keys(4 * dim))
    return out_LD


ROWS = RowOps(decode=_decode, update_=_update, merge_=_merge_, normal=_normal_rows)


def logit_grad(
    w: ChunkWeights, x: Tensor | Fp8Operand, positives: Positives, *, loss: str, prior: float, want_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``elmo_kernels.logit_grad``."""
    return reference.logit_grad(w, x, positives, loss=loss, prior=prior, want_loss=want_loss, ops=ROWS)


def update_(
    w: ChunkWeights, g_LB: Tensor, x_BD: Tensor, dx_BD: Tensor, *, scalars: Tensor, rounding: str, flags: Tensor
) -> None:
    """See ``elmo_kernels.update_with_``."""
    reference.update_(w, g_LB, x_BD, dx_BD, scalars=scalars, rounding=rounding, flags=flags, ops=ROWS)


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor) -> None:
    """See ``elmo_kernels.topk_merge_``."""
    reference.topk_merge_(scores_BK, ids_BK, w, x_BD, ops=ROWS)
