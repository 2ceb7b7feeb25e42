"""The model of a run in memory: encoder and classifier at the places of the plan."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from elmo_stream.errors import UserError
from elmo_stream.files import require_space
from elmo_stream.model.classifier import ChunkedClassifier, RowReader
from elmo_stream.model.encoder import Encoder
from elmo_stream.training.checkpoint import load_checkpoint
from elmo_stream.training.plan import Plan
from elmo_stream.training.planning import DataSizes, make_plan
from elmo_stream.training.run import Run, load_encoder, prepare_torch


def scratch_folder(run: Run) -> Path:
    """Where the scratch files of mapped chunks go."""
    return Path(run.config.memory.disk or run.path / "scratch")


def make_classifier(run: Run, plan: Plan, weights: RowReader | None, device: torch.device) -> ChunkedClassifier:
    """The classifier at the places of the plan, with the rows of a checkpoint or its first ones."""
    return ChunkedClassifier(
        run.info.labels,
        plan.dim,
        run.config.classifier,
        prior=run.info.prior,
        seed=run.config.seed,
        device=device,
        plan=plan.chunks,
        scratch=scratch_folder(run),
        weights=weights,
    )


def require_room(plan: Plan, report: Callable[[str], None]) -> None:
    """Refuse a plan that cannot work, after its table.

    Raises:
        UserError: naming the places without room and the keys to change.
    """
    if plan.lacks():
        report(plan.table())
        raise UserError(
            f"the memory does not suffice; {' '.join(plan.advice())} A run that has begun keeps all keys but memory.*."
        )


def require_space_for_checkpoint(run: Run, plan: Plan, tensors: Iterable[torch.Tensor]) -> None:
    """Refuse to begin a checkpoint that the disk cannot hold: the classifier of the plan, and other ``tensors``.

    Raises:
        OSError: says how many bytes are needed, and how many are free.
    """
    classifier = sum(sum(layout.sizes.values()) for layout in plan.chunks.layouts)
    require_space(run.path, classifier + sum(tensor.nbytes for tensor in tensors))


def trained_model(
    run: Run,
    step: int | None,
    device: torch.device,
    report: Callable[[str], None],
    sizes: DataSizes | None = None,
) -> tuple[int, Encoder, ChunkedClassifier]:
    """(step, encoder, classifier) of a run's newest checkpoint, or that of ``step``, ready to predict.

    Args:
        sizes: of the data that a loader will read; without, there is no loader.

    Raises:
        UserError: there is no checkpoint yet, or none of that step; or the memory does not suffice.
    """
    prepare_torch(run.config.threads)
    checkpoint = load_checkpoint(run.path, step, report=report)
    if checkpoint is None:
        raise UserError(f"{run.path}: has no checkpoint yet; finish training with `elmo-stream resume {run.path}`.")
    encoder = load_encoder(run, checkpoint, run.config.encoder)
    info = run.info
    alone = DataSizes.supposed(info.labels, 1, vocab_size=info.vocab_size, max_length=info.max_length)
    plan = make_plan(sizes or alone, run.config, encoder, device=device, scratch=scratch_folder(run), training=False)
    require_room(plan, report)
    classifier = make_classifier(run, plan, checkpoint.rows, device)
    encoder.eval()
    return checkpoint.step, encoder.to(device), classifier
