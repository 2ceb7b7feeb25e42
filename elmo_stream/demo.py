"""The main job on real text, end to end, through the same command line that users have.

Corpus: functions of the installed Python sources (``demo_corpus``). The training is killed half way (SIGKILL), resumed,
and compared byte for byte with one that was never stopped.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elmo_stream.demo_baselines import baseline_precisions
from elmo_stream.demo_corpus import build_corpus
from elmo_stream.errors import ElmoStreamError
from elmo_stream.files import read_json, write_bytes_durably, write_json_durably
from elmo_stream.training.checkpoint import checkpoint_steps, checkpoints_folder
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
POLL_SECONDS = 0.2


def run_demo(out: Path, *, report: Report = print) -> tuple[dict[str, Any], str]:
    """Run what is not there yet in ``out`` and return (result, the table and answers as text).

    Raises:
        ElmoStreamError: a step failed; its own output says why.
    """
    begin = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    result_file = out / "demo.json"
    if result_file.exists():
        report(f"{out}: finished before; remove the folder to run everything anew.")
        result = read_json(result_file)
    else:
        result = _run(out, report)
        result["seconds"] = round(time.monotonic() - begin, 1)
        write_json_durably(result_file, result)
    answers = _command(
        ["predict", str(out / "run"), *(part for query in QUERIES for part in ("--text", query))], report
    )
    return result, f"{_table(result)}\n\n{answers}"


def _run(out: Path, report: Report) -> dict[str, Any]:
    store, config = out / "store", out / "demo.toml"
    if not (out / "corpus.json").exists():
        report("reading the functions of the installed Python sources ...")
        write_json_durably(out / "corpus.json", build_corpus(out))
    write_bytes_durably(config, CONFIG.encode())
    if not (store / "index.json").exists():
        _command(
            [
                "shard",
                str(out / "train.jsonl"),
                "--test",
                str(out / "test.jsonl"),
                "--out",
                str(store),
                "--tokenizer",
                TOKENIZER,
                "--max-length",
                str(MAX_LENGTH),
            ],
            report,
        )
    killed_at = _train_and_kill(store, out / "run", config, report)
    _command(["resume", str(out / "run")], report)
    _command(["train", str(store), "--out", str(out / "uninterrupted"), "--config", str(config)], report)
    same = _final_files(out / "run") == _final_files(out / "uninterrupted")
    report(
        f"killed at step {killed_at:,} and resumed, against uninterrupted: "
        f"{'the same bytes' if same else 'DIFFERENT bytes'}"
    )
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
        raise ElmoStreamError(f"elmo-stream {arguments[0]} ended with exit code {done.returncode}.")
    if arguments[0] == "shard":
        report(done.stdout)
    return done.stdout


def _train_and_kill(store: Path, run: Path, config: Path, report: Report) -> int:
    """Start training and SIGKILL it in the second half; returns the last step that it reported."""
    arguments = ["train", str(store), "--out", str(run), "--config", str(config)]
    report("$ elmo-stream " + " ".join(arguments) + "    (to be killed half way)")
    plan = json.loads(_command(["plan", str(store), "--config", str(config), "--json"], report))
    process = subprocess.Popen([sys.executable, "-m", "elmo_stream", *arguments])
    try:
        while process.poll() is None:
            step = _last_step(run)
            if step >= plan["steps"] // 2 and checkpoint_steps(run):
                process.kill()
                break
            time.sleep(POLL_SECONDS)
    finally:
        process.kill()
        process.wait()
    report(
        f"killed (SIGKILL) after step {_last_step(run):,} of {plan['steps']:,}; checkpoints: {checkpoint_steps(run)}"
    )
    return _last_step(run)


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
    newest = checkpoints_folder(run) / f"step-{checkpoint_steps(run)[-1]:08d}"
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
