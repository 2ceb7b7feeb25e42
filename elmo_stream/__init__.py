"""Streaming, out-of-core training of extreme multi-label classifiers.

Six names are public: ``Config`` and ``load_config``, ``convert`` (data to store), ``train``, ``evaluate`` and
``Predictor``. They are imported on first use, so that ``import elmo_stream`` costs nothing.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Config": "elmo_stream.config",
    "load_config": "elmo_stream.config",
    "convert": "elmo_stream.data.shard",
    "train": "elmo_stream.training.trainer",
    "evaluate": "elmo_stream.training.evaluate",
    "Predictor": "elmo_stream.training.predict",
}

__all__ = ["Config", "Predictor", "convert", "evaluate", "load_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
