"""Say where a data set is to be had, and lay out and check what was downloaded. Downloads nothing by itself.

python tools/fetch_dataset.py                                 the data sets
python tools/fetch_dataset.py NAME                            where to get one, and what to do with it
python tools/fetch_dataset.py NAME --from DOWNLOAD --out DIR  copy its files out of a folder or a .zip, and count rows
"""

import argparse
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from elmo_stream.data.readers.detect import read_head
from elmo_stream.data.readers.instance import InputFile
from elmo_stream.data.readers.sparse import parse_header
from elmo_stream.data.readers.unpack import PACKED_ENDINGS, packing_of, read_unpacked
from elmo_stream.errors import ElmoStreamError, UserError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
REPOSITORY = "The Extreme Classification Repository: http://manikvarma.org/downloads/XC/XMLRepository.html"
JSON_FILES = ("trn.json.gz", "tst.json.gz", "lbl.json.gz")
RAW_FILES = ("train_raw_texts.txt", "train_labels.txt", "test_raw_texts.txt", "test_labels.txt")
BOW_FILES = ("trn_X_Xf.txt", "trn_X_Y.txt", "tst_X_Xf.txt", "tst_X_Y.txt")
TEXT_FILES = ("trn_X.txt", "trn_X_Y.txt", "tst_X.txt", "tst_X_Y.txt")
FILTER = ("filter_labels_test.txt",)
ATTENTION_XML = "The raw texts and labels in the layout of AttentionXML: https://github.com/yourh/AttentionXML"
MULAN = (
    "A research data set of Mulan. As sparse text: the repository below, or ARFF files at\n"
    "  https://github.com/xiaohan2012/mlc-starter-project (multi-label-data). It has no licence text: use it for "
    "benchmarks.\n  " + REPOSITORY
)
TIBKAT = (
    "Records of the German National Library of Science and Technology (SemEval-2025 task 5), CC BY-SA 4.0:\n"
    "  https://github.com/sciknoworg/subject-indexing-dataset (library-records-dataset). They are JSON-LD: write\n"
    "  title and abstract to trn_X.txt, one record a line, and the subjects to trn_X_Y.txt."
)


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, which of its files are read, and what is known of its size (0: not known).

    ``optional`` files are laid out where they are there.
    """

    where: str
    files: tuple[str, ...]
    optional: tuple[str, ...] = ()
    train: int = 0
    test: int = 0
    labels: int = 0


DATA_SETS = {
    "lf-amazontitles-131k": DataSet(REPOSITORY, JSON_FILES, FILTER, 294_805, 134_835, 131_073),
    "lf-wikiseealso-320k": DataSet(REPOSITORY, JSON_FILES, FILTER, 693_082, 177_515, 312_330),
    "wiki-500k": DataSet(ATTENTION_XML, RAW_FILES, (), 1_779_881, 769_421, 0),
    "amazontitles-670k": DataSet(REPOSITORY, JSON_FILES, (), 485_176, 150_875, 670_091),
    "amazon-670k": DataSet(ATTENTION_XML, RAW_FILES, (), 490_449, 153_025, 0),
    "lf-amazontitles-1.3m": DataSet(REPOSITORY, JSON_FILES, FILTER, 2_248_619, 970_237, 1_305_265),
    "amazon-3m": DataSet(REPOSITORY, JSON_FILES, (), 1_717_899, 742_507, 2_812_281),
    "lf-paper2keywords-8.6m": DataSet(
        "Google Drive, file 1aJeqMJ9b5nl3eouBjdFK8uzIA25nlLKK, named by the authors of ELMO.",
        JSON_FILES,
        FILTER,
        labels=8_623_847,
    ),
    "bibtex": DataSet(MULAN, BOW_FILES, ("Y.txt",), 4_880, 2_515, 159),
    "delicious": DataSet(MULAN, BOW_FILES, ("Y.txt",), 0, 0, 983),
    "tibkat-gnd-en": DataSet(TIBKAT, TEXT_FILES, ("val_X.txt", "val_X_Y.txt", "Y.txt"), 41_333, 9_220, 22_625),
    "tibkat-kw": DataSet(TIBKAT, TEXT_FILES, ("val_X.txt", "val_X_Y.txt", "Y.txt"), 90_441, 26_058, 121_251),
    "yso-tiny": DataSet(
        "A dense corner (5,000 and 1,000 titles) of subjects/yso-finna-en in https://github.com/NatLibFi/Annif-corpora,\n"
        "  CC0. The whole corpus is TSV, which `elmo-stream shard` reads as it is.",
        TEXT_FILES,
        ("Y.txt",),
        5_000,
        1_000,
        1_398,
    ),
}


def describe(name: str) -> str:
    """Where a data set is to be had, its files, and the commands of its recipe."""
    data = DATA_SETS[name]
    recipe = RECIPES / f"{name}.toml"
    head = [line.removeprefix("#").strip() for line in recipe.read_text("utf-8").splitlines() if line.startswith("#")]
    files = ", ".join(data.files) + (f"; where there are: {', '.join(data.optional)}" if data.optional else "")
    return "\n".join([f"{name}\n  {data.where}\n  files: {files}", "", *(f"  {line}" for line in head)])


def lay_out(name: str, given: Path, out: Path) -> list[str]:
    """Copy the files of a data set to a new folder and check what is known of them; returns what was found.

    Raises:
        UserError: a file is missing, or holds another number of rows or labels than the data set has.
    """
    data = DATA_SETS[name]
    found = dict(_members(given))
    missing = [file for file in data.files if _stored_name(file, found) is None]
    if missing:
        raise UserError(
            f"{given}: has no {', '.join(missing)}; without --from, the command says what they are made of."
        )
    if out.exists():
        raise UserError(f"{out}: exists already; choose another folder with --out.")
    out.mkdir(parents=True)
    try:
        for file in (*data.files, *data.optional):
            if (stored := _stored_name(file, found)) is not None:
                with found[stored].open() as source, open(out / stored, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        absent = [
            f"{file}: not there; where the recipe's command names it, leave it out"
            for file in data.optional
            if _stored_name(file, found) is None
        ]
        return [*(_check(out / str(_stored_name(file, found)), data) for file in data.files), *absent]
    except BaseException:
        shutil.rmtree(out)
        raise


@dataclass(frozen=True)
class _Member:
    path: Path
    inside: str = ""

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        if self.inside:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.inside) as stream:
                yield stream
        else:
            with open(self.path, "rb") as stream:
                yield stream


def _members(given: Path) -> Iterator[tuple[str, _Member]]:
    """Files by their bare names: where an archive wants them to go is never looked at."""
    if given.is_dir():
        yield from ((path.name, _Member(path)) for path in sorted(given.rglob("*")) if path.is_file())
    elif zipfile.is_zipfile(given):
        with zipfile.ZipFile(given) as archive:
            yield from ((Path(each).name, _Member(given, each)) for each in sorted(archive.namelist()))
    else:
        raise UserError(f"{given}: is neither a folder nor a .zip; unpack it and give the folder.")


def _stored_name(file: str, found: dict[str, _Member]) -> str | None:
    """The name under which a file was found: packed or not."""
    plain = re.sub(r"\.gz$", "", file)
    names = (file, plain, *(f"{plain}{end}" for end in PACKED_ENDINGS))
    return next((name for name in names if name in found), None)


def _check(path: Path, data: DataSet) -> str:
    file = InputFile(path, path, packing_of(path))
    rows = sum(piece.count(b"\n") for piece in read_unpacked(file))
    header = parse_header(read_head(file).partition(b"\n")[0]) if path.name.startswith(("trn_X_", "tst_X_")) else None
    if header is not None:
        rows -= 1
    side = "labels" if path.name.startswith("lbl") else "train" if path.name.startswith("tr") else "test"
    if (known := getattr(data, side)) and rows not in (known, known - 1):  # the last line may lack its end
        raise UserError(f"{path}: has {rows:,} rows where the data set has {known:,}; download it again.")
    if header is not None and "_Y." in path.name and data.labels not in (0, header[1]):
        raise UserError(f"{path}: has {header[1]:,} labels where the data set has {data.labels:,}.")
    return f"{path}: {rows:,} rows" + ("" if known else " (not compared: the number is not known)")


def main(words: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=sorted(DATA_SETS), metavar="NAME")
    parser.add_argument("--from", dest="given", type=Path, metavar="DOWNLOAD", help="folder or .zip")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder")
    options = parser.parse_args(words)
    if options.name is None:
        print("\n".join(DATA_SETS))
        return 0
    if options.given is None:
        print(describe(options.name))
        return 0
    if options.out is None:
        parser.error("--from needs --out")
    try:
        print("\n".join(lay_out(options.name, options.given, options.out)))
    except ElmoStreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
