"""Every format gives the same store: the choice of a file format changes nothing but the file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from elmo_stream.cli_shard import FORMAT_NAMES
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.readers import FORMATS, read_part, split_source
from elmo_stream.data.readers.detect import open_source
from elmo_stream.data.readers.instance import Fields
from elmo_stream.data.shard import convert
from tests.data.readers.conftest import NAMES, WRITERS, corpus, write_format

OPTIONS = {"tokenizer": "train:200", "rows_per_shard": 100, "workers": 1, "part_bytes": 3000, "seed": 3}
SPLITS = {"trn": corpus(300, seed=1), "tst": corpus(40, seed=2)}

Tree = Callable[[Path], dict[str, str]]


def shard(folder: Path, name: str, ending: str = "") -> Path:
    files = write_format(folder, name, SPLITS, ending)
    out = folder / "store"
    convert([files["trn"]], out, test=[files["tst"]], **OPTIONS)
    return out


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tree: Tree) -> dict[str, str]:
    return tree(shard(tmp_path_factory.mktemp("jsonl"), "jsonl"))


CASES = [(name, "") for name in WRITERS] + [("csv", ".gz"), ("xc-text", ".xz"), ("xc-json", ".zst")]


@pytest.mark.parametrize(("name", "ending"), CASES)
def test_every_format_is_recognised_and_gives_the_same_store(tmp_path, tree, expected, name, ending):
    found = tree(shard(tmp_path, name, ending))
    if name in ("xc-text", "xc-json"):  # these bring texts of the labels, and so another index
        assert (
            LabelNames(tmp_path / "store" / "labels").texts([0, 7]) == LabelNames(tmp_path / "store" / "labels")[[0, 7]]
        )
        for extra in ("labels/texts.bin", "labels/text_offsets.npy"):
            del found[extra]
        found["index.json"] = expected["index.json"]
    assert found == expected


@pytest.mark.parametrize("name", [name for name in WRITERS if not name.startswith("xc-json")])
@pytest.mark.parametrize("part_bytes", [1, 37, 500, 1 << 30])
def test_where_a_file_is_cut_into_parts_does_not_show(tmp_path, name, part_bytes):
    path = write_format(tmp_path, name, SPLITS)["trn"]
    source = open_source(path, "auto")[0]
    format = FORMATS[source.format]
    fields = Fields(format.text_fields, format.label_field, separator="|" if format.head_rows else None)
    read = [one for part in split_source(source, fields, part_bytes) for one in read_part(part, fields)]
    names = [str(label) for label in range(len(NAMES))] if name == "xc-text" else NAMES
    assert [(one.text, sorted(one.labels)) for one in read] == [
        (text, sorted(names[label] for label in labels)) for text, labels in SPLITS["trn"]
    ]


def test_the_command_line_offers_every_format_there_is():
    assert set(FORMAT_NAMES) == set(FORMATS)
