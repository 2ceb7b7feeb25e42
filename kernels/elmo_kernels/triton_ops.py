"""The Triton backend: launches the kernels over a chunk. Nothing here waits for the GPU.

The temporaries of a chunk are its gradients, (L, B), and a float32 (B, D) for each of its label blocks, or the
keys of its candidates for the top-k.
"""

import os
from functools import cache
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
    update_tiles,
)
from elmo_kernels.types import BLOCK_LABELS, ChunkWeights, Positives

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


def _even(launch: dict[str, Any], labels: int, batch: int, dim: int, rows: int) -> bool:
    return not (labels % rows or batch % launch["TILE_B"] or dim % launch["TILE_D"])


def _format(w: ChunkWeights) -> dict[str, Any]:
    return {"D": w.data_LD.shape[1], "FMT": w.fmt, "DOT_FP32": _interpreted() or w.fmt == "fp32"}


def _logit_launch(w: ChunkWeights, labels: int, batch: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and compile-time arguments of a kernel over the logits of so many rows."""
    launch = logit_tiles(w.fmt, batch, _capability(w.data_LD.device))
    grid = _tiles(labels, launch["TILE_L"]), _tiles(batch, launch["TILE_B"])
    even = _even(launch, labels, batch, w.data_LD.shape[1], launch["TILE_L"])
    return grid, {**_format(w), **launch, "EVEN": even}


def logit_grad(
    w: ChunkWeights, x_BD: Tensor, positives: Positives, *, loss: str, prior: float, want_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``elmo_kernels.logit_grad``."""
    labels, batch, count = w.data_LD.shape[0], x_BD.shape[0], positives.label_P.shape[0]
    g_LB = x_BD.new_empty(labels, batch)
    grid, launch = _logit_launch(w, labels, batch)
    tiles = grid[0] * grid[1]
    sums = torch.empty(tiles + _tiles(count, TILE_P), device=x_BD.device) if want_loss else None
    data = _patterns(w.data_LD)
    triton_logits.slope_kernel[grid](
        data, w.exponent_LG, x_BD, g_LB, sums, prior, labels, batch, LOSS=loss, WANT_LOSS=want_loss, **launch
    )
    if count:
        triton_logits.positive_kernel[(_tiles(count, TILE_P),)](
            data, w.exponent_LG, x_BD, g_LB, None if sums is None else sums[tiles:],
            positives.label_P, positives.instance_P, positives.weight_P,
            prior, w.label_offset, count, labels, batch,
            LOSS=loss, WANT_LOSS=want_loss, TILE_P=TILE_P, TILE_D=launch["TILE_D"], **_format(w), **flat_options(),
        )  # fmt: skip
    return g_LB, None if sums is None else sums.sum(dtype=torch.float64)


def update_(
    w: ChunkWeights, g_LB: Tensor, x_BD: Tensor, dx_BD: Tensor, *, scalars: Tensor, rounding: str, flags: Tensor
) -> None:
    """See ``elmo_kernels.update_with_``."""
    (labels, dim), batch, capability = w.data_LD.shape, x_BD.shape[0], _capability(x_BD.device)
    fused = is_fused(w.fmt, batch, capability)
    head = 0 if w.comp_HD is None else w.comp_HD.shape[0]
    slab = max(1, SLAB_BYTES // (4 * batch * dim))
    partial_NBD = dx_BD.new_empty(min(_tiles(labels, BLOCK_LABELS), slab), batch, dim)
    for start in range(0, labels, slab * BLOCK_LABELS):
        count = min(slab * BLOCK_LABELS, labels - start)
        blocks = _tiles(count, BLOCK_LABELS)
        data, g = _patterns(w.data_LD[start:]), g_LB[start:]
        exponent = None if w.exponent_LG is None else w.exponent_LG[start:]
        comp = None if w.comp_HD is None or start >= head else w.comp_HD[start:]
        launch = update_tiles(w.fmt, batch, capability, plain=False)
        even = _even(launch, count, batch, dim, BLOCK_LABELS)
        launch = update_tiles(w.fmt, batch, capability, plain=even and comp is None)
        if not fused:
            grad = input_grad_tiles(w.fmt, batch, capability)
            triton_update.input_grad_kernel[(blocks * _tiles(dim, grad["TILE_D"]), _tiles(batch, grad["TILE_B"]))](
                data, exponent, g, partial_NBD, count, batch, EVEN=_even(grad, count, batch, dim, BLOCK_LABELS),
                **_format(w), **grad,
            )  # fmt: skip
        triton_update.update_kernel[(blocks * _tiles(dim, launch["TILE_D"]),)](
            data, exponent, _patterns(comp), g, x_BD, partial_NBD if fused else None, scalars, flags,
            _feature_keys(dim, x_BD.device), w.label_offset + start, count, batch, max(0, head - start),
            STOCHASTIC=rounding == "stochastic", FUSED=fused, TILES_B=_tiles(batch, launch["TILE_B"]),
            EVEN=even, **_format(w), **launch,
        )  # fmt: skip
        _add_partials_(dx_BD, partial_NBD, blocks)


def _add_partials_(dx_BD: Tensor, partial_NBD: Tensor, count: int) -> None:
    size = dx_BD.numel()
    triton_update.add_partials_kernel[(_tiles(size, TILE_FLAT),)](
        dx_BD, partial_NBD, size, N=count, TILE=TILE_FLAT, **flat_options()
    )


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor) -> None:
    """See ``elmo_kernels.topk_merge_``."""
    labels, (batch, k) = w.data_LD.shape[0], scores_BK.shape
    slab = max(1, SLAB_BYTES // (8 * batch * BLOCK_LABELS)) * BLOCK_LABELS
    stages = max(MIN_STAGES_K, (k - 1).bit_length())
    key_BL = ids_BK.new_empty(batch, min(slab, labels))
    for start in range(0, labels, slab):
        rows = min(slab, labels - start)
        count_B = torch.zeros(batch, dtype=torch.int32, device=x_BD.device)
        grid, launch = _logit_launch(w, rows, batch)
        triton_logits.candidate_kernel[grid](
            _patterns(w.data_LD[start:]), None if w.exponent_LG is None else w.exponent_LG[start:], x_BD,
            scores_BK, ids_BK, key_BL, count_B, w.label_offset + start, rows, batch, k, key_BL.shape[1], **launch,
        )  # fmt: skip
        triton_logits.merge_kernel[(batch,)](
            scores_BK, ids_BK, key_BL, count_B, key_BL.shape[1], k, TILE_K=1 << stages, STAGES=stages,
            **flat_options(),
        )  # fmt: skip
