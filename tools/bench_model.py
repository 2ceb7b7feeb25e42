"""Peak memory and time of whole training steps at Amazon-3M's shape: BERT-base and 2.8 million labels.

    python -m tools.bench_model --json model.json

A step embeds the batch, updates all chunks of the classifier, and updates the encoder, as training does; weights are
random, texts have the full length. ``planned`` is what ``elmo-stream plan`` promises, ``MiB`` the peak of the
allocator, weights, gradients and optimizer state included. The second row has a budget, beyond which chunks are
streamed from pinned host memory.
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from elmo_stream.config import load_config
from elmo_stream.data.batch import Batch, Positives
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.encoder import Encoder, TransformerEncoder
from elmo_stream.model.placement import DEVICE
from elmo_stream.training.encoder_step import EncoderStep, cut_batch
from elmo_stream.training.optim import build_optimizer
from elmo_stream.training.planning import DataSizes, make_plan
from tools.batches import LR, PRIOR_SHARE, SEED, Shape, make_batch
from tools.measuring import MIB, attempt, finish, median_ms, parser
from tools.tables import Row

COLUMNS = ("labels", "budget", "streamed GiB", "ms", "instances/s", "MiB", "planned MiB", "goal")
KEYS = (
    "encoder.kind=transformer", "encoder.name=bert", "encoder.format=bf16", "encoder.rounding=stochastic",
    "encoder.checkpointing=true", "optimizer.states=8bit", "train.micro_batch=32", "classifier.kahan_head=0",
)  # fmt: skip
INSTANCES = 1_717_899


@dataclass(frozen=True)
class Case:
    """A shape, the layers and tokens of its encoder, the budget of the device's memory, and what to reach."""

    shape: Shape
    layers: int
    tokens: int
    budget: str = ""
    goal: str = "-"


CASES = (
    Case(Shape(2_812_281, 768, 128), 12, 128, goal="MiB <= 3379"),
    Case(Shape(2_812_281, 768, 128), 12, 128, "1600MiB", goal="MiB <= 1638"),
)
TINY_CASES = (Case(Shape(3000, 64, 8), 2, 16),)


def make_encoder(case: Case, keys: Sequence[str]) -> Encoder:
    """A BERT with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(SEED)
    dim = case.shape.dim
    sizes = {"hidden_size": dim, "num_attention_heads": dim // 64, "intermediate_size": 4 * dim}
    model = BertModel(BertConfig(num_hidden_layers=case.layers, **sizes))
    rule = load_config(None, keys).encoder
    return Encoder(TransformerEncoder(model, rule.pooling, rule.checkpointing), rule)


def measure(case: Case, device: torch.device, repeats: int) -> Row:
    """Time and peak of a case."""
    shape, gpu = case.shape, device.type == "cuda"
    keys = [*KEYS, f"train.batch={shape.batch}", *([f"memory.device={case.budget}"] if case.budget else [])]
    config = load_config(None, keys)
    encoder = make_encoder(case, keys)
    vocabulary = int(encoder.body.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    sizes = DataSizes.supposed(shape.labels, INSTANCES, vocab_size=vocabulary, max_length=case.tokens)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(sizes, config, encoder, device=device, scratch=Path(folder))
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        encoder.to(device).train()
        optimizer = build_optimizer(encoder, config.optimizer, rounding=config.encoder.rounding)
        assert optimizer is not None
        classifier = ChunkedClassifier(
            shape.labels,
            shape.dim,
            config.classifier,
            prior=PRIOR_SHARE,
            seed=SEED,
            device=device,
            plan=plan.chunks,
            scratch=Path(folder),
        )
        ids_BT = torch.randint(vocabulary, (shape.batch, case.tokens), generator=torch.Generator().manual_seed(SEED))
        host = Batch(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool), torch.arange(shape.batch), _positives(shape))
        pieces, batch = cut_batch(host, config.train.micro_batch), host.to(device)

        def step() -> None:
            half = EncoderStep(encoder, batch, pieces, seed=SEED, step=1)
            dx_BD, _ = classifier.train_step(half.x_BD, batch.positives, lr=LR, step=1)
            half.backward(dx_BD)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        try:
            ms = median_ms(step, device, repeats=repeats)
        finally:
            classifier.close()
    layouts = zip(plan.chunks.layouts, plan.chunks.places, strict=True)
    return {
        "streamed GiB": sum(layout.bytes for layout, place in layouts if place != DEVICE) / 2**30,
        "ms": ms,
        "instances/s": 1e3 * shape.batch / ms,
        "MiB": torch.cuda.max_memory_allocated(device) / MIB if gpu else None,
        "planned MiB": plan.peak(DEVICE) / MIB,
    }


def _positives(shape: Shape) -> Positives:
    pairs = make_batch(shape, torch.device("cpu"))
    return Positives(pairs.label_P, pairs.instance_P, pairs.weight_P, pairs.block_ptr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a row failed."""
    made = parser(__doc__, tiny="one tiny model: tries the code")
    made.add_argument("--repeats", type=int, default=3, help="timed steps of a row")
    options = made.parse_args(arguments)
    rows: list[Row] = []
    for case in TINY_CASES if options.tiny else CASES:
        row: Row = {"labels": case.shape.labels, "budget": case.budget or "-", "goal": case.goal}
        rows.append(attempt(row, partial(measure, case, options.device, options.repeats)))
    return finish(options, rows, COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
