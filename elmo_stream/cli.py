"""The command line: parses and calls, nothing else. Heavy imports wait inside the commands."""

import json
import logging
from pathlib import Path

import click

from elmo_stream.cli_common import (
    FILE,
    FOLDER,
    INPUT_FILE,
    MAX_K,
    STORE,
    Verbs,
    as_lines,
    common_options,
    config_options,
    debug_option,
    memory_option,
    on_oom_option,
    parse_ks,
    parse_names,
    say,
    show,
)
from elmo_stream.cli_plan import plan
from elmo_stream.cli_shard import shard
from elmo_stream.errors import UserError


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="elmo-stream", message="%(version)s")
def main() -> None:
    """Train extreme multi-label classifiers from streamed shards, on a GPU or a CPU.

    \b
    elmo-stream demo                                   see it all once
    elmo-stream shard train.jsonl --test test.jsonl --out store
    elmo-stream train store --out run
    elmo-stream evaluate run
    elmo-stream predict run --text "a text to tag"
    """
    # transformers imports torchao where it is installed, which tells of each of its parts that does not fit this torch.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


main.add_command(shard)


main.add_command(plan)


@main.command()
@click.argument("store", type=STORE)
@click.option("--out", type=FOLDER, help="Folder of the new run.")
@config_options
@click.option("--epochs", type=click.IntRange(1), help="Short for --set train.epochs=N.")
@click.option("--steps", type=click.IntRange(1), help="Short for --set train.steps=N.")
@click.option(
    "--init-from",
    type=FOLDER,
    help="Run to begin with: its encoder, and its labels by name; STORE may have other data and more labels.",
)
@click.option("--data-timeout", type=click.FloatRange(0, 1e6), help="Short for --set loader.timeout=SECONDS.")
@click.option("--dry-run", is_flag=True, help="Print the whole configuration and the plan, train nothing.")
@on_oom_option
@common_options
def train(
    store: Path,
    out: Path | None,
    config_file: Path | None,
    overrides: tuple[str, ...],
    epochs: int | None,
    steps: int | None,
    init_from: Path | None,
    data_timeout: float | None,
    dry_run: bool,
    on_oom: str | None,
    as_json: bool,
) -> None:
    """Train a model on a store.

    \b
    elmo-stream train store --out run --epochs 5 --set train.batch=256
    elmo-stream train newer-store --out newer-run --init-from run --config run/config.toml

    Ctrl-C (or SIGTERM) saves a checkpoint and ends; `elmo-stream resume run` goes on.
    """
    from elmo_stream.config import load_config

    if epochs is not None and steps is not None:
        raise UserError("--epochs and --steps exclude each other; give one of them.")
    if epochs is not None:
        overrides += (f"train.epochs={epochs}", "train.steps=0")
    if steps is not None:
        overrides += (f"train.steps={steps}",)
    if data_timeout is not None:
        overrides += (f"loader.timeout={data_timeout}",)
    config = load_config(config_file, overrides)
    if dry_run:
        from elmo_stream.training.preview import plan_store

        made = plan_store(store, config, out)
        show(
            {"config": config.to_dict(), "plan": made.as_dict()},
            f"{config.to_toml(comments=True)}\n{made.table()}",
            as_json,
        )
        click.get_current_context().exit(2 if made.lacks() else 0)
    if out is None:
        raise UserError("--out: give the folder of the new run.")
    from elmo_stream.training.trainer import train as train_run

    _finish(train_run(store, out, config, init_from=init_from, on_oom=on_oom, report=say), out, as_json)


@main.command()
@click.argument("run", type=FOLDER)
@click.argument("store", type=STORE, required=False)
@memory_option
@on_oom_option
@click.option("--strict", is_flag=True, help="End with code 74 if the newest checkpoint is damaged.")
@common_options
def resume(
    run: Path, store: Path | None, memory: tuple[str, ...], on_oom: str | None, strict: bool, as_json: bool
) -> None:
    """Continue a run from its last whole checkpoint; STORE is needed only if the store was moved.

    \b
    elmo-stream resume run
    """
    from elmo_stream.training.trainer import resume as resume_run

    _finish(resume_run(run, store, memory=memory, on_oom=on_oom, strict=strict, report=say), run, as_json)


def _finish(code: int, run: Path, as_json: bool) -> None:
    from elmo_stream.training.checkpoint import checkpoint_steps

    if as_json:
        click.echo(json.dumps({"run": str(run), "step": checkpoint_steps(run)[-1], "finished": code == 0}))
    click.get_current_context().exit(code)


@main.command()
@click.argument("run", type=FOLDER)
@click.argument("store", type=STORE, required=False)
@click.option("--split", default="test", show_default=True, help="test, valid or train.")
@click.option("--k", "ks", default="1,3,5", show_default=True, callback=parse_ks, help="Lengths of the ranking.")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Write the result as JSON to a file, or without one to the screen.",
)
@memory_option
@debug_option
def evaluate(
    run: Path, store: Path | None, split: str, ks: tuple[int, ...], json_file: Path | None, memory: tuple[str, ...]
) -> None:
    """Measure a run on a split of a store (by default its own): P@k, nDCG@k, PSP@k, PSnDCG@k, R@k.

    \b
    elmo-stream evaluate run --k 1,3,5 --json result.json
    """
    from elmo_stream.files import write_json_durably
    from elmo_stream.training.evaluate import evaluate as evaluate_run

    if json_file is not None and (json_file.is_dir() or not json_file.parent.is_dir()):
        raise UserError(f"--json {json_file}: is a folder, or its folder does not exist; give the name of a file.")
    result = evaluate_run(run, store, split=split, ks=ks, memory=memory, report=say)
    if json_file is not None and str(json_file) != "-":
        write_json_durably(json_file, result)
        json_file = None
    names = dict.fromkeys(name.split("@")[0] for name in result["metrics"])
    rows = [f"{name:<8}" + "".join(f"{100 * result['metrics'][f'{name}@{k}']:>9.2f}" for k in ks) for name in names]
    unseen = f"{result['unseen_labels']:,} labels unseen in training left out"
    head = f"{result['split']} split, {result['instances']:,} instances ({unseen}), step {result['step']:,}; percent"
    show(result, "\n".join([head, " " * 8 + "".join(f"{f'@{k}':>9}" for k in ks), *rows]), json_file is not None)


@main.command()
@click.argument("run", type=FOLDER)
@click.argument("source", type=INPUT_FILE, required=False, metavar="[INPUT]")
@click.option("--out", type=FILE, help="Output: .jsonl or .parquet.")
@click.option("--text", multiple=True, help="A text to tag instead of a file; may be repeated.")
@click.option(
    "--text-field", callback=parse_names, help="Fields of the input's text.  [default: text, or those of the format]"
)
@click.option("--top-k", type=click.IntRange(1, MAX_K), default=5, show_default=True, help="Labels per text.")
@memory_option
@common_options
def predict(
    run: Path,
    source: Path | None,
    out: Path | None,
    text: tuple[str, ...],
    text_field: tuple[str, ...] | None,
    top_k: int,
    memory: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tag texts with label names and probabilities; needs the run folder only.

    \b
    elmo-stream predict run --text "read a tensor from a file and check its checksum"
    elmo-stream predict run new.jsonl --out tagged.jsonl --top-k 10
    """
    from elmo_stream.training.predict import Predictor
    from elmo_stream.training.predict import predict as predict_file

    if bool(text) == (source is not None) or (text and out):
        raise UserError("give either an INPUT file with --out, or --text alone.")
    if source is not None:
        if out is None:
            raise UserError("--out: give the file for the predictions.")
        count = predict_file(run, source, out, k=top_k, text_fields=text_field, memory=memory, report=say)
        show({"out": str(out), "instances": count}, f"{count:,} instances tagged in {out}", as_json)
        return
    predictions = Predictor(run, memory=memory, report=say)(text, top_k)
    value = [
        {"text": t, "labels": [n for n, _ in p], "probabilities": [round(q, 6) for _, q in p]}
        for t, p in zip(text, predictions, strict=True)
    ]
    shown = [
        line
        for t, p in zip(text, predictions, strict=True)
        for line in (t, *(f"  {probability:6.3f}  {name}" for name, probability in p))
    ]
    show(value, "\n".join(shown), as_json)


@main.command()
@click.argument("path", type=STORE)
@common_options
def inspect(path: Path, as_json: bool) -> None:
    """Say what a store, a run or a checkpoint holds.

    \b
    elmo-stream inspect store
    """
    from elmo_stream.inspection import inspect as inspect_path

    value = inspect_path(path)
    show(value, as_lines(value), as_json)


@main.command()
@click.argument("path", type=STORE)
@common_options
def verify(path: Path, as_json: bool) -> None:
    """Compare every byte of a store, a run or a checkpoint with its checksums.

    \b
    elmo-stream verify run
    """
    from elmo_stream.inspection import verify as verify_path

    value = verify_path(path)
    show(value, f"{path}: whole.\n{as_lines(value)}", as_json)


@main.command()
@click.option("--out", type=FOLDER, default=Path("demo-run"), show_default=True, help="Folder for data and models.")
@common_options
def demo(out: Path, as_json: bool) -> None:
    """Learn from the Python sources installed here which functions a described function calls.

    \b
    elmo-stream demo

    Shards the texts, trains, kills its own training half way, resumes it, compares it with a training that was
    never stopped, and measures it beside popularity and 50 nearest neighbours. Takes some minutes.
    """
    from elmo_stream.demo import run_demo

    value, text = run_demo(out, report=say)
    show(value, text, as_json)


@main.command()
@common_options
def doctor(as_json: bool) -> None:
    """Say what this machine has for training, and what is missing.

    \b
    elmo-stream doctor
    """
    from elmo_stream.doctor import render, report

    value = report()
    show(value, render(value), as_json)


if __name__ == "__main__":
    main()
