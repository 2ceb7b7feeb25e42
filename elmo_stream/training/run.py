"""The run folder: everything that resuming, evaluating and predicting need, with no store and no network.

``run.json`` is written last, so that a run exists when it exists.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from elmo_stream.config import Config, load_config
from elmo_stream.data.index import StoreIndex
from elmo_stream.errors import CorruptError, LockedError, UserError
from elmo_stream.files import fsync_tree, read_json, write_bytes_durably, write_json_durably
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.encoder import Encoder, restore_encoder, save_architecture
from elmo_stream.system import available_cpus, try_lock
from elmo_stream.training.checkpoint import Checkpoint, load_checkpoint

FORMAT, VERSION = "elmo-stream-run", 1


@dataclass(frozen=True)
class RunInfo:
    """What a run knows of its data.

    ``store`` is where the store was when the run began; ``prior`` the share of positives among all pairs of training
    instances and labels.
    """

    store: str
    store_fingerprint: str
    labels: int
    vocab_size: int
    max_length: int
    prior: float
    instances: int
    validation_instances: int
    propensity_a: float
    propensity_b: float


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    path: Path
    config: Config
    info: RunInfo


def device_of_run() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(threads: int) -> None:
    """Use so many CPU threads, or all that this process may use."""
    torch.set_num_threads(threads or available_cpus())


def create_run(path: Path, store: Path, index: StoreIndex, config: Config, encoder: Encoder) -> Run:
    """Lay out a new run folder; the caller holds its lock."""
    if (path / "run.json").exists():
        raise UserError(
            f"{path}: holds a run already; continue it with `elmo-stream resume {path}`, or choose another folder."
        )
    for name in ("labels", "tokenizer"):
        shutil.rmtree(path / name, ignore_errors=True)
        shutil.copytree(store / name, path / name)
    save_architecture(encoder, path / "encoder")
    fsync_tree(path)
    train = index.splits["train"].instances
    held_out = min(int(config.train.validation * train), 10_000, train - 1)
    info = RunInfo(
        store=str(store.resolve()),
        store_fingerprint=index.fingerprint,
        labels=index.labels.count,
        vocab_size=index.tokenizer.vocab_size,
        max_length=index.tokenizer.max_length,
        prior=index.splits["train"].positives / (train * index.labels.count),
        instances=train - held_out,
        validation_instances=held_out,
        propensity_a=index.propensity.A,
        propensity_b=index.propensity.B,
    )
    write_bytes_durably(path / "config.toml", config.to_toml().encode())
    write_json_durably(path / "run.json", {"format": FORMAT, "version": VERSION, **asdict(info)})
    return Run(path, config, info)


def open_run(path: Path) -> Run:
    """Open a run folder.

    Raises:
        UserError: there is no run here.
        CorruptError: ``run.json`` is damaged or of another version.
    """
    if not (path / "run.json").is_file():
        raise UserError(
            f"{path}: not a run folder (it has no run.json); make one with `elmo-stream train STORE --out {path}`."
        )
    value = read_json(path / "run.json")
    try:
        if (value.pop("format"), value.pop("version")) != (FORMAT, VERSION):
            raise CorruptError(f"{path / 'run.json'}: of another version than this release reads ({VERSION}).")
        return Run(path, load_config(path / "config.toml"), RunInfo(**value))
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path / 'run.json'}: damaged ({error!r}).") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the folder against other processes; the lock ends with this process, however it ends.

    Raises:
        LockedError: another process holds it.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+") as stream:
        if not try_lock(stream):
            stream.seek(0)
            holder = stream.read(64).strip()
            raise LockedError(f"{path}: another process (pid {holder or 'unknown'}) is training here.")
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def load_model(run: Run, checkpoint: Checkpoint, device: torch.device) -> tuple[Encoder, ChunkedClassifier]:
    """Encoder and classifier with the weights of a checkpoint."""
    encoder = restore_encoder(
        run.config.encoder, run.path / "encoder", vocab_size=run.info.vocab_size, max_length=run.info.max_length
    )
    try:
        encoder.load_state_dict(checkpoint.tensors("encoder"))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise CorruptError(f"{checkpoint.folder}: its encoder does not fit config.toml: {reason}") from error
    classifier = ChunkedClassifier(
        run.info.labels,
        encoder.dim,
        run.config.classifier,
        prior=run.info.prior,
        seed=run.config.seed,
        device=device,
        weights=checkpoint.rows,
    )
    return encoder.to(device), classifier


def trained_model(
    path: Path, step: int | None, device: torch.device, report: Any
) -> tuple[Run, int, Encoder, ChunkedClassifier]:
    """(run, step, encoder, classifier) of a run's checkpoint, ready to predict.

    Raises:
        UserError: no run here, or no checkpoint yet.
    """
    run = open_run(path)
    set_threads(run.config.threads)
    checkpoint = load_checkpoint(path, step, report=report)
    if checkpoint is None:
        raise UserError(f"{path}: has no checkpoint yet; finish training with `elmo-stream resume {path}`.")
    encoder, classifier = load_model(run, checkpoint, device)
    encoder.eval()
    return run, checkpoint.step, encoder, classifier
