"""The torch twin: the specification of every operation, and the loop over label blocks that the CPU backend
shares.

An operation walks over the blocks of 1,024 labels in order. Each block is decoded, multiplied in FP32, and
handled by three element-wise row operations. Numba replaces only these (``RowOps``), so matrix products, and
their bits, are the same.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from elmo_kernels import rounding as rd
from elmo_kernels.losses import LOSSES, target_slope, target_value
from elmo_kernels.types import BLOCK_LABELS, ChunkWeights, Positives

NO_LABEL = 0xFFFFFFFF
"""Stands for id -1 in a sort key: label ids are below 2**32 - 1."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an update needs besides tensors. ``stream`` is the random stream of (seed, step)."""

    lr: float
    weight_decay: float
    rounding: str
    stream: int


def label_blocks(w: ChunkWeights) -> Iterator[slice]:
    """The rows of each label block of a chunk, in order."""
    labels = w.data_LD.shape[0]
    return (slice(start, min(start + BLOCK_LABELS, labels)) for start in range(0, labels, BLOCK_LABELS))


def decode_rows(w: ChunkWeights, rows: slice) -> Tensor:
    """float32 weights of some rows."""
    if w.exponent_L is None:
        return w.data_LD[rows].float()
    return rd.fp8_value(w.data_LD[rows].long()) * rd.power_of_two(w.exponent_L[rows])[:, None]


def update_rows_(w: ChunkWeights, rows: slice, w_LD: Tensor, u_LD: Tensor, step: Step, flags: Tensor) -> None:
    """Step rows, whose float32 values are ``w_LD``, against the gradient ``u_LD`` and round to the format."""
    v_LD = w_LD - step.lr * (u_LD + step.weight_decay * w_LD)
    if w.fmt == "fp32":
        flags[1] += (~v_LD.isfinite()).sum()
        w.data_LD[rows] = v_LD
        return
    label_L = torch.arange(rows.start, rows.stop, device=v_LD.device) + w.label_offset
    feature_key_D = rd.feature_key(torch.arange(v_LD.shape[1], device=v_LD.device))
    random_LD = rd.weight_bits(rd.row_key(step.stream, label_L)[:, None], feature_key_D)
    comp = None if w.comp_HD is None else w.comp_HD[rows]
    head = 0 if comp is None else comp.shape[0]
    if comp is not None:
        v_LD[:head] += comp.float()
    if w.fmt == "bf16":
        code_LD = _round_rows(v_LD, random_LD, head, step.rounding, rd.bf16_stochastic, rd.bf16_nearest)
        new_LD = rd.bf16_value(code_LD)
        flags[1] += (~new_LD.isfinite()).sum()
        _compensate_(comp, v_LD, new_LD)
        w.data_LD[rows] = new_LD.bfloat16()
        return
    assert w.exponent_L is not None
    exponent_L = w.exponent_L[rows]
    scaled_LD = v_LD * rd.power_of_two(-exponent_L)[:, None]
    code_LD = _round_rows(scaled_LD, random_LD, head, step.rounding, rd.fp8_stochastic, rd.fp8_nearest)
    flags[0] += (v_LD.isfinite() & (scaled_LD.abs() > rd.FP8_MAX)).sum()
    flags[1] += (~v_LD.isfinite()).sum()
    code_LD = torch.where(v_LD.isfinite(), code_LD, w.data_LD[rows].long())
    new_LD = rd.fp8_value(code_LD) * rd.power_of_two(exponent_L)[:, None]
    _compensate_(comp, v_LD, new_LD)
    _raise_exponents(w, rows, code_LD, new_LD, random_LD, comp)


def _round_rows(
    v_LD: Tensor,
    random_LD: Tensor,
    head: int,
    rounding: str,
    stochastic: Callable[[Tensor, Tensor], Tensor],
    nearest: Callable[[Tensor], Tensor],
) -> Tensor:
    """Codes of a block: rows with compensation to nearest, the others as asked."""
    if rounding == "nearest":
        return nearest(v_LD)
    return torch.cat([nearest(v_LD[:head]), stochastic(v_LD[head:], random_LD[head:])])


def _compensate_(comp: Tensor | None, v_LD: Tensor, new_LD: Tensor) -> None:
    """Kahan's sum: keep what rounding took from the first rows; where that is not finite, keep the old."""
    if comp is not None:
        lost = (v_LD - new_LD)[: comp.shape[0]]
        comp.copy_(torch.where(lost.isfinite(), rd.bf16_value(rd.bf16_nearest(lost)).bfloat16(), comp))


def _raise_exponents(
    w: ChunkWeights, rows: slice, code_LD: Tensor, value_LD: Tensor, random_LD: Tensor, comp: Tensor | None
) -> None:
    """Store codes; a row that reaches the top binade is halved, on codes, and its exponent raised by one.

    So a row always has a factor of two to grow into before the next step, and saturation needs a step that
    doubles it.
    """
    assert w.exponent_L is not None
    exponent_L = w.exponent_L[rows]
    full_L = ((code_LD & 0x7F).amax(1) >= rd.FP8_TOP_BINADE) & (exponent_L < rd.MAX_EXPONENT)
    code_LD = torch.where(full_L[:, None], rd.fp8_halve(code_LD, random_LD), code_LD)
    exponent_L += full_L
    w.data_LD[rows] = code_LD.to(torch.uint8)
    if comp is not None:
        head = comp.shape[0]
        lost = comp.float() + (value_LD - decode_rows(w, rows))[:head]
        comp.copy_(torch.where(full_L[:head, None], rd.bf16_value(rd.bf16_nearest(lost)).bfloat16(), comp))


def merge_rows_(scores_BK: Tensor, ids_BK: Tensor, z_BL: Tensor, first_label: int) -> None:
    """Keep the K best of the running top-k and the logits of the labels from ``first_label`` on.

    Score and label become one integer that sorts by score, then by lower label, so no tie is left to the
    sort. A logit that is NaN counts as -inf.
    """
    label_L = torch.arange(first_label, first_label + z_BL.shape[1], device=z_BL.device)
    candidates = torch.cat([_sort_key(scores_BK, ids_BK), _sort_key(z_BL, label_L)], 1)
    key = candidates.topk(scores_BK.shape[1], 1).values
    upper = key >> 32
    scores_BK.copy_(torch.where(upper < 0, upper ^ 0x7FFFFFFF, upper).to(torch.int32).view(torch.float32))
    label = NO_LABEL - (key & rd.MASK_32)
    ids_BK.copy_(torch.where(label == NO_LABEL, -1, label))


def _sort_key(z: Tensor, label: Tensor) -> Tensor:
    # Adding zero makes -0.0 and 0.0 one pattern, which are equal scores.
    bits = (torch.where(z.isnan(), -torch.inf, z) + 0.0).contiguous().view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) + (NO_LABEL - (label & rd.MASK_32))


@dataclass(frozen=True, slots=True)
class RowOps:
    """The element-wise part of a backend, for the rows of one label block."""

    decode: Callable[[ChunkWeights, slice], Tensor] = decode_rows
    update_: Callable[[ChunkWeights, slice, Tensor, Tensor, Step, Tensor], None] = update_rows_
    merge_: Callable[[Tensor, Tensor, Tensor, int], None] = merge_rows_


TWIN = RowOps()


def logit_grad(
    w: ChunkWeights,
    x_BD: Tensor,
    positives: Positives,
    *,
    loss: str,
    prior: float,
    want_loss: bool,
    ops: RowOps = TWIN,
) -> tuple[Tensor, Tensor | None]:
    """See ``elmo_kernels.logit_grad``."""
    table = LOSSES[loss]
    g_LB = x_BD.new_empty(w.data_LD.shape[0], x_BD.shape[0])
    total = torch.zeros((), dtype=torch.float64, device=x_BD.device) if want_loss else None
    for rows in label_blocks(w):
        z_LB = torch.mm(ops.decode(w, rows), x_BD.T, out=g_LB[rows]).add_(prior)
        first = w.label_offset + rows.start
        begin, end = positives.block_ptr[first // BLOCK_LABELS :][:2].tolist()
        label_P, instance_P = positives.label_P[begin:end] - first, positives.instance_P[begin:end]
        z_P, y_P = z_LB[label_P, instance_P], positives.weight_P[begin:end]
        if total is not None:
            total += table.value(z_LB).sum(dtype=torch.float64)
            total += (target_value(table, z_P, y_P) - table.value(z_P)).sum(dtype=torch.float64)
        z_LB.copy_(table.slope(z_LB))
        z_LB[label_P, instance_P] = target_slope(table, z_P, y_P)
    return g_LB, total


def update_(
    w: ChunkWeights, g_LB: Tensor, x_BD: Tensor, dx_BD: Tensor, step: Step, flags: Tensor, ops: RowOps = TWIN
) -> None:
    """See ``elmo_kernels.update_``."""
    for rows in label_blocks(w):
        w_LD = ops.decode(w, rows)
        dx_BD += torch.mm(g_LB[rows].T, w_LD)
        ops.update_(w, rows, w_LD, torch.mm(g_LB[rows], x_BD), step, flags)


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor, ops: RowOps = TWIN) -> None:
    """See ``elmo_kernels.topk_merge_``."""
    for rows in label_blocks(w):
        ops.merge_(scores_BK, ids_BK, torch.mm(x_BD, ops.decode(w, rows).T), w.label_offset + rows.start)
