"""The training step of the official ELMO repository (Zhang et al., ICML 2025), from a checkout of it that the user has.

Nothing of it is part of this project: its two classifier classes are imported from the checkout and their own step
is called, with weights of our values, on the same embeddings and positives.
"""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tools.measuring import Work

PEER_FORMATS = ("bf16", "fp8")
CHUNKS = 8
"""Chunks of labels of its configuration for the largest public data set; the FP8 step pads labels to 16 a chunk."""
FIRST_STD = 0.02


def peer_step(
    checkout: Path, fmt: str, labels: int, x_BD: Tensor, label_P: Tensor, instance_P: Tensor, lr: float
) -> Work:
    """One step of its chunked classifier over ``labels`` random weights, as a function of no argument.

    Args:
        checkout: folder that holds ``src/xmc_classifiers``. x_BD: float32 on a GPU.

    Raises:
        FileNotFoundError: no checkout there.
    """
    source = checkout.resolve() / "src"
    if not (source / "xmc_classifiers").is_dir():
        raise FileNotFoundError(f"{source}/xmc_classifiers is not there; give a checkout of the ELMO repository.")
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
    layer = _fp8_layer(labels, x_BD) if fmt == "fp8" else _bf16_layer(labels, x_BD)
    pairs = torch.stack([instance_P, label_P], 1)
    operand_BD = x_BD.bfloat16()
    return lambda: layer.xfc_forward_backward(operand_BD, pairs, [lr])


def _bare(module: str, name: str) -> Any:
    """An instance of a class whose constructor, which fills an FP32 matrix on the host, is left out."""
    kind = getattr(importlib.import_module(f"xmc_classifiers.{module}"), name)
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


def _fp8_layer(labels: int, x_BD: Tensor) -> Any:
    layer = _bare("chunked_fp8xmc_clf", "Fp8XMCBCEChunkedLayer")
    rows = -(-labels // (16 * CHUNKS)) * 16
    weights = [_random(rows, x_BD).to(torch.float8_e4m3fn) for _ in range(CHUNKS)]
    layer.xfc_weight = nn.ParameterList([nn.Parameter(w_LD, requires_grad=False) for w_LD in weights])
    layer.num_chunks, layer.num_labels_i, layer.num_labels = CHUNKS, rows, rows * CHUNKS
    layer.fake_fp8_matmul, layer.block_size, layer.iteration, layer.device = False, 16, 0, x_BD.device
    return layer


def _bf16_layer(labels: int, x_BD: Tensor) -> Any:
    layer = _bare("chunked", "XMCBCECHUNKEDLayer")
    rows = -(-labels // CHUNKS)
    layer.xfc_weight = torch.cat([_random(rows, x_BD).bfloat16() for _ in range(CHUNKS)])[:labels]
    layer.num_labels, layer.num_chunks, layer.chunk_size = labels, CHUNKS, rows
    layer._dtype, layer.device, layer.iteration = torch.bfloat16, x_BD.device, 0
    layer.cfg = SimpleNamespace(
        model=SimpleNamespace(xmc=SimpleNamespace(input_features=x_BD.shape[1])),
        training=SimpleNamespace(xmc=SimpleNamespace(wd=0.0)),
    )
    return layer


def _random(rows: int, x_BD: Tensor) -> Tensor:
    return torch.randn(rows, x_BD.shape[1], device=x_BD.device) * FIRST_STD
