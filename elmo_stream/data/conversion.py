"""One conversion from parts to the index: which pass runs over what, in which order."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from elmo_stream.data.bow import BagOfFeatures
from elmo_stream.data.build_folder import Options
from elmo_stream.data.filters import build_filter
from elmo_stream.data.index import BOW, BUILD_NAME, FILTERS, Files, LabelsEntry, SplitEntry, StoreIndex, TokenizerEntry
from elmo_stream.data.inputs import Input, Inputs
from elmo_stream.data.label_build import build_labels, write_texts
from elmo_stream.data.labels import LabelMap, LabelNames
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
from elmo_stream.data.readers import split_source
from elmo_stream.data.readers.label_list import LabelList, build_label_list
from elmo_stream.data.readers.lines import READ_AS_LATIN_1
from elmo_stream.data.readers.unpack import UnpackTask, unpack_file
from elmo_stream.data.tokenize import Tokenizer, load_tokenizer, open_tokenizer, wants_training
from elmo_stream.data.workers import Workers
from elmo_stream.errors import UserError
from elmo_stream.files import list_files, locked, new_folder, read_json, remove, require_space

Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; a stage is such as "counting train", done and total are parts
or shards.
"""


def names_folder(out: Path) -> Path:
    """Where the names of labels given as ids are while a conversion runs."""
    return out.resolve() / BUILD_NAME / "label-list"


class Conversion:
    """One conversion on its way from parts to the index."""

    def __init__(
        self,
        out: Path,
        inputs: Inputs,
        options: Options,
        part_bytes: int,
        pool: Workers,
        report: Callable[[str], None],
        progress: Progress,
    ) -> None:
        self._out, self._build, self._options = out, out / BUILD_NAME, options
        self._inputs, self._part_bytes = inputs, part_bytes
        self._pool, self._report, self._progress = pool, report, progress
        self._tasks: dict[str, list[PartTask]] = {}

    def run(self, *, from_shares: bool = False) -> StoreIndex:
        """Everything but writing the index.

        ``from_shares`` refuses, with a ``UserError``, to go on where a job has not finished its share.
        """
        self._prepare()
        if from_shares:
            self._check_shares()
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
            split: self._split(split, encode_tasks[split], counts[split], tokenizer, num_labels)
            for split in self._tasks
        }
        return StoreIndex(
            backend=self._options.backend,
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
            filters=self._filters(splits),
        )

    def run_share(self, index: int, jobs: int) -> int:
        """Pass 1 over every part whose number leaves ``index`` when divided by ``jobs``; returns how many there are."""
        with locked(self._build, wait=True):  # what all jobs share is made by the first
            self._prepare()
            self._tokenizer()
        tasks = self._all_tasks()[index::jobs]
        self._pool.map(count_part, tasks, self._tick("counting", f"job {index}"))
        return len(tasks)

    def _prepare(self) -> None:
        """Make the inputs readable, and cut them into parts."""
        self._inputs = self._unpacked()
        self._name_labels()
        self._tasks = {split: self._part_tasks(split, files) for split, files in self._inputs.splits.items()}

    def _check_shares(self) -> None:
        tasks = self._all_tasks()
        if missing := sum(not task.folder("count").is_dir() for task in tasks):
            raise UserError(
                f"{self._out}: {missing} of {len(tasks)} parts of the input have not been read; run the jobs that did "
                "not end once more, then --finalize."
            )

    def _all_tasks(self) -> list[PartTask]:
        return [task for tasks in self._tasks.values() for task in tasks]

    def _filters(self, splits: dict[str, SplitEntry]) -> Files:
        """Store the filter of the test split, where one is given."""
        if self._inputs.filter is None:
            return {}
        folder = self._out / FILTERS
        remove(folder)
        with new_folder(folder) as temporary:
            kept, unknown = build_filter(
                self._inputs.filter,
                rows=splits["test"].instances,
                fields=self._inputs.splits["test"][0].fields,
                lookup_folder=self._lookup,
                path=temporary / "test.npy",
            )
        self._report(f"{self._inputs.filter.name}: {kept:,} pairs kept, {unknown:,} of labels unknown to training")
        return list_files(folder)

    def _unpacked(self) -> Inputs:
        """The inputs with every packed file unpacked into the scratch."""
        packed = list(dict.fromkeys(file for file in self._inputs.files() if file.packing))
        tasks = [UnpackTask(file, self._build / f"unpacked-{number:05d}") for number, file in enumerate(packed)]
        plain = dict(zip(packed, self._pool.map(unpack_file, tasks, self._tick("unpacking", "files")), strict=True))
        return self._inputs.replace_files(lambda file: plain.get(file, file))

    def _name_labels(self) -> None:
        """Lay out the list of labels for the readers, unless it is there."""
        folder = names_folder(self._out)
        if self._inputs.label_list is not None and not folder.is_dir():
            with new_folder(folder) as temporary:
                build_label_list(self._inputs.label_list, temporary, self._report)

    def _part_tasks(self, split: str, files: Sequence[Input]) -> list[PartTask]:
        parts = [(part, each) for each in files for part in split_source(each.source, each.fields, self._part_bytes)]
        for name in dict.fromkeys(part.source.main.name for part, _ in parts if part.encoding != "utf-8"):
            self._report(f"{name}: {READ_AS_LATIN_1}")
        tokenizer_folder = None if wants_training(self._options.tokenizer) else self._out / "tokenizer"
        return [
            PartTask(self._build, split, number, part, each.fields, tokenizer_folder)
            for number, (part, each) in enumerate(parts)
        ]

    def _check_counts(self, counts: dict[str, list[PartCounts]]) -> None:
        for split, parts in counts.items():
            if not sum(part.rows for part in parts):
                why = ", ".join(f"{number} dropped: {reason}" for reason, number in _dropped(parts).items())
                names = ", ".join(str(each.source.main.name) for each in self._inputs.splits[split])
                raise UserError(f"{names}: the {split} input has no usable instance ({why or 'it is empty'}).")

    def _labels(self, counts: list[PartCounts]) -> int:
        """Build the label map, unless it is there; returns the number of labels."""
        names, lookup = self._out / "labels", self._lookup
        if not names.is_dir():  # which appears after the lookup
            remove(lookup)
            runs = [
                run for task, part in zip(self._tasks["train"], counts, strict=True) for run in count_runs(task, part)
            ]
            with new_folder(names) as new_names, new_folder(lookup) as new_lookup:
                build_labels(runs, new_lookup, new_names, new_lookup)
                if self._inputs.label_list is not None:
                    write_texts(LabelList(names_folder(self._out)), LabelMap(new_lookup), new_names)
        return len(LabelNames(names))

    @property
    def _lookup(self) -> Path:
        return self._build / "lookup"

    def _tokenizer(self, train: Sequence[EncodeTask] = ()) -> Tokenizer | BagOfFeatures:
        """Open or train the tokenizer and save it in the store, unless it is there."""
        folder = self._out / "tokenizer"
        if not folder.is_dir():
            opened: Tokenizer | BagOfFeatures
            if self._options.tokenizer == BOW:
                opened = BagOfFeatures(self._inputs.feature_count(), self._options.max_length)
            else:
                texts = self._sample(train)
                opened = open_tokenizer(self._options.tokenizer, self._options.max_length, texts)
            with new_folder(folder) as temporary:
                opened.save(temporary)
        return load_tokenizer(folder)

    def _sample(self, train: Sequence[EncodeTask]) -> Iterator[str]:
        for texts in self._pool.map(sample_texts, train, self._tick("tokenizer", "train")):
            yield from read_json(texts)

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
        self,
        split: str,
        tasks: list[EncodeTask],
        counts: list[PartCounts],
        tokenizer: Tokenizer | BagOfFeatures,
        num_labels: int,
    ) -> SplitEntry:
        waiting = [task.source.folder("count") for task in tasks if not task.source.folder("rows").is_dir()]
        arrays = [path for each in waiting for path in each.iterdir() if path.suffix == ".npy"]
        require_space(self._build, sum(path.stat().st_size for path in arrays))
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
                vocab_size=tokenizer.vocab_size,
                num_labels=num_labels,
                weighted=tokenizer.kind == BOW,
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
