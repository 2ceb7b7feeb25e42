"""The CPU backend: matrix products by torch, block by block as in ``reference``, and the row operations by
Numba.

One pass over a row steps, rounds, encodes and, where needed, raises its exponent; the bytes are those of the
twin.
"""

from functools import partial

import numba
import numpy as np
import torch
from torch import Tensor

from elmo_kernels import reference
from elmo_kernels import rounding as rd
from elmo_kernels import rounding_numba as rn
from elmo_kernels.numba_jit import compiled
from elmo_kernels.reference import RowOps, Step
from elmo_kernels.types import ChunkWeights, Positives

_parallel = partial(compiled, parallel=True)
_ZERO, _INF = np.float32(0), np.float32(np.inf)
_FP8_MAX, _TOP_BINADE, _MAX_EXPONENT = np.float32(rd.FP8_MAX), np.uint32(rd.FP8_TOP_BINADE), rd.MAX_EXPONENT

numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


@_parallel
def _decode_bf16(data, out):  # pragma: no cover
    for row in numba.prange(data.shape[0]):
        for j in range(data.shape[1]):
            out[row, j] = rn.bf16_value(data[row, j])


@_parallel
def _decode_fp8(data, exponent, out):  # pragma: no cover
    values = np.empty(256, np.float32)
    for code in range(256):
        values[code] = rn.fp8_value(np.uint32(code))
    for row in numba.prange(data.shape[0]):
        scale = rn.power_of_two(exponent[row])
        for j in range(data.shape[1]):
            out[row, j] = values[data[row, j]] * scale


@_parallel
def _update_bf16(data, w, u, comp, lr, decay, stochastic, stream, first, features, bad):  # pragma: no cover
    for row in numba.prange(data.shape[0]):
        key = rn.row_key(stream, first + row)
        kahan = row < comp.shape[0]
        count = 0
        for j in range(data.shape[1]):
            v = w[row, j] - lr * (u[row, j] + decay * w[row, j])
            if kahan:
                v = v + rn.bf16_value(comp[row, j])
            if stochastic and not kahan:
                code = rn.bf16_stochastic(v, rn.weight_bits(key, features[j]))
            else:
                code = rn.bf16_nearest(v)
            new = rn.bf16_value(code)
            count += not rn.is_finite(new)
            data[row, j] = code
            if kahan and rn.is_finite(v - new):
                comp[row, j] = rn.bf16_nearest(v - new)
        bad[row, 1] = count


@_parallel
def _update_fp8(
    data, exponent, w, u, comp, lr, decay, stochastic, stream, first, features, bad
):  # pragma: no cover  # fmt: skip
    for row in numba.prange(data.shape[0]):
        key = rn.row_key(stream, first + row)
        kahan = row < comp.shape[0]
        scale, inverse = rn.power_of_two(exponent[row]), rn.power_of_two(-exponent[row])
        saturated, broken, largest = 0, 0, np.uint32(0)
        for j in range(data.shape[1]):
            v = w[row, j] - lr * (u[row, j] + decay * w[row, j])
            if kahan:
                v = v + rn.bf16_value(comp[row, j])
            scaled = v * inverse
            if stochastic and not kahan:
                code = rn.fp8_stochastic(scaled, rn.weight_bits(key, features[j]))
            else:
                code = rn.fp8_nearest(scaled)
            finite = rn.is_finite(v)
            saturated += finite and abs(scaled) > _FP8_MAX
            broken += not finite
            code = code if finite else np.uint32(data[row, j])
            data[row, j] = code
            largest = max(largest, np.uint32(code & np.uint32(0x7F)))
            if kahan:
                lost = v - rn.fp8_value(code) * scale
                if rn.is_finite(lost):
                    comp[row, j] = rn.bf16_nearest(lost)
        bad[row, 0] = saturated
        bad[row, 1] = broken
        if largest >= _TOP_BINADE and exponent[row] < _MAX_EXPONENT:
            exponent[row] += 1
            for j in range(data.shape[1]):
                old = np.uint32(data[row, j])
                code = rn.fp8_halve(old, rn.weight_bits(key, features[j]))
                data[row, j] = code
                if kahan:
                    moved = rn.fp8_value(old) * scale - rn.fp8_value(code) * rn.power_of_two(exponent[row])
                    comp[row, j] = rn.bf16_nearest(rn.bf16_value(comp[row, j]) + moved)


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


def _decode(w: ChunkWeights, rows: slice) -> Tensor:
    if w.fmt == "fp32":
        return reference.decode_rows(w, rows)
    out_LD = torch.empty(w.data_LD[rows].shape)
    if w.exponent_L is None:
        _decode_bf16(_patterns(w.data_LD[rows]), out_LD.numpy())
    else:
        _decode_fp8(w.data_LD[rows].numpy(), w.exponent_L[rows].numpy(), out_LD.numpy())
    return out_LD


def _update(w: ChunkWeights, rows: slice, w_LD: Tensor, u_LD: Tensor, step: Step, flags: Tensor) -> None:
    if w.fmt == "fp32":
        reference.update_rows_(w, rows, w_LD, u_LD, step, flags)
        return
    none = torch.empty(0, w_LD.shape[1], dtype=torch.bfloat16)
    comp = _patterns(none if w.comp_HD is None else w.comp_HD[rows])
    lr, decay = np.float32(step.lr), np.float32(step.weight_decay)
    stochastic, first = step.rounding == "stochastic", w.label_offset + rows.start
    bad = torch.zeros(w_LD.shape[0], 2, dtype=torch.int64)
    features = rd.feature_key(torch.arange(w_LD.shape[1])).to(torch.uint32).numpy()
    step_arguments = (comp, lr, decay, stochastic, step.stream, first, features, bad.numpy())
    if w.exponent_L is None:
        _update_bf16(_patterns(w.data_LD[rows]), w_LD.numpy(), u_LD.numpy(), *step_arguments)
    else:
        code_LD, exponent_L = w.data_LD[rows].numpy(), w.exponent_L[rows].numpy()
        _update_fp8(code_LD, exponent_L, w_LD.numpy(), u_LD.numpy(), *step_arguments)
    flags += bad.sum(0)


def _merge_(scores_BK: Tensor, ids_BK: Tensor, z_BL: Tensor, first_label: int) -> None:
    _merge(scores_BK.numpy(), ids_BK.numpy(), z_BL.numpy(), first_label)


NUMBA = RowOps(decode=_decode, update_=_update, merge_=_merge_)


def logit_grad(
    w: ChunkWeights, x_BD: Tensor, positives: Positives, *, loss: str, prior: float, want_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``elmo_kernels.logit_grad``."""
    return reference.logit_grad(w, x_BD, positives, loss=loss, prior=prior, want_loss=want_loss, ops=NUMBA)


def update_(w: ChunkWeights, g_LB: Tensor, x_BD: Tensor, dx_BD: Tensor, step: Step, flags: Tensor) -> None:
    """See ``elmo_kernels.update_``."""
    reference.update_(w, g_LB, x_BD, dx_BD, step, flags, ops=NUMBA)


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor) -> None:
    """See ``elmo_kernels.topk_merge_``."""
    reference.topk_merge_(scores_BK, ids_BK, w, x_BD, ops=NUMBA)
