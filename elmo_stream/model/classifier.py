"""The labels x dim classifier in chunks of labels: nothing of the size instances x labels is ever formed.

One training step goes over the chunks: gradient of the loss for each logit, its share of the gradient for the encoder
(with the weights from before the step), and the update with rounding. No optimizer state, no FP32 copy of the weights.

Shapes: B instances, L labels of a chunk, D features, H labels with Kahan compensation, P positives, K top-k.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import elmo_kernels
import torch
from elmo_kernels import LOSSES, ChunkWeights
from elmo_kernels.types import DIM_MULTIPLE
from torch import Tensor

from elmo_stream.config import ClassifierConfig
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.model.chunk_layout import ChunkLayout, chunk_tensors
from elmo_stream.model.chunk_store import ChunkStore
from elmo_stream.model.graph import StepGraphs, suits_graphs
from elmo_stream.model.placement import ChunkPlan, plan_chunks

MIN_PRIOR = 1e-9


class RowReader(Protocol):
    """Reads stored rows of the classifier, ``[first, last)``, whatever the chunks they were saved in."""

    def __call__(self, name: str, first: int, last: int) -> Tensor: ...


class ChunkedClassifier:
    """One chunk of weights after the other, each at its place; label ids are sorted by training frequency.

    Args:
        prior: share of positives among all pairs of instances and labels; logits start there.
        plan: chunks and their places; by default all in the memory of the device. Changes no result.
        scratch: folder for the files of mapped chunks.
        weights: rows of a checkpoint; None draws initial ones from (seed, label id, feature).

    Raises:
        UserError: ``dim`` is no multiple of 16.
        CorruptError: the rows of the checkpoint are of another format or size.
        OSError: no room for mapped chunks, or a folder that cannot be written.
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
        plan: ChunkPlan | None = None,
        scratch: Path | None = None,
        weights: RowReader | None = None,
    ) -> None:
        if dim % DIM_MULTIPLE:
            raise UserError(f"The embedding has {dim} features; the classifier needs a multiple of {DIM_MULTIPLE}.")
        self.num_labels, self.dim = num_labels, dim
        self.plan = plan or plan_chunks(num_labels, dim, config, device=device)
        self._config, self._seed = config, seed
        self._loss = LOSSES[config.loss]
        self._prior = self._loss.prior(min(max(prior, MIN_PRIOR), 0.5))
        self._rounding = "stochastic" if config.rounding == "kahan" else config.rounding
        # Counts of saturated and of non-finite new weights; read by the trainer when it reports, not in a step.
        self.flags = torch.zeros(2, dtype=torch.int64, device=device)
        self._scalars = torch.empty(3, dtype=torch.int64, device=device)
        self._graphs = StepGraphs() if suits_graphs(self.plan, device) else None

        def fill_(layout: ChunkLayout, chunk: ChunkWeights) -> None:
            if weights is None:
                self._draw_(layout, chunk)
            else:
                _restore_(chunk, weights)

        self._chunks = ChunkStore(self.plan, device=device, scratch=scratch, fill_=fill_)

    def _draw_(self, layout: ChunkLayout, chunk: ChunkWeights) -> None:
        drawn = elmo_kernels.make_chunk(
            layout.format,
            layout.last - layout.first,
            layout.dim,
            layout.first,
            seed=self._seed,
            std=self._config.init_std,
            kahan_rows=layout.kahan_rows,
            device=chunk.data_LD.device,
        )
        for target, source in zip(chunk_tensors(chunk).values(), chunk_tensors(drawn).values(), strict=True):
            target.copy_(source)

    def train_step(
        self,
        x_BD: Tensor,
        positives: Any,
        *,
        lr: float,
        step: int,
        want_loss: bool = False,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Update all weights with one batch and return what the encoder's backward pass needs.

        Args:
            x_BD: float32 embeddings, detached from the encoder's graph.
            positives: sorted positives of the batch (``elmo_kernels.Positives``).
            lr: learning rate on gradients summed over the batch.
            step: number of the step; keys the random bits of the rounding.
            valid: 0-dim bool on the device of ``x_BD``; where it is False no weight changes, and what is returned means
                nothing.

        Returns:
            (dx_BD float32, the loss summed over labels and instances as a float64 scalar, or None). On a GPU the next
            step may overwrite dx_BD; work of this one on the same stream is done by then.
        """
        numbers = {"lr": lr, "weight_decay": self._config.weight_decay}
        elmo_kernels.step_scalars(x_BD.device, **numbers, seed=self._seed, step=step, out=self._scalars)
        if valid is not None:
            self._scalars[1].mul_(valid)  # a learning rate of 0 changes no weight
        operand_BD = elmo_kernels.operand(x_BD, self._config.format)
        if self._graphs is not None and not want_loss:
            with torch.cuda.device_of(operand_BD):  # whose launches a graph records
                return self._graphs.step(self._step_, operand_BD, positives), None
        dx_BD = torch.zeros_like(x_BD)
        return dx_BD, self._step_(operand_BD, dx_BD, positives, want_loss=want_loss)

    def _step_(self, x_BD: Tensor, dx_BD: Tensor, positives: Any, *, want_loss: bool = False) -> Tensor | None:
        """All chunks, with what ``_scalars`` holds; adds to dx_BD."""
        total = torch.zeros((), dtype=torch.float64, device=x_BD.device) if want_loss else None
        x = elmo_kernels.fp8_operand(x_BD) if self._config.fp8_logits else x_BD
        for chunk in self._chunks.walk(changed=True):
            g_LB, loss = elmo_kernels.logit_grad(
                chunk, x, positives, loss=self._config.loss, prior=self._prior, want_loss=want_loss
            )
            if total is not None and loss is not None:
                total += loss
            elmo_kernels.update_with_(
                chunk, g_LB, x_BD, dx_BD, scalars=self._scalars, rounding=self._rounding, flags=self.flags
            )
            del g_LB  # before the next chunk's is formed
        return total

    def topk(self, x_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(scores_BK float32 logits, label_ids_BK int64) of the k best labels; equal scores go to the lower id."""
        k = min(k, self.num_labels)
        scores_BK = torch.full((len(x_BD), k), float("-inf"), device=x_BD.device)
        ids_BK = torch.full((len(x_BD), k), -1, dtype=torch.int64, device=x_BD.device)
        x_BD = elmo_kernels.operand(x_BD, self._config.format)
        for chunk in self._chunks.walk(changed=False):
            elmo_kernels.topk_merge_(scores_BK, ids_BK, chunk, x_BD)
        return scores_BK + self._prior, ids_BK

    def probability(self, scores: Tensor) -> Tensor:
        """The probabilities of logits from ``topk``."""
        return self._loss.probability(scores)

    def state_chunks(self) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """(first label, last label, tensors) of each chunk, valid until the next one: one chunk in memory at a time."""
        for layout, chunk in self._chunks.walk_host():
            yield layout.first, layout.last, {name: tensor.cpu() for name, tensor in chunk_tensors(chunk).items()}

    def close(self) -> None:
        """Free the memory of the chunks, end background threads and remove scratch files."""
        if self._graphs is not None:
            self._graphs.close()
        self._chunks.close()


def _restore_(chunk: ChunkWeights, weights: RowReader) -> None:
    for name, tensor in chunk_tensors(chunk).items():
        rows = weights(name, chunk.label_offset, chunk.label_offset + len(tensor))
        if rows.dtype != tensor.dtype or rows.shape != tensor.shape:
            raise CorruptError(
                f"the checkpoint's {name!r} is {rows.dtype} {tuple(rows.shape)}, the configuration asks for "
                f"{tensor.dtype} {tuple(tensor.shape)}; it belongs to another run."
            )
        tensor.copy_(rows)
