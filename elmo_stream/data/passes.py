"""The three passes of the converter as functions of one task, to be run in worker processes.

Each leaves its result as a folder that appears with one rename, and skips the work when the folder is there
already; so a conversion that was killed continues where it stopped.

1. :func:`count_part`: check every line, count instances, spill label counts; and tokenise, unless the tokenizer is to
   be trained on what is read.
2. :func:`encode_part`: give labels their ids, compute the target position of every row, sort by it.
3. :func:`build_shard`: gather the rows of one shard, one slice from each part, and write it.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmo_stream.data.arrays import map_array, save_array
from elmo_stream.data.bow import BagOfFeatures
from elmo_stream.data.index import ShardEntry
from elmo_stream.data.label_runs import LabelCounter, Run
from elmo_stream.data.labels import LabelMap
from elmo_stream.data.readers import read_part
from elmo_stream.data.readers.instance import Fields, Part, RawInstance, file_identity
from elmo_stream.data.shuffle import permute
from elmo_stream.data.store import Shard, concatenate, create_store
from elmo_stream.data.tokenize import (
    TOKENIZER_FILE,
    TRAINING_TEXT_CHARACTERS,
    TRAINING_TEXTS,
    Tokenizer,
    load_tokenizer,
)
from elmo_stream.data.tokenized import TokenizedPart, load_arrays, save_arrays, tokenize_part
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import new_folder, read_json, write_json_durably

_COUNTS_FILE = "counts.json"
_SAMPLE_FILE = "texts.json"


@dataclass(frozen=True)
class PartTask:
    """One part of one split; ``number`` counts the parts of the split in the order of the input.

    ``tokenizer_folder`` is None where the tokenizer is trained on what is read.
    """

    build: Path
    split: str
    number: int
    part: Part
    fields: Fields
    tokenizer_folder: Path | None

    def folder(self, kind: str) -> Path:
        """Where the result of a pass over this part is."""
        return part_folder(self.build, kind, self.split, self.number)


@dataclass(frozen=True)
class PartCounts:
    """What pass 1 found in a part: rows kept and dropped, duplicate labels merged, runs spilled."""

    rows: int
    dropped: dict[str, int]
    duplicates: int
    runs: list[str]


@dataclass(frozen=True)
class EncodeTask:
    """Pass 2 over a part that holds ``rows`` of the split's ``total`` rows, from ``first_row`` on.

    ``shuffle_seed`` None keeps the order of the input.
    """

    source: PartTask
    first_row: int
    rows: int
    total: int
    shuffle_seed: int | None
    tokenizer_folder: Path
    lookup_folder: Path

    def positions(self) -> NDArray[np.int64]:
        """Where each kept row of the part goes in the split, int64."""
        rows = np.arange(self.first_row, self.first_row + self.rows, dtype=np.int64)
        return rows if self.shuffle_seed is None else permute(rows, self.total, self.shuffle_seed)


@dataclass(frozen=True)
class PartEncoding:
    """What pass 2 found in a part: truncated instances, occurrences of labels unknown to training."""

    truncated: int
    unseen: int


@dataclass(frozen=True)
class ShardTask:
    """Pass 3 for the rows at positions ``begin`` ... ``end - 1`` of a split, out of ``parts`` parts."""

    build: Path
    split: str
    number: int
    begin: int
    end: int
    parts: int
    root: Path
    backend: str
    vocab_size: int
    num_labels: int
    weighted: bool


def part_folder(build: Path, kind: str, split: str, number: int) -> Path:
    """Folder of the result of a pass (``kind``: count, rows) over a part."""
    return build / f"{kind}-{split}-{number:05d}"


def count_part(task: PartTask) -> PartCounts:
    """Pass 1; raises what :func:`read_part` raises."""
    folder = task.folder("count")
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            counter = LabelCounter(temporary)
            dropped: Counter[str] = Counter()
            rows = duplicates = 0

            def kept() -> Iterator[RawInstance]:
                nonlocal rows, duplicates
                for instance in read_part(task.part, task.fields):
                    if reason := _reason_to_drop(task.split, instance):
                        dropped[reason] += 1
                        continue
                    rows += 1
                    duplicates += instance.duplicates
                    if task.split == "train":
                        counter.add(instance.labels)
                    yield instance

            if task.tokenizer_folder is not None:
                tokenize_part(_tokenizer(task.tokenizer_folder), kept()).save(temporary)
            else:
                deque(kept(), maxlen=0)
            counter.close()
            counts = PartCounts(rows, dict(sorted(dropped.items())), duplicates, counter.runs)
            write_json_durably(temporary / _COUNTS_FILE, asdict(counts))
    return PartCounts(**read_json(folder / _COUNTS_FILE))


def count_runs(task: PartTask, counts: PartCounts) -> list[Run]:
    """The runs of label counts that pass 1 spilled for a part."""
    return [Run(task.folder("count"), name) for name in counts.runs]


def sample_texts(task: EncodeTask) -> Path:
    """The part's share of a uniform sample of training texts, the same whatever the parts are, as a file of JSON.

    A worker that is killed while it sends much to its parent would leave that waiting for the rest.
    """
    folder = task.source.folder("sample")
    if not folder.is_dir():
        chosen = task.positions() < TRAINING_TEXTS
        kept = zip(chosen, _kept(task.source), strict=False)
        texts = [instance.text[:TRAINING_TEXT_CHARACTERS] for take, instance in kept if take]
        with new_folder(folder) as temporary:
            write_json_durably(temporary / _SAMPLE_FILE, texts)
    return folder / _SAMPLE_FILE


def encode_part(task: EncodeTask) -> PartEncoding:
    """Pass 2."""
    folder = task.source.folder("rows")
    if not folder.is_dir():
        part = TokenizedPart.load(task.source.folder("count"))
        if part is None:
            part = tokenize_part(_tokenizer(task.tokenizer_folder), _kept(task.source))
        if part.local.rows != task.rows:
            raise UserError(
                f"{task.source.part.source.main.name}: was changed during the conversion; run the command again."
            )
        rows, unseen = part.rows(LabelMap(task.lookup_folder))
        positions = task.positions()
        order = np.argsort(positions)
        _save_rows(folder, positions[order], rows.take(order), PartEncoding(part.truncated, unseen))
    return PartEncoding(**read_json(folder / _COUNTS_FILE))


def build_shard(task: ShardTask) -> ShardEntry:
    """Pass 3."""
    store = create_store(
        task.backend, task.root, vocab_size=task.vocab_size, num_labels=task.num_labels, weighted=task.weighted
    )
    name = f"shard-{task.number:05d}"
    if entry := store.describe_shard(task.split, name):
        return entry
    folders = [part_folder(task.build, "rows", task.split, number) for number in range(task.parts)]
    loaded = [_load_rows(folder, task.begin, task.end) for folder in folders]
    positions = np.concatenate([part_positions for part_positions, _ in loaded])
    order = np.argsort(positions)
    if not np.array_equal(positions[order], np.arange(task.begin, task.end)):
        raise CorruptError(f"{task.build}: rows are missing from the scratch; remove it and run the command again.")
    return store.write_shard(task.split, name, concatenate([rows for _, rows in loaded]).take(order))


def _reason_to_drop(split: str, instance: RawInstance) -> str | None:
    """Why a row cannot train; test and validation rows are all kept, so that the metrics count every one."""
    if split != "train":
        return None
    if instance.features is not None:
        if not len(instance.features.id_N):
            return "no features"
    elif not instance.text.strip():
        return "empty text"
    return None if instance.labels else "no labels"


def _kept(task: PartTask) -> Iterator[RawInstance]:
    return (one for one in read_part(task.part, task.fields) if not _reason_to_drop(task.split, one))


def _tokenizer(folder: Path) -> Tokenizer | BagOfFeatures:
    return _loaded_tokenizer(folder, *file_identity(folder / TOKENIZER_FILE))


@lru_cache(maxsize=1)
def _loaded_tokenizer(folder: Path, size: int, changed_ns: int) -> Tokenizer | BagOfFeatures:
    """A process reads many parts with one tokenizer, and loading it takes as long as a thousand texts."""
    return load_tokenizer(folder)


def _save_rows(folder: Path, positions: NDArray[np.int64], rows: Shard, encoding: PartEncoding) -> None:
    with new_folder(folder) as temporary:
        save_array(temporary / "positions.npy", positions)
        save_arrays(temporary, rows)
        write_json_durably(temporary / _COUNTS_FILE, asdict(encoding))


def _load_rows(folder: Path, begin: int, end: int) -> tuple[NDArray[np.int64], Shard]:
    """The rows of a part whose positions are in [begin, end), read without the rest of the part."""
    positions = map_array(folder / "positions.npy")
    first, last = np.searchsorted(positions, [begin, end]).tolist()
    return np.array(positions[first:last]), load_arrays(folder).rows_between(first, last)
