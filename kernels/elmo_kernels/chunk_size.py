"""How many labels a chunk best has on a device."""

import torch

from elmo_kernels.types import BLOCK_LABELS, num_groups

CPU_BLOCKS = 32
MAX_GPU_BLOCKS = 160
"""Where features are few, the gradients of the logits are what is large."""
CACHE_SHARE = 0.5
"""Of a GPU's L2 cache, for a chunk: three kernels read its weights, and the gradients of its logits pass there too."""


def preferred_chunk_labels(device: torch.device | str, dim: int) -> int:
    """Labels of a chunk that suit a device, whole blocks; any other number gives the same weights.

    On a GPU they are counted at a byte a weight, whatever the format.
    """
    if torch.device(device).type != "cuda":
        return CPU_BLOCKS * BLOCK_LABELS
    gpu = torch.cuda.get_device_properties(device)
    return gpu_chunk_blocks(gpu.multi_processor_count, gpu.L2_cache_size, dim) * BLOCK_LABELS


def gpu_chunk_blocks(processors: int, cache_bytes: int, dim: int) -> int:
    """Label blocks of a chunk in half of the L2 cache, or of one wave where that is more, which leave the fewest idle.

    A processor updates a group of features of a block at a time. Among equals the most blocks win, for a chunk has a
    fixed cost too.
    """
    groups = num_groups(dim)
    fit = int(CACHE_SHARE * cache_bytes) // (BLOCK_LABELS * dim)
    most = max(1, processors // groups, min(MAX_GPU_BLOCKS, fit))

    def busy(blocks: int) -> float:
        waves = -(-blocks * groups // processors)
        return blocks * groups / (waves * processors)

    return max(range(1, most + 1), key=lambda blocks: (busy(blocks), blocks))
