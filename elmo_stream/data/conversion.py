"""One conversion from parts to the index: which pass runs over what, in which order."""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from elmo_stream.data.build_folder import Options
from elmo_stream.data.index import BUILD_NAME, LabelsEntry, SplitEntry, StoreIndex, TokenizerEntry
from elmo_stream.data.label_build import build_labels
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.passes import (
    EncodeTask,
    PartCounts,
    PartTask,
    ShardTask,
    build_shard,
    count_part,
    count_runs,
    encode_part,
    sample_texts,
)
from elmo_stream.data.readers import split_parts
from elmo_stream.data.tokenize import Tokenizer, open_tokenizer, wants_training
from elmo_stream.data.workers import Workers
from elmo_stream.errors import UserError
from elmo_stream.files import list_files, new_folder

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; a stage is such as "counting train", done and total are parts
or shards.
"""


class Conversion:
    """One conversion on its way from parts to the index."""

    def __init__(
        self,
        out: Path,
        inputs: dict[str, list[Path]],
        options: Options,
        part_bytes: int,
        pool: Workers,
        progress: Progress,
    ) -> None:
        self._out, self._build, self._options = out, out / BUILD_NAME, options
        self._pool, self._progress = pool, progress
        self._tasks = {
            split: [
                PartTask(self._build, split, number, part, options.fields)
                for number, part in enumerate(part for path in paths for part in split_parts(path, part_bytes))
            ]
            for split, paths in inputs.items()
        }

    def run(self) -> StoreIndex:
        """Everything but writing the index."""
        tokenizer = None if wants_training(self._options.tokenizer) else self._tokenizer()
        counts = {
            split: self._pool.map(count_part, tasks, self._tick("counting", split))
            for split, tasks in self._tasks.items()
        }
        self._check_counts(counts)
        num_labels = self._labels(counts["train"])
        encode_tasks = {split: self._encode_tasks(split, counts[split]) for split in self._tasks}
        tokenizer = tokenizer or self._tokenizer(encode_tasks["train"])
        splits = {
            split: self._split(split, encode_tasks[split], counts[split], tokenizer.vocab_size, num_labels)
            for split in self._tasks
        }
        return StoreIndex(
            backend="zarr",
            seed=self._options.seed,
            rows_per_shard=self._options.rows_per_shard,
            tokenizer=TokenizerEntry(
                kind=tokenizer.kind,
                source=tokenizer.source,
                fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                pad_id=tokenizer.pad_id,
                max_length=tokenizer.max_length,
                files=list_files(self._out / "tokenizer"),
            ),
            labels=LabelsEntry(num_labels, list_files(self._out / "labels")),
            propensity=self._options.propensity,
            splits=splits,
        )

    def _check_counts(self, counts: dict[str, list[PartCounts]]) -> None:
        for split, parts in counts.items():
            if not sum(part.rows for part in parts):
                why = ", ".join(f"{number} dropped: {reason}" for reason, number in _dropped(parts).items())
                raise UserError(f"the {split} input has no usable instance ({why or 'it is empty'}).")

    def _labels(self, counts: list[PartCounts]) -> int:
        """Build the label map, unless it is there; returns the number of labels."""
        names, lookup = self._out / "labels", self._lookup
        if not (names.is_dir() and lookup.is_dir()):
            shutil.rmtree(names, ignore_errors=True)
            shutil.rmtree(lookup, ignore_errors=True)
            runs = [
                run for task, part in zip(self._tasks["train"], counts, strict=True) for run in count_runs(task, part)
            ]
            with new_folder(names) as new_names, new_folder(lookup) as new_lookup:
                build_labels(runs, new_lookup, new_names, new_lookup)
        return len(LabelNames(names))

    @property
    def _lookup(self) -> Path:
        return self._build / "lookup"

    def _tokenizer(self, train: Sequence[EncodeTask] = ()) -> Tokenizer:
        """Open or train the tokenizer and save it in the store, unless it is there."""
        folder = self._out / "tokenizer"
        if not folder.is_dir():
            texts = self._sample(train)
            opened = open_tokenizer(self._options.tokenizer, self._options.max_length, texts)
            with new_folder(folder) as temporary:
                opened.save(temporary)
        return Tokenizer.load(folder)

    def _sample(self, train: Sequence[EncodeTask]) -> Iterator[str]:
        for texts in self._pool.map(sample_texts, train, self._tick("tokenizer", "train")):
            yield from texts

    def _encode_tasks(self, split: str, counts: list[PartCounts]) -> list[EncodeTask]:
        first_rows = list(accumulate((part.rows for part in counts), initial=0))
        return [
            EncodeTask(
                source=task,
                first_row=first_row,
                rows=part.rows,
                total=first_rows[-1],
                shuffle_seed=self._options.seed if split == "train" else None,
                tokenizer_folder=self._out / "tokenizer",
                lookup_folder=self._lookup,
            )
            for task, part, first_row in zip(self._tasks[split], counts, first_rows, strict=False)
        ]

    def _split(
        self, split: str, tasks: list[EncodeTask], counts: list[PartCounts], vocab_size: int, num_labels: int
    ) -> SplitEntry:
        encodings = self._pool.map(encode_part, tasks, self._tick("encoding", split))
        rows, most = tasks[0].total, self._options.rows_per_shard
        shard_tasks = [
            ShardTask(
                build=self._build,
                split=split,
                number=number,
                begin=begin,
                end=min(begin + most, rows),
                parts=len(tasks),
                root=self._out,
                backend=self._options.backend,
                vocab_size=vocab_size,
                num_labels=num_labels,
            )
            for number, begin in enumerate(range(0, rows, most))
        ]
        shards = self._pool.map(build_shard, shard_tasks, self._tick("writing", split))
        return SplitEntry(
            instances=rows,
            tokens=sum(shard.tokens for shard in shards),
            positives=sum(shard.positives for shard in shards),
            truncated=sum(encoding.truncated for encoding in encodings),
            dropped=_dropped(counts),
            unseen_labels=sum(encoding.unseen for encoding in encodings),
            duplicate_labels=sum(part.duplicates for part in counts),
            shards=tuple(shards),
        )

    def _tick(self, stage: str, split: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(f"{stage} {split}", done, total)


def _dropped(counts: Sequence[PartCounts]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part.dropped)
    return dict(sorted(total.items()))
