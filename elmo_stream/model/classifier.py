"""The labels x dim classifier in chunks of labels: nothing of the size instances x labels is ever formed.

One training step goes over the chunks: gradient of the loss for each logit, its share of the gradient for the encoder
(with the weights from before the step), and the update with rounding. No optimizer state, no FP32 copy of the weights.

Shapes: B instances, L labels of a chunk, D features, H labels with Kahan compensation, P positives, K top-k.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import elmo_kernels
import torch
from elmo_kernels import BLOCK_LABELS, LOSSES, ChunkWeights
from torch import Tensor

from elmo_stream.config import ClassifierConfig
from elmo_stream.errors import CorruptError, UserError

# At 768 FP8 features a chunk of this size stays in the L2 cache of a large GPU together with its logits.
DEFAULT_CHUNK_LABELS = 32 * BLOCK_LABELS
MIN_PRIOR = 1e-9


def plan_chunks(num_labels: int, chunk_labels: int) -> list[tuple[int, int]]:
    """(first, last) label of each chunk; sizes are multiples of ``BLOCK_LABELS`` except the last one's."""
    wanted = chunk_labels or DEFAULT_CHUNK_LABELS
    size = -(-wanted // BLOCK_LABELS) * BLOCK_LABELS
    return [(first, min(first + size, num_labels)) for first in range(0, num_labels, size)]


class RowReader(Protocol):
    """Reads stored rows of the classifier, ``[first, last)``, whatever the chunks they were saved in."""

    def __call__(self, name: str, first: int, last: int) -> Tensor: ...


class ChunkedClassifier:
    """One chunk of weights after the other, on one device; label ids are sorted by training frequency.

    Args:
        prior: share of positives among all pairs of instances and labels; logits start there.
        weights: rows of a checkpoint; None draws initial ones from (seed, label id, feature).

    Raises:
        UserError: ``dim`` is no multiple of 16.
        CorruptError: the rows of the checkpoint are of another format or size.
    """

    def __init__(
        self,
        num_labels: int,
        dim: int,
        config: ClassifierConfig,
        *,
        prior: float,
        seed: int,
        device: torch.device,
        weights: RowReader | None = None,
    ) -> None:
        if dim % 16:
            raise UserError(f"The embedding has {dim} features; the classifier needs a multiple of 16.")
        self.num_labels, self.dim = num_labels, dim
        self._config, self._seed, self._device = config, seed, device
        self._loss = LOSSES[config.loss]
        self._prior = self._loss.prior(min(max(prior, MIN_PRIOR), 0.5))
        kahan_share = 1.0 if config.rounding == "kahan" else config.kahan_head
        self._kahan_labels = int(kahan_share * num_labels)
        self._rounding = "stochastic" if config.rounding == "kahan" else config.rounding
        # Counts of saturated and of non-finite new weights; read by the trainer when it reports, not in a step.
        self.flags = torch.zeros(2, dtype=torch.int64, device=device)
        self.chunks = [self._make(first, last, weights) for first, last in plan_chunks(num_labels, config.chunk_labels)]

    def _make(self, first: int, last: int, weights: RowReader | None) -> ChunkWeights:
        config, shape = self._config, (last - first, self.dim, first)
        kahan_rows = max(0, min(self._kahan_labels, last) - first)
        if weights is None:
            return elmo_kernels.make_chunk(
                config.format,
                *shape,
                seed=self._seed,
                std=config.init_std,
                kahan_rows=kahan_rows,
                device=self._device,
            )
        chunk = elmo_kernels.empty_chunk(config.format, *shape, kahan_rows=kahan_rows, device=self._device)
        for name, tensor in chunk_tensors(chunk).items():
            rows = weights(name, first, first + len(tensor))
            if rows.dtype != tensor.dtype or rows.shape != tensor.shape:
                raise CorruptError(
                    f"the checkpoint's {name!r} is {rows.dtype} {tuple(rows.shape)}, the configuration asks for "
                    f"{tensor.dtype} {tuple(tensor.shape)}; it belongs to another run."
                )
            tensor.copy_(rows)
        return chunk

    def train_step(
        self, x_BD: Tensor, positives: Any, *, lr: float, step: int, want_loss: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Update all weights with one batch and return what the encoder's backward pass needs.

        Args:
            x_BD: float32 embeddings, detached from the encoder's graph.
            positives: sorted positives of the batch (``elmo_kernels.Positives``).
            lr: learning rate on gradients summed over the batch.
            step: number of the step; keys the random bits of the rounding.

        Returns:
            (dx_BD float32, the loss summed over labels and instances as a float64 scalar, or None).
        """
        dx_BD = torch.zeros_like(x_BD)
        total = torch.zeros((), dtype=torch.float64, device=x_BD.device) if want_loss else None
        scalars = elmo_kernels.step_scalars(
            x_BD.device, lr=lr, weight_decay=self._config.weight_decay, seed=self._seed, step=step
        )
        x_BD = elmo_kernels.operand(x_BD, self._config.format)
        for chunk in self.chunks:
            g_LB, loss = elmo_kernels.logit_grad(
                chunk, x_BD, positives, loss=self._config.loss, prior=self._prior, want_loss=want_loss
            )
            if total is not None and loss is not None:
                total += loss
            elmo_kernels.update_with_(
                chunk, g_LB, x_BD, dx_BD, scalars=scalars, rounding=self._rounding, flags=self.flags
            )
        return dx_BD, total

    def topk(self, x_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(scores_BK float32 logits, label_ids_BK int64) of the k best labels; equal scores go to the lower id."""
        k = min(k, self.num_labels)
        scores_BK = torch.full((len(x_BD), k), float("-inf"), device=x_BD.device)
        ids_BK = torch.full((len(x_BD), k), -1, dtype=torch.int64, device=x_BD.device)
        x_BD = elmo_kernels.operand(x_BD, self._config.format)
        for chunk in self.chunks:
            elmo_kernels.topk_merge_(scores_BK, ids_BK, chunk, x_BD)
        return scores_BK + self._prior, ids_BK

    def probability(self, scores: Tensor) -> Tensor:
        """The probabilities of logits from ``topk``."""
        return self._loss.probability(scores)

    def state_chunks(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """(first label, last label, tensors) of each chunk, one chunk in memory at a time."""
        for chunk in self.chunks:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in chunk_tensors(chunk).items()}
            yield chunk.label_offset, chunk.label_offset + len(chunk.data_LD), tensors


def chunk_tensors(chunk: ChunkWeights) -> dict[str, Tensor]:
    """The stored tensors of a chunk by name; each has one row a label."""
    named = {"weight": chunk.data_LD, "exponent": chunk.exponent_LG, "compensation": chunk.comp_HD}
    return {name: tensor for name, tensor in named.items() if tensor is not None and len(tensor)}
