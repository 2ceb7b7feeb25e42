"""The main job on real text, end to end, through the same command line that users have.

Corpus: functions of the installed Python sources (``demo_corpus``). The training is killed half way (SIGKILL), resumed,
and compared byte for byte with one that was never stopped.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elmo_stream.demo_baselines import baseline_precisions
from elmo_stream.demo_corpus import build_corpus
from elmo_stream.errors import ElmoStreamError, UserError
from elmo_stream.files import read_json, write_bytes_durably, write_json_durably
from elmo_stream.training.checkpoint import checkpoint_folder, checkpoint_steps
from elmo_stream.training.runlog import Report, clock

QUERIES = (
    "read a tensor from a file and check its checksum",
    "open a socket, connect to a host and send all bytes",
    "walk a directory tree and copy every file",
)
CONFIG = """\
[train]
epochs = 8

[classifier]
format = "fp8"
kahan_head = 0.25

[checkpoint]
every_steps = 250
"""
TOKENIZER, MAX_LENGTH = "train:16000", 64
KS = (1, 3, 5)


class _StepFailed(ElmoStreamError):
    """A command of the demo ended early; the demo ends with its exit code."""

    def __init__(self, command: str, code: int) -> None:
        super().__init__(f"{command} ended with exit code {code}.")
        self.exit_code = 128 - code if code < 0 else code or 1


POLL_SECONDS = 0.2


def run_demo(out: Path, *, report: Report = print) -> tuple[dict[str, Any], str]:
    """Run the demo in a folder of its own; what an interrupted demo left is used again.

    Returns:
        The result as plain values, and the table with the answers as text.

    Raises:
        UserError: ``out`` holds other files.
        ElmoStreamError: a step failed; its own output says why.
    """
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / "demo.toml").exists():
        raise UserError(f"{out}: holds other files; choose an empty or new folder with --out.")
    write_bytes_durably(out / "demo.toml", CONFIG.encode())
    result_file = out / "demo.json"
    if result_file.exists():
        report(f"{out}: finished before; remove the folder to run everything anew.")
        result = read_json(result_file)
    else:
        result = _run(out, report)
        result["seconds"] = round(time.monotonic() - begin, 1)
        write_json_durably(result_file, result)
    queries = [part for query in QUERIES for part in ("--text", query)]
    answers = _command(["predict", str(out / "run"), *queries], report)
    return result, f"{_table(result)}\n\n{answers}"


def _run(out: Path, report: Report) -> dict[str, Any]:
    store, config = out / "store", out / "demo.toml"
    if not (out / "corpus.json").exists():
        report("reading the functions of the installed Python sources ...")
        write_json_durably(out / "corpus.json", build_corpus(out))
    if not (store / "index.json").exists():
        options = ["--out", str(store), "--tokenizer", TOKENIZER, "--max-length", str(MAX_LENGTH)]
        report(_command(["shard", str(out / "train.jsonl"), "--test", str(out / "test.jsonl"), *options], report))
    for name in ("run", "uninterrupted"):
        shutil.rmtree(out / name, ignore_errors=True)
    killed_at = _train_and_kill(store, out / "run", config, report)
    _command(["resume", str(out / "run")], report)
    _command(["train", str(store), "--out", str(out / "uninterrupted"), "--config", str(config)], report)
    same = _final_files(out / "run") == _final_files(out / "uninterrupted")
    model = json.loads(_command(["evaluate", str(out / "run"), "--json"], report))
    report("measuring popularity and 50 nearest neighbours ...")
    return {
        "corpus": read_json(out / "corpus.json"),
        "killed_at_step": killed_at,
        "same_bytes": same,
        "percent": {
            "elmo-stream (bag, fp8)": {f"P@{k}": round(100 * model["metrics"][f"P@{k}"], 2) for k in KS},
            **baseline_precisions(out / "train.jsonl", out / "test.jsonl"),
        },
    }


def _command(arguments: Sequence[str], report: Report) -> str:
    report("$ elmo-stream " + " ".join(f'"{word}"' if " " in word else word for word in arguments))
    done = subprocess.run([sys.executable, "-m", "elmo_stream", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise _StepFailed(f"elmo-stream {arguments[0]}", done.returncode)
    return done.stdout


def _train_and_kill(store: Path, run: Path, config: Path, report: Report) -> int:
    """Start training and SIGKILL it in its second half, behind a checkpoint; returns the last step that it reported.

    Raises:
        ElmoStreamError: the training ended before it could be killed.
    """
    arguments = ["train", str(store), "--out", str(run), "--config", str(config)]
    steps = json.loads(_command(["plan", str(store), "--config", str(config), "--json"], report))["steps"]
    report("$ elmo-stream " + " ".join(arguments) + "    (to be killed half way)")
    process = subprocess.Popen([sys.executable, "-m", "elmo_stream", *arguments])
    try:
        while process.poll() is None and not (_last_step(run) >= steps // 2 and checkpoint_steps(run)):
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            raise _StepFailed("the training that was to be killed", process.returncode)
    finally:
        process.kill()
        process.wait()
    killed_at = _last_step(run)
    report(f"killed (SIGKILL) behind step {killed_at:,} of {steps:,}; checkpoints: {checkpoint_steps(run)}")
    return killed_at


def _last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue  # the line that is being written
    return 0


def _final_files(run: Path) -> dict[str, str]:
    """Checksums of the weights and of the optimizer's state in the last checkpoint."""
    newest = checkpoint_folder(run, checkpoint_steps(run)[-1])
    files = read_json(newest / "manifest.json")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def _table(result: dict[str, Any]) -> str:
    rows = [
        f"{name:<24}" + "".join(f"{values[f'P@{k}']:>8.2f}" for k in KS) for name, values in result["percent"].items()
    ]
    corpus = ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in result["corpus"].items())
    same = "the same bytes as" if result["same_bytes"] else "OTHER BYTES THAN"
    return "\n".join(
        [
            f"corpus: {corpus}",
            f"killed at step {result['killed_at_step']:,} and resumed: {same} the uninterrupted training",
            f"all in {clock(result['seconds'])}; percent of the test instances' labels:",
            " " * 24 + "".join(f"{f'P@{k}':>8}" for k in KS),
            *rows,
        ]
    )
