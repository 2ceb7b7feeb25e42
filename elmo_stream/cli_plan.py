"""The verb ``plan``."""

from pathlib import Path

import click

from elmo_stream.cli_common import STORE, common_options, config_options, show
from elmo_stream.errors import UserError


@click.command()
@click.argument("store", type=STORE, required=False)
@click.option("--labels", type=click.IntRange(1, 2**32 - 2), help="Instead of STORE: number of labels.")
@click.option("--dim", type=click.IntRange(16, 65536), help="Instead of STORE: size of the embedding.")
@click.option("--instances", type=click.IntRange(1), help="Instead of STORE: number of training instances.")
@click.option("--device-memory", metavar="SIZE", help="Short for --set memory.device=SIZE, such as 8GiB.")
@click.option("--host-memory", metavar="SIZE", help="Short for --set memory.host=SIZE.")
@click.option("--disk", metavar="FOLDER", help="Short for --set memory.disk=FOLDER.")
@click.option(
    "--rate",
    "rates",
    multiple=True,
    metavar="NAME=VALUE",
    help="A rate to use instead of the measured one, such as disk_read=2GB; --json lists the names.",
)
@config_options
@common_options
def plan(
    store: Path | None,
    labels: int | None,
    dim: int | None,
    instances: int | None,
    device_memory: str | None,
    host_memory: str | None,
    disk: str | None,
    rates: tuple[str, ...],
    config_file: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show where every byte of a training run would go, and how long a step would take.

    \b
    elmo-stream plan store --set classifier.format=bf16
    elmo-stream plan --labels 100000000 --dim 64 --instances 20000000 --device-memory 3GiB --disk /scratch

    Measures this machine for some seconds. Exit code 2: the memory does not suffice, and the plan says what to change.
    """
    from elmo_stream.config import load_config
    from elmo_stream.training.preview import plan_sizes, plan_store

    short = {"memory.device": device_memory, "memory.host": host_memory, "memory.disk": disk, "encoder.dim": dim}
    kind = load_config(config_file, overrides).encoder.kind
    if kind == "transformer" and dim is not None:
        raise UserError("--dim: the size of a transformer's embedding is its own; leave --dim out.")
    overrides += tuple(f"{key}={value}" for key, value in short.items() if value is not None)
    config = load_config(config_file, overrides)
    if store is not None:
        if labels is not None or dim is not None or instances is not None:
            raise UserError("give a STORE, or --labels, --dim and --instances, not both.")
        made = plan_store(store, config, None, rates)
    elif labels is None or instances is None:
        raise UserError("give a STORE, or --labels and --instances (and --dim).")
    else:
        made = plan_sizes(labels, instances, config, rates)
    show(made.as_dict(), made.table(), as_json)
    click.get_current_context().exit(2 if made.lacks() else 0)
