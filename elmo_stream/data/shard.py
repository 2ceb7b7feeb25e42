"""The converter: JSONL to a store, in parallel, in bounded memory, restartable at any point.

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

from elmo_stream.data.build_folder import Options, claim, discard, inputs_unchanged, plan_of, remove_scratch
from elmo_stream.data.conversion import Conversion, Progress
from elmo_stream.data.index import Propensity, StoreIndex
from elmo_stream.data.readers import Fields, check_format
from elmo_stream.data.workers import Workers
from elmo_stream.errors import UserError
from elmo_stream.system import available_cpus

_PART_BYTES = (2 << 20, 32 << 20)
_PARTS = 64


def convert(
    train: Sequence[Path],
    out: Path,
    *,
    test: Sequence[Path] = (),
    valid: Sequence[Path] = (),
    format: str = "auto",
    text_fields: Sequence[str] = ("text",),
    label_field: str = "labels",
    tokenizer: str = "train:16000",
    max_length: int = 128,
    store: str = "zarr",
    rows_per_shard: int = 65_536,
    workers: int | None = None,
    seed: int = 0,
    propensity: tuple[float, float] = (0.55, 1.5),
    part_bytes: int | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Convert JSONL files to a store; the same call continues a conversion that was interrupted.

    Training instances are shuffled over the whole split by ``seed``; test and validation instances keep their
    order. Training instances with empty text or without labels are dropped and counted; test and validation
    instances are all kept, with the labels that the training split knows.

    Args:
        train, test, valid: input files, read in the order given.
        out: folder of the new store.
        format: ``auto`` (by ending) or ``jsonl``.
        text_fields: fields joined by a space to the text of an instance.
        label_field: field with the list of labels.
        tokenizer: what :func:`elmo_stream.data.tokenize.open_tokenizer` takes.
        max_length: most tokens of an instance.
        store: backend; ``zarr``.
        rows_per_shard: instances of a shard; the last shard of a split may have fewer.
        workers: processes; by default one per core.
        seed: of the shuffle.
        propensity: A and B of the propensity model, kept in the index for the metrics.
        part_bytes: size of the pieces of input that workers take; by default chosen by the size of the input.
        report: receives notes about what happens, a line at a time.
        progress: receives ``(stage, done, total)``.

    Returns:
        A summary: for each split ``{instances, positives, tokens, truncated, dropped, unseen_labels,
        duplicate_labels, shards}`` under its name, and ``labels``, ``bytes``, ``seconds``.

    Raises:
        UserError: a mistake in the options or the input; nothing of an unfinished store is left behind.
        LockedError: another process is converting into the same folder.
        ElmoStreamError: a worker process died; the same call continues.
    """
    started = time.monotonic()
    options = Options(
        fields=Fields(tuple(text_fields), label_field),
        tokenizer=tokenizer,
        max_length=max_length,
        backend=store,
        rows_per_shard=rows_per_shard,
        seed=seed,
        propensity=Propensity(*propensity),
    )
    _check_options(options, workers)
    inputs = {name: list(paths) for name, paths in (("train", train), ("test", test), ("valid", valid)) if paths}
    if "train" not in inputs:
        raise UserError("no training file was given; name at least one.")
    for paths in inputs.values():
        for path in paths:
            check_format(path, format)
    part_bytes = part_bytes or _choose_part_bytes([path for paths in inputs.values() for path in paths])
    plan = plan_of(inputs, options, part_bytes)
    with claim(out, plan, report) as finished:
        if not finished:
            try:
                with Workers(workers or available_cpus()) as pool:
                    index = Conversion(out, inputs, options, part_bytes, pool, progress).run()
                if not inputs_unchanged(plan):
                    raise UserError("an input file was changed during the conversion; run the command again.")
            except UserError:
                discard(out)
                raise
            index.save(out)
        remove_scratch(out)
    return _summary(StoreIndex.load(out), out, time.monotonic() - started)


def _check_options(options: Options, workers: int | None) -> None:
    for key, value, least in (
        ("--max-length", options.max_length, 1),
        ("--rows-per-shard", options.rows_per_shard, 1),
        ("--seed", options.seed, 0),
        ("--workers", workers if workers is not None else 1, 1),
    ):
        if value < least:
            raise UserError(f"{key} {value}: expected at least {least}.")
    if options.backend != "zarr":
        raise UserError(f"--store {options.backend}: unknown; expected zarr.")
    if not options.fields.text or not all(options.fields.text):
        raise UserError("--text-field names no field; expected one or more, separated by commas.")
    A, B = options.propensity.A, options.propensity.B
    if not (math.isfinite(A) and math.isfinite(B) and A >= 0 and B > -1):
        raise UserError(f"--propensity {A},{B}: expected finite A >= 0 and B > -1, such as 0.55,1.5.")


def _choose_part_bytes(paths: Sequence[Path]) -> int:
    """Some 64 parts, whatever the number of workers, so that another number can continue a conversion."""
    least, most = _PART_BYTES
    return min(max(sum(path.stat().st_size for path in paths) // _PARTS, least), most)


def _summary(index: StoreIndex, out: Path, seconds: float) -> dict[str, Any]:
    splits = {name: asdict(split) | {"shards": len(split.shards)} for name, split in index.splits.items()}
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return splits | {"labels": index.labels.count, "bytes": size, "seconds": seconds}
