"""A frozen encoder reads each text once; what is trained on its embeddings is what would be trained on the texts."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from elmo_stream.config import load_config
from elmo_stream.data.embeddings import EmbeddingPart
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames
from elmo_stream.data.rows import SplitRows
from elmo_stream.data.store import open_store
from elmo_stream.errors import CorruptError
from elmo_stream.model.encoder import Encoder
from elmo_stream.training.checkpoint import checkpoint_folder, checkpoint_steps, load_checkpoint
from elmo_stream.training.evaluate import evaluate, evaluate_model
from elmo_stream.training.metrics import RankingMetrics
from elmo_stream.training.models import trained_model
from elmo_stream.training.preview import plan_store
from elmo_stream.training.run import open_run
from elmo_stream.training.trainer import resume, train
from tests.cli_helpers import assert_refused, run_cli

CPU = torch.device("cpu")
KEYS = ["encoder.frozen=true", "train.batch=256", "threads=1"]


def _bert_keys(bert: Path) -> list[str]:
    return ["encoder.kind=transformer", f"encoder.name={json.dumps(str(bert))}"]


def _train(store: Path, out: Path, keys: list[str]) -> list[str]:
    heard: list[str] = []
    assert train(store, out, load_config(None, [*KEYS, *keys]), report=heard.append) == 0
    return heard


def _parts(cache: Path) -> list[Path]:
    return sorted(path.parent for path in cache.glob("*/*/index.json"))


def test_each_cached_embedding_is_that_of_its_own_text(store: Path, bert: Path, tmp_path: Path) -> None:
    keys = [*_bert_keys(bert), "train.steps=1", "train.label_texts=true", f"encoder.cache={tmp_path / 'cache'}"]
    _train(store, tmp_path / "run", keys)
    index, shards = StoreIndex.load(store), open_store(store)
    _, encoder, _ = trained_model(open_run(tmp_path / "run"), None, CPU, lambda line: None)
    names, rows = _parts(tmp_path / "cache")
    assert (names.name, rows.name) == ("names-0", "train")
    part = EmbeddingPart(rows, SplitRows(store, index, "train", 1500), encoder.dim)
    at = torch.tensor([1499, 0, 256, 255, 700, 700])
    x_BD = part.take(at.numpy())
    assert x_BD.dtype == torch.bfloat16
    for row, x_D in zip(at.tolist(), x_BD, strict=True):
        shard = shards.read_shard("train", index.splits["train"].shards[row // 256])
        ids = torch.from_numpy(shard.rows_between(row % 256, row % 256 + 1).tokens.astype("int64"))[None]
        with torch.no_grad():
            expected_1D = encoder.embed(ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(x_D.float(), expected_1D[0], rtol=0.01, atol=0.01)
    assert not torch.equal(x_BD[0], x_BD[1])
    labels = len(LabelNames(store / "labels"))
    assert sum(path.stat().st_size for path in names.glob("*.bf16")) == 2 * labels * encoder.dim


@pytest.mark.parametrize("keys", [[], ["encoder.hidden=24", "train.label_texts=true"]])
def test_a_stopped_run_resumes_with_the_same_bits_with_and_without_its_cache(
    store: Path, tmp_path: Path, keys: list[str]
) -> None:
    keys = [*keys, "encoder.dim=32", "train.epochs=2", "checkpoint.every_steps=1", "checkpoint.keep=99"]
    _train(store, tmp_path / "whole", keys)
    whole = load_checkpoint(tmp_path / "whole")
    assert whole is not None
    for name, has_cache in (("with", True), ("without", False)):
        run = tmp_path / name
        shutil.copytree(tmp_path / "whole", run)
        for step in range(4, whole.step + 1):
            shutil.rmtree(checkpoint_folder(run, step))
        if not has_cache:
            shutil.rmtree(run / "embeddings")
        heard: list[str] = []
        assert resume(run, report=heard.append) == 0
        assert any("embedding train" in line for line in heard) is not has_cache
        again = load_checkpoint(run)
        assert again is not None and again.step == whole.step
        assert torch.equal(again.rows("weight", 0, 1000), whole.rows("weight", 0, 1000))
        for part, tensor in whole.tensors("encoder").items():
            assert torch.equal(again.tensors("encoder")[part], tensor)


def test_runs_share_a_cache_and_train_only_what_is_not_frozen(store: Path, tmp_path: Path) -> None:
    keys = ["encoder.dim=32", "encoder.hidden=24", "train.epochs=3", f"encoder.cache={tmp_path / 'cache'}"]
    first = _train(store, tmp_path / "first", [*keys, "optimizer.classifier_lr=0.03"])
    second = _train(store, tmp_path / "second", keys)
    assert any("embedding train" in line for line in first)
    assert not any("embedding train" in line for line in second)
    other = _train(store, tmp_path / "other", [*keys, "seed=1"])
    assert any("embedding train" in line for line in other), "another encoder needs a cache of its own"
    one, two = load_checkpoint(tmp_path / "first"), load_checkpoint(tmp_path / "second")
    assert one is not None and two is not None
    for name, tensor in one.tensors("encoder").items():
        assert torch.equal(tensor, two.tensors("encoder")[name]) is name.startswith("body."), name


def test_the_plan_says_what_the_cache_takes(store: Path, tmp_path: Path) -> None:
    keys = ["encoder.dim=32", "train.steps=1", "train.label_texts=true"]
    _train(store, tmp_path / "run", keys)
    taken = sum(path.stat().st_size for path in (tmp_path / "run" / "embeddings").rglob("*.bf16"))
    plan = plan_store(store, load_config(None, [*KEYS, *keys]), tmp_path / "other")
    assert [row.bytes for row in plan.rows if row.name == "cached embeddings"] == [taken]


def test_a_resumed_transformer_finds_its_cache(store: Path, bert: Path, tmp_path: Path) -> None:
    keys = [*_bert_keys(bert), "encoder.hidden=24", "train.epochs=2", "checkpoint.every_steps=3"]
    _train(store, tmp_path / "run", keys)
    shutil.rmtree(checkpoint_folder(tmp_path / "run", checkpoint_steps(tmp_path / "run")[-1]))
    heard: list[str] = []
    assert resume(tmp_path / "run", report=heard.append) == 0
    assert not any("embedding train" in line for line in heard)


def test_embeddings_that_the_disk_cannot_hold_are_refused_before_any_is_computed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, full = shutil.disk_usage, shutil.disk_usage(tmp_path)._replace(free=60_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if "cache" in Path(path).parts else whole(path))
    with pytest.raises(OSError, match="only 60,000 are free"):
        _train(store, tmp_path / "run", ["encoder.dim=32", f"encoder.cache={tmp_path / 'cache'}"])
    assert not list((tmp_path / "cache").rglob("*.bf16"))


def test_validation_from_the_cache_is_that_of_the_texts(store: Path, tmp_path: Path) -> None:
    _train(store, tmp_path / "run", ["encoder.dim=64", "train.epochs=6", "train.validation=0.2"])
    told = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [row["validation/P@5"] for row in told if "validation/P@5" in row][-1]
    run = open_run(tmp_path / "run")
    _, encoder, classifier = trained_model(run, None, CPU, lambda line: None)
    again = evaluate_model(
        encoder, classifier, store, split="train", rows=(1200, 1500), metrics=RankingMetrics((5,), None), device=CPU
    )
    assert last > 0.05
    assert again["P@5"] == pytest.approx(last, abs=0.01)
    assert evaluate(tmp_path / "run", report=lambda line: None)["instances"] == 200


def test_a_killed_computation_keeps_the_files_that_were_finished(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["encoder.dim=32", "train.steps=1", f"encoder.cache={tmp_path / 'cache'}"]
    plain = Encoder.embed

    def fails_in_the_third_shard(self: Encoder, *batch: torch.Tensor) -> torch.Tensor:
        if len(list((tmp_path / "cache").rglob("shard-*.bf16"))) == 2:
            raise KeyboardInterrupt
        return plain(self, *batch)

    monkeypatch.setattr(Encoder, "embed", fails_in_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        _train(store, tmp_path / "run", keys)
    monkeypatch.undo()
    assert _parts(tmp_path / "cache") == []
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.bf16")}
    assert len(files) == 2
    assert resume(tmp_path / "run", report=lambda line: None) == 0
    assert len(_parts(tmp_path / "cache")) == 1
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())


def test_a_damaged_cache_is_named_and_not_trained_on(store: Path, tmp_path: Path) -> None:
    keys = ["encoder.dim=32", "train.steps=1", f"encoder.cache={tmp_path / 'cache'}"]
    _train(store, tmp_path / "run", keys)
    path = next((tmp_path / "cache").rglob("shard-00002.bf16"))
    good = path.read_bytes()
    for bad in (good[:-2], bytes([good[0] ^ 1]) + good[1:]):
        path.write_bytes(bad)
        with pytest.raises(CorruptError, match=r"shard-00002\.bf16"):
            _train(store, tmp_path / f"run-{len(bad)}-{bad[0]}", [*keys, "train.steps=6"])
    assert_refused(run_cli("train", store, "--out", tmp_path / "x", "--set", "encoder.cache=/tmp"), "encoder.frozen")
