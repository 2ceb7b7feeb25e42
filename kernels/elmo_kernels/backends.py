"""Which module computes for which device. A backend's compiler is imported with its first operation."""

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from elmo_kernels.types import require_choice

_MODULES = {"reference": "reference", "numba": "cpu", "triton": "triton_ops"}


def backend_name(device: torch.device | str) -> str:
    """The backend for tensors of a device: "triton" on CUDA, else "numba" where it is installed, else
    "reference".

    The environment variable ``ELMO_KERNELS`` names one instead.

    Raises:
        ValueError: when ``ELMO_KERNELS`` is no backend, or one that cannot work on this device.
    """
    kind = torch.device(device).type
    forced = os.environ.get("ELMO_KERNELS", "")
    if forced:
        require_choice("ELMO_KERNELS", forced, tuple(_MODULES))
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        works = {"reference": True, "numba": kind == "cpu", "triton": kind == "cuda" or interpreted}
        if not works[forced]:
            raise ValueError(f"ELMO_KERNELS={forced} cannot work on {kind} tensors; unset it.")
        return forced
    if kind == "cuda":
        return "triton"
    return "numba" if kind == "cpu" and importlib.util.find_spec("numba") else "reference"


def backend(device: torch.device | str) -> ModuleType:
    """The module with the operations for tensors of a device, and its row operations as ``ROWS``."""
    return importlib.import_module(f"elmo_kernels.{_MODULES[backend_name(device)]}")
