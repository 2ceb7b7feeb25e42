"""The verb ``shard``: every choice about the input and the store."""

from pathlib import Path

import click

from elmo_stream.cli_common import (
    FOLDER,
    INPUT_FILE,
    ProgressLines,
    as_lines,
    common_options,
    parse_names,
    parse_propensity,
    say,
    show,
)
from elmo_stream.data.index import BACKENDS, MAX_LENGTH, MAX_ROWS_PER_SHARD
from elmo_stream.errors import UserError

FORMAT_NAMES = ("jsonl", "csv", "tsv", "parquet", "xc-json", "xc-text", "xc-bow", "npz", "annif")


@click.command()
@click.argument("train", nargs=-1, required=True, type=INPUT_FILE)
@click.option("--out", required=True, type=FOLDER, help="Folder of the new store.")
@click.option("--test", multiple=True, type=INPUT_FILE, help="Test file; may be repeated.")
@click.option("--valid", multiple=True, type=INPUT_FILE, help="Validation file; may be repeated.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["auto", *FORMAT_NAMES]),
    default="auto",
    show_default=True,
    help="auto: by ending and first lines.",
)
@click.option(
    "--text-field",
    callback=parse_names,
    help="Fields of the text, joined by a space: title,body.  [default: text, or those of the format]",
)
@click.option(
    "--label-field", help="Field with the labels, as strings, ids or a list.  [default: labels, or that of the format]"
)
@click.option(
    "--label-separator",
    default="auto",
    show_default=True,
    help="What stands between labels in one string; auto: as seen in the first rows of CSV or TSV; '': nothing.",
)
@click.option(
    "--label-file",
    multiple=True,
    type=INPUT_FILE,
    help="Labels of texts or features in a file of their own; may be repeated.  [default: the one beside the data]",
)
@click.option("--labels", type=INPUT_FILE, help="Names of labels given as ids, a line each: Y.txt or lbl.json.")
@click.option(
    "--filter",
    "filter_",
    type=INPUT_FILE,
    help="Lines of test row and label id, both from 0, that no ranking may hold (reciprocal pairs).",
)
@click.option(
    "--tokenizer",
    help="Hub name, installed package, folder, train:N to train one on the corpus, or bow for features.  "
    "[default: train:16000, or bow]",
)
@click.option(
    "--max-length",
    type=click.IntRange(1, MAX_LENGTH),
    help="Tokens kept of a text, or features.  [default: 128 tokens, or all features]",
)
@click.option(
    "--store",
    type=click.Choice(BACKENDS),
    default="zarr",
    show_default=True,
    help="How shards are kept: zarr (compressed), or webdataset (plain tars of blocks of rows).",
)
@click.option(
    "--rows-per-shard",
    type=click.IntRange(1, MAX_ROWS_PER_SHARD),
    default=65536,
    show_default=True,
    help="Instances of a shard.",
)
@click.option("--workers", type=click.IntRange(1, 1024), help="Processes.  [default: one a CPU]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Seed of the shuffle.")
@click.option(
    "--propensity",
    default="0.55,1.5",
    show_default=True,
    callback=parse_propensity,
    help="A,B of the propensity model: 0.5,0.4 for Wikipedia, 0.6,2.6 for Amazon.",
)
@click.option(
    "--shard-index", type=click.IntRange(0), help="Read and tokenise one share of the input only: 0 to N - 1."
)
@click.option("--num-shards", type=click.IntRange(1), help="Shares of the input, N.")
@click.option("--finalize", is_flag=True, help="Make the store out of the shares that were read.")
@common_options
def shard(
    train: tuple[Path, ...],
    out: Path,
    test: tuple[Path, ...],
    valid: tuple[Path, ...],
    format_: str,
    text_field: tuple[str, ...] | None,
    label_field: str | None,
    label_separator: str,
    label_file: tuple[Path, ...],
    labels: Path | None,
    filter_: Path | None,
    tokenizer: str | None,
    max_length: int | None,
    store: str,
    rows_per_shard: int,
    workers: int | None,
    seed: int,
    propensity: tuple[float, float],
    shard_index: int | None,
    num_shards: int | None,
    finalize: bool,
    as_json: bool,
) -> None:
    """Convert text and labels to a store of shuffled shards.

    \b
    elmo-stream shard train.jsonl --test test.jsonl --out store

    A line of JSONL is {"text": "...", "labels": ["...", ...]}. Tables, the files of the Extreme Classification
    Repository and Annif's corpora are read as well, packed by gzip, xz or zstd too. Run the same command again to
    finish a conversion that was stopped.

    An array of jobs shares the work in one folder that all of them see; then one more makes the store:

    \b
    elmo-stream shard train.jsonl --out store --tokenizer NAME --shard-index 3 --num-shards 16
    elmo-stream shard train.jsonl --out store --tokenizer NAME --finalize
    """
    from elmo_stream.data.shard import convert

    if (shard_index is None) != (num_shards is None) or (finalize and shard_index is not None):
        raise UserError("give --shard-index together with --num-shards, or --finalize alone.")
    job = None if shard_index is None or num_shards is None else (shard_index, num_shards)
    summary = convert(
        list(train),
        out,
        test=list(test),
        valid=list(valid),
        format=format_,
        text_fields=text_field,
        label_field=label_field,
        label_separator=label_separator,
        label_files=label_file,
        labels=labels,
        filter=filter_,
        tokenizer=tokenizer,
        max_length=max_length,
        store=store,
        rows_per_shard=rows_per_shard,
        workers=workers,
        seed=seed,
        propensity=propensity,
        job=job,
        finalize=finalize,
        report=say,
        progress=ProgressLines(),
    )
    show(summary, as_lines(summary), as_json)
