"""Budgets: training does what its plan says, says before it begins what cannot work, and loses nothing on the way."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from elmo_stream.config import ClassifierConfig, load_config, parse_size
from elmo_stream.errors import UserError, out_of_memory
from elmo_stream.model.placement import DEVICE, MAPPED
from elmo_stream.system import peak_resident_bytes, resident_bytes
from elmo_stream.training.checkpoint import checkpoint_folder, checkpoint_steps, load_checkpoint
from elmo_stream.training.evaluate import evaluate
from elmo_stream.training.plan import ALWAYS, DISK, Plan
from elmo_stream.training.preview import plan_sizes, plan_store
from elmo_stream.training.rates import Rates
from elmo_stream.training.trainer import resume, train
from tests.cli_helpers import assert_refused, run_cli
from tests.training.left_behind import tensor_files
from tools.synthetic_store import make_store

KEYS = [
    "encoder.dim=512", "encoder.bigrams=0", "train.batch=64", "train.steps=4", "train.validation=0",
    "classifier.chunk_labels=1024", "classifier.format=fp32", "loader.bucket=1", "checkpoint.every_steps=2",
    "threads=1",
]  # fmt: skip


def _quiet(line: str) -> None:
    pass


def _half_of_the_chunks(store: Path) -> str:
    """A budget in which most of the 78 MiB of chunks have room; the process may grow by 38 MiB until it is used."""
    plan = plan_store(store, load_config(None, [*KEYS, "memory.device=1TiB"]), None)
    assert plan.chunks.bytes_at(DEVICE) > 78 * 2**20
    return f"memory.device={plan.peak(DEVICE) - plan.chunks.bytes_at(DEVICE) * 2 // 5}"


def _weights(run: Path) -> dict[str, str]:
    return tensor_files(run, checkpoint_steps(run)[-1])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40,000 labels, 300 instances."""
    folder = tmp_path_factory.mktemp("wide") / "store"
    make_store(folder, labels=40_000, instances=300, test=20, tokens=16, rows_per_shard=128)
    return folder


@pytest.fixture(scope="module")
def resident(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose chunks all have room."""
    run = tmp_path_factory.mktemp("resident") / "run"
    assert train(store, run, load_config(None, KEYS), report=_quiet) == 0
    return run


def test_a_run_from_disk_writes_the_bytes_of_a_resident_one_and_may_change_at_a_resume(
    store: Path, resident: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    run = tmp_path / "run"
    assert train(store, run, load_config(None, [*KEYS, _half_of_the_chunks(store)]), report=lines.append) == 0
    assert any("mapped" in line and "device" in line for line in lines)
    found = evaluate(run, report=_quiet)
    assert _weights(run) == _weights(resident)
    assert found == evaluate(resident, report=_quiet)
    assert list((run / "scratch").iterdir()) == []
    shutil.rmtree(checkpoint_folder(run, checkpoint_steps(run)[-1]))
    assert resume(run, memory=["memory.device=1TiB"], report=lines.append) == 0
    assert _weights(run) == _weights(resident)


def test_a_resume_changes_budgets_and_nothing_else(resident: Path) -> None:
    assert_refused(run_cli("resume", resident, "--set", "train.batch=7"), "memory.device")
    assert_refused(run_cli("resume", resident, "--set", "memory.device=8Gb"), "memory.device", "8GiB")


def test_a_budget_that_cannot_work_is_refused_with_the_table_before_anything_is_written(
    store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    options = [part for key in [*KEYS, "memory.device=64MiB"] for part in ("--set", key)]
    result = run_cli("train", store, "--out", out, *options)
    assert result.exit_code == 2
    assert "encoder weights" in result.stderr and "memory.device; raise it, or change" in result.stderr
    assert not out.exists() or list(out.iterdir()) == []
    plan = run_cli("plan", store, *options)
    assert plan.exit_code == 2 and "memory.device; raise it, or change" in plan.stdout


def test_a_plan_from_numbers_puts_what_has_no_room_on_the_disk(tmp_path: Path) -> None:
    plan = run_cli(
        "plan", "--labels", 30_000_000, "--dim", 64, "--instances", 1000, "--device-memory", "1500MiB",
        "--disk", tmp_path, "--set", "threads=1", "--rate", "disk_read=1GB", "--rate", "disk_write=500MB",
        "--rate", "disk_work=1e15", "--rate", "weights=1e12", "--rate", "flops=1e12", "--json",
    )  # fmt: skip
    value = json.loads(plan.stdout)
    assert value["placement"]["device"] > 0 and value["placement"]["mapped"] > 0
    assert value["peak"]["device"] <= value["budget"]["device"] == 1500 * 2**20
    mapped = sum(row["bytes"] for row in value["memory"] if row["where"] == "disk")
    assert value["time"]["transfer"] == pytest.approx(mapped / 500e6, rel=0.01)
    assert 0.98 < value["time"]["hidden_from_batch"] / (value["time"]["transfer"] * 1e12 / (6 * 64 * 3e7)) < 1.02
    assert_refused(run_cli("plan", "--labels", 10), "--instances")
    assert_refused(run_cli("plan", "--labels", 10, "--instances", 5, "--rate", "speed=3"), "disk_read")


def test_a_gpu_whose_memory_ran_out_is_known_by_any_of_its_words() -> None:
    words = ("CUDA out of memory. Tried to allocate 2 MiB", "CUDA error: out of memory", "can't allocate memory")
    for says in (*words, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"):
        assert out_of_memory(RuntimeError(says))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("text", "size"), [("8GiB", 2**33), ("1.5 MB", 1_500_000), ("77", 77), ("", None)])
def test_sizes_are_read(text: str, size: int | None) -> None:
    assert parse_size("memory.device", text) == size


@pytest.mark.parametrize("text", ["8Gb", "-1GiB", "GiB", "0", "1e3MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"memory\.host"):
        load_config(None, [f"memory.host='{text}'"])


@pytest.mark.slow
def test_when_memory_runs_out_shrinking_goes_on_to_the_same_bytes(store: Path, resident: Path, tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from elmo_stream.config import load_config
from elmo_stream.training import trainer
store, out, mode, *keys = sys.argv[1:]
real, calls = trainer.make_classifier, []
def limited(*arguments):  # the first attempt meets a hard limit in its first step
    model = real(*arguments)
    calls.append(model)
    if len(calls) == 1:
        import torch
        def full(*a, **k): return torch.empty(1 << 62, dtype=torch.uint8)
        model.train_step = full
    return model
trainer.make_classifier = limited
sys.exit(trainer.train(Path(store), Path(out), load_config(None, keys), on_oom=mode or None, report=print))
"""
    keys = [key if "chunk_labels" not in key else "classifier.chunk_labels=2048" for key in KEYS]
    done = subprocess.run(
        [sys.executable, "-c", script, str(store), str(tmp_path / "shrunk"), "shrink", *keys],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "chunks of 1,024 labels" in done.stdout
    loaded, expected = load_checkpoint(tmp_path / "shrunk"), load_checkpoint(resident)
    assert loaded is not None and expected is not None
    labels = json.loads((resident / "run.json").read_text())["labels"]
    assert torch.equal(loaded.rows("weight", 0, labels), expected.rows("weight", 0, labels))
    done = subprocess.run(
        [sys.executable, "-c", script, str(store), str(tmp_path / "ended"), "", *keys], capture_output=True, text=True
    )
    assert done.returncode != 0 and "--on-oom shrink" in done.stderr and "encoder weights" in done.stdout


def test_a_full_disk_for_scratch_files_is_said_before_training(store: Path, tmp_path: Path) -> None:
    keys = ["encoder.dim=4096", "classifier.format=fp32", "memory.device=2GiB", "threads=1"]
    keys += [f"memory.disk={json.dumps(str(tmp_path))}"]
    plan = plan_sizes(10**8, 1000, load_config(None, keys))
    assert DISK in plan.lacks() and "memory.disk" in " ".join(plan.advice())


def test_a_folder_that_cannot_be_written_is_named(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keys = [*KEYS, _half_of_the_chunks(store), f"memory.disk={tmp_path / 'file' / 'scratch'}"]
    options = [part for key in keys for part in ("--set", key)]
    assert_refused(run_cli("train", store, "--out", tmp_path / "run", *options), str(tmp_path / "file"), code=74)


def test_the_limit_of_file_sizes_ends_in_one_sentence_and_leaves_no_scratch(store: Path, tmp_path: Path) -> None:
    # The kernel's limit on the size of a file stands for a full disk.
    script = (
        "import resource,sys; from pathlib import Path; import torch;"
        "from elmo_stream.model.classifier import ChunkedClassifier as C; from elmo_stream.config import *;"
        "from elmo_stream.model.placement import plan_chunks; import signal;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "c=ClassifierConfig(chunk_labels=1024);"
        "C(3000,16,c,prior=.1,seed=0,device=torch.device('cpu'),plan=plan_chunks(3000,16,c,device_room=0),"
        "scratch=Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "File too large" in done.stderr and "chunk-00000" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_initial_weights_and_checkpoints_take_a_chunk_and_not_the_classifier(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "from tests.training.test_memory import _peak_of_a_large_one as f; f(sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[2])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown, whole = map(int, done.stdout.split())
    assert whole > 90 * 2**20 and grown < 40 * 2**20


def _peak_of_a_large_one(folder: str) -> None:
    """Print by how much the peak of this process grew, and the bytes of the classifier that it made and saved."""
    from elmo_stream.model.classifier import ChunkedClassifier
    from elmo_stream.model.placement import plan_chunks
    from elmo_stream.training.checkpoint import Checkpoint, save_checkpoint

    torch.set_num_threads(1)
    labels, dim, config = 400_000, 64, ClassifierConfig(format="fp32", chunk_labels=4096)
    plan = plan_chunks(labels, dim, config, device_room=0)
    small = ChunkedClassifier(5000, dim, config, prior=0.1, seed=0, device=torch.device("cpu"))
    small.close()
    before = peak_resident_bytes()
    assert before - resident_bytes() < 2**28, "the peak is that of another process"
    keep = {"prior": 0.1, "seed": 0, "device": torch.device("cpu"), "plan": plan, "scratch": Path(folder) / "scratch"}
    model = ChunkedClassifier(labels, dim, config, **keep)  # type: ignore[arg-type]
    path = save_checkpoint(
        Path(folder), 1, state={"total_steps": 2}, encoder={}, optimizer={}, classifier=model.state_chunks()
    )
    model.close()
    again = ChunkedClassifier(labels, dim, config, weights=Checkpoint(path).rows, **keep)  # type: ignore[arg-type]
    again.close()
    print(peak_resident_bytes() - before, plan.bytes_at(MAPPED))


def test_the_peak_of_a_plan_is_what_is_always_there_and_the_largest_phase(store: Path) -> None:
    plan: Plan = plan_store(store, load_config(None, KEYS), None)
    always = sum(row.bytes for row in plan.rows if row.where == DEVICE and row.phase == ALWAYS)
    phases = {row.phase for row in plan.rows} - {ALWAYS}
    sums = [sum(row.bytes for row in plan.rows if (row.where, row.phase) == (DEVICE, phase)) for phase in phases]
    assert plan.peak(DEVICE) == always + max(sums)
    assert isinstance(plan.rates, Rates) and np.isfinite(plan.time().step)  # type: ignore[union-attr]
