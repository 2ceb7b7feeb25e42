"""Makes the golden files: small stores and runs as this version writes them, which later versions must read.

    python -m tests.golden.make FOLDER

Run it for a new version of a format, into a new folder beside the others, which stay as they are.
"""

import hashlib
import json
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from elmo_stream.config import LoaderConfig
from elmo_stream.data.index import BACKENDS, StoreIndex
from elmo_stream.data.loader import StreamLoader
from elmo_stream.files import read_sealed_json, write_sealed_json
from elmo_stream.training.predict import Predictor
from elmo_stream.training.run import open_run
from tests.torture.materials import make_run, make_store, quiet

FORMATS = ("fp32", "bf16", "fp8")
TEXTS = ["topic3 a topic7 b", "topic12 c", "topic0 h topic39 a topic5 d"]


def store_facts(store: Path) -> dict[str, Any]:
    """What a store must still be: its fingerprint, and a digest of its batches."""
    digest = hashlib.sha256()
    with StreamLoader(store, batch=16, seed=3, block_labels=1024, config=LoaderConfig(workers=0)) as loader:
        for batch in islice(loader, loader.batches_per_epoch):
            for tensor in (batch.token_ids_BT, batch.instance_B, batch.positives.label_P):
                digest.update(tensor.numpy().tobytes())
    return {"fingerprint": StoreIndex.load(store).fingerprint, "batches": digest.hexdigest()}


def run_facts(run: Path) -> dict[str, Any]:
    """What a run must still say."""
    predictor = Predictor(run, report=quiet)
    try:
        tagged = predictor(TEXTS, 3)
    finally:
        predictor.close()
    return {
        "labels": [[name for name, _ in each] for each in tagged],
        "probabilities": [[round(probability, 5) for _, probability in each] for each in tagged],
        "step": predictor.step,
        "store": open_run(run).info.store_fingerprint,
    }


def main(out: Path) -> None:
    """Write stores, runs and ``facts.json`` into ``out``; what no reader needs is left out."""
    out.mkdir(parents=True)
    facts: dict[str, Any] = {}
    for backend in BACKENDS:
        store = make_store(out, backend, rows=60)
        facts[store.name] = store_facts(store)
    for format in FORMATS:
        keys = [f"classifier.format={format}", "encoder.bigrams=0", "train.steps=3", "train.batch=16"]
        if format != "fp8":  # which has the states of an optimizer, the others none
            keys.append("encoder.frozen=true")
        run = make_run(out / "store-zarr", out / f"run-{format}", *keys)
        shutil.rmtree(run / "checkpoints" / "step-00000002")
        shutil.rmtree(run / "tensorboard")
        shutil.rmtree(run / "embeddings", ignore_errors=True)
        body = read_sealed_json(run / "run.json")
        body["store"] = "store-zarr"  # rather than a place on the machine that made it
        write_sealed_json(run / "run.json", body)
        facts[run.name] = run_facts(run)
    for path in [*out.glob("*.jsonl"), *out.glob("*.txt")]:
        path.unlink()
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
