"""The Triton backend: launches the kernels over a chunk. Nothing here waits for the GPU."""

import os
from typing import Any

import torch
from torch import Tensor

from elmo_kernels import triton_kernels as tk
from elmo_kernels.reference import ROWS, merge_rows_  # noqa: F401 - rows of a GPU are made and read by torch
from elmo_kernels.types import BLOCK_LABELS, ChunkWeights, Positives

# Products of 64 rows and more do not compile for sm_100 (Triton 3.7, tensor memory layouts).
TILES = {"TILE_L": 32, "TILE_B": 32, "TILE_D": 32}
TILE_P = 32
TILE_FLAT = 1024
SLAB_BLOCKS = 64
"""Label blocks whose input gradients are held at a time."""
TOPK_BLOCKS = 8
"""Label blocks whose logits are held at a time for the top-k; its merge takes 36 bytes a logit."""
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4}


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _patterns(tensor: Tensor | None) -> Tensor | None:
    """bfloat16 as int16 patterns, sharing memory; other types as they are."""
    return tensor.view(torch.int16) if tensor is not None and tensor.dtype == torch.bfloat16 else tensor


def _format(w: ChunkWeights) -> dict[str, Any]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return {"D": w.data_LD.shape[1], "FMT": w.fmt, "DOT_FP32": interpreted or w.fmt == "fp32"}


def _launch_logits(
    w: ChunkWeights, rows: slice, x_BD: Tensor, out_LB: Tensor, sums: Tensor | None, loss: str, prior: float
) -> None:
    exponent_L = None if w.exponent_L is None else w.exponent_L[rows]
    labels, batch = out_LB.shape
    tk.logit_kernel[(_tiles(labels, TILES["TILE_L"]), _tiles(batch, TILES["TILE_B"]))](
        _patterns(w.data_LD[rows]), exponent_L, x_BD, out_LB, sums, prior, labels, batch,
        LOSS=loss, WANT_LOSS=sums is not None, **_format(w), **TILES, **OPTIONS,
    )  # fmt: skip


def logit_grad(
    w: ChunkWeights, x_BD: Tensor, positives: Positives, *, loss: str, prior: float, want_loss: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``elmo_kernels.logit_grad``."""
    labels, batch, count = w.data_LD.shape[0], x_BD.shape[0], positives.label_P.shape[0]
    g_LB = x_BD.new_empty(labels, batch)
    tiles = _tiles(labels, TILES["TILE_L"]) * _tiles(batch, TILES["TILE_B"])
    sums = x_BD.new_empty(tiles + _tiles(count, TILE_P)) if want_loss else None
    _launch_logits(w, slice(0, labels), x_BD, g_LB, sums, loss, prior)
    if count:
        tk.positive_kernel[(_tiles(count, TILE_P),)](
            _patterns(w.data_LD), w.exponent_L, x_BD, g_LB, None if sums is None else sums[tiles:],
            positives.label_P, positives.instance_P, positives.weight_P,
            prior, w.label_offset, count, labels, batch,
            LOSS=loss, WANT_LOSS=want_loss, TILE_P=TILE_P, TILE_D=TILES["TILE_D"], **_format(w), **OPTIONS,
        )  # fmt: skip
    return g_LB, None if sums is None else sums.sum(dtype=torch.float64)


def update_(w: ChunkWeights, g_LB: Tensor, x_BD: Tensor, dx_BD: Tensor, step: Step, flags: Tensor) -> None:
    """See ``elmo_kernels.update_``."""
    _add_input_grad_(w, g_LB, dx_BD)
    (labels, dim), batch = w.data_LD.shape, x_BD.shape[0]
    head = 0 if w.comp_HD is None else w.comp_HD.shape[0]
    data, comp = _patterns(w.data_LD), _patterns(w.comp_HD)
    top_L = torch.zeros(labels, dtype=torch.int32, device=x_BD.device) if w.fmt == "fp8" else None
    tk.update_kernel[(_tiles(labels, TILES["TILE_L"]), _tiles(dim, TILES["TILE_D"]))](
        data, w.exponent_L, comp, top_L, g_LB, x_BD, flags, step.lr, step.weight_decay, step.stream,
        w.label_offset, labels, batch, head,
        STOCHASTIC=step.rounding == "stochastic", TILES_B=_tiles(batch, TILES["TILE_B"]),
        **_format(w), **TILES, **OPTIONS,
    )  # fmt: skip
    if w.fmt == "fp8":
        tk.raise_exponent_kernel[(_tiles(labels, TILES["TILE_L"]),)](
            data, w.exponent_L, comp, top_L, step.stream, w.label_offset, labels, head,
            D=dim, TILE_L=TILES["TILE_L"], TILE_D=TILES["TILE_D"], **OPTIONS,
        )  # fmt: skip


def _add_input_grad_(w: ChunkWeights, g_LB: Tensor, dx_BD: Tensor) -> None:
    (labels, dim), batch = w.data_LD.shape, dx_BD.shape[0]
    blocks = _tiles(labels, BLOCK_LABELS)
    partial_NBD = dx_BD.new_empty(min(blocks, SLAB_BLOCKS), batch, dim)
    for first in range(0, blocks, SLAB_BLOCKS):
        count = min(blocks - first, SLAB_BLOCKS)
        tk.input_grad_kernel[(count, _tiles(batch, TILES["TILE_B"]), _tiles(dim, TILES["TILE_D"]))](
            _patterns(w.data_LD), w.exponent_L, g_LB, partial_NBD, first, labels, batch,
            BLOCK=BLOCK_LABELS, **_format(w), **TILES, **OPTIONS,
        )  # fmt: skip
        tk.add_partials_kernel[(_tiles(batch * dim, TILE_FLAT),)](
            dx_BD, partial_NBD, batch * dim, N=count, TILE=TILE_FLAT, **OPTIONS
        )


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor) -> None:
    """See ``elmo_kernels.topk_merge_``."""
    labels, slab = w.data_LD.shape[0], TOPK_BLOCKS * BLOCK_LABELS
    for start in range(0, labels, slab):
        rows = slice(start, min(start + slab, labels))
        z_LB = x_BD.new_empty(rows.stop - rows.start, x_BD.shape[0])
        _launch_logits(w, rows, x_BD, z_LB, None, "none", 0.0)
        merge_rows_(scores_BK, ids_BK, z_LB.T, w.label_offset + start)
