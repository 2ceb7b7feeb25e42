"""Tokenizers: opened by name or folder, or trained on the corpus; saved as one ``tokenizer.json`` beside the
data.

Only opening a tokenizer of the Hugging Face hub imports transformers; stores and runs load theirs without it
and without a network.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from elmo_stream.data.bow import BagOfFeatures, is_bow
from elmo_stream.data.store import offsets_of, token_dtype
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import read_json, write_bytes_durably, write_json_durably
from elmo_stream.pretrained import find_pretrained
from elmo_stream.threads import DaemonThreads

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
TRAINING_TEXTS = 100_000
TRAINING_TEXT_CHARACTERS = 1_000
_CHARACTERS_PER_TOKEN = 64
_TRAIN = re.compile(r"train:(\d+)")
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_VOCABULARY_LIMITS = (64, 1_000_000)
_PAD_NAMES, _UNKNOWN_NAMES = ("[PAD]", "<pad>"), ("[UNK]", "<unk>")
_CASE_CHANGE = r"(?<=[\p{Ll}\p{Nd}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"


class Tokenizer:
    """Text to token ids, with the special tokens that the tokenizer itself adds (such as CLS and SEP).

    Args:
        tokenizer: the wrapped tokenizer; its own truncation and padding are taken off.
        kind: ``pretrained`` or ``trained``.
        source: the name it was opened by.
        max_length: most tokens of an instance, special tokens included.

    Raises:
        UserError: ``max_length`` leaves no room for a token beside the special ones.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, kind: str, source: str, max_length: int) -> None:
        self.kind = kind
        self.source = source
        self.max_length = max_length
        self.pad_id = _pad_id(tokenizer)
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._json = tokenizer.to_str(pretty=False).encode()
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if max_length <= special:
            raise UserError(
                f"--max-length {max_length} leaves no room beside the {special} special tokens of tokenizer "
                f"'{source}'; choose at least {special + 1}."
            )
        tokenizer.enable_truncation(max_length)
        self._tokenizer = tokenizer
        unknown = _first_known(tokenizer, _UNKNOWN_NAMES)
        self._empty = [self.pad_id if unknown is None else unknown]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ``tokenizer.json``; equal fingerprints give equal ids (up to ``max_length``)."""
        return hashlib.sha256(self._json).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64], int]:
        """Tokenise texts.

        A text beyond 64 characters per allowed token is cut before tokenising, which bounds memory, and
        counts as truncated. A text that gives no token becomes one unknown token, so that every instance has
        at least one.

        Returns:
            Token ids of all texts in a row (uint16 or uint32, see
            :func:`elmo_stream.data.store.token_dtype`), offsets (int64, ``len(texts) + 1``), and how many
            texts were truncated.
        """
        most = self.max_length * _CHARACTERS_PER_TOKEN
        encodings = self._tokenizer.encode_batch_fast([text[:most] for text in texts])
        ids = [encoding.ids or self._empty for encoding in encodings]
        cut = [len(text) > most or bool(code.overflowing) for text, code in zip(texts, encodings, strict=True)]
        offsets = offsets_of([len(row) for row in ids])
        tokens = np.fromiter(chain.from_iterable(ids), token_dtype(self.vocab_size), count=int(offsets[-1]))
        return tokens, offsets, sum(cut)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json`` into an existing folder."""
        config = {
            "kind": self.kind,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "vocab_size": self.vocab_size,
            "source": self.source,
        }
        write_bytes_durably(folder / TOKENIZER_FILE, self._json)
        write_json_durably(folder / CONFIG_FILE, config)

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load what :meth:`save` wrote.

        Raises:
            CorruptError: a file is missing or damaged, or the two do not belong together.
        """
        for name in (TOKENIZER_FILE, CONFIG_FILE):
            if not (folder / name).is_file():
                raise CorruptError(f"{folder / name}: missing, though it belongs to the tokenizer.")
        config = read_json(folder / CONFIG_FILE)
        try:
            inner = tokenizers.Tokenizer.from_buffer((folder / TOKENIZER_FILE).read_bytes())
        except Exception as error:  # the Rust library raises plain Exception
            raise CorruptError(f"{folder / TOKENIZER_FILE}: not a tokenizer ({error}); it is damaged.") from error
        try:
            loaded = cls(
                inner,
                kind=str(config["kind"]),
                source=str(config["source"]),
                max_length=int(config["max_length"]),
            )
            matches = (loaded.pad_id, loaded.vocab_size) == (config["pad_id"], config["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(
                f"{folder / CONFIG_FILE}: a value is missing or odd ({error}); it is damaged."
            ) from error
        if not matches:
            raise CorruptError(f"{folder / CONFIG_FILE}: describes another tokenizer than {TOKENIZER_FILE}.")
        return loaded


def load_tokenizer(folder: Path) -> Tokenizer | BagOfFeatures:
    """Load what either kind saved; raises ``CorruptError`` when the folder is damaged."""
    return BagOfFeatures.load(folder) if is_bow(folder) else Tokenizer.load(folder)


def wants_training(spec: str) -> bool:
    """Whether ``spec`` is ``train:N``, so that opening it needs the corpus."""
    return spec.startswith("train:")


def open_tokenizer(spec: str, max_length: int, corpus_texts: Iterable[str] = ()) -> Tokenizer:
    """Open the tokenizer that ``--tokenizer`` names.

    Args:
        spec: a folder with ``tokenizer.json``; or the name of an installed Python package that ships one (the
            package is not imported); or a name on the Hugging Face hub; or ``train:N`` to train one of N
            entries on the corpus. They are tried in this order.
        max_length: most tokens of an instance, special tokens included.
        corpus_texts: texts to train on; read only for ``train:N``.

    Raises:
        UserError: no such tokenizer (says what was tried), or N or ``max_length`` is out of range.
    """
    if wants_training(spec):
        return _train(spec, max_length, corpus_texts)
    if Path(spec).is_dir():
        return _open_folder(Path(spec), Path(spec).resolve().name, max_length)
    folder = find_pretrained(spec, TOKENIZER_FILE)
    return _open_folder(folder, spec, max_length) if folder else _open_hub(spec, max_length)


def _train(spec: str, max_length: int, texts: Iterable[str]) -> Tokenizer:
    """Byte-pair encoding (Sennrich et al., ACL 2016) over lower-cased words and parts of identifiers.

    Identifiers are split at underscores and changes of case, punctuation stands alone, and a mark at the
    start of each word keeps "tensor" as a word apart from the end of another. There are no CLS and SEP: a bag
    needs none. (The mark is part of the text rather than a prefix known to the trainer, because the trainer
    numbers prefixed characters in the random order of a hash table.)
    """
    match = _TRAIN.fullmatch(spec)
    low, high = _VOCABULARY_LIMITS
    if match is None or not low <= (size := int(match[1])) <= high:
        raise UserError(f"--tokenizer {spec}: expected train:N with N from {low} to {high}, such as train:16000.")
    inner = tokenizers.Tokenizer(models.BPE(unk_token=_UNKNOWN_NAMES[0]))
    inner.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Replace(Regex(_CASE_CHANGE), " "),
            normalizers.Replace(Regex(r"[_\s]+"), " "),
            normalizers.Lowercase(),
        ]
    )
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.BertPreTokenizer(),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[_PAD_NAMES[0], _UNKNOWN_NAMES[0]],
        limit_alphabet=size // 4,
        show_progress=False,
    )
    cut = (text[:TRAINING_TEXT_CHARACTERS] for text in texts)
    threads = DaemonThreads(1, "elmo-tokenizer")
    try:  # a signal interrupts this waiting, but not the library
        threads.submit(partial(inner.train_from_iterator, cut, trainer)).result()
    finally:
        threads.close(seconds=0)
    return Tokenizer(inner, kind="trained", source=spec, max_length=max_length)


def _open_folder(folder: Path, source: str, max_length: int) -> Tokenizer:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"--tokenizer {folder}: the folder has no {TOKENIZER_FILE}.")
    try:
        inner = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the Rust library raises plain Exception
        raise UserError(f"{path}: not a tokenizer in the format of Hugging Face tokenizers ({error}).") from error
    return Tokenizer(inner, kind="pretrained", source=source, max_length=max_length)


def _open_hub(name: str, max_length: int) -> Tokenizer:
    tried = f"--tokenizer {name}: no such folder, and no installed package of that name ships a {TOKENIZER_FILE}"
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"{tried}; give NAME, a folder, or train:N.")
    from huggingface_hub import model_info
    from transformers import AutoTokenizer

    try:
        try:
            opened = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError):
            model_info(name, timeout=10)  # says at once that a name is wrong or the network is down
            opened = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        inner = opened.backend_tokenizer
    except Exception as error:  # not found, no network, no fast tokenizer, a damaged download, ...
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"{tried}, and the Hugging Face hub did not give it ({reason}).") from error
    return Tokenizer(inner, kind="pretrained", source=name, max_length=max_length)


def _pad_id(tokenizer: tokenizers.Tokenizer) -> int:
    """The id that fills short rows; 0 where a tokenizer knows none, since padding is masked everywhere."""
    if tokenizer.padding:
        return int(tokenizer.padding["pad_id"])
    return _first_known(tokenizer, _PAD_NAMES) or 0


def _first_known(tokenizer: tokenizers.Tokenizer, names: tuple[str, ...]) -> int | None:
    return next((known for name in names if (known := tokenizer.token_to_id(name)) is not None), None)
