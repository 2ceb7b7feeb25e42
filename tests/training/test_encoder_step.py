"""Micro-batches change the memory of the encoder, not what a step learns."""

from pathlib import Path

import pytest
import torch

from elmo_stream.config import EncoderConfig, load_config
from elmo_stream.data.batch import Batch, pad, sort_positives
from elmo_stream.model.encoder import Encoder, create_encoder
from elmo_stream.training.checkpoint import load_checkpoint
from elmo_stream.training.encoder_step import EncoderStep, cut_batch
from elmo_stream.training.trainer import train

VOCABULARY, INSTANCES = 300, 29


def _encoder(kind: str, bert: Path, dropout: float) -> Encoder:
    if kind == "bag":
        config = EncoderConfig(dim=32, bigrams=500, hidden=24, dropout=dropout)
    else:
        config = EncoderConfig(kind="transformer", name=str(bert), dropout=dropout)
    made = create_encoder(config, vocab_size=VOCABULARY, max_length=64, tokenizer=bert / "tokenizer.json", seed=1)
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return made.train()


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 60, (INSTANCES,), generator=generator).sort().values.numpy()
    offsets = torch.tensor([0, *lengths]).cumsum(0).numpy()
    tokens = torch.randint(0, VOCABULARY, (int(offsets[-1]),), generator=generator).numpy()
    labels = torch.arange(INSTANCES).numpy()
    positives = sort_positives(labels, torch.arange(INSTANCES + 1).numpy(), num_labels=INSTANCES, block_labels=1024)
    return Batch(*pad(tokens, offsets, 0), torch.arange(INSTANCES), positives)


def _gradients(encoder: Encoder, micro_batch: int, dx_BD: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch = _batch()
    encoder.zero_grad()
    half = EncoderStep(encoder, batch, cut_batch(batch, micro_batch), seed=5, step=2)
    half.backward(dx_BD)
    return half.x_BD, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["bag", "bert"])
def test_a_cut_batch_has_the_embeddings_and_gradients_of_a_whole_one(kind: str, bert: Path) -> None:
    encoder = _encoder(kind, bert, dropout=0.0)
    dx_BD = torch.randn(INSTANCES, encoder.dim, generator=torch.Generator().manual_seed(4))
    whole = _gradients(encoder, 0, dx_BD)
    for micro_batch in (1, 7, 28):
        x_BD, gradients = _gradients(encoder, micro_batch, dx_BD)
        torch.testing.assert_close(x_BD, whole[0], rtol=1e-4, atol=1e-5)
        assert len(gradients) == len(whole[1]) > 0
        for mine, theirs in zip(gradients, whole[1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max() + 1))
    assert all(torch.equal(a, b) for a, b in zip(_gradients(encoder, 99, dx_BD)[1], whole[1], strict=True))


@pytest.mark.parametrize("kind", ["bag", "bert"])
def test_dropout_is_the_same_when_a_piece_is_embedded_again(kind: str, bert: Path) -> None:
    encoder = _encoder(kind, bert, dropout=0.4)
    batch = _batch()
    pieces = cut_batch(batch, 8)
    half = EncoderStep(encoder, batch, pieces, seed=5, step=2)
    dropped_BD = half.x_BD == 0
    assert 0.3 < float(dropped_BD.float().mean()) < 0.5
    assert not torch.equal(dropped_BD[0:8], dropped_BD[8:16])
    half.backward(dropped_BD.float())  # a gradient for dropped features alone reaches no weight
    assert all(not p.grad.any() for p in encoder.parameters() if p.grad is not None)
    half.backward((~dropped_BD).float())
    assert any(p.grad.any() for p in encoder.parameters() if p.grad is not None)
    assert not torch.equal(EncoderStep(encoder, batch, pieces, seed=5, step=3).x_BD == 0, dropped_BD)


def test_a_piece_is_trimmed_to_its_own_longest_row() -> None:
    batch = _batch()
    pieces = cut_batch(batch, 8)
    assert [piece.rows for piece in pieces] == [slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 32)]
    for piece in pieces:
        longest = int(batch.mask_BT[piece.rows].sum(1).max())
        assert longest <= piece.width < longest + 8
    assert pieces[0].width < pieces[-1].width == batch.mask_BT.shape[1]


def test_training_with_micro_batches_ends_with_the_weights_of_training_without(store: Path, tmp_path: Path) -> None:
    keys = ["encoder.dim=32", "encoder.dropout=0", "classifier.format=fp32", "train.batch=300", "train.steps=3"]
    weights = []
    for micro_batch in (0, 64):
        out = tmp_path / f"run-{micro_batch}"
        config = load_config(None, [*keys, f"train.micro_batch={micro_batch}", "optimizer.warmup_steps=1"])
        assert train(store, out, config, report=lambda line: None) == 0
        checkpoint = load_checkpoint(out)
        assert checkpoint is not None
        weights.append({"weight": checkpoint.rows("weight", 0, 1000), **checkpoint.tensors("encoder")})
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4)
