"""The configuration of a training run: frozen dataclasses <- TOML file <- ``--set table.key=value``.

Every key is declared once, with its default, its allowed values and one line of help. Unknown keys and values out of
range are refused with the name of the key. The resolved configuration is saved in the run folder as ``config.toml``.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from elmo_stream.errors import UserError
from elmo_stream.files import reading

MAX_CONFIG_BYTES = 1 << 20
FP8_KAHAN_HEAD = 0.2
# Batches are as long as a multiple of this, so that few shapes occur.
PAD_MULTIPLE = 8
# (encoder_lr, classifier_lr) by kind of encoder
DEFAULT_LRS = {"bag": (0.01, 0.02), "transformer": (5e-5, 0.004), "frozen transformer": (3e-4, 0.01)}


def _key(
    default: Any, help: str, *, choices: tuple[str, ...] = (), low: float | None = None, high: float | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class EncoderConfig:
    """Text -> embedding."""

    kind: str = _key(
        "bag",
        "bag: weighted bag of token embeddings; transformer: a Hugging Face encoder",
        choices=("bag", "transformer"),
    )
    name: str = _key("", "transformer: hub name, folder or installed package; bag: one whose input embeddings start it")
    pooling: str = _key("mean", "transformer: mean over the tokens, or the first token", choices=("mean", "cls"))
    dim: int = _key(256, "bag: size of the embedding, a multiple of 16", low=16, high=65536)
    bigrams: int = _key(32768, "bag: buckets for pairs of neighbouring tokens; 0 for none", low=0, high=1 << 28)
    hidden: int = _key(0, "width of a residual MLP on the embedding; 0 for none", low=0, high=65536)
    dropout: float = _key(0.3, "dropout on the embedding", low=0.0, high=0.95)
    frozen: bool = _key(
        False, "keep the encoder as it is, embed each text once, and train the classifier and the MLP on what is cached"
    )
    cache: str = _key("", "folder of cached embeddings, which runs may share; empty: embeddings/ in the run's folder")
    checkpointing: bool = _key(False, "transformer: recompute activations in the backward pass to save memory")
    format: str = _key(
        "fp32",
        "encoder weights; fp8: bf16 weights and FP8 products of matrices, for a transformer on a GPU from sm_89 on",
        choices=("fp32", "bf16", "fp8"),
    )
    rounding: str = _key(
        "kahan",
        "of bf16 weights: kahan keeps a compensation of 2 bytes a weight, stochastic needs none",
        choices=("kahan", "stochastic"),
    )


@dataclass(frozen=True)
class ClassifierConfig:
    """The labels x dim matrix, stored in chunks of labels."""

    format: str = _key("fp8", "storage of the weights", choices=("fp32", "bf16", "fp8"))
    rounding: str = _key(
        "stochastic", "how an updated weight is rounded to its format", choices=("stochastic", "kahan", "nearest")
    )
    kahan_head: float = _key(
        -1.0,
        "share of the most frequent labels that keep a Kahan compensation, 2 bytes a weight; -1: 0.2 for fp8, else 0",
        low=-1.0,
        high=1.0,
    )
    loss: str = _key("bce", "loss per label", choices=("bce", "squared_hinge"))
    fp8_logits: bool = _key(
        False, "multiply fp8 weights by embeddings rounded to FP8 for the logits of training, on a GPU from sm_89 on"
    )
    chunk_labels: int = _key(0, "labels per chunk, rounded up to a multiple of 1,024; 0 chooses", low=0)
    weight_decay: float = _key(1e-4, "decay of the classifier's weights", low=0.0, high=1.0)
    init_std: float = _key(0.02, "standard deviation of the initial weights", low=1e-6, high=1.0)

    @property
    def kahan_share(self) -> float:
        """Share of the labels whose weights carry a compensation."""
        return 1.0 if self.rounding == "kahan" else max(0.0, self.kahan_head)


@dataclass(frozen=True)
class TrainConfig:
    """How long, and on which part of the data."""

    batch: int = _key(256, "instances per step", low=1, high=1 << 20)
    micro_batch: int = _key(
        0, "instances that the encoder takes at once, twice, to save its memory; 0: the whole batch, once", low=0
    )
    epochs: int = _key(10, "passes over the training data", low=1, high=1_000_000)
    steps: int = _key(0, "steps in all; 0: as many as the epochs need", low=0)
    label_texts: bool = _key(False, "train on the labels' names too: each is an instance whose label is itself")
    on_nonfinite: str = _key(
        "stop",
        "a step whose embeddings or gradients are not finite ends the training, is left out, or takes the training "
        "back to its last checkpoint and on with the batches behind it",
        choices=("stop", "skip", "rollback"),
    )
    validation: float = _key(
        0.02,
        "share of the training instances held out for validation, 10,000 at most, unless the store has a valid split",
        low=0.0,
        high=0.5,
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """Learning rates and their schedule (both follow the same one)."""

    encoder_lr: float = _key(
        0.0,
        "peak learning rate of the encoder (AdamW); 0: 0.01 for a bag, 5e-5 for a transformer, 3e-4 on a frozen one",
        low=0.0,
        high=100.0,
    )
    classifier_lr: float = _key(
        0.0, "peak learning rate of the classifier (SGD, summed gradients); 0: 0.02, 0.004 or 0.01", low=0.0, high=100.0
    )
    warmup_steps: int = _key(100, "steps of linear warm-up", low=0)
    schedule: str = _key("cosine", "learning rate after the warm-up", choices=("cosine", "linear", "constant"))
    weight_decay: float = _key(0.01, "decay of the encoder's matrices", low=0.0, high=10.0)
    states: str = _key(
        "auto",
        "AdamW's two states a weight: 8, 4 or 2 bytes; auto: fp32 for fp32 weights, else bf16",
        choices=("auto", "fp32", "bf16", "8bit"),
    )
    offload: bool = _key(False, "AdamW's states stay in host memory and visit the GPU slice by slice")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written; one is always written at the end and at SIGTERM or SIGINT."""

    every_steps: int = _key(0, "steps between checkpoints; 0: by minutes only", low=0)
    every_minutes: float = _key(10.0, "minutes between checkpoints; 0: by steps only", low=0.0)
    keep: int = _key(2, "newest checkpoints kept", low=2, high=1000)


@dataclass(frozen=True)
class LoaderConfig:
    """Reading of batches; changes no result but the grouping by length."""

    workers: int = _key(1, "background threads; 0 reads in the training thread", low=0, high=256)
    prefetch: int = _key(2, "groups of batches prepared ahead", low=1, high=1024)
    bucket: int = _key(
        16, "batches per group, within which instances of like length share a batch; 1: none", low=1, high=4096
    )
    timeout: float = _key(600.0, "seconds after which training ends where no batch comes; 0: never", low=0.0, high=1e6)


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory a run may take, such as 8GiB; changes no result, so a resume may change it."""

    device: str = _key("", "memory of the GPU, or on a CPU of the whole process; empty: 90 % of what is free")
    host: str = _key("", "memory of the process beside a GPU; empty: 90 % of what is free")
    disk: str = _key("", "folder for scratch files of chunks that fit no memory; empty: scratch in the run folder")


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    seed: int = _key(0, "seed of order, initial weights, dropout and rounding", low=0, high=2**63 - 1)
    threads: int = _key(0, "CPU threads; 0: all cores", low=0, high=4096)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested plain values."""
        return asdict(self)

    def to_toml(self, *, comments: bool = False) -> str:
        """The configuration as TOML, complete; with ``comments``, each key explained."""
        lines: list[str] = []
        table = ""
        for key, value, meta in _walk(self):
            head, _, name = key.rpartition(".")
            if head != table:
                lines += ["", f"[{head}]"]
                table = head
            # TOML's strings, numbers and booleans are written as JSON writes them.
            line = f"{name} = {json.dumps(value, ensure_ascii=False)}"
            hint = meta["help"] + (f" ({' | '.join(meta['choices'])})" if meta["choices"] else "")
            lines.append(f"{line:<32} # {hint}" if comments else line)
        return "\n".join(lines) + "\n"


def _walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    scalars_first = sorted(fields(config), key=lambda item: is_dataclass(getattr(config, item.name)))
    for item in scalars_first:
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _walk(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, value, item.metadata


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a TOML file (or the defaults) and apply ``table.key=value`` overrides.

    Raises:
        UserError: file absent or not TOML, unknown key, wrong type, value out of range; names file and key.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            with reading(path) as stream:
                data = stream.read(MAX_CONFIG_BYTES + 1)
            if len(data) > MAX_CONFIG_BYTES:
                raise UserError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is not a configuration file.")
            values = tomllib.loads(data.decode("utf-8"))
        except (FileNotFoundError, IsADirectoryError) as error:
            raise UserError(f"{path}: no such configuration file.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path}: not valid TOML: {error}.") from error
        _build(Config, values, "", str(path))
    for override in overrides:
        _apply(values, override)
    config: Config = _build(Config, values, "", "--set")
    _check_together(config)
    return _resolved(config)


def with_memory(config: Config, overrides: Iterable[str]) -> Config:
    """A run's configuration with other ``memory.*`` keys, the only ones that change no result.

    Raises:
        UserError: another key, or a bad value.
    """
    values = config.to_dict()
    for override in overrides:
        if not override.strip().startswith("memory."):
            raise UserError(f"--set {override}: a run keeps its keys but memory.device, memory.host and memory.disk.")
        _apply(values, override)
    changed: Config = _build(Config, values, "", "--set")
    _check_together(changed)
    return changed


def _resolved(config: Config) -> Config:
    frozen = config.encoder.frozen and config.encoder.kind == "transformer"
    encoder_lr, classifier_lr = DEFAULT_LRS["frozen transformer" if frozen else config.encoder.kind]
    states = config.optimizer.states
    if states == "auto":
        states = "fp32" if config.encoder.format == "fp32" else "bf16"
    optimizer = replace(
        config.optimizer,
        encoder_lr=config.optimizer.encoder_lr or encoder_lr,
        classifier_lr=config.optimizer.classifier_lr or classifier_lr,
        states=states,
    )
    classifier = config.classifier
    if classifier.kahan_head < 0:
        share = FP8_KAHAN_HEAD if (classifier.format, classifier.rounding) == ("fp8", "stochastic") else 0.0
        classifier = replace(classifier, kahan_head=share)
    return replace(config, optimizer=optimizer, classifier=classifier)


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: expected KEY=VALUE, for example --set train.batch=256.")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text.strip()
    target = values
    *tables, name = key.strip().split(".")
    for table in tables:
        target = target.setdefault(table, {})
        if not isinstance(target, dict):
            raise UserError(f"--set {override}: {table} is a key, not a table.")
    target[name] = value


def _build(cls: Any, values: Any, prefix: str, source: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {prefix.rstrip('.')} is a table of keys, got {values!r}.")
    known = {item.name: item for item in fields(cls)}
    types = get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}."
            raise UserError(f"{source}: unknown key {prefix}{name}; {hint}")
        if is_dataclass(types[name]):
            arguments[name] = _build(types[name], value, f"{prefix}{name}.", source)
        else:
            arguments[name] = _checked(prefix + name, value, types[name], known[name].metadata, source)
    return cls(**arguments)


def _checked(key: str, value: Any, kind: type, meta: Any, source: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    if key.startswith("memory.") and type(value) is int:
        value = str(value)  # a size in bytes
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise UserError(f"{source}: {key} must be {names[kind]}, got {value!r}.")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{source}: {key} must be one of {', '.join(meta['choices'])}; got {value!r}.")
    low, high = meta["low"], meta["high"]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{source}: {key} must be a finite number; got {value}.")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{source}: {key} must be {limits}; got {value}.")
    return value


_UNITS = {
    "": 1,
    **{f"{p}{b}": (1024 if b == "iB" else 1000) ** (i + 1) for i, p in enumerate("KMGT") for b in ("B", "iB")},
}


def parse_size(key: str, text: str) -> int | None:
    """Bytes of a size such as ``8GiB`` or ``500 MB``; None for an empty one.

    Raises:
        UserError: it is no size; names the key.
    """
    if not text.strip():
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|)\s*", text)
    if not found or not 0 < float(found[1]) * _UNITS[found[2]] < 2**60:
        raise UserError(f"{key}: {text!r} is no size; give a number with a unit, such as 8GiB or 500MB.")
    return int(float(found[1]) * _UNITS[found[2]])


def _check_together(config: Config) -> None:
    for name in ("device", "host"):
        parse_size(f"memory.{name}", getattr(config.memory, name))
    if config.encoder.kind == "transformer" and not config.encoder.name:
        raise UserError("encoder.name: a transformer needs a name, folder or installed package; set encoder.name.")
    if config.encoder.kind == "bag" and config.encoder.dim % 16:
        raise UserError(f"encoder.dim must be a multiple of 16; got {config.encoder.dim}.")
    if config.encoder.cache and not config.encoder.frozen:
        raise UserError(
            "encoder.cache: embeddings are cached with encoder.frozen = true only; set it, or leave it out."
        )
    if config.encoder.kind == "bag" and config.encoder.format == "fp8":
        raise UserError("encoder.format: fp8 is for transformers; a bag multiplies no matrices. Use fp32 or bf16.")
    if config.encoder.frozen and config.encoder.format == "fp8":
        raise UserError("encoder.format: fp8 is for training, and a frozen encoder is not trained. Use fp32 or bf16.")
    if config.encoder.format == "fp32" and config.encoder.rounding == "stochastic":
        raise UserError("encoder.rounding: stochastic needs encoder.format bf16 or fp8.")
    if -1 < config.classifier.kahan_head < 0:
        raise UserError("classifier.kahan_head must be between 0 and 1, or -1 to let the format decide.")
    if config.classifier.format == "fp32" and config.classifier.kahan_share:
        raise UserError("classifier.rounding: kahan and classifier.kahan_head need classifier.format bf16 or fp8.")
    if config.classifier.fp8_logits and config.classifier.format != "fp8":
        raise UserError("classifier.fp8_logits needs classifier.format fp8; set it to false.")
    if config.checkpoint.every_steps == 0 and config.checkpoint.every_minutes == 0:
        raise UserError("checkpoint.every_steps and checkpoint.every_minutes are both 0; set one of them.")
