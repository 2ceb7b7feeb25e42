"""The training loop: one screen per step, resumed by integers, stopped only at the edge of a step.

Nothing random has a state: the order of instances, dropout and rounding are functions of (seed, epoch or step), so a
resumed run repeats the bits of one that was never stopped (on a CPU: same versions, threads and instruction set; for
GPUs see docs/numerics.md).
"""

import math
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import elmo_kernels
import torch
from elmo_kernels import BLOCK_LABELS

from elmo_stream.config import Config
from elmo_stream.data.batch import Batch
from elmo_stream.data.index import StoreIndex
from elmo_stream.data.loader import StreamLoader
from elmo_stream.errors import CorruptError, UserError, out_of_memory
from elmo_stream.files import check_files, locked
from elmo_stream.model.classifier import RowReader
from elmo_stream.model.encoder import Encoder
from elmo_stream.model.fp8_linear import require_fp8, use_fp8_
from elmo_stream.model.placement import chunk_size
from elmo_stream.system import return_free_memory
from elmo_stream.training.checkpoint import Checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from elmo_stream.training.embedding_cache import EmbeddingCache, open_embedding_cache
from elmo_stream.training.encoder_step import EncoderStep, cut_batch
from elmo_stream.training.evaluate import evaluate_model
from elmo_stream.training.finite import Diverged, FiniteWatch, all_finite, rollback_point
from elmo_stream.training.metrics import RankingMetrics
from elmo_stream.training.models import make_classifier, require_room, require_space_for_checkpoint, scratch_folder
from elmo_stream.training.optim import build_optimizer, load_optimizer_tensors, lr_factor, optimizer_tensors
from elmo_stream.training.plan import Plan
from elmo_stream.training.planning import DataSizes, make_plan
from elmo_stream.training.run import (
    Run,
    device_of_run,
    lay_out_run,
    load_encoder,
    new_encoder,
    open_run,
    prepare_torch,
    publish_run,
)
from elmo_stream.training.runlog import LOG_STEPS, Report, RunLog, environment
from elmo_stream.training.stop_signal import StopSignal
from elmo_stream.training.warm_start import WarmStart

VALIDATION_KS = (1, 3, 5)


def train(
    store: Path,
    out: Path,
    config: Config,
    *,
    init_from: Path | None = None,
    on_oom: str | None = None,
    report: Report = print,
) -> int:
    """Train a new run; returns 0, or 128 + the number of the signal that ended it after a checkpoint.

    Args:
        init_from: a run whose weights the new one begins with; see ``training/warm_start.py``.
        on_oom: "shrink" goes on from the last checkpoint with smaller chunks when memory runs out.

    Raises:
        UserError: bad store or configuration, a run in ``out`` already, or memory that does not suffice.
        Diverged: numbers that are not finite, which ``train.on_nonfinite`` does not pass over.
        LockedError: another process trains in ``out``.
    """
    prepare_torch(config.threads)
    require_fp8(config, device_of_run())
    index = StoreIndex.load(store)
    check_files(store / "tokenizer", index.tokenizer.files)
    start = WarmStart(init_from, store, index, config, report) if init_from is not None else None
    encoder = start.encoder if start else new_encoder(store, config, index.tokenizer)
    with locked(out):
        sizes = DataSizes.of_store(index, config)
        scratch = Path(config.memory.disk or out / "scratch")
        plan = make_plan(sizes, config, encoder, device=device_of_run(), scratch=scratch)
        require_room(plan, report)
        run = lay_out_run(out, store, index, config, encoder, prior=start.prior if start else None)
        return _fit(run, report, encoder=encoder, weights=start, plan=plan, on_oom=on_oom)


def resume(
    path: Path,
    store: Path | None = None,
    *,
    memory: Sequence[str] = (),
    on_oom: str | None = None,
    strict: bool = False,
    report: Report = print,
) -> int:
    """Continue a run from its last whole checkpoint, or from step 0; returns what ``train`` returns.

    Args:
        store: where the store of the run is now, if it was moved.
        memory: ``memory.key=value``, other budgets than the run began with; they change no result.
        on_oom: see ``train``.
        strict: refuse a damaged newest checkpoint instead of going on from the one before it.

    Raises:
        UserError: no run here, its store is gone or was replaced, or memory that does not suffice.
        Diverged: as ``train`` does.
        LockedError: another process trains here.
    """
    run = open_run(path, memory)
    prepare_torch(run.config.threads)
    require_fp8(run.config, device_of_run())
    with locked(path):
        checkpoint = load_checkpoint(path, strict=strict, report=report)
        if checkpoint is not None and checkpoint.step >= checkpoint.total_steps:
            report(f"{path}: finished already, at step {checkpoint.step:,}.")
            return 0
        report(f"{path}: resuming at step {checkpoint.step if checkpoint else 0:,}.")
        return _fit(run, report, store=store, checkpoint=checkpoint, on_oom=on_oom)


def _fit(run: Run, report: Report, *, on_oom: str | None, **parts: Any) -> int:
    """Train to the end; what diverges or runs out of memory goes on from the last checkpoint, or says why not."""
    stop = StopSignal()
    while True:
        trainer = _Trainer(run, report, stop, **parts)
        diverged: Diverged | None = None
        try:
            return trainer.fit()
        except Diverged as error:
            diverged = error.with_traceback(None)  # which holds the trainer
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            table, chunk_labels = trainer.plan.table(), trainer.plan.chunks.largest_labels
        finally:
            trainer.close()
        trainer.encoder.zero_grad(set_to_none=True)
        # The caller holds it; the next try begins with it where there is no checkpoint to begin with.
        trainer.encoder.to("cpu" if diverged is None and not run.published else "meta")
        del trainer
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if diverged is not None:
            checkpoint = rollback_point(run, diverged, report)
            parts = {"store": parts.get("store"), "checkpoint": checkpoint, "rolled_back_at": diverged.step}
            continue
        report(table)
        if on_oom != "shrink" or chunk_labels <= BLOCK_LABELS:
            raise UserError(
                "out of memory, in spite of the plan above, or another process took the memory. Go on with "
                f"`elmo-stream {f'resume {run.path}' if run.published else 'train'} --on-oom shrink`, or with --set "
                "memory.device=... below what is free. The keys beside the largest rows lower it, in a new run."
            )
        smaller = chunk_size(chunk_labels // 2)
        report(f"out of memory; going on from the last checkpoint with chunks of {smaller:,} labels.")
        run = replace(run, config=replace(run.config, classifier=replace(run.config.classifier, chunk_labels=smaller)))
        if run.published:
            parts = {"store": parts.get("store"), "checkpoint": load_checkpoint(run.path, report=report)}
        else:  # nothing was trained yet
            parts.pop("plan", None)


class _Trainer:
    def __init__(
        self,
        run: Run,
        report: Report,
        stop: StopSignal,
        *,
        store: Path | None = None,
        encoder: Encoder | None = None,
        plan: Plan | None = None,
        weights: RowReader | None = None,
        checkpoint: Checkpoint | None = None,
        rolled_back_at: int | None = None,
    ) -> None:
        self.run, self.config, self.report, self.stop = run, run.config, report, stop
        self.store = store or Path(run.info.store)
        if not self.store.is_dir():
            raise UserError(
                f"{self.store}: the store of {run.path} is not there; give its new place: resume RUN STORE."
            )
        self.index = StoreIndex.load(self.store)
        if self.index.fingerprint != run.info.store_fingerprint:
            raise UserError(f"{self.store}: is not the store that {run.path} was trained on; bring that one back.")
        self.device = device_of_run()
        self.step = 0
        if checkpoint is not None:
            encoder, weights = load_encoder(run, checkpoint, self.config.encoder), checkpoint.rows
        elif encoder is None:
            encoder = new_encoder(run.path, self.config, run.info)
        if plan is None:
            sizes = DataSizes.of_store(self.index, self.config)
            plan = make_plan(sizes, self.config, encoder, device=self.device, scratch=scratch_folder(run))
            require_room(plan, report)
        self.plan, self.encoder, self._weights = plan, encoder, weights
        self._checkpoint, self._rolled_back_at = checkpoint, rolled_back_at
        self.loader = StreamLoader(
            self.store,
            rows=(0, run.info.instances),
            batch=self.config.train.batch,
            seed=self.config.seed,
            block_labels=BLOCK_LABELS,
            config=self.config.loader,
            label_texts=self.config.train.label_texts,
        )
        self.total_steps = self.config.train.steps or self.config.train.epochs * self.loader.batches_per_epoch
        self.cache: EmbeddingCache | None = None
        self._open = ExitStack()
        self._open.callback(self.loader.close)

    def _allocate(self) -> None:
        """Everything large, at the places of the plan; a new run exists from then on."""
        self.encoder.to(self.device)
        self.classifier = make_classifier(self.run, self.plan, self._weights, self.device)
        self._open.callback(self.classifier.close)
        if self.config.encoder.format == "fp8":
            use_fp8_(self.encoder.body)
        skips = self.config.train.on_nonfinite == "skip"
        rounding = self.config.encoder.rounding
        self.optimizer = build_optimizer(self.encoder, self.config.optimizer, rounding=rounding, skips=skips)
        skipped = self._restore(self._checkpoint) if self._checkpoint is not None else 0
        self.watch = FiniteWatch(self.run, self.step, self.classifier.flags, self.report, skipped=skipped)
        return_free_memory()  # of drawing or reading the weights; gaps that a step's tensors need not fit
        require_space_for_checkpoint(self.run, self.plan, self.encoder.parameters())
        if self._rolled_back_at is not None:
            self.save()  # from which a run that is killed from now on goes on
        if not self.run.published:
            if self._weights is not None:
                self.save()  # from which a run that is killed before its first step goes on
            publish_run(self.run)

    def fit(self) -> int:
        """Train to the last step, or until a signal; a checkpoint is written either way."""
        self._allocate()
        self._say_what_is_used()
        if self.config.encoder.frozen:
            self.encoder.eval()
            self.cache = open_embedding_cache(self.run, self.store, self.index, self.encoder, self.device, self.report)
            self.loader.embeddings = self.cache.training
        last_save = time.monotonic()
        self.encoder.train()
        with (
            self.stop.caught(),
            RunLog(self.run.path, self.step, self.total_steps, self.report, self.device) as log,
        ):
            batches = iter(self.loader)
            while self.step < self.total_steps and self.stop.number is None:
                self.train_step(next(batches), log)
                if self.step % self.loader.batches_per_epoch == 0 or self.step == self.total_steps:
                    self._validate(log)
                if self._checkpoint_due(last_save) and self.step < self.total_steps:
                    self.save()
                    last_save = time.monotonic()
            path = self.save()
        if self.stop.number is not None and self.step < self.total_steps:
            self.report(
                f"stopped by {signal.Signals(self.stop.number).name} at step {self.step:,}; saved {path}. "
                f"Continue with: elmo-stream resume {self.run.path}"
            )
            return 128 + self.stop.number
        self.report(f"finished: step {self.step:,}, saved {path}")
        return 0

    def close(self) -> None:
        """Free the memory of the classifier and remove its scratch files."""
        self._open.close()

    def train_step(self, batch: Batch, log: RunLog) -> None:
        """One step: embeddings, all chunks of the classifier, then the encoder."""
        config, step = self.config.optimizer, self.step
        factor = lr_factor(step, total=self.total_steps, warmup=config.warmup_steps, schedule=config.schedule)
        last = step + 1 == self.total_steps
        want_loss = last or (step + 1) % LOG_STEPS == 0 or step == 0
        pieces = cut_batch(batch, self.config.train.micro_batch)
        batch = batch.to(self.device)
        half = EncoderStep(self.encoder, batch, pieces, seed=self.config.seed, step=step)
        valid = self.watch.embeddings(step, half.x_BD)
        dx_BD, loss = self.classifier.train_step(
            half.x_BD, batch.positives, lr=factor * config.classifier_lr, step=step, want_loss=want_loss, valid=valid
        )
        self.watch.input_gradient(step, dx_BD)
        if self.optimizer is not None:
            half.backward(dx_BD)
            self.watch.gradients(step, self.optimizer)
            for group in self.optimizer.param_groups:
                group["lr"] = factor * config.encoder_lr
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        log.count(len(batch.instance_B))
        if loss is not None:
            whole = self.watch.look(self.step)
            if whole and not math.isfinite(float(loss)):
                raise Diverged(self.run, self.step, "the loss")
            log.training(
                self.step,
                self.step / self.loader.batches_per_epoch,
                float(loss) / len(batch.instance_B) if whole else None,
                {
                    "encoder_lr": factor * config.encoder_lr,
                    "classifier_lr": factor * config.classifier_lr,
                    "saturated": int(self.classifier.flags[0]),
                    "skipped": self.watch.skipped,
                },
            )

    def save(self) -> Path:
        """Write a checkpoint of the current step and remove old ones; one that is not finite is never written."""
        self.watch.look(self.step)
        tensors, numbers = optimizer_tensors(self.optimizer) if self.optimizer is not None else ({}, {})
        if not all_finite([*self.encoder.parameters(), *tensors.values()]):
            raise Diverged(self.run, self.step, "weights of the encoder, or the states of its optimizer")
        require_space_for_checkpoint(self.run, self.plan, [*self.encoder.parameters(), *tensors.values()])
        state = {
            "total_steps": self.total_steps,
            "loader": self.loader.state_dict(),
            "optimizer": numbers,
            "saturated": int(self.classifier.flags[0]),
            "skipped": self.watch.skipped,
            "rolled_back": self.step == self._rolled_back_at,
            "environment": environment(),
        }
        path = save_checkpoint(
            self.run.path,
            self.step,
            state=state,
            encoder={name: tensor.cpu() for name, tensor in self.encoder.state_dict().items()},
            optimizer={name: tensor.cpu() for name, tensor in tensors.items()},
            classifier=self.classifier.state_chunks(),
        )
        prune_checkpoints(self.run.path, self.config.checkpoint.keep)
        return_free_memory()
        return path

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Go to the state of a checkpoint, and behind the batches left out; returns the steps skipped until then."""
        try:
            self.loader.load_state_dict(checkpoint.state["loader"])
            if self.optimizer is not None:
                load_optimizer_tensors(self.optimizer, checkpoint.tensors("optimizer"), checkpoint.state["optimizer"])
            before, saturated = checkpoint.state["environment"], int(checkpoint.state["saturated"])
            skipped = int(checkpoint.state.get("skipped", 0))  # the first release counted none
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(f"{checkpoint.folder / 'state.json'}: does not fit this run ({error!r}).") from error
        self.step = checkpoint.step
        if self._rolled_back_at is not None:
            self.step = self._rolled_back_at
            self.loader.go_to(self.step)
        self.classifier.flags[0] = saturated
        changed = [
            f"{key} {before.get(key)} -> {value}" for key, value in environment().items() if before.get(key) != value
        ]
        if changed:
            self.report(f"notice: {', '.join(changed)}; the result may differ in its last bits.")
        return skipped

    def _validate(self, log: RunLog) -> None:
        self.watch.look(self.step)
        info = self.run.info
        if info.validation_instances:
            split, first = ("valid", 0) if "valid" in self.index.splits else ("train", info.instances)
            rows = (first, first + info.validation_instances)
            log.validation(
                self.step,
                evaluate_model(
                    self.encoder,
                    self.classifier,
                    self.store,
                    split=split,
                    rows=rows,
                    metrics=RankingMetrics(VALIDATION_KS, None),
                    device=self.device,
                    embeddings=self.cache.validation if self.cache else None,
                    timeout=self.config.loader.timeout,
                ),
            )

    def _checkpoint_due(self, last_save: float) -> bool:
        rule = self.config.checkpoint
        by_steps = rule.every_steps > 0 and self.step % rule.every_steps == 0
        return by_steps or 0 < rule.every_minutes * 60 <= time.monotonic() - last_save

    def _say_what_is_used(self) -> None:
        info, name = self.run.info, environment()["device"]
        self.report(
            f"device {name} (kernels: {elmo_kernels.backend_name(self.device)}, "
            f"{torch.get_num_threads()} CPU threads); {self.loader.instances:,} instances, {info.labels:,} labels x "
            f"{self.classifier.dim} features in {self.config.classifier.format}, "
            f"{len(self.plan.chunks.layouts)} chunks ({self.plan.places_text()}); "
            f"steps {self.step:,} to {self.total_steps:,}"
        )
