"""What a user types: every verb works from files to words, and every mistake costs one sentence and exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli_helpers import assert_refused, run_cli


def test_fifty_rows_of_ones_own_go_all_the_way(tmp_path: Path) -> None:
    rows = [
        {
            "headline": f"red apple number {i}" if i % 2 else f"blue sea number {i}",
            "body": "text",
            "tags": ["fruit" if i % 2 else "water"],
        }
        for i in range(50)
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store, folder = tmp_path / "store", tmp_path / "run"
    result = run_cli(
        "shard",
        tmp_path / "mine.jsonl",
        "--out",
        store,
        "--text-field",
        "headline,body",
        "--label-field",
        "tags",
        "--tokenizer",
        "train:100",
        "--workers",
        1,
        "--json",
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["train"]["instances"] == 50 and summary["labels"] == 2
    assert (
        run_cli(
            "train", store, "--out", folder, "--epochs", 40, "--set", "train.batch=10", "--set", "encoder.dim=16"
        ).exit_code
        == 0
    )
    shutil.rmtree(store)
    (tmp_path / "new.jsonl").write_text('{"text": "red apple"}\n{"text": "blue sea"}\n')
    answer = run_cli("predict", folder, "--text", "a red apple", "--text", "the blue sea", "--top-k", 1, "--json")
    assert [row["labels"] for row in json.loads(answer.stdout)] == [["fruit"], ["water"]]
    out = tmp_path / "out.jsonl"
    assert run_cli("predict", folder, tmp_path / "new.jsonl", "--out", out).exit_code == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["labels"][0] for line in lines] == ["fruit", "water"]
    assert all(0 <= p <= 1 for line in lines for p in line["probabilities"])
    assert_refused(run_cli("evaluate", folder), "evaluate RUN STORE")


def test_evaluate_gives_the_contracts_json(run: Path, tmp_path: Path) -> None:
    result = run_cli("evaluate", run, "--k", "1,5", "--json", tmp_path / "result.json")
    assert result.exit_code == 0, result.output
    value = json.loads((tmp_path / "result.json").read_text())
    assert {"split", "instances", "step", "metrics"} <= set(value)
    assert (value["split"], value["instances"], value["step"]) == ("test", 200, 4)
    assert set(value["metrics"]) == {f"{name}@{k}" for name in ("P", "nDCG", "PSP", "PSnDCG", "R") for k in (1, 5)}
    assert all(0 <= metric <= 1 for metric in value["metrics"].values())
    assert json.loads(run_cli("evaluate", run, "--k", "1,5", "--json").stdout) == value


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_fp8_logits_without_a_gpu_are_refused_before_anything_is_written(store: Path, tmp_path: Path) -> None:
    result = run_cli("train", store, "--out", tmp_path / "run", "--set", "classifier.fp8_logits=true")
    assert_refused(result, "classifier.fp8_logits needs a GPU")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_is_laid_out_as_promised(run: Path) -> None:
    for name in ("config.toml", "metrics.jsonl", "labels", "tokenizer", "tensorboard"):
        assert (run / name).exists()
    checkpoint = run / "checkpoints" / "step-00000004"
    for name in (
        "manifest.json",
        "state.json",
        "encoder.safetensors",
        "optimizer.safetensors",
        "classifier/chunk-00000.safetensors",
    ):
        assert (checkpoint / name).is_file()


def test_resume_of_a_finished_run_says_so(run: Path) -> None:
    result = run_cli("resume", run, "--json")
    assert result.exit_code == 0
    assert "finished already" in result.stderr
    assert json.loads(result.stdout)["step"] == 4


def test_dry_run_prints_every_key_and_trains_nothing(store: Path, tmp_path: Path) -> None:
    result = run_cli("train", store, "--dry-run", "--set", "seed=4")
    assert result.exit_code == 0, result.output
    for key in (
        "seed = 4",
        "[encoder]",
        "[classifier]",
        "chunk_labels",
        "[optimizer]",
        "[checkpoint]",
        "[loader]",
        "threads",
        "classifier weights",
    ):
        assert key in result.stdout
    value = json.loads(run_cli("train", store, "--dry-run", "--json").stdout)
    plan = json.loads(run_cli("plan", store, "--json").stdout)
    measured = ("rates", "time", "budget", "peak")
    assert {key for key in plan if plan[key] != value["plan"][key]} <= {*measured, "memory"}
    assert plan["fits"] and plan["time"]["step"] > 0 and plan["placement"]["mapped"] == 0


def test_epochs_on_the_command_line_replace_the_steps_of_a_configuration(store: Path, tmp_path: Path) -> None:
    given = run_cli("train", store, "--set", "train.steps=100", "--epochs", "3", "--dry-run", "--json")
    config = json.loads(given.stdout)["config"]["train"]
    assert (config["epochs"], config["steps"]) == (3, 0)


def test_evaluate_and_predict_take_another_budget_than_the_training_had(run: Path) -> None:
    for verb in (("evaluate", run), ("predict", run, "--text", "a text")):
        assert_refused(run_cli(*verb, "--set", "memory.device=1MiB"), "memory does not suffice")
        assert_refused(run_cli(*verb, "--set", "train.batch=8"), "train.batch=8")


def test_inspect_and_verify_know_stores_runs_and_checkpoints(store: Path, run: Path) -> None:
    for path, kind in ((store, "store"), (run, "run"), (run / "checkpoints" / "step-00000004", "checkpoint")):
        assert json.loads(run_cli("inspect", path, "--json").stdout)["kind"] == kind
        assert kind in run_cli("inspect", path).stdout
        assert json.loads(run_cli("verify", path, "--json").stdout)["kind"] == kind


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a", "labels": {"b": 1}}', ["list of strings"]),
        ('{"text": "a", "labels": ["b", 1]}', ["label 2"]),
        ('{"text": "a", "labels": [""]}', ["empty"]),
        ('{"text": "a", "labels": null}', ["labels"]),
        ('{"text": "a"}', ["labels", "missing"]),
        ('{"labels": ["b"]}', ["text", "missing"]),
        ('{"text": 3, "labels": ["b"]}', ["text"]),
        ('{"text": "a", "text": "b", "labels": ["b"]}', ["twice"]),
        ('{"text": "a", "labels": ["b"]', ["JSON"]),
        ('["a"]', ["a list"]),
        ('"text"', ["a string"]),
        ("plain text", ["JSON"]),
        ("", ["blank"]),
        ("\x00", ["JSON"]),
        ("[" * 100_000, ["nested"]),
        ('{"text": "\\ud800", "labels": ["b"]}', ["surrogate"]),
        ('{"text": "a", "labels": ["\\udfff"]}', ["surrogate"]),
        ('{"text": "a", "labels": ["' + "x" * 5000 + '"]}', ["4096"]),
        ('{"text": "a", "labels": {"b": 1}}', ["list"]),
        (b'{"text": "caf\xe9", "labels": ["b"]}', ["UTF-8"]),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line_and_nothing_stays(
    tmp_path: Path, line: str | bytes, words: list[str]
) -> None:
    good = b'{"text": "good", "labels": ["b"]}\n'
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    result = run_cli("shard", path, "--out", tmp_path / "store", "--tokenizer", "train:100", "--workers", 1)
    assert_refused(result, "bad.jsonl:2:", *words)
    assert not (tmp_path / "store" / "index.json").exists()


def test_every_misspelt_argument_of_a_session_is_refused_with_what_to_do(
    store: Path, run: Path, tmp_path: Path
) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "a", "labels": ["b"]}\n')
    new = tmp_path / "new"
    for arguments, words in [
        (["shrad", text], ["No such command"]),
        (["shard", tmp_path / "nowhere.jsonl", "--out", new], ["nowhere.jsonl"]),
        (["shard", text], ["--out"]),
        (["shard", text, "--out", new, "--tokeniser", "x"], ["--tokenizer"]),
        (["shard", text, "--out", new, "--tokenizer", "no-such-tokenizer-anywhere"], ["no-such-tokenizer-anywhere"]),
        (["shard", text, "--out", new, "--tokenizer", "train:many"], ["train:N"]),
        (["shard", text, "--out", new, "--text-field", "title"], ["a.jsonl:1", "title"]),
        (["shard", text, "--out", new, "--label-field", "tags"], ["a.jsonl:1", "tags"]),
        (["shard", text, "--out", new, "--format", "xml"], ["xml"]),
        (["shard", text, "--out", new, "--propensity", "1"], ["A,B"]),
        (["shard", text, "--out", new, "--max-length", "0"], ["0"]),
        (["shard", text, "--out", store], ["exists"]),
        (["train", tmp_path / "nowhere", "--out", new], ["nowhere", "elmo-stream shard"]),
        (["train", store], ["--out"]),
        (["train", store, "--out", run], ["elmo-stream resume"]),
        (["train", store, "--out", store], ["other files"]),
        (["train", store, "--out", new, "--set", "checkpoint.every_minutes=inf"], ["checkpoint.every_minutes"]),
        (["train", store, "--out", new, "--epochs", "0"], ["--epochs"]),
        (["train", store, "--out", new, "--epochs", "1", "--steps", "1"], ["exclude"]),
        (["train", store, "--out", new, "--config", tmp_path / "no.toml"], ["no.toml"]),
        (["train", store, "--out", new, "--set", "train.bacth=2"], ["train.batch"]),
        (
            ["train", store, "--out", new, "--set", "encoder.kind=transformer", "--set", "encoder.name=no-such-model"],
            ["encoder.name", "no-such-model"],
        ),
        (["resume", new], ["not a run"]),
        (["evaluate", new], ["not a run"]),
        (["evaluate", run, "--split", "tset"], ["tset", "train, test"]),
        (["evaluate", run, "--k", "one"], ["1,3,5"]),
        (["evaluate", run, tmp_path / "nowhere"], ["nowhere"]),
        (["predict", run], ["--text"]),
        (["predict", new, "--text", "a"], ["not a run"]),
        (["predict", run, text], ["--out"]),
        (["predict", run, text, "--out", text], ["exists"]),
        (["predict", run, text, "--out", tmp_path / "no" / "out.jsonl"], ["no"]),
        (["predict", run, text, "--text-field", "title", "--out", tmp_path / "out.jsonl"], ["a.jsonl:1", "title"]),
        (["predict", run, "--text", "a", "--top-k", "0"], ["--top-k"]),
        (["predict", run, "--text", "\udcff"], ["Unicode"]),
        (["predict", run, "--text", "a", "--out", tmp_path / "out.jsonl"], ["--text alone"]),
        (["evaluate", run, "--json", tmp_path], ["folder"]),
        (["predict", run, text, "--out", tmp_path / "out.csv"], [".jsonl or .parquet"]),
        (["evaluate", run, "--json", tmp_path / "no" / "out.json"], ["folder"]),
        (["inspect", tmp_path], ["neither"]),
        (["verify", tmp_path], ["neither"]),
    ]:
        assert_refused(run_cli(*arguments), *words)
        assert not new.exists() and not (tmp_path / "out.jsonl").exists(), arguments


def test_a_tokenizer_that_is_not_the_encoders_is_refused(store: Path, tmp_path: Path, bert_of_others: Path) -> None:
    assert_refused(
        run_cli(
            "train",
            store,
            "--out",
            tmp_path / "run",
            "--set",
            "encoder.kind=transformer",
            "--set",
            f"encoder.name={json.dumps(str(bert_of_others))}",
        ),
        "--tokenizer",
    )


@pytest.fixture(scope="module")
def bert_of_others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("others") / "bert"
    BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    ).save_pretrained(folder)
    Tokenizer(models.WordLevel({"[UNK]": 0, "other": 1}, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    return folder


def test_parquet_output_reads_back(run: Path, corpus: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    out = tmp_path / "out.parquet"
    assert run_cli("predict", run, corpus / "test.jsonl", "--out", out, "--top-k", 3).exit_code == 0
    table = pyarrow.parquet.read_table(out).to_pylist()
    assert len(table) == 200 and all(len(row["labels"]) == 3 for row in table)


@pytest.mark.parametrize(
    "verb", ["shard", "plan", "train", "resume", "evaluate", "predict", "inspect", "verify", "demo", "doctor"]
)
def test_each_verbs_help_shows_an_example(verb: str) -> None:
    result = run_cli(verb, "--help")
    assert result.exit_code == 0
    assert f"elmo-stream {verb}" in result.stdout
    assert "--debug" in result.stdout and "--json" in result.stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "elmo_stream", "resume", str(tmp_path), "--debug"],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert "Traceback" in process.stderr


def test_the_public_names_are_six_and_exist() -> None:
    import elmo_stream

    assert len(elmo_stream.__all__) == 6
    assert all(getattr(elmo_stream, name) for name in elmo_stream.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = elmo_stream.nothing
