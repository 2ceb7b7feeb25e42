"""One training batch: padded token ids and the positive labels in the order in which the kernels read them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elmo_stream.config import PAD_MULTIPLE
from elmo_stream.data.store import Shard


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
    """token_ids_BT: int64, padded; mask_BT: bool, true on tokens; instance_B: int64, rows of the split,
    and behind them the labels' names where they are trained on; embedding_BD: bfloat16, where they are cached;
    weight_BT: float32, weights of the tokens, 0 on padding, where they have any.
    """

    token_ids_BT: Tensor
    mask_BT: Tensor
    instance_B: Tensor
    positives: Positives
    embedding_BD: Tensor | None = None
    weight_BT: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; a copy to a GPU, from pinned memory, does not hold up the host."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        pairs = self.positives
        moved = Positives(move(pairs.label_P), move(pairs.instance_P), move(pairs.weight_P), move(pairs.block_ptr))
        embedding_BD = None if self.embedding_BD is None else move(self.embedding_BD)
        weight_BT = None if self.weight_BT is None else move(self.weight_BT)
        return replace(
            self,
            token_ids_BT=move(self.token_ids_BT),
            mask_BT=move(self.mask_BT),
            positives=moved,
            embedding_BD=embedding_BD,
            weight_BT=weight_BT,
        )


def pad(tokens: NDArray[Any], offsets: NDArray[np.int64], pad_id: int) -> tuple[Tensor, Tensor]:
    """(token_ids_BT int64, mask_BT bool), T rounded up to a multiple of 8 so that few shapes occur."""
    lengths = np.diff(offsets)
    longest = max(1, int(lengths.max(initial=0)))
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    mask = np.arange(width) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = tokens
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pad_weights(weights: NDArray[np.float32], mask_BT: Tensor) -> Tensor:
    """weight_BT float32 of tokens that lie as ``mask_BT`` says; 0 on padding."""
    padded = np.zeros(tuple(mask_BT.shape), dtype=np.float32)
    padded[mask_BT.numpy()] = weights
    return torch.from_numpy(padded)


def sort_positives(
    labels: NDArray[np.int64], offsets: NDArray[np.int64], *, num_labels: int, block_labels: int
) -> Positives:
    """Order the labels of a batch by label, then instance, with a pointer per block of labels."""
    instance = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((instance, labels))
    label = labels[order]
    blocks = -(-num_labels // block_labels)
    block_ptr = np.searchsorted(label, np.arange(blocks + 1) * block_labels)
    return Positives(
        torch.from_numpy(label),
        torch.from_numpy(instance[order]),
        torch.ones(len(label), dtype=torch.float32),
        torch.from_numpy(block_ptr.astype(np.int64)),
    )


def make_batch(
    rows: Shard,
    instances: NDArray[np.int64],
    *,
    pad_id: int,
    num_labels: int,
    block_labels: int,
    embedding_BD: Tensor | None = None,
) -> Batch:
    """Assemble a batch from its rows."""
    token_ids_BT, mask_BT = pad(rows.tokens, rows.token_offsets, pad_id)
    positives = sort_positives(rows.labels, rows.label_offsets, num_labels=num_labels, block_labels=block_labels)
    weight_BT = None if rows.token_weights is None else pad_weights(rows.token_weights, mask_BT)
    return Batch(token_ids_BT, mask_BT, torch.from_numpy(instances), positives, embedding_BD, weight_BT)
