"""A label space beyond memory, under a hard limit: train, checkpoint, resume, evaluate, and what bounds a step.

    python tools/bench_overflow.py --store STORE --limit 3GiB

Runs the real command line on a store (see tools/synthetic_store.py) in a memory control group where one can be made (v1
or v2: page cache and all processes count), else under RLIMIT_AS (``ulimit -v``: address space of each process). Prints
JSON: the mechanism, peak memory, seconds of each stage, and the seconds of a step beside those of its two bounds, both
measured in the same limit right after: the disk alone (all mapped bytes read and written through the same files) and
computing alone (the same kernels on resident chunks).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from elmo_stream.config import parse_size
from elmo_stream.system import peak_resident_bytes

GROUPS = Path("/sys/fs/cgroup")
SAMPLE_CHUNKS, BATCH = 24, 32


class Limit:
    """A memory control group, or RLIMIT_AS where none can be made."""

    def __init__(self, limit: int) -> None:
        self._limit, self._group, self._version = limit, None, 0
        for version, root, name in ((1, GROUPS / "memory", "memory.limit_in_bytes"), (2, GROUPS, "memory.max")):
            group = root / f"elmo-stream-{os.getpid()}"
            try:
                group.mkdir()
                (group / name).write_text(str(limit))
            except OSError:
                continue
            self._group, self._version = group, version
            break

    @property
    def mechanism(self) -> str:
        """How the limit is kept."""
        return f"memory control group, version {self._version}" if self._group else "RLIMIT_AS (ulimit -v)"

    def enter(self) -> None:
        """In the child: come under the limit."""
        if self._group:
            (self._group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_AS, (self._limit, self._limit))

    def peak(self) -> dict[str, int]:
        """Peak memory in bytes: page cache included, as the group counts, and its failures to stay below."""
        if not self._group:
            return {"peak_of_largest_process": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}
        names = ("memory.max_usage_in_bytes", "memory.failcnt") if self._version == 1 else ("memory.peak",)
        return {name: int((self._group / name).read_text()) for name in names}

    def close(self) -> None:
        """Remove the group."""
        if self._group:
            self._group.rmdir()


def _run(limit: Limit, *arguments: str) -> tuple[float, str]:
    """Seconds and output of a process under the limit."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], preexec_fn=limit.enter, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}")
    return time.perf_counter() - start, done.stdout


def _step_seconds(run: Path) -> float:
    """Seconds of a step over the whole resumed part, which no checkpoint interrupts."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return BATCH / float(last["instances_per_second"])


def bounds(run: Path) -> dict[str, Any]:
    """In the child: seconds of a step if only the disk, or only the kernels, had to work."""
    import torch

    from elmo_stream.model.chunk_layout import aligned_memory
    from elmo_stream.model.chunk_reader import ChunkReader
    from elmo_stream.model.placement import plan_chunks
    from elmo_stream.model.scratch import ScratchFiles
    from elmo_stream.training.rates import chunk_step, probe_chunk
    from elmo_stream.training.run import open_run, prepare_torch

    opened = open_run(run)
    config, info = opened.config, opened.info
    prepare_torch(config.threads)
    chunks = plan_chunks(info.labels, config.encoder.dim, config.classifier, device_room=0)
    sample = min(SAMPLE_CHUNKS, len(chunks.layouts) - 1)
    size = chunks.layouts[0].bytes
    files = ScratchFiles(run / "scratch")
    try:
        memories = [aligned_memory(size, torch.device("cpu")) for _ in range(3)]
        for number in range(sample):
            files.create(number, size)
            files.write(number, memories[0])
        reader = ChunkReader(files, range(sample), memories)
        start = time.perf_counter()
        rounds = 4
        for _ in range(rounds * sample):
            reader.release(reader.get(), changed=True)
        disk = (time.perf_counter() - start) / (rounds * sample)
        reader.close()
    finally:
        files.close()
    labels = chunks.largest_labels
    probe = probe_chunk(config, config.encoder.dim, torch.device("cpu"), labels)
    step = chunk_step(config, [probe], config.train.batch)
    step()
    start = time.perf_counter()
    for _ in range(sample):
        step()
    compute = (time.perf_counter() - start) / sample
    whole = info.labels / labels
    return {"disk_bound": disk * whole, "compute_bound": compute * whole, "peak_resident": peak_resident_bytes()}


def main() -> None:
    """Run all stages and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--run", type=Path, default=Path("overflow-run"), help="folder of the run, made anew")
    parser.add_argument("--limit", default="3GiB", help="hard limit of memory")
    parser.add_argument("--device-memory", default="1GiB", help="budget of the run: below the limit, page cache counts")
    parser.add_argument("--steps", type=int, default=4, help="before the resume, and as many after it")
    parser.add_argument("--set", dest="keys", action="append", default=[], help="more configuration keys")
    parser.add_argument("--bounds", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bounds:
        print(json.dumps(bounds(arguments.bounds)))
        return
    limit = Limit(parse_size("--limit", arguments.limit) or 0)
    shutil.rmtree(arguments.run, ignore_errors=True)
    keys = [
        f"train.batch={BATCH}", "train.validation=0", "encoder.dim=64", "encoder.bigrams=0", "classifier.format=fp8",
        "classifier.kahan_head=0",
        "classifier.chunk_labels=131072", f"train.steps={2 * arguments.steps}",
        f"checkpoint.every_steps={arguments.steps}", "optimizer.warmup_steps=0",
        f"memory.device={arguments.device_memory}", *arguments.keys,
    ]  # fmt: skip
    options = [part for key in keys for part in ("--set", key)]
    stages: dict[str, Any] = {}
    try:
        run, command = str(arguments.run), ["-m", "elmo_stream"]
        stages["train"], _ = _run(limit, *command, "train", str(arguments.store), "--out", run, *options)
        steps = sorted((arguments.run / "checkpoints").iterdir())
        shutil.rmtree(steps[-1])  # as a kill before the last checkpoint leaves it
        stages["resume"], _ = _run(limit, *command, "resume", run)
        step = _step_seconds(arguments.run)
        stages["evaluate"], result = _run(limit, *command, "evaluate", run, "--json")
        measured = json.loads(_run(limit, __file__, "--bounds", run)[1])
        peak = limit.peak()
    finally:
        limit.close()
    bound = max(measured["disk_bound"], measured["compute_bound"])
    report = {
        "limit": arguments.limit, "mechanism": limit.mechanism, "peak": peak, "stage_seconds": stages,
        "step_seconds": step, **measured, "step_over_bound": step / bound, "evaluation": json.loads(result),
    }  # fmt: skip
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
