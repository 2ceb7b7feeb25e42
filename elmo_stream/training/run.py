"""The run folder: everything that resuming, evaluating and predicting need, with no store and no network.

``run.json`` is written last, so that a run exists when it exists.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from elmo_stream.config import Config, EncoderConfig, load_config, with_memory
from elmo_stream.data.bow import MAX_FEATURES, is_bow
from elmo_stream.data.index import MAX_LENGTH, Files, StoreIndex, TokenizerEntry, decode
from elmo_stream.errors import CorruptError, UserError
from elmo_stream.files import (
    check_files,
    copy_listed,
    file_entry,
    fsync_tree,
    list_files,
    read_sealed_json,
    remove,
    write_bytes_durably,
    write_sealed_json,
)
from elmo_stream.model.encoder import Encoder, create_encoder, restore_encoder, save_architecture
from elmo_stream.system import available_cpus
from elmo_stream.training.checkpoint import Checkpoint

FORMAT, VERSION = "elmo-stream-run", 1
MAX_VALIDATION = 10_000
_FOLDERS = ("labels", "tokenizer", "encoder", "checkpoints")
_MARKER = ".creating"


@dataclass(frozen=True)
class RunInfo:
    """What a run knows of its data.

    ``store`` is where the store was when the run began; ``prior`` the share of positives among all pairs of training
    instances and labels; ``instances`` those that are trained on; ``files`` the checksums of what was laid down with
    the run.
    """

    store: str
    store_fingerprint: str
    tokenizer_fingerprint: str
    labels: int
    vocab_size: int
    max_length: int
    prior: float
    train_instances: int
    instances: int
    validation_instances: int
    propensity_a: float
    propensity_b: float
    files: Files


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    path: Path
    config: Config
    info: RunInfo

    @property
    def published(self) -> bool:
        """Whether the run exists for others."""
        return (self.path / "run.json").is_file()


def device_of_run() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_torch(threads: int) -> None:
    """Use so many CPU threads, or all that this process may use, and deterministic algorithms where torch has them."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads or available_cpus())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def held_out_instances(index: StoreIndex, share: float) -> int:
    """Training instances kept for validation: a share, at most 10,000, never all; none where a valid split is given."""
    instances = index.splits["train"].instances
    return 0 if "valid" in index.splits else min(int(share * instances), MAX_VALIDATION, instances - 1)


def instances_per_epoch(index: StoreIndex, config: Config) -> int:
    """Instances that an epoch trains on: those not held out, and the labels' names where they are asked for."""
    names = index.labels.count if config.train.label_texts else 0
    return index.splits["train"].instances - held_out_instances(index, config.train.validation) + names


def new_encoder(home: Path, config: Config, sizes: TokenizerEntry | RunInfo) -> Encoder:
    """An untrained encoder for the tokenizer in ``home``, a store or a run; raises what ``create_encoder`` raises."""
    return create_encoder(
        config.encoder,
        vocab_size=sizes.vocab_size,
        max_length=sizes.max_length,
        ordered=not is_bow(home / "tokenizer"),
        tokenizer=home / "tokenizer" / "tokenizer.json",
        seed=config.seed,
    )


def lay_out_run(
    path: Path, store: Path, index: StoreIndex, config: Config, encoder: Encoder, *, prior: float | None = None
) -> Run:
    """Lay out a new run in a folder that is empty, or was left by a creation that did not end; the caller locks it.

    There is a run once ``publish_run`` was called; what belongs to its beginning is written before.

    Args:
        prior: where logits start; by default the share of positives in the training split.

    Raises:
        UserError: the folder holds a run already, or other files.
        CorruptError: the store's labels or tokenizer are damaged.
    """
    marker = path / _MARKER
    if (path / "run.json").exists():
        raise UserError(
            f"{path}: holds a run already; continue it with `elmo-stream resume {path}`, or choose another folder."
        )
    if not marker.exists():
        if any(path.iterdir()):
            raise UserError(f"{path}: holds other files; choose an empty or new folder with --out.")
        marker.touch()
    for name in (*_FOLDERS, "config.toml"):
        remove(path / name)
    laid_down = {"labels": index.labels.files, "tokenizer": index.tokenizer.files}
    for name, listed in laid_down.items():
        copy_listed(store / name, path / name, listed)
    save_architecture(encoder, path / "encoder")
    write_bytes_durably(path / "config.toml", config.to_toml().encode())
    fsync_tree(path)
    train = index.splits["train"]
    held_out = held_out_instances(index, config.train.validation)
    valid = min(index.splits["valid"].instances, MAX_VALIDATION) if "valid" in index.splits else held_out
    info = RunInfo(
        store=str(store.resolve()),
        store_fingerprint=index.fingerprint,
        tokenizer_fingerprint=index.tokenizer.fingerprint,
        labels=index.labels.count,
        vocab_size=index.tokenizer.vocab_size,
        max_length=index.tokenizer.max_length,
        prior=prior or train.positives / (train.instances * index.labels.count),
        train_instances=train.instances,
        instances=train.instances - held_out,
        validation_instances=valid,
        propensity_a=index.propensity.A,
        propensity_b=index.propensity.B,
        files={
            **{f"{name}/{file}": entry for name, listed in laid_down.items() for file, entry in listed.items()},
            **{f"encoder/{file}": entry for file, entry in list_files(path / "encoder").items()},
            "config.toml": file_entry(path / "config.toml"),
        },
    )
    return Run(path, config, info)


def publish_run(run: Run) -> None:
    """Let a run that was laid out exist."""
    body = {"format": FORMAT, "version": VERSION, **asdict(run.info)}
    write_sealed_json(run.path / "run.json", body)
    (run.path / _MARKER).unlink()


def open_run(path: Path, memory: Iterable[str] = ()) -> Run:
    """Open a run folder and check the files that were laid down with it.

    Args:
        memory: ``memory.key=value``, other budgets than the run began with; they change no result.

    Raises:
        UserError: there is no run here, or ``memory`` names another key or a bad value.
        CorruptError: ``run.json`` or another file is damaged, was changed, or is of another version.
    """
    if not (path / "run.json").is_file():
        raise UserError(
            f"{path}: not a run folder (it has no run.json); make one with `elmo-stream train STORE --out {path}`."
        )
    value = read_sealed_json(path / "run.json", first_had_none=True)
    if (value.pop("format", None), value.pop("version", None)) != (FORMAT, VERSION):
        raise CorruptError(f"{path / 'run.json'}: damaged, or of another version than this release reads ({VERSION}).")
    info: RunInfo = decode(RunInfo, value, str(path / "run.json"))
    check_files(path, info.files)
    most_labels = (path / "labels" / "offsets.npy").stat().st_size // 8
    bow = is_bow(path / "tokenizer")
    most_tokens = MAX_FEATURES + 1 if bow else (path / "tokenizer" / "tokenizer.json").stat().st_size
    sane = 0 < info.labels <= most_labels and 0 < info.vocab_size <= most_tokens and 0 < info.prior <= 1
    if not (sane and 0 < info.max_length <= MAX_LENGTH):
        raise CorruptError(f"{path / 'run.json'}: damaged; its sizes do not fit the files beside it.")
    return Run(path, with_memory(load_config(path / "config.toml"), memory), info)


def load_encoder(run: Run, checkpoint: Checkpoint, config: EncoderConfig) -> Encoder:
    """The encoder of a checkpoint of a run, under a configuration that asks for the same tensors.

    Raises:
        CorruptError: it asks for other tensors.
    """
    encoder = restore_encoder(
        config,
        run.path / "encoder",
        vocab_size=run.info.vocab_size,
        max_length=run.info.max_length,
        ordered=not is_bow(run.path / "tokenizer"),
    )
    try:
        encoder.load_state_dict(checkpoint.tensors("encoder"))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CorruptError(f"{checkpoint.folder}: its encoder does not fit the configuration: {reason}") from error
    return encoder
