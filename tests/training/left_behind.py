"""What a run leaves behind, as tests compare it."""

import json
import shutil
from pathlib import Path
from typing import Any

from elmo_stream.training.checkpoint import checkpoint_folder, checkpoint_steps


def tensor_files(run: Path, step: int) -> dict[str, str]:
    """SHA-256 of the files of tensors in a checkpoint, by name."""
    manifest = json.loads((checkpoint_folder(run, step) / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def forget_after(run: Path, step: int) -> None:
    """Leave the run as a kill after the checkpoint of ``step`` would have left it."""
    for later in checkpoint_steps(run):
        if later > step:
            shutil.rmtree(checkpoint_folder(run, later))


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` but for the rate, which no two runs share."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "instances_per_second"} for row in rows]
