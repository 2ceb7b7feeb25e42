"""Ranking metrics of a model on a split, out of core: batches from the loader, top-k over the chunks of labels."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from elmo_kernels import BLOCK_LABELS
from numpy.typing import NDArray

from elmo_stream.config import LoaderConfig
from elmo_stream.data.batch import Batch
from elmo_stream.data.embeddings import Embeddings
from elmo_stream.data.filters import NO_PAIRS, FilterPairs, load_filter
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import InversePropensity, LabelNames
from elmo_stream.data.loader import StreamLoader
from elmo_stream.errors import UserError
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.encoder import Encoder
from elmo_stream.training.encoder_step import embed
from elmo_stream.training.metrics import RankingMetrics, drop_filtered
from elmo_stream.training.models import trained_model
from elmo_stream.training.plan import EVALUATION_BATCH
from elmo_stream.training.planning import DataSizes
from elmo_stream.training.run import Run, device_of_run, open_run
from elmo_stream.training.runlog import Report


def evaluate_model(
    encoder: Encoder,
    classifier: ChunkedClassifier,
    store: Path,
    *,
    split: str,
    rows: tuple[int, int] | None,
    metrics: RankingMetrics,
    device: torch.device,
    filtered: FilterPairs = NO_PAIRS,
    embeddings: Embeddings | None = None,
    timeout: float = LoaderConfig().timeout,
) -> dict[str, float]:
    """Metrics of the instances in ``rows`` of a split; the encoder's mode is set back afterwards.

    Args:
        metrics: new ones, which the instances are added to.
        embeddings: of the split's rows, where they are cached.
        timeout: seconds that a batch may take to be read, as ``loader.timeout``.
    """
    length = metrics.depth + filtered.most_per_row()
    was_training = encoder.training
    encoder.eval()
    loader = StreamLoader(
        store,
        split=split,
        rows=rows,
        batch=EVALUATION_BATCH,
        shuffle=False,
        block_labels=BLOCK_LABELS,
        config=LoaderConfig(timeout=timeout),
        embeddings=embeddings,
    )
    with torch.no_grad(), loader:
        for batch in loader:
            on_device = batch.to(device)
            _, ids = classifier.topk(embed(encoder, on_device), length)
            ids_BK = np.pad(ids.cpu().numpy(), ((0, 0), (0, length - ids.shape[1])), constant_values=-1)
            kept_BK = drop_filtered(ids_BK, *filtered.of(batch.instance_B.numpy()), metrics.depth)
            metrics.update(kept_BK, *_true_labels(batch))
    encoder.train(was_training)
    return metrics.result()


def _true_labels(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    pairs = batch.positives
    by_instance = torch.argsort(pairs.instance_P, stable=True)
    counts = torch.bincount(pairs.instance_P, minlength=len(batch.instance_B)).numpy()
    return pairs.label_P[by_instance].numpy(), np.concatenate([[0], np.cumsum(counts)])


def evaluate(
    run: Path,
    store: Path | None = None,
    *,
    split: str = "test",
    ks: Sequence[int] = (1, 3, 5),
    step: int | None = None,
    filtered: FilterPairs | None = None,
    memory: Iterable[str] = (),
    report: Report = print,
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint (or that of ``step``) on a split of a store, by default the run's own.

    Args:
        filtered: pairs that are taken out of the rankings before they are cut to k; by default those that the store
            keeps for the split.
        memory: see ``resume``.

    Returns:
        ``{"split", "instances", "unseen_labels", "step", "metrics": {"P@1": ..., ...}}`` with fractions in 0...1.
        Labels that training has never seen are counted, and take no part in the metrics.

    Raises:
        UserError: no run, no store, no such split, or the store's labels or tokenizer are not the run's.
    """
    opened = open_run(run, memory)
    if store is None:
        store = Path(opened.info.store)
        if not store.is_dir():
            raise UserError(f"{store}: the store of {run} is not there; give its new place: evaluate RUN STORE.")
    index = StoreIndex.load(store)
    if split not in index.splits:
        raise UserError(
            f"{store}: has no split {split!r}; it has {', '.join(index.splits)}. Shard again with --test or --valid."
        )
    _check_store(opened, store, index)
    device = device_of_run()
    at_step, encoder, classifier = trained_model(
        opened, step, device, report, DataSizes.of_store(index, opened.config, split)
    )
    weights = inverse_propensity(opened)
    try:
        metrics = evaluate_model(
            encoder,
            classifier,
            store,
            split=split,
            rows=None,
            metrics=RankingMetrics(ks, weights),
            device=device,
            filtered=load_filter(store, index, split) if filtered is None else filtered,
        )
    finally:
        classifier.close()
    counts = index.splits[split]
    return {
        "split": split,
        "instances": counts.instances,
        "unseen_labels": counts.unseen_labels,
        "step": at_step,
        "metrics": metrics,
    }


def inverse_propensity(run: Run) -> InversePropensity:
    """Of the labels of a run, from the instances that it was made for."""
    info, frequency_L = run.info, LabelNames(run.path / "labels").frequency_L
    return InversePropensity(frequency_L, info.train_instances, info.propensity_a, info.propensity_b)


def _check_store(run: Run, store: Path, index: StoreIndex) -> None:
    own = {name.removeprefix("labels/"): entry for name, entry in run.info.files.items() if name.startswith("labels/")}
    if index.labels.files != own:
        raise UserError(
            f"{store}: its labels are not those that {run.path} was trained on; "
            "evaluate on a store made with the same training data."
        )
    tokenizer = index.tokenizer
    if (tokenizer.fingerprint, tokenizer.max_length) != (run.info.tokenizer_fingerprint, run.info.max_length):
        raise UserError(
            f"{store}: was tokenized otherwise than the data of {run.path}; shard it with the same --tokenizer and "
            "--max-length."
        )
