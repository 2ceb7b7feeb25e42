"""The torch twin: the specification of every operation, and the loop over label blocks that the CPU backend
shares.

An operation walks over the blocks of 1,024 labels in order. Each block is decoded, multiplied, and handled by
three element-wise row operations. Numba replaces only these (``RowOps``), so matrix products, and
their bits, are the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from elmo_kernels import rounding as rd
from elmo_kernels.losses import LOSSES, target_slope, target_value
from elmo_kernels.types import BLOCK_LABELS, GROUP_FEATURES, ChunkWeights, Fp8Operand, Positives, values

Rule = Callable[[Tensor], Tensor]
"""Float32 values to their codes."""
NO_LABEL = 0xFFFFFFFF
"""Stands for id -1 in a sort key: label ids are below 2**32 - 1."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an update needs besides tensors.

    Attributes:
        lr: learning rate. keep: 1 - lr * weight decay, the share of a weight that stays; both float32.
        stream: signed 64-bit key of (seed, step).
    """

    lr: float
    keep: float
    stream: int


def read_scalars(scalars: Tensor) -> Step:
    """The numbers in a tensor of ``elmo_kernels.step_scalars``; on a GPU this waits for it."""
    stream, *patterns = scalars.tolist()
    lr, keep = torch.tensor(patterns).to(torch.int32).view(torch.float32).tolist()
    return Step(lr, keep, stream)


def label_blocks(w: ChunkWeights) -> Iterator[slice]:
    """The rows of each label block of a chunk, in order."""
    labels = w.data_LD.shape[0]
    return (slice(start, min(start + BLOCK_LABELS, labels)) for start in range(0, labels, BLOCK_LABELS))


@cache
def _has_bf16_units() -> bool:
    return torch.cpu._is_amx_tile_supported()


@contextmanager
def products(fmt: str) -> Iterator[None]:
    """How float32 matrices are multiplied on a CPU while weights of a format take part.

    Where the CPU has matrix units for bf16 (AMX), operands are rounded to it and sums stay FP32, as on a GPU;
    bf16 and fp8 weights lose nothing by that. The fp32 format, and other CPUs, multiply in FP32.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if fmt != "fp32" and _has_bf16_units():
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def decode_rows(w: ChunkWeights, rows: slice) -> Tensor:
    """float32 weights of some rows."""
    if w.exponent_LG is None:
        return w.data_LD[rows].float()
    return rd.fp8_value(w.data_LD[rows].long()) * _spread(rd.power_of_two(w.exponent_LG[rows]), w.data_LD.shape[1])


def _spread(group_LG: Tensor, dim: int) -> Tensor:
    """A value for each group of features as one for each feature, (L, D)."""
    return group_LG.repeat_interleave(GROUP_FEATURES, 1)[:, :dim]


def normal_rows(w: ChunkWeights, rows: slice, stream: int) -> Tensor:
    """For rows, sums of four centred uniform 16-bit integers as float32: standard deviation 2**16 / sqrt(3)."""
    label_L = torch.arange(rows.start, rows.stop, device=w.data_LD.device) + w.label_offset
    feature_key = rd.feature_key(torch.arange(4 * w.data_LD.shape[1], device=label_L.device))
    bits = rd.weight_bits(rd.row_key(stream, label_L)[:, None], feature_key)
    return ((bits >> 16).unflatten(1, (4, -1)).sum(1) - 2 * 0xFFFF).to(torch.float32)


def update_rows_(
    w: ChunkWeights, rows: slice, w_LD: Tensor, u_LD: Tensor, step: Step, rounding: str, flags: Tensor
) -> None:
    """Step rows, whose float32 values are ``w_LD``, against ``u_LD``, which is lost, and round to the format."""
    if w.fmt == "fp32":
        v_LD = torch.mul(w_LD, step.keep, out=w.data_LD[rows]).sub_(u_LD.mul_(step.lr))
        flags[1] += v_LD.numel() - v_LD.isfinite().sum()
        return
    v_LD = step.keep * w_LD - step.lr * u_LD
    comp = None if w.comp_HD is None else w.comp_HD[rows]
    head = 0 if comp is None else comp.shape[0]
    if comp is not None:
        v_LD[:head] += comp.float()
    broken = ~v_LD.isfinite()
    flags[1] += broken.sum()
    label_L = torch.arange(rows.start, rows.stop, device=v_LD.device) + w.label_offset
    feature_key_D = rd.feature_key(torch.arange(v_LD.shape[1], device=v_LD.device))
    random_LD = rd.weight_bits(rd.row_key(step.stream, label_L)[:, None], feature_key_D)
    if rounding == "nearest":
        head = len(v_LD)

    def rounded(v_LD: Tensor, nearest: Rule, stochastic: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return torch.cat([nearest(v_LD[:head]), stochastic(v_LD[head:], random_LD[head:])])

    if w.exponent_LG is None:
        code_LD = rounded(v_LD, rd.bf16_nearest, rd.bf16_stochastic)
        w.data_LD[rows] = code_LD.to(torch.int16).view(torch.bfloat16)
        new_LD = rd.bf16_value(code_LD)
    else:
        v_LD = torch.where(broken, w_LD, v_LD)
        flags[0] += (v_LD.abs() > rd.FP8_MAX * 2.0**rd.MAX_EXPONENT).sum()
        _store_fp8(w, rows, v_LD, lambda scaled_LD: rounded(scaled_LD, rd.fp8_nearest, rd.fp8_stochastic))
        new_LD = decode_rows(w, rows)
    if comp is not None:
        # Kahan's sum: keep what rounding took; where that is not finite, keep the old.
        lost_HD = (v_LD - new_LD)[: len(comp)]
        comp.copy_(torch.where(lost_HD.isfinite(), rd.bf16_value(rd.bf16_nearest(lost_HD)).bfloat16(), comp))


def _store_fp8(w: ChunkWeights, rows: slice, v_LD: Tensor, encode: Rule) -> None:
    """Store finite values as codes, with ``encode`` for values scaled by their exponents.

    The exponent of a group follows its largest new value, whatever it was before. So no value that E4M3 can be
    scaled to is ever cut off, and a group that shrinks gets its resolution back.
    """
    assert w.exponent_LG is not None
    padded_LD = F.pad(v_LD.abs(), (0, -v_LD.shape[1] % GROUP_FEATURES))
    exponent_LG = rd.fp8_exponent(padded_LD.unflatten(1, (-1, GROUP_FEATURES)).amax(2))
    w.exponent_LG[rows] = exponent_LG.to(torch.int8)
    w.data_LD[rows] = encode(v_LD * _spread(rd.power_of_two(-exponent_LG), v_LD.shape[1])).to(torch.uint8)


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
    """The element-wise part of a backend, for the rows of one label block.

    ``decode`` gives float32 weights, in the memory of its last argument where it needs some.
    """

    decode: Callable[[ChunkWeights, slice, Tensor], Tensor] = lambda w, rows, scratch: decode_rows(w, rows)
    update_: Callable[[ChunkWeights, slice, Tensor, Tensor, Step, str, Tensor], None] = update_rows_
    merge_: Callable[[Tensor, Tensor, Tensor, int], None] = merge_rows_
    normal: Callable[[ChunkWeights, slice, int], Tensor] = normal_rows


ROWS = RowOps()


def _decoded_blocks(w: ChunkWeights, ops: RowOps) -> Iterator[tuple[slice, Tensor]]:
    """Rows and float32 weights of each label block, valid until the next: fresh memory would cost page faults.

    Until the last one, matrices are multiplied as ``products`` says.
    """
    scratch_LD = _block_scratch(w)
    with products(w.fmt):
        for rows in label_blocks(w):
            yield rows, ops.decode(w, rows, scratch_LD[: rows.stop - rows.start])


def _block_scratch(w: ChunkWeights) -> Tensor:
    labels, dim = w.data_LD.shape
    return torch.empty(min(labels, BLOCK_LABELS), dim, device=w.data_LD.device)


def fp8_operand(x_BD: Tensor) -> Fp8Operand:
    """See ``elmo_kernels.fp8_operand``."""
    x = x_BD.float()
    exponent_B = rd.fp8_exponent(x.abs().nan_to_num(0.0).amax(1))
    code_BD = rd.fp8_nearest(x * rd.power_of_two(-exponent_B)[:, None])
    value_BD = (rd.fp8_value(code_BD) * rd.power_of_two(exponent_B)[:, None]).to(x_BD.dtype)
    return Fp8Operand(value_BD, code_BD.to(torch.uint8), exponent_B.to(torch.int8))


def logit_grad(
    w: ChunkWeights,
    x: Tensor | Fp8Operand,
    positives: Positives,
    *,
    loss: str,
    prior: float,
    want_loss: bool,
    ops: RowOps = ROWS,
) -> tuple[Tensor, Tensor | None]:
    """See ``elmo_kernels.logit_grad``."""
    table, x_BD = LOSSES[loss], values(x)
    g_LB = x_BD.new_empty(w.data_LD.shape[0], x_BD.shape[0])
    total = torch.zeros((), dtype=torch.float64, device=x_BD.device) if want_loss else None
    for rows, w_LD in _decoded_blocks(w, ops):
        z_LB = torch.mm(w_LD, x_BD.T, out=g_LB[rows]).add_(prior)
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
    w: ChunkWeights,
    g_LB: Tensor,
    x_BD: Tensor,
    dx_BD: Tensor,
    *,
    scalars: Tensor,
    rounding: str,
    flags: Tensor,
    ops: RowOps = ROWS,
) -> None:
    """See ``elmo_kernels.update_with_``."""
    step = read_scalars(scalars)
    scratch_LD, dx_DB = _block_scratch(w), dx_BD.T.contiguous()
    for rows, w_LD in _decoded_blocks(w, ops):
        dx_DB.addmm_(w_LD.T, g_LB[rows])
        if not step.lr:
            continue
        u_LD = torch.mm(g_LB[rows], x_BD, out=scratch_LD[: len(w_LD)])
        ops.update_(w, rows, w_LD, u_LD, step, rounding, flags)
    dx_BD.copy_(dx_DB.T)


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor, ops: RowOps = ROWS) -> None:
    """See ``elmo_kernels.topk_merge_``."""
    for rows, w_LD in _decoded_blocks(w, ops):
        ops.merge_(scores_BK, ids_BK, torch.mm(x_BD, w_LD.T), w.label_offset + rows.start)


def update_bytes(fmt: str, labels: int, dim: int, batch: int, device: torch.device) -> int:
    """Bytes of the temporaries of ``logit_grad`` and ``update_``, whatever the format: those of a label block."""
    return 4 * (min(labels, BLOCK_LABELS) * (4 * dim + 3 * batch) + 4 * batch * dim)


def topk_bytes(labels: int, dim: int, batch: int) -> int:
    """Bytes of the temporaries of ``topk_merge_``: those of a label block."""
    return 4 * min(labels, BLOCK_LABELS) * (batch + 2 * dim)
