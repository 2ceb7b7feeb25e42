"""Tiles and launch options of the Triton kernels: functions of format, batch and compute capability alone.

They do not depend on the number of labels, so the chunk size changes no sum.
``tools/aot_report.py`` compiles what these functions give for every architecture.
"""

from typing import Any

from elmo_kernels.types import GROUP_FEATURES

Launch = dict[str, Any]
TILE_P = 32
TILE_FLAT = 256
MIN_STAGES_K = 7
"""The top-k is sorted 128 keys at a time, or more for a larger K."""
INTERPRETER = 0
"""Stands for a compute capability. Its calls are slow and its tiles of any size, so they are few and large."""
FP32_TILES = {"TILE_L": 32, "TILE_B": 32, "TILE_D": 32}
"""Products in FP32 have no tensor cores."""


def _options(num_warps: int, num_stages: int = 2) -> Launch:
    return {"enable_fp_fusion": False, "num_warps": num_warps, "num_stages": num_stages}


def _is_hopper(capability: int) -> bool:
    """Its tensor cores take operands from shared memory, so registers are left for larger tiles."""
    return capability // 10 == 9


def _tiles(rows: int, batch: int, most: int) -> Launch:
    tile_b = min(most, max(16, 1 << (batch - 1).bit_length()))
    return {"TILE_L": rows, "TILE_B": tile_b, "TILE_D": GROUP_FEATURES}


def is_fused(fmt: str, batch: int, capability: int) -> bool:
    """Whether one pass makes new weights and input gradient: the sums of the batch fit the registers."""
    return fmt != "fp32" and batch <= (128 if _is_hopper(capability) else 64)


def logit_tiles(fmt: str, batch: int, capability: int) -> Launch:
    """Of ``slope_kernel`` and ``candidate_kernel``."""
    if capability == INTERPRETER:
        return {**_tiles(256, batch, 64), **_options(4)}
    if fmt == "fp32":
        return {**FP32_TILES, **_options(4)}
    if capability // 10 == 10:  # sums in tensor memory, which a thread reads at once, must fit its registers
        return {**_tiles(64, batch, 64), **_options(4)}
    return {**_tiles(128, batch, 128), **_options(8, 3 if _is_hopper(capability) else 2)}


def update_tiles(fmt: str, batch: int, capability: int, *, plain: bool) -> Launch:
    """Of ``update_kernel``; ``plain`` without compensation and masks.

    ``CHAINED`` decodes a weight once. That needs all warps side by side on the labels, which leaves no register
    for anything but the plain update.
    """
    if capability == INTERPRETER:
        return {"CHAINED": False, **_tiles(256, batch, 64), **_options(4)}
    if fmt == "fp32":
        return {"CHAINED": False, **FP32_TILES, **_options(4)}
    if is_fused(fmt, batch, capability):
        if not _is_hopper(capability):
            return {"CHAINED": plain and fmt == "fp8", **_tiles(64, batch, 128), **_options(4)}
        return {"CHAINED": plain, **_tiles(128 if plain else 64, batch, 128), **_options(8)}
    if _is_hopper(capability):
        return {"CHAINED": False, **_tiles(128, batch, 128), **_options(8)}
    if capability // 10 == 10:
        # Triton 3.7 fails to lay out a product in one or two pieces whose rows are summed up in registers.
        return {"CHAINED": False, **_tiles(64, batch, 32), **_options(4)}
    return {"CHAINED": False, **_tiles(64, batch, 32 if capability // 10 == 12 else 64), **_options(8)}


def mend_tiles(fmt: str, batch: int, capability: int) -> Launch:
    """Of ``mend_kernel``, which mostly has nothing to do: few registers, so that many wait at a time."""
    if capability == INTERPRETER:
        return {**_tiles(256, batch, 64), **_options(4)}
    if fmt == "fp32":
        return {**FP32_TILES, **_options(4)}
    return {**_tiles(32, batch, 32), **_options(8)}


def input_grad_tiles(fmt: str, batch: int, capability: int) -> Launch:
    """Of ``input_grad_kernel``."""
    if capability == INTERPRETER:
        return {**_tiles(256, batch, 64), **_options(4)}
    if fmt == "fp32":
        return {**FP32_TILES, **_options(4)}
    return {**_tiles(64, batch, 128), **_options(8)}


def flat_options() -> Launch:
    """Of the small kernels."""
    return _options(4)
