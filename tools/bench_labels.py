"""Memory and time of the label map: counting, merging and looking up, in one process.

    python -m tools.bench_labels [--labels 10000000]

Every label occurs once, and the first thousand of each hundred thousand once more. Memory is the peak of the resident
memory over what the process held before it began; the map that is looked up in is mapped from disk and counts.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from elmo_stream.data.label_build import build_labels
from elmo_stream.data.label_runs import LabelCounter, Run
from elmo_stream.data.labels import LabelMap
from elmo_stream.system import peak_resident_bytes

LOOKED_UP = 100_000


def main() -> None:
    """Parse, count, build, look up, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--labels", type=int, default=10_000_000)
    labels: int = parser.parse_args().labels
    before = peak_resident_bytes()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-labels-") as name:
        folder = Path(name)
        for part in ("runs", "names", "lookup"):
            (folder / part).mkdir()
        counter = LabelCounter(folder / "runs")
        for first in range(0, labels, LOOKED_UP):
            counter.add(f"the name of label {number}" for number in range(first, min(first + LOOKED_UP, labels)))
            counter.add(f"the name of label {number}" for number in range(first, min(first + 1000, labels)))
        counter.close()
        runs = [Run(folder / "runs", run) for run in counter.runs]
        count = build_labels(runs, folder / "lookup", folder / "names", folder / "lookup")
        built = time.perf_counter() - started
        chosen = np.random.default_rng(0).choice(labels, min(LOOKED_UP, labels), replace=False)
        ids = LabelMap(folder / "lookup").lookup([f"the name of label {number}" for number in chosen.tolist()])
        assert count == labels and len(np.unique(ids)) == len(chosen) and ids.min() >= 0
    extra = peak_resident_bytes() - before
    each = extra / labels
    print(f"{labels:,} labels in {len(runs)} runs: {built:,.0f} s, {extra >> 20:,} MiB, {each:.1f} bytes a label")


if __name__ == "__main__":
    main()
