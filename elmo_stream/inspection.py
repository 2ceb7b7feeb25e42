"""``inspect`` and ``verify``: what a folder is and holds, and whether every byte is as it was written."""

from pathlib import Path
from typing import Any

from elmo_stream.data.embeddings import verify_part
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.remote import shards_of
from elmo_stream.errors import UserError
from elmo_stream.files import read_json, walk
from elmo_stream.training.checkpoint import Checkpoint, checkpoint_folder, checkpoint_steps, verify_checkpoint
from elmo_stream.training.run import open_run


def kind_of(path: Path) -> str:
    """``store``, ``run`` or ``checkpoint``.

    Raises:
        UserError: the folder is none of them.
    """
    for name, kind in (("index.json", "store"), ("run.json", "run"), ("manifest.json", "checkpoint")):
        if (path / name).is_file():
            return kind
    if path.name.startswith("step-") and path.is_dir():
        return "checkpoint"
    raise UserError(
        f"{path}: neither a store, nor a run, nor a checkpoint"
        + (" (an unfinished conversion)." if (path / ".build").is_dir() else ".")
    )


def inspect(path: Path) -> dict[str, Any]:
    """What a person wants to know of a store, a run or a checkpoint, as plain JSON values."""
    kind = kind_of(path)
    if kind == "store":
        index = StoreIndex.load(path)
        splits = {
            name: {
                "instances": split.instances,
                "positives": split.positives,
                "tokens": split.tokens,
                "truncated": split.truncated,
                "dropped": split.dropped,
                "unseen_labels": split.unseen_labels,
                "shards": len(split.shards),
            }
            for name, split in index.splits.items()
        }
        return {
            "kind": kind,
            "backend": index.backend,
            "fingerprint": index.fingerprint,
            "labels": index.labels.count,
            "tokenizer": index.tokenizer.source,
            "vocab_size": index.tokenizer.vocab_size,
            "max_length": index.tokenizer.max_length,
            "splits": splits,
        }
    if kind == "run":
        run = open_run(path)
        return {
            "kind": kind,
            "store": run.info.store,
            "labels": run.info.labels,
            "instances": run.info.instances,
            "validation_instances": run.info.validation_instances,
            "encoder": run.config.encoder.kind,
            "classifier": run.config.classifier.format,
            "checkpoints": checkpoint_steps(path),
        }
    checkpoint = Checkpoint(path)
    files = read_json(path / "manifest.json")["files"]
    return {
        "kind": kind,
        "step": checkpoint.step,
        "total_steps": checkpoint.state["total_steps"],
        "chunks": len(checkpoint.state["chunks"]),
        "bytes": sum(entry["bytes"] for entry in files.values()),
        "environment": checkpoint.state["environment"],
    }


def verify(path: Path) -> dict[str, Any]:
    """Read everything and compare it with its checksums; returns what was checked.

    Raises:
        CorruptError: naming the first file that is missing, cut or altered.
    """
    kind = kind_of(path)
    if kind == "store":
        index = StoreIndex.load(path)
        index.verify(path, shards_of(path))
        return {"kind": kind, "shards": sum(len(split.shards) for split in index.splits.values())}
    if kind == "checkpoint":
        verify_checkpoint(path)
        return {"kind": kind, "checkpoints": 1}
    open_run(path)
    steps = checkpoint_steps(path)
    for step in steps:
        verify_checkpoint(checkpoint_folder(path, step))
    for part in sorted(folder for folder, files in walk(path / "embeddings") if folder / "index.json" in files):
        verify_part(part)
    return {"kind": kind, "checkpoints": len(steps)}
