"""The converter: files of text and labels to a store, in parallel, in bounded memory, restartable at any point.

The bytes of the store depend on the inputs and the options alone: not on the number of workers, nor on how
the files are cut into parts, nor on how often the conversion was killed. Scratch lives in ``STORE/.build``;
the index comes last.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elmo_stream.data.build_folder import (
    Options,
    check_plan,
    claim,
    discard,
    inputs_unchanged,
    join,
    plan_of,
    remove_scratch,
)
from elmo_stream.data.conversion import Conversion, Progress, names_folder
from elmo_stream.data.index import BACKENDS, BOW, INDEX_NAME, MAX_LENGTH, MAX_ROWS_PER_SHARD, Propensity, StoreIndex
from elmo_stream.data.inputs import AUTO, InputOptions, Inputs, gather
from elmo_stream.data.tokenize import wants_training
from elmo_stream.data.workers import Workers
from elmo_stream.errors import UserError
from elmo_stream.files import locked
from elmo_stream.system import available_cpus

_PART_BYTES = (2 << 20, 32 << 20)
_PARTS = 64
_DEFAULTS = {
    False: ("train:16000", 128),
    True: (BOW, MAX_LENGTH),
}  # tokenizer and most tokens, of texts and of features


def convert(
    train: Sequence[Path],
    out: Path,
    *,
    test: Sequence[Path] = (),
    valid: Sequence[Path] = (),
    format: str = AUTO,
    text_fields: Sequence[str] | None = None,
    label_field: str | None = None,
    label_separator: str = AUTO,
    label_files: Sequence[Path] = (),
    labels: Path | None = None,
    filter: Path | None = None,
    tokenizer: str | None = None,
    max_length: int | None = None,
    store: str = "zarr",
    rows_per_shard: int = 65_536,
    workers: int | None = None,
    seed: int = 0,
    propensity: tuple[float, float] = (0.55, 1.5),
    part_bytes: int | None = None,
    job: tuple[int, int] | None = None,
    finalize: bool = False,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Convert files of text and labels to a store; the same call continues a conversion that was interrupted.

    Training instances are shuffled over the whole split by ``seed``; test and validation instances keep their
    order. Training instances with empty text or without labels are dropped and counted; test and validation
    instances are all kept, with the labels that the training split knows.

    Args:
        train, test, valid: input files, read in the order given.
        out: folder of the new store.
        format: a name of :data:`elmo_stream.data.readers.FORMATS`, or ``auto``: by ending and first lines.
        text_fields: fields joined by a space to the text of an instance; by default those of the format.
        label_field: field with the labels; by default that of the format.
        label_separator: what stands between the labels in one string; ``auto``: seen in the first rows of a table.
        label_files: files of the labels, for formats that have them apart; by default those beside the data. One for
            each training file, or for each file in the order of training, test and validation files.
        labels: names, a line each, of labels that the data give as ids (``Y.txt``, ``lbl.json``).
        filter: pairs of test row and label id that no ranking may hold, kept in the store for the metrics.
        tokenizer: what :func:`elmo_stream.data.tokenize.open_tokenizer` takes, or ``bow`` for features; by default
            ``train:16000`` for texts, ``bow`` for features.
        max_length: most tokens of an instance; by default 128 of a text, and all features.
        store: backend; ``zarr`` or ``webdataset``.
        rows_per_shard: instances of a shard; the last shard of a split may have fewer.
        workers: processes; by default one per core.
        seed: of the shuffle.
        propensity: A and B of the propensity model, kept in the index for the metrics.
        part_bytes: size of the pieces of input that workers take; by default chosen by the size of the input.
        job: (i, n) does the share of job i of n of reading and tokenising, and no more; jobs may run at once, on
            machines that share the folder.
        finalize: make the store out of what all jobs have read; the same store as without jobs.
        report: receives notes about what happens, a line at a time.
        progress: receives ``(stage, done, total)``.

    Returns:
        A summary: for each split ``{instances, positives, tokens, truncated, dropped, unseen_labels,
        duplicate_labels, shards}`` under its name, and ``labels``, ``bytes``, ``seconds``. Of a job
        ``{job, jobs, parts}``.

    Raises:
        UserError: a mistake in the options or the input; nothing of an unfinished store is left behind.
        LockedError: another process is converting into the same folder.
        ElmoStreamError: a worker process died; the same call continues.
    """
    started = time.monotonic()
    input_options = InputOptions(
        format=format,
        text_fields=tuple(text_fields) if text_fields is not None else None,
        label_field=label_field,
        label_separator=label_separator,
        label_files=tuple(label_files),
        labels=labels,
        filter=filter,
    )
    _check_numbers(max_length, rows_per_shard, seed, workers)
    if text_fields is not None and not all(text_fields or [""]):
        raise UserError("--text-field names no field; expected one or more, separated by commas.")
    paths = {name: list(files) for name, files in (("train", train), ("test", test), ("valid", valid)) if files}
    if "train" not in paths:
        raise UserError("no training file was given; name at least one.")
    inputs = gather(paths, input_options, names_folder(out), report)
    chosen, most_tokens = _DEFAULTS[inputs.has_features]
    options = Options(
        inputs=input_options,
        tokenizer=tokenizer or chosen,
        max_length=max_length or most_tokens,
        backend=store,
        rows_per_shard=rows_per_shard,
        seed=seed,
        propensity=Propensity(*propensity),
    )
    _check_options(options, inputs)
    if job is not None or finalize:
        _check_job(job or (0, 1), options)
    part_bytes = part_bytes or _choose_part_bytes(inputs)
    plan = plan_of(inputs, options, part_bytes)
    if job is not None:
        with (
            join(out, plan) as build,
            locked(build / f"job-{job[0]:05d}"),
            Workers(workers or available_cpus()) as pool,
        ):
            parts = Conversion(out, inputs, options, part_bytes, pool, report, progress).run_share(*job)
        return {"job": job[0], "jobs": job[1], "parts": parts}
    if finalize and not (out / INDEX_NAME).exists():
        check_plan(out, plan)
    with claim(out, plan, report) as finished:
        if not finished:
            try:
                with Workers(workers or available_cpus()) as pool:
                    conversion = Conversion(out, inputs, options, part_bytes, pool, report, progress)
                    index = conversion.run(from_shares=finalize)
                if not inputs_unchanged(plan):
                    raise UserError("an input file was changed during the conversion; run the command again.")
            except UserError:
                if not finalize:  # the work of many jobs is kept
                    discard(out)
                raise
            index.save(out)
        summary = _summary(StoreIndex.load(out), out, time.monotonic() - started)
        remove_scratch(out)  # last, for without it the same command is refused
    return summary


def _check_numbers(max_length: int | None, rows_per_shard: int, seed: int, workers: int | None) -> None:
    for key, value, least, most in (
        ("--max-length", max_length, 1, MAX_LENGTH),
        ("--rows-per-shard", rows_per_shard, 1, MAX_ROWS_PER_SHARD),
        ("--seed", seed, 0, 2**63 - 1),
        ("--workers", workers, 1, 1024),
    ):
        if value is not None and not least <= value <= most:
            raise UserError(f"{key} {value}: expected {least} to {most}.")


def _check_options(options: Options, inputs: Inputs) -> None:
    if options.backend not in BACKENDS:
        raise UserError(f"--store {options.backend}: unknown; expected {' or '.join(BACKENDS)}.")
    if inputs.has_features != (options.tokenizer == BOW):
        raise UserError(
            "--tokenizer: the input has features, not texts; only bow takes them."
            if inputs.has_features
            else "--tokenizer bow: takes features (xc-bow, npz), but the input has texts; leave it out."
        )
    A, B = options.propensity.A, options.propensity.B
    if not (math.isfinite(A) and math.isfinite(B) and A >= 0 and B > -1):
        raise UserError(f"--propensity {A},{B}: expected finite A >= 0 and B > -1, such as 0.55,1.5.")


def _check_job(job: tuple[int, int], options: Options) -> None:
    if not 0 <= job[0] < job[1]:
        raise UserError(f"--shard-index {job[0]} --num-shards {job[1]}: expected an index from 0 to {job[1] - 1}.")
    if wants_training(options.tokenizer):
        raise UserError(
            f"--tokenizer {options.tokenizer}: cannot be trained by jobs that each see a part of the corpus; shard a "
            "sample first and give its STORE/tokenizer."
        )


def _choose_part_bytes(inputs: Inputs) -> int:
    """Some 64 parts, whatever the number of workers, so that another number can continue a conversion."""
    least, most = _PART_BYTES
    return min(max(sum(file.path.stat().st_size for file in inputs.files()) // _PARTS, least), most)


def _summary(index: StoreIndex, out: Path, seconds: float) -> dict[str, Any]:
    splits = {name: asdict(split) | {"shards": len(split.shards)} for name, split in index.splits.items()}
    shards = [shard.files for split in index.splits.values() for shard in split.shards]
    listed = (index.tokenizer.files, index.labels.files, index.filters, *shards)
    size = (out / INDEX_NAME).stat().st_size + sum(entry["bytes"] for files in listed for entry in files.values())
    return splits | {"labels": index.labels.count, "bytes": size, "seconds": seconds}
