"""The demo's corpus and its baselines: an honest task, made from sources on the disk."""

import json
from collections import Counter
from pathlib import Path

import pytest

from elmo_stream.demo_baselines import baseline_precisions
from elmo_stream.demo_corpus import MAX_LABEL_SHARE, TEST_PERCENT, build_corpus, functions_of, split_of
from elmo_stream.errors import UserError

FUNCTIONS = 400


def source_of(number: int) -> str:
    """A function that calls a name of its own, a name shared by two functions, and one that all share."""
    return (
        f'def act_{number}():\n    """Do thing {number}."""\n'
        f"    only_{number}()\n    tools.pair_{number // 2}()\n    everywhere(lambda: (x)())\n\n\n"
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    (root / "package").mkdir(parents=True)
    (root / "a.py").write_text("".join(map(source_of, range(FUNCTIONS // 2))))
    (root / "package" / "b.py").write_text("".join(map(source_of, range(FUNCTIONS // 2, FUNCTIONS))))
    return root


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_instance_is_a_documented_function_and_its_labels_are_the_names_it_calls() -> None:
    source = b'''
class Reader:
    async def load(self, path):
        """Load it.

        All of it."""
        def inner():
            return parse(path)
        self.file.close(); open(path); open(path); table[0](); inner()

    def undocumented(self):
        parse()

    def calls_nothing(self):
        """Rests."""
'''
    (found,) = functions_of(source)
    assert found.text == "load Load it.\n\nAll of it."
    assert found.labels == ("close", "inner", "open", "parse")


def test_labels_that_are_unique_or_everywhere_are_not_learned(tree: Path, tmp_path: Path) -> None:
    stats = build_corpus(tmp_path / "out", [tree])
    rows = read(tmp_path / "out/train.jsonl") + read(tmp_path / "out/test.jsonl")
    frequency = Counter(label for row in rows for label in row["labels"])  # type: ignore[attr-defined]
    assert set(frequency) == {f"pair_{number}" for number in range(FUNCTIONS // 2)}
    assert set(frequency.values()) == {2}
    assert max(frequency.values()) <= MAX_LABEL_SHARE * len(rows)
    assert stats["train"] + stats["test"] + stats["dropped"] == stats["functions"] == FUNCTIONS
    assert stats["labels"] == len(frequency)


def test_no_text_stands_in_both_splits_even_when_functions_are_copied(tree: Path, tmp_path: Path) -> None:
    copied = (tree / "a.py").read_text()
    (tree / "same.py").write_text(copied)
    (tree / "other.py").write_text(copied.replace("only_", "pair_"))
    stats = build_corpus(tmp_path / "out", [tree])
    train, test = (read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test"))
    assert stats["functions"] == FUNCTIONS + FUNCTIONS // 2
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert {split_of(str(row["text"])) for row in test} == {"test"}


def test_the_split_depends_on_the_text_alone() -> None:
    texts = [f"function {number}" for number in range(2_000)]
    share = sum(split_of(text) == "test" for text in texts) / len(texts)
    assert [number for number in range(40) if split_of(texts[number]) == "test"] == [21, 22]
    assert abs(100 * share - TEST_PERCENT) < 3


def test_a_file_that_python_cannot_parse_is_counted_and_the_others_are_read(tree: Path, tmp_path: Path) -> None:
    whole = build_corpus(tmp_path / "whole", [tree])
    (tree / "broken.py").write_text("def broken(:\n")
    (tree / "nul.py").write_bytes(b"a = 1\x00")
    (tree / "latin.py").write_bytes(b"name = '\xe9'\n")
    stats = build_corpus(tmp_path / "out", [tree])
    assert stats == whole | {"files": 5, "unreadable_files": 3}


def test_the_same_sources_give_the_same_bytes_wherever_they_lie(tree: Path, tmp_path: Path) -> None:
    for number in range(150):
        (tree / f"m{number}.py").write_text(source_of(number % 7))
    moved = tmp_path / "elsewhere"
    build_corpus(tmp_path / "one", [tree])
    tree.rename(moved)
    build_corpus(tmp_path / "two", [moved])
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_packages_of_another_environment_inside_a_root_are_left_out(tree: Path, tmp_path: Path) -> None:
    before = build_corpus(tmp_path / "before", [tree])
    (tree / "site-packages").mkdir()
    (tree / "site-packages/stranger.py").write_text(source_of(10_000))
    assert build_corpus(tmp_path / "after", [tree]) == before


def test_text_that_no_file_can_hold_is_made_writable(tree: Path, tmp_path: Path) -> None:
    (tree / "odd.py").write_text('def odd():\n    "A lone \\ud800 half."\n    pair_0()\n')
    build_corpus(tmp_path / "out", [tree])
    rows = read(tmp_path / "out/train.jsonl") + read(tmp_path / "out/test.jsonl")
    assert [row for row in rows if row["text"] == "odd A lone ? half."]


def test_sources_without_functions_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="both splits"):
        build_corpus(tmp_path / "out", [tmp_path])
    assert not (tmp_path / "out").exists()


def write(path: Path, rows: list[tuple[str, list[str]]]) -> Path:
    lines = (json.dumps({"text": text, "labels": labels}) for text, labels in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_baselines_count_hits_as_the_definition_of_precision_says(tmp_path: Path) -> None:
    train = [("red apple", ["fruit", "red"]), ("red rose", ["flower", "red"]), ("green pear", ["fruit"])]
    test = [("a green pear", ["fruit", "unseen"]), ("rose", ["red"])]
    result = baseline_precisions(write(tmp_path / "a", train), write(tmp_path / "b", test), neighbours=1)
    assert result["popularity"] == pytest.approx({"P@1": 50, "P@3": 100 / 3, "P@5": 20})
    assert result["TF-IDF 1-NN"] == pytest.approx({"P@1": 100, "P@3": 100 / 3, "P@5": 20})


def test_many_weak_neighbours_outvote_a_near_copy_unless_votes_are_sharp(tmp_path: Path) -> None:
    train = [("alpha beta gamma", ["copy"])] + [(f"alpha delta{number}", ["crowd"]) for number in range(30)]
    test = [("alpha beta gamma", ["copy"])]
    result = baseline_precisions(write(tmp_path / "a", train), write(tmp_path / "b", test))
    assert (result["TF-IDF 50-NN"]["P@1"], result["TF-IDF 50-NN, sharp"]["P@1"]) == (0, 100)


def test_an_empty_split_is_refused_by_name(tmp_path: Path) -> None:
    rows = write(tmp_path / "a", [("word", ["label"])])
    with pytest.raises(UserError, match=r"empty\.jsonl"):
        baseline_precisions(rows, write(tmp_path / "empty.jsonl", []))
