"""Warm start: a new run begins with the weights of another one, for more epochs, new data or new labels.

The encoder is copied. Labels are matched by name: the rows of known ones are copied, with everything that belongs to
them, into the order of the new store; those of new ones are drawn as in any new run. Rows are read chunk by chunk.
"""

from pathlib import Path

import elmo_kernels
import numpy as np
from torch import Tensor

from elmo_stream.config import Config
from elmo_stream.data.bow import is_bow
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.label_match import ABSENT, match_labels
from elmo_stream.data.labels import LabelNames
from elmo_stream.errors import UserError
from elmo_stream.model.classifier import chunk_tensors
from elmo_stream.training.checkpoint import load_checkpoint
from elmo_stream.training.run import Run, load_encoder, open_run
from elmo_stream.training.runlog import Report

_SAME_KEYS = (
    ("encoder", ("kind", "name", "pooling", "dim", "bigrams", "hidden")),
    ("classifier", ("format", "loss")),
)


class WarmStart:
    """The newest checkpoint of a run, as the beginning of another; called as a reader of the classifier's rows.

    Attributes:
        encoder: with the weights of the checkpoint.
        prior: where the logits of the old run start; its weights are right with this one only.

    Raises:
        UserError: no run or no checkpoint in ``old``, another tokenizer than that of the new store, or a configuration
            that asks for other tensors; names the key.
        CorruptError: the old run is damaged.
    """

    def __init__(self, old: Path, store: Path, index: StoreIndex, config: Config, report: Report) -> None:
        run = open_run(old)
        _check_same(run, store, index, config)
        checkpoint = load_checkpoint(old, report=report)
        if checkpoint is None:
            raise UserError(f"{old}: has no checkpoint yet to begin with; finish it with `elmo-stream resume {old}`.")
        self._checkpoint, self._config = checkpoint, config
        self.encoder = load_encoder(run, checkpoint, config.encoder)
        self.prior = run.info.prior
        self._old_id_L = match_labels(LabelNames(old / "labels"), LabelNames(store / "labels"))
        kept = int(np.sum(self._old_id_L != ABSENT))
        report(
            f"begins with {checkpoint.folder}: {kept:,} labels kept, {index.labels.count - kept:,} new, "
            f"{run.info.labels - kept:,} gone."
        )

    def __call__(self, name: str, first: int, last: int) -> Tensor:
        """Rows of the tensor ``name`` for the labels ``[first, last)`` of the new store."""
        rule = self._config.classifier
        drawn = elmo_kernels.make_chunk(
            rule.format,
            last - first,
            self.encoder.dim,
            first,
            seed=self._config.seed,
            std=rule.init_std,
            kahan_rows=0 if rule.format == "fp32" else last - first,
        )
        rows = chunk_tensors(drawn)[name]
        self._checkpoint.copy_rows(name, self._old_id_L[first:last], rows)
        return rows


def _check_same(run: Run, store: Path, index: StoreIndex, config: Config) -> None:
    theirs, mine = run.info, index.tokenizer
    if (theirs.tokenizer_fingerprint, theirs.max_length) != (mine.fingerprint, mine.max_length):
        how = f"shard it with --tokenizer {run.path / 'tokenizer'} --max-length {theirs.max_length}"
        if is_bow(run.path / "tokenizer"):
            how = f"it must have as many features, of which shard keeps --max-length {theirs.max_length}"
        raise UserError(f"{store}: was tokenized otherwise than the data of {run.path}; {how}.")
    for table, keys in _SAME_KEYS:
        for key in keys:
            old, new = getattr(getattr(run.config, table), key), getattr(getattr(config, table), key)
            if old != new:
                raise UserError(
                    f"{table}.{key} is {new!r}, but {old!r} in {run.path}; a run that begins with it needs the same: "
                    f"--config {run.path / 'config.toml'}."
                )
