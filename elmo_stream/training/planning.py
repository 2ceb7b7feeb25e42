"""Makes the plan of a run: one function a part of the memory, and the placement of the chunks in what is left.

A new part of the memory is a row in one of the functions ``_..._rows``.
"""

import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from elmo_kernels import BLOCK_LABELS, preferred_chunk_labels, step_bytes, topk_bytes
from elmo_kernels.types import DIM_MULTIPLE

from elmo_stream.config import PAD_MULTIPLE, Config, LoaderConfig, parse_size
from elmo_stream.data.embeddings import EMBEDDING_BYTES
from elmo_stream.data.index import BOW, StoreIndex
from elmo_stream.data.order import WINDOW_SHARDS
from elmo_stream.data.store import token_dtype
from elmo_stream.model.encoder import Encoder
from elmo_stream.model.placement import DEVICE, MAPPED, PINNED, ChunkPlan, plan_chunks
from elmo_stream.system import free_memory_bytes, resident_bytes, return_free_memory
from elmo_stream.training.encoder_memory import encoder_memory, evaluation_bytes
from elmo_stream.training.plan import ALWAYS, DISK, EVALUATION_BATCH, HOST, RUN, Plan, Row
from elmo_stream.training.rates import chunk_step, measure_rates, probe_chunk
from elmo_stream.training.run import instances_per_epoch

FREE_SHARE = 0.9
# Logs, stacks of threads, decoders of the loader, and what Python allocates on the way (measured on Linux).
SMALL_THINGS = 24 << 20
START, CLASSIFIER, BACKWARD = "start", "classifier", "backward"
EVALUATION, CHECKPOINT, CHECKPOINT_CHUNK = "evaluation", "checkpoint", "its chunks"


@dataclass(frozen=True)
class DataSizes:
    """What a plan needs to know of the data: counts, the largest shard, and whether it is text or features."""

    labels: int
    train_instances: int
    instances: int
    vocab_size: int
    max_length: int
    mean_tokens: float
    positives_per_instance: float
    shards: int
    shard_rows: int
    ordered: bool = True

    @classmethod
    def of_store(cls, index: StoreIndex, config: Config, split: str = "train") -> "DataSizes":
        """Sizes of a store, whose ``split`` is read."""
        rows = index.splits[split]
        return cls(
            labels=index.labels.count,
            train_instances=rows.instances,
            instances=instances_per_epoch(index, config),
            vocab_size=index.tokenizer.vocab_size,
            max_length=index.tokenizer.max_length,
            mean_tokens=rows.tokens / rows.instances,
            positives_per_instance=rows.positives / rows.instances,
            shards=len(rows.shards),
            shard_rows=max(shard.rows for shard in rows.shards),
            ordered=index.tokenizer.kind != BOW,
        )

    @classmethod
    def supposed(cls, labels: int, instances: int, *, vocab_size: int, max_length: int = 128) -> "DataSizes":
        """Sizes of data whose store is not at hand: full texts, five labels each, shards of 65,536 instances."""
        rows = min(instances, 65536)
        return cls(labels, instances, instances, vocab_size, max_length, max_length, 5.0, -(-instances // rows), rows)


def make_plan(
    sizes: DataSizes,
    config: Config,
    encoder: Encoder,
    *,
    device: torch.device,
    scratch: Path,
    training: bool = True,
    calibrate: bool = False,
) -> Plan:
    """Plan a training, or evaluation and prediction alone, from sizes and budgets; allocates nothing large.

    Args:
        encoder: with its weights, or on the device "meta".
        scratch: folder for the files of mapped chunks; need not exist.
        calibrate: also measure how fast this machine is, in some seconds, and predict the time of a step.
    """
    if not training:  # no kernel of training runs, and this device may lack what that of the training had
        config = replace(config, classifier=replace(config.classifier, fp8_logits=False))
    budget = _budgets(config, device)
    fixed = [*_process_rows(config, encoder, device), *_encoder_rows(config, encoder, sizes, device, training)]
    fixed += _loader_rows(config, encoder, sizes, device, training)
    chosen = config.classifier.chunk_labels
    blocks = preferred_chunk_labels(device, encoder.dim) // BLOCK_LABELS
    halved = [(blocks >> shift) * BLOCK_LABELS for shift in range(blocks.bit_length())]
    for chunk_labels in [chosen] if chosen else halved:
        rule = replace(config.classifier, chunk_labels=chunk_labels)
        everything = plan_chunks(sizes.labels, encoder.dim, rule)
        rows = [*fixed, *_step_rows(config, everything, device, training)]
        empty = Plan(everything, sizes.labels, encoder.dim, config.train.batch, 0, 0, 0, tuple(rows), {})
        room = {where: limit - empty.peak(where) for where, limit in budget.items()}
        chunks = plan_chunks(sizes.labels, encoder.dim, rule, device_room=room[DEVICE], host_room=room.get(HOST))
        per_epoch = -(-sizes.instances // config.train.batch)
        plan = replace(
            empty,
            chunks=chunks,
            instances=sizes.instances,
            steps_per_epoch=per_epoch,
            steps=config.train.steps or config.train.epochs * per_epoch,
            rows=(*_classifier_rows(chunks, device), *rows, *_run_rows(config, everything, encoder, sizes, training)),
            budget=budget | ({DISK: shutil.disk_usage(_existing(scratch)).free} if chunks.at(MAPPED) else {}),
        )
        if not plan.lacks():
            break
    if not calibrate or plan.lacks():
        return plan
    place = _existing(scratch) if plan.chunks.at(MAPPED) else None
    # Batches are sorted by length, and padded to a multiple.
    tokens = min(round(sizes.mean_tokens) + PAD_MULTIPLE // 2, sizes.max_length)
    text = (tokens, sizes.vocab_size)
    rates = measure_rates(config, chunks=plan.chunks, device=device, encoder=encoder, text=text, scratch=place)
    return replace(plan, rates=rates)


def _budgets(config: Config, device: torch.device) -> dict[str, int]:
    memory = config.memory
    given = parse_size("memory.device", memory.device), parse_size("memory.host", memory.host)
    free = resident_bytes() + int(FREE_SHARE * free_memory_bytes())
    if device.type == "cpu":
        return {DEVICE: min([size for size in given if size] or [free])}
    gc.collect()
    torch.cuda.empty_cache()  # what an earlier model of this process held is free
    return {DEVICE: given[0] or int(FREE_SHARE * torch.cuda.mem_get_info(device)[0]), HOST: given[1] or free}


def _host(device: torch.device) -> str:
    return DEVICE if device.type == "cpu" else HOST


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path())


def _process_rows(config: Config, encoder: Encoder, device: torch.device) -> Iterator[Row]:
    """What this process has already, after everything is loaded that training will load."""
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401

    import elmo_stream.data.store_zarr  # noqa: F401

    threads = torch.get_num_threads()
    chunk_step(config, [probe_chunk(config, DIM_MULTIPLE, device, BLOCK_LABELS)], 2)()
    torch.set_num_threads(threads)  # Numba, when it starts, sets the number for all that use OpenMP
    return_free_memory()  # of what this process did before; none of it is needed
    weights = sum(p.untyped_storage().nbytes() for p in encoder.parameters() if p.device.type == "cpu")
    yield Row("interpreter, libraries, kernels", _host(device), ALWAYS, max(0, resident_bytes() - weights))
    yield Row("logs, threads and small things", _host(device), ALWAYS, SMALL_THINGS)


def _classifier_rows(chunks: ChunkPlan, device: torch.device) -> Iterator[Row]:
    names = {"weight": "weights", "exponent": "exponents", "compensation": "Kahan compensation"}
    where = {DEVICE: DEVICE, PINNED: HOST, MAPPED: DISK}
    keys = {"weight": "classifier.format", "exponent": "", "compensation": "classifier.kahan_head"}
    for place in (DEVICE, PINNED, MAPPED):
        for name, title in names.items():
            size = sum(chunks.layouts[number].sizes.get(name, 0) for number in chunks.at(place))
            yield Row(f"classifier {title}, {place}", where[place], ALWAYS, size, keys[name])
    staging = "classifier.chunk_labels"
    if device.type == "cpu":
        yield Row("staging buffers", DEVICE, ALWAYS, chunks.staging_bytes(MAPPED), staging)
    else:
        yield Row("staging buffers", DEVICE, ALWAYS, chunks.staging_bytes(PINNED, MAPPED), staging)
        yield Row("staging buffers of mapped chunks", HOST, ALWAYS, chunks.staging_bytes(MAPPED), staging)


def _step_rows(config: Config, chunks: ChunkPlan, device: torch.device, training: bool) -> Iterator[Row]:
    """What the kernels take for one chunk, and reading and writing checkpoints chunk by chunk."""
    batch, dim, labels = config.train.batch, chunks.layouts[0].dim, chunks.largest_labels
    largest = max(layout.bytes for layout in chunks.layouts)
    block = min(labels, BLOCK_LABELS)
    if training:
        keys = "train.batch, classifier.chunk_labels"
        gradients, temporaries = step_bytes(config.classifier.format, labels, dim, batch, device)
        yield Row("gradient of the logits of one chunk", DEVICE, CLASSIFIER, gradients, keys)
        name = "partial sums of the input gradient" if device.type == "cuda" else "temporaries of one block of labels"
        yield Row(name, DEVICE, CLASSIFIER, temporaries, "train.batch")
        if config.classifier.fp8_logits:
            yield Row("embeddings in FP8", DEVICE, CLASSIFIER, batch * (3 * dim + 1), "classifier.fp8_logits")
        yield Row("checkpoint: one chunk", _host(device), CHECKPOINT_CHUNK, 2 * largest, "classifier.chunk_labels")
    # Random bits are int64, two a weight, with some temporaries.
    fill = largest + block * dim * 8 * 8
    yield Row(
        "first weights or those of a checkpoint: one chunk", _host(device), START, fill, "classifier.chunk_labels"
    )
    candidates = topk_bytes(labels, dim, EVALUATION_BATCH, device)
    yield Row("top-k of one block of labels", DEVICE, EVALUATION, candidates)


def _encoder_rows(
    config: Config, encoder: Encoder, sizes: DataSizes, device: torch.device, training: bool
) -> Iterator[Row]:
    length = -(-sizes.max_length // PAD_MULTIPLE) * PAD_MULTIPLE
    size_keys = "encoder.dim, encoder.bigrams" if config.encoder.kind == "bag" else "encoder.name, encoder.format"
    memory = encoder_memory(encoder, config, length=length, device=device)
    yield Row("encoder weights", DEVICE, ALWAYS, memory.weights, size_keys)
    evaluation = evaluation_bytes(encoder, instances=EVALUATION_BATCH, length=length, device=device)
    yield Row("evaluation: activations of the encoder", DEVICE, EVALUATION, evaluation)
    if not training:
        return
    keys = "train.batch, train.micro_batch, encoder.checkpointing"
    states = _host(device) if config.optimizer.offload else DEVICE
    keys_of_states = "optimizer.states, optimizer.offload, encoder.frozen"
    yield Row("encoder optimizer state", states, ALWAYS, memory.optimizer_held, keys_of_states)
    for phase in (CLASSIFIER, BACKWARD):
        yield Row("encoder activations", DEVICE, phase, memory.activations, keys)
    yield Row("gaps between activations in the heap", DEVICE, ALWAYS, memory.gaps, keys)
    yield Row("encoder gradients", DEVICE, BACKWARD, memory.gradients, "encoder.frozen")
    written = max(memory.weights, memory.optimizer)
    yield Row("checkpoint: encoder and optimizer", _host(device), CHECKPOINT, written)


def _loader_rows(
    config: Config, encoder: Encoder, sizes: DataSizes, device: torch.device, training: bool
) -> Iterator[Row]:
    rules = LoaderConfig()
    shards, batches = _loader_bytes(sizes, rules, EVALUATION_BATCH, windows=1)
    yield Row("evaluation: loader", _host(device), EVALUATION, shards + batches)
    if training:
        cached = encoder.dim if config.encoder.frozen else 0
        shards, batches = _loader_bytes(sizes, config.loader, config.train.batch, windows=2, cached_features=cached)
        yield Row("loader: shards of two windows", _host(device), ALWAYS, shards, "(shard --rows-per-shard)")
        yield Row(
            "loader: batches ahead", _host(device), ALWAYS, batches, "loader.prefetch, loader.bucket, train.batch"
        )


def _loader_bytes(
    sizes: DataSizes, rule: LoaderConfig, batch: int, *, windows: int, cached_features: int = 0
) -> tuple[int, int]:
    """(bytes of cached shards, bytes of prepared batches, with ``cached_features`` of an embedding)."""
    weight = 0 if sizes.ordered else 4
    token = token_dtype(sizes.vocab_size).itemsize + weight
    row = sizes.mean_tokens * token + 16 + sizes.positives_per_instance * 8
    cached = min(sizes.shards, windows * WINDOW_SHARDS)
    order = 4 * 8 * min(sizes.shards, WINDOW_SHARDS) * sizes.shard_rows
    instance = sizes.mean_tokens * (9 + weight) + 8 + sizes.positives_per_instance * 20
    instance += EMBEDDING_BYTES * cached_features
    blocks = -(-sizes.labels // BLOCK_LABELS)
    group = rule.bucket * 8 * blocks + min(rule.bucket * batch, sizes.train_instances) * instance
    groups = rule.prefetch + 1 + max(1, rule.workers)
    return int((cached + 1) * sizes.shard_rows * row + order), int(groups * group)


def _run_rows(config: Config, chunks: ChunkPlan, encoder: Encoder, sizes: DataSizes, training: bool) -> Iterator[Row]:
    if not training:
        return
    if config.encoder.frozen and not config.encoder.cache:
        texts = sizes.train_instances + sizes.labels * config.train.label_texts
        yield Row("cached embeddings", RUN, ALWAYS, EMBEDDING_BYTES * texts * encoder.dim, "encoder.cache")
    weights = sum(p.numel() * p.element_size() for p in encoder.parameters())
    one = chunks.bytes_at(DEVICE) + 3 * weights
    title = "checkpoints kept, and the one being written"
    yield Row(title, RUN, ALWAYS, (config.checkpoint.keep + 1) * one, "checkpoint.keep")
