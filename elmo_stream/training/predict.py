"""Predictions in words: label names with probabilities, from the run folder alone."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import torch

from elmo_stream.data.batch import pad, pad_weights
from elmo_stream.data.bow import BagOfFeatures
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.readers import FORMATS, read_part, split_source
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.readers.instance import Fields, RawInstance
from elmo_stream.data.readers.unpack import unpack
from elmo_stream.data.tokenize import load_tokenizer
from elmo_stream.errors import UserError
from elmo_stream.files import new_file, temporary_folder
from elmo_stream.training.models import trained_model
from elmo_stream.training.plan import EVALUATION_BATCH
from elmo_stream.training.run import device_of_run, open_run
from elmo_stream.training.runlog import Report

PART_BYTES = 32 << 20

Prediction = list[tuple[str, float]]


class Predictor:
    """Tags texts with the labels of a trained run.

    Args:
        run: folder of the run; neither its store nor a network is needed.
        step: checkpoint to use; the newest by default.
        memory: see ``resume``.

    Raises:
        UserError: no run here, or no checkpoint yet.
        CorruptError: the run's files are damaged.
    """

    def __init__(
        self, run: Path | str, *, step: int | None = None, memory: Iterable[str] = (), report: Report = print
    ) -> None:
        self._device = device_of_run()
        opened = open_run(Path(run), memory)
        self.step, self._encoder, self._classifier = trained_model(opened, step, self._device, report)
        self._tokenizer = load_tokenizer(Path(run) / "tokenizer")
        self._names = LabelNames(Path(run) / "labels")

    def close(self) -> None:
        """Free the memory, and remove the scratch files of a classifier that does not fit it."""
        self._classifier.close()

    def __call__(self, texts: Sequence[str], k: int = 5) -> list[Prediction]:
        """The ``k`` best labels of each text as (name, probability), best first."""
        if not texts:
            return []
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"The text {text!r:.80} is not valid Unicode; give it as UTF-8.") from error
        return self.tag([RawInstance(text, (), 0) for text in texts], k)

    def tag(self, instances: Sequence[RawInstance], k: int = 5) -> list[Prediction]:
        """The same for instances, of texts or of features, as the run was trained on; at least one.

        Raises:
            UserError: they are of the other kind.
        """
        bow = isinstance(self._tokenizer, BagOfFeatures)
        if bow != (instances[0].features is not None):
            kinds = ("features", "texts") if bow else ("texts", "features")
            raise UserError(f"the run was trained on {kinds[0]}, and cannot tag {kinds[1]}.")
        weights = None
        if isinstance(self._tokenizer, BagOfFeatures):
            features = [instance.features for instance in instances if instance.features is not None]
            tokens, offsets, weights, _ = self._tokenizer.encode_features(features)
        else:
            tokens, offsets, _ = self._tokenizer.encode_batch([instance.text for instance in instances])
        token_ids_BT, mask_BT = pad(tokens, offsets, self._tokenizer.pad_id)
        weight_BT = None if weights is None else pad_weights(weights, mask_BT).to(self._device)
        with torch.no_grad():
            x_BD = self._encoder(token_ids_BT.to(self._device), mask_BT.to(self._device), weight_BT)
            scores_BK, ids_BK = self._classifier.topk(x_BD, k)
        probability_BK = self._classifier.probability(scores_BK).cpu().numpy()
        return [
            list(zip(self._names[ids], map(float, row), strict=True))
            for ids, row in zip(ids_BK.cpu().numpy(), probability_BK, strict=True)
        ]


def predict(
    run: Path,
    source: Path,
    out: Path,
    *,
    k: int = 5,
    text_fields: Sequence[str] | None = None,
    memory: Iterable[str] = (),
    report: Report = print,
) -> int:
    """Tag every instance of a file in any format that :func:`convert` reads, labels being left unread.

    Line i of ``out`` (JSONL, or Parquet by ending) belongs to instance i of the input.

    Each line is ``{"labels": [...], "probabilities": [...]}``, best first. The output appears when it is complete.

    Returns:
        The number of instances.

    Raises:
        UserError: bad input (names file and line), or ``out`` exists or cannot be written in its format.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; choose another file or remove it first.")
    if not out.parent.is_dir():
        raise UserError(f"{out}: its folder {out.parent} does not exist.")
    if out.suffix not in _WRITERS:
        raise UserError(f"{out}: the ending says no known format; expected {' or '.join(_WRITERS)}.")
    with (
        new_file(out) as stream,
        _instances(source, text_fields, out) as instances,
        closing(Predictor(run, memory=memory, report=report)) as predictor,
    ):
        return _WRITERS[out.suffix](stream, _batches(predictor, instances, k))


@contextmanager
def _instances(path: Path, text_fields: Sequence[str] | None, out: Path) -> Iterator[Iterator[RawInstance]]:
    """The instances of a file, which is unpacked into a temporary folder beside ``out`` where it is packed."""
    source, _ = open_source(path, "auto", labeled=False)
    fields = Fields(tuple(text_fields or FORMATS[source.format].text_fields), label=None)
    with temporary_folder(out.with_name(f"{out.name}.unpacked")) as folder:
        if source.main.packing:
            source = replace(source, main=unpack(source.main, folder))
        parts = split_source(source, fields, PART_BYTES)
        yield chain.from_iterable(read_part(part, fields) for part in parts)


def _batches(predictor: Predictor, instances: Iterator[RawInstance], k: int) -> Iterator[list[Prediction]]:
    while batch := list(islice(instances, EVALUATION_BATCH)):
        yield predictor.tag(batch, k)


def _as_row(prediction: Prediction) -> dict[str, Any]:
    return {
        "labels": [name for name, _ in prediction],
        "probabilities": [round(probability, 6) for _, probability in prediction],
    }


def _write_jsonl(stream: IO[bytes], batches: Iterator[list[Prediction]]) -> int:
    count = 0
    for batch in batches:
        for prediction in batch:
            stream.write((json.dumps(_as_row(prediction), ensure_ascii=False) + "\n").encode())
        count += len(batch)
    return count


def _write_parquet(stream: IO[bytes], batches: Iterator[list[Prediction]]) -> int:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Writing Parquet needs pyarrow: pip install pyarrow; or give an output ending in .jsonl."
        ) from error
    schema = pyarrow.schema(
        [("labels", pyarrow.list_(pyarrow.string())), ("probabilities", pyarrow.list_(pyarrow.float64()))]
    )
    count = 0
    with pyarrow.parquet.ParquetWriter(stream, schema) as writer:
        for batch in batches:
            writer.write_table(pyarrow.Table.from_pylist([_as_row(row) for row in batch], schema))
            count += len(batch)
    return count


_WRITERS = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
