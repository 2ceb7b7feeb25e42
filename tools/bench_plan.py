"""How true plans are: peak memory and step time of runs against their plans, each run a process of its own.

    python tools/bench_plan.py --folder SCRATCH [--only 3] [--steps 12] [--threads 1] [--rounds 3]

For every configuration a store is made (tools/synthetic_store.py), a plan with its calibration is computed in one
process, and training runs in another: its peak of resident memory, and that beyond what the process had before anything
was allocated (delta), against the plan; its seconds a step against the prediction. Prints a table, or JSON. Where the
speed of a machine varies from minute to minute, more rounds calibrate and train in turn: the median times
are compared, and the largest peak.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from elmo_stream.system import peak_resident_bytes

STORE = Path(__file__).with_name("synthetic_store.py")
TOKENS, INSTANCES, TINY_BERT = 32, 40_000, "bert"
# (labels, features, batch, format and other keys, share of the chunks' bytes that has room)
GRID: list[tuple[int, int, int, list[str], float]] = [
    (150_000, 256, 128, ["classifier.format=fp32"], 1.0),
    (150_000, 256, 128, ["classifier.format=fp32"], 0.5),
    (150_000, 256, 128, ["classifier.format=fp32"], 0.0),
    (300_000, 256, 64, ["classifier.format=bf16"], 1.0),
    (300_000, 256, 64, ["classifier.format=bf16", "classifier.rounding=kahan"], 0.5),
    (300_000, 256, 64, ["classifier.format=bf16"], 0.0),
    (500_000, 256, 64, ["classifier.format=fp8", "classifier.kahan_head=0"], 1.0),
    (500_000, 256, 64, ["classifier.format=fp8", "classifier.kahan_head=0.2"], 0.5),
    (500_000, 256, 32, ["classifier.format=fp8", "classifier.kahan_head=0"], 0.0),
    (400_000, 128, 512, ["classifier.format=fp8", "classifier.kahan_head=0", "classifier.chunk_labels=131072"], 1.0),
    (200_000, 512, 64, ["classifier.format=fp8", "classifier.kahan_head=0", "encoder.bigrams=131072"], 1.0),
    (200_000, 256, 64, ["classifier.format=bf16", TINY_BERT], 1.0),
    (200_000, 256, 64, ["classifier.format=bf16", TINY_BERT], 0.0),
]


def child(mode: str, store: Path, run: Path, keys: list[str]) -> dict[str, Any]:
    """In a process of its own: the plan with its prediction, or a training with its measured peak and time."""
    from elmo_stream.config import load_config
    from elmo_stream.training import trainer
    from elmo_stream.training.preview import plan_store

    config = load_config(None, keys)
    if mode == "plan":
        return plan_store(store, config, run).as_dict()
    times: list[float] = []
    plans: list[Any] = []
    step, allocate = trainer._Trainer.train_step, trainer._Trainer._allocate

    def timed_step(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        times.append(time.perf_counter())

    def noted(self: Any) -> None:
        plans.append(self.plan)
        allocate(self)

    for name, function in (("train_step", timed_step), ("_allocate", noted)):
        setattr(trainer._Trainer, name, function)
    trainer.train(store, run, config, report=lambda line: print(line, file=sys.stderr))
    gaps = sorted(b - a for a, b in itertools.pairwise(times[1:]))
    return {
        "peak": peak_resident_bytes(),
        "step": gaps[len(gaps) // 2],
        "plan": plans[0].as_dict(),
    }


def _child(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def _make_bert(folder: Path, store: Path, dim: int) -> Path:
    """A small BERT with random weights for the store's tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    from elmo_stream.data.index import StoreIndex

    target = folder / f"bert-{dim}-{store.name}"
    if not target.is_dir():
        torch.manual_seed(0)
        sizes = {"hidden_size": dim, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 4 * dim}
        model = BertModel(BertConfig(vocab_size=StoreIndex.load(store).tokenizer.vocab_size, **sizes))
        model.save_pretrained(target)
        shutil.copy(store / "tokenizer" / "tokenizer.json", target / "tokenizer.json")
    return target


def measure(folder: Path, number: int, steps: int, threads: int, rounds: int) -> dict[str, Any]:
    """Plan, then train, one configuration of the grid."""
    labels, dim, batch, keys, share = GRID[number]
    store = folder / f"store-{labels}"
    if not store.is_dir():
        sizes = ["--labels", str(labels), "--instances", str(INSTANCES), "--tokens", str(TOKENS)]
        subprocess.run([sys.executable, str(STORE), "--out", str(store), *sizes], check=True)
    keys = [f"threads={threads}", f"train.batch={batch}", f"train.steps={steps}", "train.validation=0.005", *keys]
    if TINY_BERT in keys:
        keys.remove(TINY_BERT)
        keys += ["encoder.kind=transformer", f"encoder.name={json.dumps(str(_make_bert(folder, store, dim)))}"]
    else:
        keys.append(f"encoder.dim={dim}")
    if share < 1:
        plan = _child("plan", str(store), str(folder / "none"), *keys)
        where = {row["name"]: row["bytes"] for row in plan["memory"] if row["where"] == "device"}
        chunks = sum(size for name, size in where.items() if name.startswith("classifier ") and name.endswith("device"))
        keys.append(f"memory.device={int(plan['peak']['device'] - (1 - share) * 0.9 * chunks)}")
    plans, runs = [], []
    for _ in range(rounds):
        plans.append(_child("plan", str(store), str(folder / "none"), *keys))
        run = folder / f"run-{number}"
        runs.append(_child("train", str(store), str(run), *keys))
        shutil.rmtree(run)
    planned = runs[0]["plan"]
    peak = max(run["peak"] for run in runs)
    step, step_planned = median(run["step"] for run in runs), median(plan["time"]["step"] for plan in plans)
    base = next(row["bytes"] for row in planned["memory"] if row["name"].startswith("interpreter"))
    return {
        "configuration": " ".join(key for key in keys if "encoder.name" not in key),
        "labels": labels,
        "placement": planned["placement"],
        "peak_measured": peak,
        "peak_planned": planned["peak"]["device"],
        "delta_ratio": (peak - base) / (planned["peak"]["device"] - base),
        "total_ratio": peak / planned["peak"]["device"],
        "step_measured": step,
        "step_planned": step_planned,
        "step_ratio": step / step_planned,
    }


def main() -> None:
    """Measure the grid and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", type=int, action="append", help="number of a configuration; may be repeated")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all cores")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        mode, store, run, *keys = arguments.child
        print(json.dumps(child(mode, Path(store), Path(run), keys)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in arguments.only or range(len(GRID)):
        rows.append(row := measure(arguments.folder, number, arguments.steps, arguments.threads, arguments.rounds))
        if not arguments.json:
            step, peak = 1000 * row["step_measured"], row["peak_measured"] / 2**20
            planned_step, planned_peak = 1000 * row["step_planned"], row["peak_planned"] / 2**20
            print(
                f"{number:>2}  {row['labels']:>9,} labels  {row['configuration']}\n    {row['placement']}\n"
                f"    peak {peak:,.0f} of {planned_peak:,.0f} MiB planned: x{row['total_ratio']:.2f}, delta "
                f"x{row['delta_ratio']:.2f}; step {step:,.0f} of {planned_step:,.0f} ms: x{row['step_ratio']:.2f}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
