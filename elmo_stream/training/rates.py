"""How fast this machine is: a calibration of seconds, from which a plan predicts the time of a step.

The kernels, the encoder and the disk are run as training will run them, on small pieces.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import elmo_kernels
import torch
from elmo_kernels import BLOCK_LABELS, ChunkWeights, Positives

from elmo_stream.config import Config, parse_size
from elmo_stream.errors import UserError, out_of_memory
from elmo_stream.model.chunk_layout import aligned_memory
from elmo_stream.model.classifier import ChunkedClassifier
from elmo_stream.model.encoder import Encoder
from elmo_stream.model.placement import MAPPED, STAGING_BUFFERS, ChunkPlan, plan_chunks
from elmo_stream.model.scratch import ScratchFiles
from elmo_stream.training.optim import build_optimizer

PROBE_WEIGHTS = 1 << 25
PROBE_BYTES = 64 << 20
"""Chunks in turn take this much, so that their weights come from memory and not from a cache, as in training."""
PROBE_SECONDS = 0.4
PROBE_FILES, PROBE_FILE_BYTES, PROBE_ROUNDS = 8, 16 << 20, 4
PROBE_TOKENS = 2048


@dataclass(frozen=True)
class Rates:
    """What a step's time is made of; None is unknown and counts as no time.

    Attributes:
        flops: per second, in the classifier's matrix products.
        weights: classifier weights per second that are decoded, updated, rounded and stored, without the products.
        disk_read, disk_write: bytes per second with both at once, past the page cache.
        disk_work: mapped bytes that a second of computing is lost to, since processors move them.
        to_device, from_device: bytes per second between page-locked memory and a GPU, with both at once.
        encoder_instances: instances per second of the encoder's forward and backward pass.
        encoder_fixed: seconds of a step's encoder that do not depend on the batch, the optimizer's mostly.
    """

    flops: float | None = None
    weights: float | None = None
    disk_read: float | None = None
    disk_write: float | None = None
    disk_work: float | None = None
    to_device: float | None = None
    from_device: float | None = None
    encoder_instances: float | None = None
    encoder_fixed: float | None = None

    def with_given(self, given: Sequence[str]) -> "Rates":
        """These rates with some replaced by ``name=value``; sizes may have units.

        Raises:
            UserError: an unknown name, or no positive number.
        """
        names = [field.name for field in fields(self)]
        values = {}
        for text in given:
            name, _, value = text.partition("=")
            if name not in names:
                raise UserError(f"--rate {text}: expected NAME=VALUE with one of the names {', '.join(names)}.")
            try:
                values[name] = float(value)
            except ValueError:
                values[name] = float(parse_size(f"--rate {name}", value) or 0)
            if not values[name] > 0:
                raise UserError(f"--rate {text}: must be above 0.")
        return replace(self, **values)

    def as_dict(self) -> dict[str, float | None]:
        """The rates by name."""
        return asdict(self)


def measure_rates(
    config: Config,
    *,
    chunks: ChunkPlan,
    device: torch.device,
    encoder: Encoder,
    text: tuple[int, int],
    scratch: Path | None,
) -> Rates:
    """Measure this machine, in some seconds.

    Args:
        chunks: of the plan.
        encoder: with its weights, which go to ``device``; or on the device "meta", where its time stays unknown,
            as that of one that finds no room.
        text: usual tokens of an instance, and size of the vocabulary.
        scratch: an existing folder on the disk of the mapped chunks, None where there are none.
    """
    dim = encoder.dim
    chunk_labels = min(chunks.largest_labels, elmo_kernels.preferred_chunk_labels(device, dim))
    labels = BLOCK_LABELS * max(1, min(chunk_labels, PROBE_WEIGHTS // dim) // BLOCK_LABELS)

    size = chunks.layouts[0].bytes * labels // chunks.largest_labels
    count = min(len(chunks.layouts), max(1, PROBE_BYTES // size))
    probes = [probe_chunk(config, dim, device, labels) for _ in range(count)]

    def chunk_seconds(batch: int) -> float:
        return _usual(chunk_step(config, probes, batch), device)

    fixed, each = _per_instance(chunk_seconds, config.train.batch)
    rates = Rates(flops=6 * dim * labels / each if each > 0 else None, weights=labels * dim / max(fixed, 1e-9))
    if next(encoder.parameters()).device.type != "meta":
        most = PROBE_TOKENS // text[0] if config.encoder.kind == "transformer" else config.train.batch
        batch = max(2, min(config.train.batch, most))
        try:
            fixed, each = _per_instance(_encoder_step(config, encoder.to(device), *text), batch)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):  # which a plan for another GPU does not mind
                raise
        else:
            rates = replace(rates, encoder_fixed=max(fixed, 1e-6), encoder_instances=1 / max(each, 1e-9))
    if scratch is not None:
        read, write = _disk_rates(scratch)
        rates = replace(rates, disk_read=read, disk_write=write)
        if device.type == "cpu":
            rates = replace(rates, disk_work=_disk_work(config, chunks, (read, write), scratch))
    if device.type == "cuda":
        into, out = _copy_rates(device)
        rates = replace(rates, to_device=into, from_device=out)
    return rates


def _per_instance(seconds: Callable[[int], float], batch: int) -> tuple[float, float]:
    """(seconds that do not depend on the batch, seconds per instance), from the batch and half of it."""
    half = max(1, batch // 2)
    whole, part = seconds(batch), seconds(half)
    each = max(0.0, (whole - part) / (batch - half)) if batch > half else 0.0
    return max(0.0, whole - each * batch), each


def _usual(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run, the median of some."""
    run()  # compiles, or fills caches
    seconds: list[float] = []
    begin = time.perf_counter()
    while not seconds or time.perf_counter() - begin < PROBE_SECONDS:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


@dataclass(slots=True)
class _NoPositives:
    label_P: torch.Tensor
    instance_P: torch.Tensor
    weight_P: torch.Tensor
    block_ptr: torch.Tensor


def _no_positives(labels: int, device: torch.device) -> Positives:
    none = torch.empty(0, dtype=torch.int64, device=device)
    blocks = torch.zeros(labels // BLOCK_LABELS + 2, dtype=torch.int64, device=device)
    return _NoPositives(none, none, none.float(), blocks)


def probe_chunk(config: Config, dim: int, device: torch.device, labels: int) -> ChunkWeights:
    """A chunk of random weights in the format of the configuration."""
    rule = config.classifier
    head = round(rule.kahan_share * labels)
    return elmo_kernels.make_chunk(
        rule.format, labels, dim, 0, seed=0, std=rule.init_std, kahan_rows=head, device=device
    )


def chunk_step(config: Config, chunks: Sequence[ChunkWeights], batch: int) -> Callable[[], Any]:
    """A function that does what a step does with one chunk, the next one each time; its first call loads the kernels.

    The chunks have one shape and lie on one device.
    """
    rule = config.classifier
    (labels, dim), device = chunks[0].data_LD.shape, chunks[0].data_LD.device
    x_BD = torch.randn(batch, dim, generator=torch.Generator().manual_seed(0)).to(device)
    positives = _no_positives(labels, device)
    flags, dx_BD = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros_like(x_BD)
    operand = elmo_kernels.operand(x_BD, rule.format)
    rounding = "stochastic" if rule.rounding == "kahan" else rule.rounding
    turns = cycle(chunks)

    def step() -> None:
        chunk = next(turns)
        scalars = elmo_kernels.step_scalars(device, lr=1e-3, weight_decay=rule.weight_decay, seed=0, step=0)
        x = elmo_kernels.fp8_operand(operand) if rule.fp8_logits else operand
        g_LB, _ = elmo_kernels.logit_grad(chunk, x, positives, loss=rule.loss, prior=-5.0)
        elmo_kernels.update_with_(chunk, g_LB, operand, dx_BD, scalars=scalars, rounding=rounding, flags=flags)

    return step


def _encoder_step(config: Config, encoder: Encoder, tokens: int, vocabulary: int) -> Callable[[int], float]:
    device = next(encoder.parameters()).device
    optimizer = build_optimizer(
        encoder,
        replace(config.optimizer, encoder_lr=0.0, weight_decay=0.0),
        rounding=config.encoder.rounding,
        skips=config.train.on_nonfinite == "skip",
    )

    def seconds(batch: int) -> float:
        ids_BT = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)

        def step() -> None:
            with torch.set_grad_enabled(optimizer is not None):
                x_BD = encoder(ids_BT, mask_BT)
            if optimizer is not None:
                x_BD.backward(torch.zeros_like(x_BD))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return _usual(step, device)

    return seconds


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes per second of reading and writing at once."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="calibration-") as place:
        files = ScratchFiles(Path(place))
        try:
            buffers = [aligned_memory(PROBE_FILE_BYTES, torch.device("cpu")) for _ in range(2)]
            for number in range(PROBE_FILES):
                files.create(number, PROBE_FILE_BYTES)
                files.write(number, buffers[0])

            def move(way: int) -> float:
                for number in range(way, PROBE_FILES, 2):  # a first round, for files that are still being made
                    (files.write if way else files.read_into)(number, buffers[way])
                start = time.perf_counter()
                for number in [*range(way, PROBE_FILES, 2)] * PROBE_ROUNDS:
                    (files.write if way else files.read_into)(number, buffers[way])
                return time.perf_counter() - start

            with ThreadPoolExecutor(2) as threads:
                seconds = list(threads.map(move, (0, 1)))
        finally:
            files.close()
    moved = PROBE_ROUNDS * PROBE_FILES // 2 * PROBE_FILE_BYTES
    return tuple(moved / max(each, 1e-9) for each in seconds)  # type: ignore[return-value]


def _disk_work(config: Config, chunks: ChunkPlan, disk: tuple[float, float], folder: Path) -> float:
    """Mapped bytes per second that their chunks cost more than resident ones, where ``disk`` is not waited for."""
    cpu, dim = torch.device("cpu"), chunks.layouts[0].dim
    chunk_labels = min(chunks.largest_labels, elmo_kernels.preferred_chunk_labels(cpu, dim))
    rule = replace(config.classifier, chunk_labels=chunk_labels)
    labels = min(STAGING_BUFFERS, len(chunks.at(MAPPED))) * chunk_labels  # no more memory than is planned
    x_BD = torch.randn(config.train.batch, dim, generator=torch.Generator().manual_seed(0))
    positives, seconds, moved = _no_positives(labels, cpu), [], 0
    for room in (None, 0):
        plan = plan_chunks(labels, dim, rule, device_room=room)
        with tempfile.TemporaryDirectory(dir=folder, prefix="calibration-") as place:
            classifier = ChunkedClassifier(
                labels, dim, rule, prior=0.5, seed=0, device=cpu, plan=plan, scratch=Path(place)
            )
            try:
                seconds.append(_usual(partial(classifier.train_step, x_BD, positives, lr=1e-3, step=0), cpu))
            finally:
                classifier.close()
        moved = plan.bytes_at(MAPPED)
    waited = max(seconds[0], moved / min(disk))
    return moved / max(seconds[1] - waited, 1e-9)


def _copy_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second to and from a GPU, both at once, from page-locked memory."""
    size = 64 << 20
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    streams = [torch.cuda.Stream(device) for _ in range(2)]

    def copy() -> None:
        with torch.cuda.stream(streams[0]):
            there[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            host[1].copy_(there[1], non_blocking=True)

    rate = size / _usual(copy, device)
    return rate, rate
