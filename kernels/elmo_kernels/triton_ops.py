"""The Triton backend: launches the kernels over a chunk. Nothing here waits for the GPU.

The temporaries of a chunk are its gradients, (L, B), a float32 (B, D) for each of its label blocks and a byte for each
group of features that rounding may not take; or the keys of its candidates for the top-k.
"""

import os
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elmo_kernels import rounding, triton_logits, triton_update
from elmo_kernels.reference import ROWS  # noqa: F401 - rows of a GPU are made and read by torch
from elmo_kernels.triton_config import (
    INTERPRETER,
    MIN_STAGES_K,
    TILE_FLAT,
    TILE_P,
    flat_options,
    input_grad_tiles,
    is_fused,
    logit_tiles,
    mend_tiles,
    update_tiles,
)
from elmo_kernels.types import BLOCK_LABELS, ChunkWeights, Fp8Operand, Positives, values

SLAB_BYTES = 1 << 25
"""Input gradients of label blocks, or candidates of a top-k, that are held at a time."""


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


@cache
def _feature_keys(dim: int, device: torch.device) -> Tensor:
    """int32 patterns of ``rounding.feature_key`` of every feature."""
    return rounding.feature_key(torch.arange(dim, device=device)).to(torch.uint32).view(torch.int32)


def _patterns(tensor: Tensor | None) -> Tensor | None:
    """bfloat16 as int16 patterns, sharing memory; other types as they are."""
    return tensor.view(torch.int16) if tensor is not None and tensor.dtype == torch.bfloat16 else tensor


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _capability(device: torch.device) -> int:
    if _interpreted():
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def block_runs(start: int, stop: int, head: int = 0) -> Iterator[tuple[int, int]]:
    """(first, last) rows of label blocks of a kind: with compensation (below ``head``) or without, whole or not.

    Each kind has its own launch, so that what is compiled for a block depends on the block, never on its chunk.
    """
    whole = stop - (stop - start) % BLOCK_LABELS
    plain = min(stop, max(start, _tiles(head, BLOCK_LABELS) * BLOCK_LABELS))
    return pairwise(sorted({start, plain, whole, stop}))


def _even(launch: dict[str, Any], rows: int, batch: int, dim: int) -> bool:
    return not (rows % BLOCK_LABELS or batch % launch["TILE_B"] or dim % launch["TILE_D"])


def _from(tensor: Tensor | None, row: int) -> Tensor | None:
    """The rows from ``row`` on."""
    return None if tensor is None else _patterns(tensor[row:])


def _format(w: ChunkWeights) -> dict[str, Any]:
    return {"D": w.data_LD.shape[1], "FMT": w.fmt, "DOT_FP32": _interpreted() or w.fmt == "fp32"}


def _logit_launch(w: ChunkWeights, rows: int, batch: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time arguments of a kernel over the logits of so many rows."""
    launch = logit_tiles(w.fmt, batch, _capability(w.data_LD.device))
    grid = _tiles(rows, launch["TILE_L"]), _tiles(batch, launch["TILE_B"])
    return grid, {**_format(w), **launch, "EVEN": _even(launch, rows, batch, w.data_LD.shape[1])}


def fp8_operand(x_BD: Tensor) -> Fp8Operand:
    """See ``elmo_kernels.fp8_operand``."""
    batch, dim = x_BD.shape
    code_BD, exponent_B = x_BD.new_empty(batch, dim, dtype=torch.uint8), x_BD.new_empty(batch, dtype=torch.int8)
    rounded = Fp8Operand(torch.empty_like(x_BD), code_BD, exponent_B)
    triton_logits.fp8_operand_kernel[(batch,)](
        x_BD, *rounded, D=dim, TILE=1 << (dim - 1).bit_length(), **flat_options()
    )
    return rounded


def logit_grad(
    w: ChunkWeights, x: Tensor | Fp8Operand, positives: Positives, *, loss: str, prior: float, want_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``elmo_kernels.logit_grad``."""
    x_BD = values(x)
    operand, exponent_B = (x.code_BD, x.exponent_B) if isinstance(x, Fp8Operand) else (x_BD, None)
    labels, batch, count = w.data_LD.shape[0], x_BD.shape[0], positives.label_P.shape[0]
    g_LB = x_BD.new_empty(labels, batch)
    sums: list[Tensor | None] = []
    for first, last in block_runs(0, labels):
        grid, launch = _logit_launch(w, last - first, batch)
        sums.append(torch.empty(grid[0] * grid[1], device=x_BD.device) if want_loss else None)
        triton_logits.slope_kernel[grid](
            _from(w.data_LD, first), _from(w.exponent_LG, first), operand, exponent_B, g_LB[first:], sums[-1],
            prior, last - first, batch, LOSS=loss, WANT_LOSS=want_loss, **launch,
        )  # fmt: skip
    if count:
        tiles = _tiles(count, TILE_P)
        sums.append(torch.empty(tiles, device=x_BD.device) if want_loss else None)
        triton_logits.positive_kernel[(tiles,)](
            _patterns(w.data_LD), w.exponent_LG, x_BD, g_LB, sums[-1],
            positives.label_P, positives.instance_P, positives.weight_P,
            prior, w.label_offset, count, labels, batch,
            LOSS=loss, WANT_LOSS=want_loss, TILE_P=TILE_P, TILE_D=launch["TILE_D"], **_format(w), **flat_options(),
        )  # fmt: skip
    return g_LB, torch.cat([part for part in sums if part is not None]).sum(dtype=torch.float64) if want_loss else None


def _update_slab(dim: int, batch: int) -> int:
    """Label blocks whose input gradients are held at a time."""
    return max(1, SLAB_BYTES // (4 * batch * dim))


def update_bytes(fmt: str, labels: int, dim: int, batch: int, device: torch.device) -> int:
    """Bytes of the temporaries of ``update_``."""
    blocks = min(_tiles(labels, BLOCK_LABELS), _update_slab(dim, batch))
    groups = _tiles(dim, mend_tiles(fmt, batch, _capability(device))["TILE_D"])
    return blocks * (4 * batch * dim + groups * BLOCK_LABELS)


def update_(
    w: ChunkWeights, g_LB: Tensor, x_BD: Tensor, dx_BD: Tensor, *, scalars: Tensor, rounding: str, flags: Tensor
) -> None:
    """See ``elmo_kernels.update_with_``."""
    (labels, dim), batch, capability = w.data_LD.shape, x_BD.shape[0], _capability(x_BD.device)
    fused, grad = is_fused(w.fmt, batch, capability), input_grad_tiles(w.fmt, batch, capability)
    mend, common = mend_tiles(w.fmt, batch, capability), {"STOCHASTIC": rounding == "stochastic", **_format(w)}
    keys_D, groups = _feature_keys(dim, x_BD.device), _tiles(dim, mend["TILE_D"])
    head = 0 if w.comp_HD is None else w.comp_HD.shape[0]
    slab = _update_slab(dim, batch)
    partial_NBD = dx_BD.new_empty(min(_tiles(labels, BLOCK_LABELS), slab), batch, dim)
    skipped_NGL = partial_NBD.new_empty(len(partial_NBD), groups, BLOCK_LABELS, dtype=torch.int8)
    for start in range(0, labels, slab * BLOCK_LABELS):
        stop = min(start + slab * BLOCK_LABELS, labels)
        for first, last in block_runs(start, stop, head):
            rows, kahan, block = last - first, max(0, head - first), (first - start) // BLOCK_LABELS
            data, exponent, g = _from(w.data_LD, first), _from(w.exponent_LG, first), g_LB[first:]
            comp, blocks = _from(w.comp_HD, first) if kahan else None, _tiles(rows, BLOCK_LABELS)
            partial, skipped = partial_NBD[block:], skipped_NGL[block:]
            if not fused:
                triton_update.input_grad_kernel[(blocks * _tiles(dim, grad["TILE_D"]), _tiles(batch, grad["TILE_B"]))](
                    data, exponent, g, partial, rows, batch, EVEN=_even(grad, rows, batch, dim), **_format(w), **grad
                )
            launch = update_tiles(w.fmt, batch, capability, plain=False)
            even = _even(launch, rows, batch, dim)
            launch = update_tiles(w.fmt, batch, capability, plain=even and comp is None)
            triton_update.update_kernel[(blocks * groups,)](
                data, exponent, comp, g, x_BD, partial if fused else None, scalars, skipped, keys_D,
                w.label_offset + first, rows, batch, kahan,
                FUSED=fused, TILES_B=_tiles(batch, launch["TILE_B"]), EVEN=even, **common, **launch,
            )  # fmt: skip
            triton_update.mend_kernel[(blocks * groups,)](
                data, exponent, comp, g, x_BD, scalars, skipped, flags, keys_D,
                w.label_offset + first, rows, batch, kahan, TILES_B=_tiles(batch, mend["TILE_B"]), **common, **mend,
            )  # fmt: skip
        _add_partials_(dx_BD, partial_NBD, _tiles(stop - start, BLOCK_LABELS))


def _add_partials_(dx_BD: Tensor, partial_NBD: Tensor, count: int) -> None:
    size = dx_BD.numel()
    triton_update.add_partials_kernel[(_tiles(size, TILE_FLAT),)](
        dx_BD, partial_NBD, size, N=count, TILE=TILE_FLAT, **flat_options()
    )


def _topk_slab(batch: int) -> int:
    """Labels whose candidates are held at a time."""
    return max(1, SLAB_BYTES // (8 * batch * BLOCK_LABELS)) * BLOCK_LABELS


def topk_bytes(labels: int, dim: int, batch: int) -> int:
    """Bytes of the temporaries of ``topk_merge_``."""
    return 8 * batch * min(_topk_slab(batch), labels)


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor) -> None:
    """See ``elmo_kernels.topk_merge_``."""
    labels, (batch, k) = w.data_LD.shape[0], scores_BK.shape
    slab = _topk_slab(batch)
    stages = max(MIN_STAGES_K, (k - 1).bit_length())
    key_BL = ids_BK.new_empty(batch, min(slab, labels))
    for start in range(0, labels, slab):
        count_B = torch.zeros(batch, dtype=torch.int32, device=x_BD.device)
        for first, last in block_runs(start, min(start + slab, labels)):
            grid, launch = _logit_launch(w, last - first, batch)
            triton_logits.candidate_kernel[grid](
                _from(w.data_LD, first), _from(w.exponent_LG, first), x_BD, scores_BK, ids_BK, key_BL, count_B,
                w.label_offset + first, last - first, batch, k, key_BL.shape[1], **launch,
            )  # fmt: skip
        triton_logits.merge_kernel[(batch,)](
            scores_BK, ids_BK, key_BL, count_B, key_BL.shape[1], k, TILE_K=1 << stages, STAGES=stages,
            **flat_options(),
        )  # fmt: skip
