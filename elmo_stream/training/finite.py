"""Numbers that are not finite: noted on the device in every step, where nothing waits, and read now and then.

A number counts as finite where the sum of the squares that it is part of is, as FP32: AdamW keeps squares.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from elmo_stream.errors import UserError
from elmo_stream.training.checkpoint import Checkpoint, load_checkpoint
from elmo_stream.training.run import Run
from elmo_stream.training.runlog import LOG_STEPS, Report

_NOTED = ("its embeddings", "the gradient of its embeddings", "the gradients of the encoder")
_WEIGHTS = len(_NOTED)


class Diverged(UserError):
    """A training cannot go on.

    Attributes:
        step: the first one that met what is not finite. what: that was.
    """

    def __init__(self, run: Run, step: int, what: str) -> None:
        super().__init__(
            f"step {step}: the training diverged (not finite: {what}); start a new run with a lower "
            "optimizer.classifier_lr or optimizer.encoder_lr, or where the data of one batch are to blame with "
            f"train.on_nonfinite=skip. The checkpoints in {run.path} are from before."
        )
        self.step, self.what = step, what


class FiniteWatch:
    """What the steps of a training met, as ``train.on_nonfinite`` asks for it.

    Args:
        step: steps done. flags: those of the classifier, on its device. skipped: steps that were left out.

    Attributes:
        skipped: the same, with those that ``look`` found.
    """

    def __init__(self, run: Run, step: int, flags: Tensor, report: Report, *, skipped: int = 0) -> None:
        self._run, self._flags, self._report = run, flags, report
        self._skips = run.config.train.on_nonfinite == "skip"
        self._sees_gradients = run.config.train.on_nonfinite != "stop"  # which costs a pass over them
        self._noted = torch.zeros(LOG_STEPS, len(_NOTED) + 1, device=flags.device)
        self._seen = self._last_whole = step
        self.skipped = skipped

    def embeddings(self, step: int, x_BD: Tensor) -> Tensor | None:
        """Note x_BD; returns whether it is finite (0-dim bool on the device) where a step that is not is left out."""
        norm = torch.linalg.vector_norm(x_BD, out=self._noted[step % LOG_STEPS, 0])
        return norm < math.inf if self._skips else None

    def input_gradient(self, step: int, dx_BD: Tensor) -> None:
        """Note dx_BD and the classifier's weights, after its half of the step."""
        row = self._noted[step % LOG_STEPS]
        torch.linalg.vector_norm(dx_BD, out=row[1])
        row[_WEIGHTS].copy_(self._flags[1])

    def gradients(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Note the gradients; where steps are left out, tell the optimizer whether this is one, with ``found_inf``."""
        if not self._sees_gradients:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        row = self._noted[step % LOG_STEPS]
        row[2].copy_(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self._skips:
            finite = row[:_WEIGHTS].amax() < math.inf
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]

    def look(self, step: int) -> bool:
        """Read what was noted until ``step`` steps were done, at most LOG_STEPS after the last look.

        Returns:
            Whether the last of them was a whole step.

        Raises:
            Diverged: the training cannot go on: by its configuration, because weights of the classifier are not
                finite, or because no step of the last LOG_STEPS was.
        """
        rows, skipped = self._noted.tolist(), []
        for number in range(self._seen, step):
            *norms, broken_weights = rows[number % LOG_STEPS]
            found = [name for name, norm in zip(_NOTED, norms, strict=True) if not norm < math.inf]
            if broken_weights or (found and not self._skips):
                raise Diverged(self._run, number + 1, *found[:1] or ["weights of the classifier"])
            if found:
                skipped.append(f"step {number + 1:,} was left out (not finite: {found[0]})")
            else:
                self._last_whole = number + 1
        self._seen = step
        if skipped:
            self.skipped += len(skipped)
            others = f" and {len(skipped) - 1:,} of the next" if skipped[1:] else ""
            self._report(f"{skipped[0]}{others}; {self.skipped:,} so far.")
        if step - self._last_whole >= LOG_STEPS:
            raise Diverged(self._run, self._last_whole + 1, f"{LOG_STEPS} steps in a row")
        return self._last_whole == step


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number is finite; takes no memory, and waits for the device."""
    ends = [end for tensor in tensors if tensor.is_floating_point() for end in tensor.detach().aminmax()]
    return all(math.isfinite(float(end)) for end in ends)


def rollback_point(run: Run, diverged: Diverged, report: Report) -> Checkpoint:
    """The checkpoint from whose weights a training that diverged goes on.

    Raises:
        Diverged: the configuration does not ask for that, there is no checkpoint, or none was written by training
            since it went back before: it would go back again and again.
        CorruptError: no checkpoint is whole.
    """
    if run.config.train.on_nonfinite != "rollback":
        raise diverged
    checkpoint = load_checkpoint(run.path, report=report)
    if checkpoint is None or checkpoint.state.get("rolled_back"):
        raise diverged
    report(
        f"step {diverged.step:,}: not finite: {diverged.what}; going back to the weights of step {checkpoint.step:,}, "
        f"and on with the batches after step {diverged.step:,}."
    )
    return checkpoint
