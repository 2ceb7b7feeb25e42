"""A text becomes the same token ids in every process, now and when the store is opened again."""

import importlib
import sys
from itertools import pairwise

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from elmo_stream.data.tokenize import Tokenizer, open_tokenizer
from elmo_stream.errors import CorruptError, UserError

CORPUS = ["def readTensorFile(path): return read_tensor_file(path)", "HTTPServer reads tensor files"] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return open_tokenizer("train:300", 8, CORPUS)


@pytest.fixture
def pretrained(tmp_path):
    """A folder as BERT-like models ship it: CLS and SEP around the text, padding and truncation switched on."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "c"]
    inner = tokenizers.Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inner.enable_padding(length=16)
    inner.enable_truncation(16)
    (tmp_path / "model").mkdir()
    inner.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def rows(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    tokens, offsets, _ = tokenizer.encode_batch(texts)
    return [tokens[start:end].tolist() for start, end in pairwise(offsets)]


def test_special_tokens_stay_when_a_text_is_cut_and_padding_is_off(pretrained):
    tokenizer = open_tokenizer(str(pretrained), 4)
    tokens, offsets, truncated = tokenizer.encode_batch(["a b", "a b c", "", "a"])
    assert rows(tokenizer, ["a b", "a b c", "", "a"]) == [[2, 4, 5, 3], [2, 4, 5, 3], [2, 3], [2, 4, 3]]
    assert (truncated, tokens.dtype, offsets.tolist()) == (1, "uint16", [0, 4, 8, 10, 13])
    assert (tokenizer.pad_id, tokenizer.vocab_size, tokenizer.kind, tokenizer.source) == (0, 7, "pretrained", "model")


def test_a_very_long_text_is_cut_early_and_counted(trained):
    _, offsets, truncated = trained.encode_batch(["tensor " * 100_000, "tensor", " " * 5000])
    assert (truncated, offsets.tolist()) == (2, [0, 8, 9, 10])


def test_every_text_has_at_least_one_token(trained):
    unknown = 1
    assert rows(trained, ["", " ", "_\n"]) == [[unknown]] * 3


def test_identifiers_are_split_at_case_changes_underscores_and_punctuation(trained):
    spellings = ["readTensorFile", "read_tensor_file", "Read Tensor FILE", "read__tensor\tfile_"]
    assert len({tuple(row) for row in rows(trained, spellings)}) == 1
    assert rows(trained, ["HTTPServer"]) == rows(trained, ["http server"])
    assert rows(trained, ["read(tensor)"]) == rows(trained, ["read ( tensor )"])
    assert rows(trained, ["readtensor"]) != rows(trained, ["read tensor"])


def test_training_again_gives_the_same_tokenizer(trained):
    again = open_tokenizer("train:300", 8, list(reversed(CORPUS)))
    assert again.fingerprint == trained.fingerprint


def test_a_saved_tokenizer_gives_the_same_ids_and_fingerprint(trained, pretrained, tmp_path):
    for number, tokenizer in enumerate((trained, open_tokenizer(str(pretrained), 5))):
        folder = tmp_path / str(number)
        folder.mkdir()
        tokenizer.save(folder)
        loaded = Tokenizer.load(folder)
        for key in ("fingerprint", "pad_id", "vocab_size", "max_length", "kind", "source"):
            assert getattr(loaded, key) == getattr(tokenizer, key)
        texts = ["read a tensor", "a b c d e f g h i j k", ""]
        assert rows(loaded, texts) == rows(tokenizer, texts)


def test_the_fingerprint_tells_tokenizers_apart_but_not_lengths(pretrained, trained):
    short, long = (open_tokenizer(str(pretrained), length) for length in (4, 9))
    assert short.fingerprint == long.fingerprint != trained.fingerprint


def test_loading_a_tokenizer_needs_no_transformers_and_no_network(trained, tmp_path, monkeypatch):
    trained.save(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert Tokenizer.load(tmp_path).fingerprint == trained.fingerprint


def test_a_tokenizer_inside_an_installed_package_is_found_without_importing_it(pretrained, tmp_path, monkeypatch):
    package = tmp_path / "site" / "tiny_model"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (pretrained / "tokenizer.json").rename(package / "weights" / "tokenizer.json")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    assert open_tokenizer("tiny-model", 4).source == "tiny-model"
    (package / "more").mkdir()
    (package / "more" / "tokenizer.json").write_bytes((package / "weights" / "tokenizer.json").read_bytes())
    with pytest.raises(UserError, match="several"):
        open_tokenizer("tiny_model", 4)


@pytest.mark.parametrize("spec", ["train:", "train:abc", "train:1", "train:99999999", "/no/such/folder", "no such"])
def test_a_wrong_name_says_what_was_expected(spec):
    with pytest.raises(UserError, match="train:N"):
        open_tokenizer(spec, 8)


def test_an_unknown_name_says_everything_that_was_tried():
    with pytest.raises(UserError, match=r"no such folder, and no installed package .* hub did not give it"):
        open_tokenizer("nobody/has-this-model", 8)


def test_folders_without_a_usable_tokenizer_are_refused(pretrained, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        open_tokenizer(str(tmp_path), 8)
    with pytest.raises(UserError, match="--max-length 2 leaves no room"):
        open_tokenizer(str(pretrained), 2)
    (pretrained / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        open_tokenizer(str(pretrained), 8)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"kind": "trained", "source": 1, "max_length": null}'])
def test_a_damaged_saved_tokenizer_is_named(trained, tmp_path, name, content):
    trained.save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorruptError, match=name.replace(".", r"\.")):
        Tokenizer.load(tmp_path)
