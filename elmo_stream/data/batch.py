"""One training batch: padded token ids and the positive labels in the order in which the kernels read them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

PAD_MULTIPLE = 8


@dataclass(frozen=True, slots=True)
class Positives:
    """The positive (label, instance) pairs of a batch, sorted by label, then instance; no pair twice.

    label_P, instance_P: int64; weight_P: float32 in (0, 1]; block_ptr: int64, the pairs whose label lies in block b
    of ``block_labels`` labels are ``[block_ptr[b], block_ptr[b + 1])``.
    """

    label_P: Tensor
    instance_P: Tensor
    weight_P: Tensor
    block_ptr: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """token_ids_BT: int64, padded with ``pad_id``; mask_BT: bool, true on tokens; instance_B: int64 rows of the split."""

    token_ids_BT: Tensor
    mask_BT: Tensor
    instance_B: Tensor
    positives: Positives

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; a copy to a GPU runs beside the computation from pinned memory."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        pairs = self.positives
        moved = Positives(move(pairs.label_P), move(pairs.instance_P), move(pairs.weight_P), move(pairs.block_ptr))
        return replace(self, token_ids_BT=move(self.token_ids_BT), mask_BT=move(self.mask_BT), positives=moved)


@dataclass(frozen=True, slots=True)
class Ragged:
    """Rows of unequal length: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Ragged":
        """The given rows in the given order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.values[source], offsets)


def concatenate(parts: list[Ragged]) -> Ragged:
    """The rows of several ragged arrays, one after the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.values for part in parts]), np.concatenate([[0], np.cumsum(lengths)]))


def pad(tokens: Ragged, pad_id: int) -> tuple[Tensor, Tensor]:
    """(token_ids_BT int64, mask_BT bool), T rounded up to a multiple of 8 so that few shapes occur."""
    lengths = tokens.lengths
    longest = max(1, int(lengths.max(initial=0)))
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    mask = np.arange(width) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = tokens.values
    return torch.from_numpy(ids), torch.from_numpy(mask)


def sort_positives(labels: Ragged, *, num_labels: int, block_labels: int) -> Positives:
    """Order the labels of a batch by label, then instance, with a pointer per block of labels."""
    instance = np.repeat(np.arange(len(labels.offsets) - 1), labels.lengths)
    order = np.lexsort((instance, labels.values))
    label = labels.values[order].astype(np.int64)
    blocks = -(-num_labels // block_labels)
    block_ptr = np.searchsorted(label, np.arange(blocks + 1) * block_labels)
    return Positives(
        torch.from_numpy(label),
        torch.from_numpy(instance[order]),
        torch.ones(len(label), dtype=torch.float32),
        torch.from_numpy(block_ptr.astype(np.int64)),
    )


def make_batch(tokens: Ragged, labels: Ragged, instances: np.ndarray, *, pad_id: int, num_labels: int,
               block_labels: int) -> Batch:
    """Assemble a batch from its rows."""
    token_ids_BT, mask_BT = pad(tokens, pad_id)
    positives = sort_positives(labels, num_labels=num_labels, block_labels=block_labels)
    return Batch(token_ids_BT, mask_BT, torch.from_numpy(instances), positives)
