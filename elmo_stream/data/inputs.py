"""Everything that a conversion reads: the sources of each split with their fields, the list of labels, the filter."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from elmo_stream.data.readers import FORMATS
from elmo_stream.data.readers.detect import list_of_labels_beside, open_source, read_head
from elmo_stream.data.readers.instance import Fields, InputFile, Source
from elmo_stream.data.readers.label_values import guess_separator
from elmo_stream.data.readers.sparse import parse_header
from elmo_stream.data.readers.unpack import NPZ, packing_of
from elmo_stream.errors import UserError

AUTO = "auto"


@dataclass(frozen=True)
class Input:
    """One file of a split, and what makes an instance of it."""

    source: Source
    fields: Fields


@dataclass(frozen=True)
class Inputs:
    """The files of a conversion.

    Attributes:
        splits: files by split, in the order in which they are read.
        label_list: names and texts of labels that are given as ids.
        filter: pairs of test row and label id that no ranking may hold.
    """

    splits: dict[str, list[Input]]
    label_list: InputFile | None = None
    filter: InputFile | None = None

    def files(self) -> Iterator[InputFile]:
        """All files, each once for every use."""
        for inputs in self.splits.values():
            for each in inputs:
                yield each.source.main
                if each.source.labels is not None:
                    yield each.source.labels
        yield from (file for file in (self.label_list, self.filter) if file is not None)

    def replace_files(self, new: Callable[[InputFile], InputFile]) -> "Inputs":
        """The same inputs, each file exchanged for ``new(file)``."""
        splits = {
            split: [
                replace(
                    each,
                    source=replace(
                        each.source,
                        main=new(each.source.main),
                        labels=each.source.labels and new(each.source.labels),
                    ),
                )
                for each in inputs
            ]
            for split, inputs in self.splits.items()
        }
        return Inputs(splits, self.label_list and new(self.label_list), self.filter and new(self.filter))

    @property
    def has_features(self) -> bool:
        """Whether instances are sparse vectors rather than texts."""
        return FORMATS[self.splits["train"][0].source.format].feature_count is not None

    def feature_count(self) -> int:
        """The number of features that every file has; the files are unpacked.

        Raises:
            UserError: they have different numbers.
        """
        counts = {
            each.source.main.name: count(each.source)
            for inputs in self.splits.values()
            for each in inputs
            if (count := FORMATS[each.source.format].feature_count)
        }
        if len(set(counts.values())) > 1:
            says = ", ".join(f"{name} {number}" for name, number in counts.items())
            raise UserError(f"the files have different numbers of features ({says}); they must count the same ones.")
        return next(iter(counts.values()))


@dataclass(frozen=True)
class InputOptions:
    """How the files are to be read; None and ``auto`` leave the choice to the format."""

    format: str = AUTO
    text_fields: tuple[str, ...] | None = None
    label_field: str | None = None
    label_separator: str = AUTO
    label_files: tuple[Path, ...] = ()
    labels: Path | None = None
    filter: Path | None = None


def gather(
    paths: dict[str, list[Path]], options: InputOptions, names_folder: Path, report: Callable[[str], None]
) -> Inputs:
    """Find out what each file is, saying so.

    Args:
        paths: files by split; ``train`` has at least one.
        names_folder: where the converter will put the names of the list of labels.

    Raises:
        UserError: a file or a combination of options that cannot be read.
    """
    sources = _open_sources(paths, options, report)
    formats = {source.format for each in sources.values() for source in each}
    if len({FORMATS[format].feature_count is None for format in formats}) > 1:
        raise UserError(f"the files mix features and texts ({', '.join(sorted(formats))}); give files of one kind.")
    if options.filter is not None and "test" not in sources:
        raise UserError("--filter: its pairs belong to the test split; give --test as well.")
    label_list = _label_list(sources["train"][0], options, report)
    separator = _separator(sources["train"], options, report)
    return Inputs(
        splits={
            split: [
                Input(source, _fields(source, options, separator, names_folder if label_list else None))
                for source in each
            ]
            for split, each in sources.items()
        },
        label_list=label_list,
        filter=_side_file(options.filter, "--filter"),
    )


def _open_sources(
    paths: dict[str, list[Path]], options: InputOptions, report: Callable[[str], None]
) -> dict[str, list[Source]]:
    count = sum(map(len, paths.values()))
    label_files = list(options.label_files)
    if len(label_files) not in (0, len(paths["train"]), count):
        raise UserError(
            f"--label-file: {len(label_files)} files were given for {len(paths['train'])} training files and {count} "
            "files in all; give one for each, in the order of training, test and validation files."
        )
    sources: dict[str, list[Source]] = {}
    for split, files in paths.items():
        for path in files:
            source, note = open_source(path, options.format, label_files.pop(0) if label_files else None)
            sources.setdefault(split, []).append(source)
            report(f"{split}: {note}")
    return sources


def _label_list(source: Source, options: InputOptions, report: Callable[[str], None]) -> InputFile | None:
    if options.labels is not None:
        if not FORMATS[source.format].has_ids:
            raise UserError(f"--labels: the labels of {source.format} files are names already; leave the option out.")
        return _side_file(options.labels, "--labels")
    found = list_of_labels_beside(source.main.name, source.format)
    if found is None or (source.labels is not None and _holds_names(source.labels)):
        return None
    report(f"{found}: names of the labels, since it stands beside the data (--labels names another file)")
    return _side_file(found, "--labels")


def _holds_names(labels: InputFile) -> bool:
    """Whether a file of labels has names on its lines, as train_labels.txt, which no list of names concerns."""
    return labels.packing != NPZ and parse_header(read_head(labels).partition(b"\n")[0]) is None


def _side_file(path: Path | None, option: str) -> InputFile | None:
    if path is None:
        return None
    if not path.is_file():
        raise UserError(f"{option} {path}: no such file.")
    return InputFile(path, path, packing_of(path))


def _separator(sources: list[Source], options: InputOptions, report: Callable[[str], None]) -> str | None:
    """The separator of labels in one string; guessed from the head of the first table."""
    if options.label_separator != AUTO:
        return options.label_separator or None
    for source in sources:
        head_rows = FORMATS[source.format].head_rows
        if head_rows is None:
            continue
        header, *rows = head_rows(read_head(source.main)) or [[]]
        names = [name.strip() for name in header]
        field = options.label_field or FORMATS[source.format].label_field
        if field not in names:
            return None  # the reader will say so, with the line
        place = names.index(field)
        separator = guess_separator([row[place] for row in rows if len(row) == len(names)])
        if separator is not None:
            report(
                f"{source.main.name}: labels in field '{field}' are separated by {separator!r}, by its first rows "
                "(--label-separator names another; '' for none)"
            )
        return separator
    return None


def _fields(source: Source, options: InputOptions, separator: str | None, names_folder: Path | None) -> Fields:
    format = FORMATS[source.format]
    return Fields(
        text=options.text_fields or format.text_fields,
        label=options.label_field or format.label_field,
        separator=separator if format.head_rows or options.label_separator != AUTO else None,
        names=str(names_folder) if names_folder and format.has_ids else None,
    )
