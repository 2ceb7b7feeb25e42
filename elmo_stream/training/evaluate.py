"""Ranking metrics of a model on a split, out of core: batches from the loader, top-k over the chunks of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from elmo_kernels import BLOCK_LABELS

from elmo_stream.config import LoaderConfig
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.labels import LabelNames, inverse_propensity_L
from elmo_stream.data.loader import StreamLoader
from elmo_stream.errors import UserError
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.encoder import Encoder
from elmo_stream.training.metrics import RankingMetrics
from elmo_stream.training.run import device_of_run, open_run, trained_model
from elmo_stream.training.runlog import Report

BATCH = 256


def evaluate_model(
    encoder: Encoder,
    classifier: ChunkedClassifier,
    store: Path,
    *,
    split: str,
    rows: tuple[int, int] | None,
    ks: Sequence[int],
    inverse_propensity: np.ndarray | None,
    device: torch.device,
) -> dict[str, float]:
    """Metrics of the instances in ``rows`` of a split; the encoder's mode is set back afterwards."""
    metrics = RankingMetrics(ks, inverse_propensity)
    was_training = encoder.training
    encoder.eval()
    with (
        torch.no_grad(),
        StreamLoader(
            store, split=split, rows=rows, batch=BATCH, shuffle=False, block_labels=BLOCK_LABELS, config=LoaderConfig()
        ) as loader,
    ):
        for batch in loader:
            on_device = batch.to(device)
            x_BD = encoder(on_device.token_ids_BT, on_device.mask_BT)
            _, ids_BK = classifier.topk(x_BD, max(ks))
            metrics.update(_padded(ids_BK.cpu().numpy(), max(ks)), *_true_labels(batch))
    encoder.train(was_training)
    return metrics.result()


def _padded(ids_BK: np.ndarray, k: int) -> np.ndarray:
    return np.pad(ids_BK, ((0, 0), (0, k - ids_BK.shape[1])), constant_values=-1)


def _true_labels(batch: Any) -> tuple[np.ndarray, np.ndarray]:
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
    report: Report = print,
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint (or that of ``step``) on a split of a store, by default the run's own.

    Returns:
        ``{"split", "instances", "unseen_labels", "step", "metrics": {"P@1": ..., ...}}`` with fractions in 0...1.
        Labels that training has never seen are counted, and take no part in the metrics.

    Raises:
        UserError: no run, no store, no such split, or the store's labels are not the run's.
    """
    store = store or Path(open_run(run).info.store)
    index = StoreIndex.load(store)
    if split not in index.splits:
        raise UserError(f"{store}: has no split {split!r}; it has {', '.join(index.splits)}.")
    device = device_of_run()
    opened, at_step, encoder, classifier = trained_model(run, step, device, report)
    own = StoreIndex.load(store).labels.files
    if not _same_labels(run, own):
        raise UserError(
            f"{store}: its labels are not those that {run} was trained on; "
            "evaluate on a store made with the same training data."
        )
    names = LabelNames(run / "labels")
    info = opened.info
    weights = inverse_propensity_L(
        names.frequency_L, info.instances + info.validation_instances, info.propensity_a, info.propensity_b
    )
    metrics = evaluate_model(
        encoder, classifier, store, split=split, rows=None, ks=ks, inverse_propensity=weights, device=device
    )
    return {
        "split": split,
        "instances": index.splits[split].instances,
        "unseen_labels": index.splits[split].unseen_labels,
        "step": at_step,
        "metrics": metrics,
    }


def _same_labels(run: Path, files: dict[str, dict[str, Any]]) -> bool:
    from elmo_stream.files import list_files

    mine = list_files(run / "labels")
    return all(mine.get(name) == entry for name, entry in files.items())
