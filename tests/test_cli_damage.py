"""What must not be lost or believed when files, disks and processes fail under the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from elmo_stream.files import write_sealed_json
from tests.cli_helpers import BAG, assert_refused, run_cli


def _sign(run: Path, **change: object) -> None:
    """Change the description of a run as one who also makes its checksum agree."""
    body = {**json.loads((run / "run.json").read_text()), **change}
    del body["sha256"]
    write_sealed_json(run / "run.json", body)


def test_verify_names_the_damaged_file_with_exit_code_74(store: Path, run: Path, tmp_path: Path) -> None:
    for source, name in (
        (store, "labels/names.bin"),
        (run, "checkpoints/step-00000004/encoder.safetensors"),
        (run, "labels/names.bin"),
        (run, "tokenizer/tokenizer.json"),
        (run, "config.toml"),
        (run, "run.json"),
    ):
        copy = tmp_path / name.replace("/", "-") / source.name
        shutil.copytree(source, copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 4
        (copy / name).write_bytes(data)
        assert_refused(run_cli("verify", copy), Path(name).name, code=74)


def test_a_store_that_was_replaced_is_not_trained_on(store: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    _sign(copy, store_fingerprint="0" * 64)
    shutil.rmtree(copy / "checkpoints")
    assert_refused(run_cli("resume", copy), "not the store")


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning_or_refused_if_asked(
    store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert run_cli("train", store, "--out", run, *BAG, "--set", "checkpoint.every_steps=3").exit_code == 0
    path = run / "checkpoints" / "step-00000004" / "encoder.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert_refused(run_cli("resume", run, "--strict"), str(path), code=74)
    result = run_cli("resume", run)
    assert result.exit_code == 0 and "warning" in result.stderr and str(path) in result.stderr
    assert "resuming at step 3" in result.stderr and path.read_bytes() == whole


def test_two_trainings_in_one_folder_do_not_mix(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["train", str(store), "--out", str(folder), "--set", "encoder.dim=32", "--steps", "100000"]
    first = subprocess.Popen([sys.executable, "-m", "elmo_stream", *arguments], stderr=subprocess.PIPE, text=True)
    try:
        assert first.stderr is not None
        assert any("step" in line for line in first.stderr)
        assert_refused(run_cli("resume", folder), "another process", code=75)
    finally:
        first.kill()
        first.wait()
    assert json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("name", ["labels/names.bin", "tokenizer/tokenizer.json"])
def test_a_damaged_store_is_not_taken_into_a_run(store: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert_refused(run_cli("train", copy, "--out", tmp_path / "run", *BAG), Path(name).name, code=74)
    assert not (tmp_path / "run" / "run.json").exists()
    assert run_cli("train", store, "--out", tmp_path / "run", *BAG).exit_code == 0


def test_a_moved_store_is_resumed_with_at_its_new_place(store: Path, run: Path, tmp_path: Path) -> None:
    copy, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints")
    _sign(copy, store=str(tmp_path / "gone"))
    assert_refused(run_cli("resume", copy), "resume RUN STORE")
    shutil.copytree(store, moved)
    assert run_cli("resume", copy, moved).exit_code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_prediction_leaves_nothing_behind(run: Path, tmp_path: Path, number: int, code: int) -> None:
    texts, out = tmp_path / "texts.jsonl", tmp_path / "out.jsonl"
    texts.write_text('{"text": "word1 a word2 b"}\n' * 1_000_000)
    arguments = [sys.executable, "-m", "elmo_stream", "predict", str(run), str(texts), "--out", str(out)]
    # Without coverage: a signal that arrives inside it leaves its lock held.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment)
    while not list(tmp_path.glob("out.jsonl.tmp-*")):
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == code
    assert errors.strip() == f"error: ended by {number.name}."
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_plan_of_a_model_beyond_all_memory_is_a_plan(store: Path) -> None:
    keys = ["encoder.dim=65536", "encoder.hidden=65536", "encoder.bigrams=268435456"]
    result = run_cli("plan", store, "--json", *(part for key in keys for part in ("--set", key)))
    assert result.exit_code == 2, result.output
    plan = json.loads(result.stdout)
    assert {row["name"]: row["bytes"] for row in plan["memory"]}["encoder weights"] > 2**44
    assert not plan["fits"] and "encoder.dim" in plan["advice"][0]


def test_a_changed_configuration_is_not_resumed_with(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = (copy / "config.toml").read_text()
    (copy / "config.toml").write_text(config.replace('format = "fp8"', 'format = "bf16"'))
    for verb in (["resume", copy], ["evaluate", copy], ["predict", copy, "--text", "a"]):
        assert_refused(run_cli(*verb), "config.toml", code=74)


@pytest.mark.parametrize(
    "change", [{"labels": "10"}, {"labels": 10**15}, {"vocab_size": 10**12}, {"prior": 3.0}, {"x": 1}]
)
def test_a_run_description_that_lies_is_refused(run: Path, tmp_path: Path, change: dict[str, object]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    _sign(copy, **change)
    assert_refused(run_cli("predict", copy, "--text", "a"), "run.json", code=74)


def test_a_store_with_another_tokenizer_is_not_evaluated_on(run: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    files = [corpus / "train.jsonl", "--test", corpus / "test.jsonl"]
    assert run_cli("shard", *files, "--out", other, "--tokenizer", "train:300", "--workers", 1).exit_code == 0
    assert_refused(run_cli("evaluate", run, other), "tokenized otherwise")


def test_a_full_disk_is_an_input_output_error_and_the_run_stays_whole(store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = f"ulimit -f 2000; exec {sys.executable} -m elmo_stream train {store} --out {folder} --steps 2"
    process = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert process.returncode == 74, process.stderr
    assert "Traceback" not in process.stderr and "safetensors" in process.stderr
    assert run_cli("verify", folder).exit_code == 0
    assert not list((folder / "checkpoints").iterdir())


def test_an_unwritable_place_is_an_input_output_error(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(run_cli("train", store, "--out", tmp_path / "file" / "run", *BAG), "file", code=74)


def test_what_a_disk_cannot_hold_is_refused_before_it_is_written(
    store: Path, run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized = ["shard", corpus / "train.jsonl", "--out", tmp_path / "store", "--tokenizer", run / "tokenizer"]
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=10_000))
    assert_refused(run_cli("train", store, "--out", tmp_path / "other", *BAG), "bytes", "make room", code=74)
    assert not list(tmp_path.glob("other/checkpoints/*"))
    assert_refused(run_cli(*tokenized, "--workers", 1), "bytes", "make room", code=74)
    assert not list(tmp_path.glob("store/.build/rows-*"))
    monkeypatch.undo()
    assert run_cli(*tokenized, "--workers", 1).exit_code == 0
    assert run_cli("train", store, "--out", tmp_path / "other", *BAG).exit_code == 0


def test_a_reader_of_messages_that_goes_away_neither_ends_the_work_nor_changes_its_exit_code(
    store: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "elmo_stream"]
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full, which refuses what is written")
    with open("/dev/full", "wb") as full:
        refused = subprocess.run([*command, "evaluate", tmp_path / "nope"], stderr=full)
        trained = subprocess.run([*command, "train", store, "--out", tmp_path / "run", *BAG], stderr=full)
    assert (refused.returncode, trained.returncode) == (2, 0)
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()


def test_a_working_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    script = "import os, sys; os.mkdir(sys.argv[1]); os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); "
    script += "from elmo_stream.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "gone"], capture_output=True, text=True)
    assert done.returncode == 2 and "not there any more" in done.stderr
