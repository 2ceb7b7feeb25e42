"""Predictions in words: label names with probabilities, from the run folder alone."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch

from elmo_stream.data.batch import pad
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.readers import Fields, Part, check_format, read_part
from elmo_stream.data.tokenize import Tokenizer
from elmo_stream.errors import UserError
from elmo_stream.system import fsync_path
from elmo_stream.training.models import trained_model
from elmo_stream.training.plan import EVALUATION_BATCH
from elmo_stream.training.run import device_of_run, open_run
from elmo_stream.training.runlog import Report

Prediction = list[tuple[str, float]]


class Predictor:
    """Tags texts with the labels of a trained run.

    Args:
        run: folder of the run; neither its store nor a network is needed.
        step: checkpoint to use; the newest by default.

    Raises:
        UserError: no run here, or no checkpoint yet.
        CorruptError: the run's files are damaged.
    """

    def __init__(self, run: Path | str, *, step: int | None = None, report: Report = print) -> None:
        self._device = device_of_run()
        self.step, self._encoder, self._classifier = trained_model(open_run(Path(run)), step, self._device, report)
        self._tokenizer = Tokenizer.load(Path(run) / "tokenizer")
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
        tokens, offsets, _ = self._tokenizer.encode_batch(texts)
        token_ids_BT, mask_BT = pad(tokens, offsets, self._tokenizer.pad_id)
        with torch.no_grad():
            x_BD = self._encoder(token_ids_BT.to(self._device), mask_BT.to(self._device))
            scores_BK, ids_BK = self._classifier.topk(x_BD, k)
        probability_BK = self._classifier.probability(scores_BK).cpu().numpy()
        return [
            list(zip(self._names[ids], map(float, row), strict=True))
            for ids, row in zip(ids_BK.cpu().numpy(), probability_BK, strict=True)
        ]


def predict(
    run: Path, source: Path, out: Path, *, k: int = 5, text_fields: Sequence[str] = ("text",), report: Report = print
) -> int:
    """Tag every line of a JSONL file; line i of ``out`` (JSONL, or Parquet by ending) belongs to line i of the input.

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
    check_format(source, "auto")
    instances = read_part(Part(source, 0, source.stat().st_size), Fields(tuple(text_fields), label=None))
    predictor = Predictor(run, report=report)
    temporary = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as stream:
            count = _WRITERS[out.suffix](stream, _batches(predictor, (instance.text for instance in instances), k))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        predictor.close()
    fsync_path(out.parent)
    return count


def _batches(predictor: Predictor, texts: Iterable[str], k: int) -> Iterator[list[Prediction]]:
    rest = iter(texts)
    while batch := list(islice(rest, EVALUATION_BATCH)):
        yield predictor(batch, k)


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
