"""The encoder's half of a training step: the embeddings of a batch, and the gradient back through them.

A batch that is cut into pieces is embedded twice: without gradients for the classifier's one step, and once more,
piece by piece, to receive its rows of the embeddings' gradient. Activations are those of one piece (gradient caching:
Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP 2021). Dropout is seeded
from (run seed, step, piece) and so the same both times.

Shapes: B instances, T tokens, D features.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from elmo_stream.config import PAD_MULTIPLE
from elmo_stream.data.batch import Batch
from elmo_stream.model.encoder import Encoder


@dataclass(frozen=True)
class Piece:
    """Consecutive instances of a batch, and the tokens that the longest of them needs."""

    rows: slice
    width: int


def cut_batch(batch: Batch, micro_batch: int) -> list[Piece]:
    """Pieces of at most ``micro_batch`` instances, or one of all for 0; reads the lengths, so call it on the host."""
    instances = len(batch.instance_B)
    size = min(micro_batch or instances, instances)
    length_B = batch.mask_BT.sum(1)
    pieces = []
    for first in range(0, instances, size):
        longest = int(length_B[first : first + size].max())
        width = min(-(-longest // PAD_MULTIPLE) * PAD_MULTIPLE, batch.mask_BT.shape[1])
        pieces.append(Piece(slice(first, first + size), width))
    return pieces


class EncoderStep:
    """Embeddings of a batch, with their graph when the batch is in one piece.

    Args:
        batch: on the encoder's device. pieces: from ``cut_batch``.
        seed, step: of the run; with the number of the piece they seed torch's generators, which dropout draws from.

    Attributes:
        x_BD: float32, detached from the encoder's graph.
    """

    def __init__(self, encoder: Encoder, batch: Batch, pieces: list[Piece], *, seed: int, step: int) -> None:
        self._encoder, self._batch, self._pieces = encoder, batch, pieces
        self._seed, self._step = seed, step
        if len(pieces) == 1:
            self._with_graph_BD = self._embed(0)
            self.x_BD = self._with_graph_BD.detach()
        else:
            with torch.no_grad():
                self.x_BD = torch.cat([self._embed(number) for number in range(len(pieces))])

    def backward(self, dx_BD: Tensor) -> None:
        """Add to the gradients of the encoder's weights, given those of ``x_BD``; call it once."""
        if len(self._pieces) == 1:
            self._with_graph_BD.backward(dx_BD)
            return
        for number, piece in enumerate(self._pieces):
            self._embed(number).backward(dx_BD[piece.rows])

    def _embed(self, number: int) -> Tensor:
        piece = self._pieces[number]
        torch.manual_seed(_mix(self._seed, self._step, number))
        return embed(self._encoder, self._batch, piece)


def embed(encoder: Encoder, batch: Batch, piece: Piece | None = None) -> Tensor:
    """x_BD float32 of a batch, or of a piece of it: from its tokens, or from the embeddings that it carries."""
    rows, width = (piece.rows, piece.width) if piece else (slice(None), batch.mask_BT.shape[1])
    if batch.embedding_BD is not None:
        return encoder.head(batch.embedding_BD[rows].float())
    weight_BT = None if batch.weight_BT is None else batch.weight_BT[rows, :width]
    return encoder(batch.token_ids_BT[rows, :width], batch.mask_BT[rows, :width], weight_BT)


def _mix(seed: int, step: int, piece: int) -> int:
    """63 bits; the first piece has those of the step, so that one piece is as none."""
    text = f"{seed}/{step}/{piece}" if piece else f"{seed}/{step}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
