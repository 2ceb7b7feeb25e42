"""Products of matrices in FP8 while a transformer trains: weights stay BF16, operands are scaled and rounded.

Method: Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433, with one scale a tensor, from torchao.
"""

import importlib.util

import torch
from torch import nn

from elmo_stream.config import Config
from elmo_stream.errors import UserError

_MULTIPLE = 16
_LEAST_CAPABILITY = (8, 9)


def require_fp8(config: Config, device: torch.device) -> None:
    """Refuse to train on a device that cannot multiply in FP8 what the configuration wants multiplied so.

    Raises:
        UserError: no CUDA GPU, one before sm_89, or the encoder needs torchao, which is not installed.
    """
    encoder = config.encoder.format == "fp8"
    if not encoder and not config.classifier.fp8_logits:
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        key, instead = ("encoder.format: fp8", "bf16") if encoder else ("classifier.fp8_logits", "false")
        raise UserError(f"{key} needs a GPU of compute capability 8.9 or newer, {name} is none; set it to {instead}.")
    if encoder and importlib.util.find_spec("torchao") is None:
        raise UserError("encoder.format: fp8 needs torchao: pip install torchao; or set it to bf16.")


def use_fp8_(module: nn.Module, *, emulate: bool = False) -> None:
    """Let the linear layers of a module multiply in FP8, those with sizes that are multiples of 16.

    Args:
        emulate: round as FP8 would and multiply in the weights' type, on any device; to compare with.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def fits(layer: nn.Module, _: str) -> bool:
        return isinstance(layer, nn.Linear) and layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0

    convert_to_float8_training(
        module, config=Float8LinearConfig(pad_inner_dim=True, emulate=emulate), module_filter_fn=fits
    )
