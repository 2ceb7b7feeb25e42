"""Where the bytes of a run go, from the configuration alone, before anything large is allocated."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from elmo_kernels import num_groups

from elmo_stream.config import Config
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.order import WINDOW_SHARDS
from elmo_stream.model.classifier import plan_chunks
from elmo_stream.model.encoder import Encoder, restore_encoder
from elmo_stream.training.run import instances_per_epoch, new_encoder

WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; ``memory`` maps each part to its bytes."""

    labels: int
    dim: int
    chunks: int
    instances: int
    steps_per_epoch: int
    steps: int
    memory: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain values, bytes in ``memory``."""
        return asdict(self)

    def table(self) -> str:
        """The plan as lines for a person."""
        head = (
            f"{self.instances:,} instances, {self.labels:,} labels x {self.dim} features in {self.chunks} chunks, "
            f"{self.steps:,} steps ({self.steps_per_epoch:,} an epoch)"
        )
        rows = [*self.memory.items(), ("sum", sum(self.memory.values()))]
        return "\n".join([head, *(f"  {name:<44}{size / 2**20:>12,.1f} MiB" for name, size in rows)])


def _sizes_of_encoder(store: Path, index: StoreIndex, config: Config) -> Encoder:
    """The encoder for its sizes: a bag takes no memory, a transformer is opened."""
    if config.encoder.kind == "transformer":
        return new_encoder(store, config, index.tokenizer)
    sizes = index.tokenizer
    with torch.device("meta"):
        return restore_encoder(config.encoder, store, vocab_size=sizes.vocab_size, max_length=sizes.max_length)


def make_plan(store: Path, config: Config) -> Plan:
    """Sizes of training on a store; opens the encoder to know its parameters.

    Raises:
        UserError: no store, or the encoder is not to be had.
    """
    index = StoreIndex.load(store)
    encoder = _sizes_of_encoder(store, index, config)
    labels, dim, batch = index.labels.count, encoder.dim, config.train.batch
    rule = config.classifier
    chunks = plan_chunks(labels, rule.chunk_labels)
    largest = max(last - first for first, last in chunks)
    parameters = sum(p.numel() * p.element_size() for p in encoder.parameters())
    trained = sum(p.numel() * p.element_size() for p in encoder.parameters() if p.requires_grad)
    kahan = int((1.0 if rule.rounding == "kahan" else rule.kahan_head) * labels) * dim * 2
    train = index.splits["train"]
    shard = max(s.tokens * 2 + s.rows * 16 + s.positives * 8 for s in train.shards)
    instances = instances_per_epoch(index, config)
    per_epoch = -(-instances // batch)
    states = 3 if config.encoder.format == "bf16" else 2
    return Plan(
        labels=labels,
        dim=dim,
        chunks=len(chunks),
        instances=instances,
        steps_per_epoch=per_epoch,
        steps=config.train.steps or config.train.epochs * per_epoch,
        memory={
            "classifier weights": labels * dim * WEIGHT_BYTES[rule.format],
            "classifier exponents": labels * num_groups(dim) if rule.format == "fp8" else 0,
            "classifier Kahan compensation": kahan,
            "gradient of the logits of one chunk": largest * batch * 4,
            "encoder weights": parameters,
            "encoder gradients": trained,
            "encoder optimizer state": states * trained,
            "loader: shards of two windows": 2 * WINDOW_SHARDS * shard,
        },
    )
