"""Plans before there is a run: from a store, or from numbers alone."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elmo_stream.config import Config
from elmo_stream.data.index import StoreIndex
from elmo_stream.model.encoder import Encoder, create_encoder, restore_encoder
from elmo_stream.model.fp8_linear import require_fp8
from elmo_stream.system import free_memory_bytes
from elmo_stream.training.plan import Plan
from elmo_stream.training.planning import DataSizes, make_plan
from elmo_stream.training.rates import Rates
from elmo_stream.training.run import device_of_run, prepare_torch

SUPPOSED_VOCABULARY = 16_000
# An encoder of more than this share of the free memory, as its optimizer needs, is planned without being made.
MOST_OF_MEMORY = 1 / 16


def plan_store(store: Path, config: Config, out: Path | None, given: Sequence[str] = ()) -> Plan:
    """The plan of training on a store in ``out``, by default a folder here.

    Raises:
        UserError: no store, the encoder is not to be had, or a bad rate.
    """
    index = StoreIndex.load(store)
    return _plan(DataSizes.of_store(index, config), config, store / "tokenizer" / "tokenizer.json", out, given)


def plan_sizes(labels: int, instances: int, config: Config, given: Sequence[str] = ()) -> Plan:
    """The plan for so many labels and instances of 128 tokens with five labels each.

    Raises:
        UserError: the encoder is not to be had, or a bad rate.
    """
    sizes = DataSizes.supposed(labels, instances, vocab_size=SUPPOSED_VOCABULARY)
    sizes = replace(sizes, instances=instances + labels * config.train.label_texts)
    return _plan(sizes, config, None, None, given)


def _plan(sizes: DataSizes, config: Config, tokenizer: Path | None, out: Path | None, given: Sequence[str]) -> Plan:
    rates = Rates().with_given(given)
    prepare_torch(config.threads)
    device = device_of_run()
    if device.type == "cuda":  # whose kernels are tried
        require_fp8(config, device)
    encoder = _encoder(config, sizes, tokenizer)
    scratch = Path(config.memory.disk or out or ".")
    plan = make_plan(sizes, config, encoder, device=device, scratch=scratch, calibrate=True)
    known = {name: value for name, value in rates.as_dict().items() if value is not None}
    return replace(plan, rates=replace(plan.rates or Rates(), **known))


def _encoder(config: Config, data: DataSizes, tokenizer: Path | None) -> Encoder:
    """The encoder as training would make it; a large bag without its weights."""
    sizes: dict[str, Any] = {"vocab_size": data.vocab_size, "max_length": data.max_length, "ordered": data.ordered}
    if config.encoder.kind == "bag":
        with torch.device("meta"):
            empty = restore_encoder(config.encoder, Path(), **sizes)
        weights = sum(p.numel() * p.element_size() for p in empty.parameters())
        if weights > MOST_OF_MEMORY * free_memory_bytes():
            return empty
    return create_encoder(config.encoder, tokenizer=tokenizer, seed=config.seed, **sizes)
