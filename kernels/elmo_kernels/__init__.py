"""Chunked classifier operations in fp32, bf16 and fp8: one torch twin that is the specification, Numba for
CPUs, Triton for GPUs.

Shape legend: B instances in the batch, L labels in the chunk, D features, P positives, K top-k.
Importing this package loads torch only; a backend's compiler is imported with its first operation. Operations run on
the device of their tensors, whichever is current: Triton would launch on the current one.
"""

import torch
from torch import Tensor

from elmo_kernels.backends import backend, backend_name
from elmo_kernels.chunk_size import preferred_chunk_labels
from elmo_kernels.chunks import dequantize, empty_chunk, make_chunk
from elmo_kernels.losses import LOSSES
from elmo_kernels.rounding import random_bits, stream_key
from elmo_kernels.types import (
    BLOCK_LABELS,
    FORMATS,
    GROUP_FEATURES,
    ROUNDINGS,
    ChunkWeights,
    Fp8Operand,
    Positives,
    num_groups,
    require_choice,
    require_chunk,
    require_tensor,
    values,
)

__all__ = [
    "BLOCK_LABELS",
    "FORMATS",
    "GROUP_FEATURES",
    "LOSSES",
    "ROUNDINGS",
    "ChunkWeights",
    "Fp8Operand",
    "Positives",
    "backend_name",
    "dequantize",
    "empty_chunk",
    "fp8_operand",
    "logit_grad",
    "make_chunk",
    "num_groups",
    "operand",
    "preferred_chunk_labels",
    "random_bits",
    "step_bytes",
    "step_scalars",
    "topk_bytes",
    "topk_merge_",
    "update_",
    "update_with_",
]


def _operand_type(fmt: str, device: torch.device) -> torch.dtype:
    return torch.float32 if fmt == "fp32" or device.type == "cpu" else torch.bfloat16


def operand(x_BD: Tensor, fmt: str) -> Tensor:
    """Float32 embeddings in the type that products with weights of a format take on their device, contiguous.

    It is bfloat16 on a GPU, where accumulation is FP32, for bf16 and fp8; float32 otherwise.
    """
    return x_BD.to(_operand_type(fmt, x_BD.device)).contiguous()


def fp8_operand(x_BD: Tensor) -> Fp8Operand:
    """Embeddings, from ``operand``, rounded to E4M3 for products with fp8 weights; once a step, for all chunks.

    An instance has one power-of-two exponent, which its largest magnitude decides as in a group of weights: nearest,
    ties to even, and nothing below 28,672 saturates. NaN stays NaN.
    """
    require_tensor("x_BD", x_BD, _operand_type("fp8", x_BD.device), tuple(x_BD.shape))
    with torch.cuda.device_of(x_BD):
        return backend(x_BD.device).fp8_operand(x_BD)


def logit_grad(
    w: ChunkWeights,
    x: Tensor | Fp8Operand,
    positives: Positives,
    *,
    loss: str,
    prior: float = 0.0,
    want_loss: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the summed loss with respect to the logits ``W x + prior`` of a chunk.

    Logits are accumulated in FP32 and never rounded before the loss (ELMO, Zhang et al., ICML 2025, rounds
    them to bf16).

    Args:
        x: embeddings (B, D), from ``operand``; or from ``fp8_operand``, for fp8 weights alone: then logits are those of
            the rounded embeddings, from FP8 tensor cores on a GPU, ``sum over groups of features of 2**(exponents of
            weights and instance) * (product of the codes)`` in FP32.
        positives: of the whole batch; those of other chunks touch nothing.
        loss: a key of ``LOSSES``. prior: added to every logit; see ``Loss.prior``.
        want_loss: also return the loss, which costs a pass over the logits.

    Returns:
        g_LB in the type of ``operand``, and the summed loss of the chunk as a float64 scalar tensor, or None.

    Raises:
        ValueError: for an unknown loss or tensors that do not fit.
    """
    require_chunk(w)
    require_choice("loss", loss, tuple(LOSSES))
    x_BD = values(x)
    require_tensor("x_BD", x_BD, _operand_type(w.fmt, w.data_LD.device), (x_BD.shape[0], w.data_LD.shape[1]))
    if isinstance(x, Fp8Operand) and w.fmt != "fp8":
        raise ValueError(f"embeddings in FP8 and weights in {w.fmt}; give embeddings from operand().")
    with torch.cuda.device_of(x_BD):
        return backend(w.data_LD.device).logit_grad(w, x, positives, loss=loss, prior=prior, want_loss=want_loss)


def step_scalars(
    device: torch.device | str, *, lr: float, weight_decay: float, seed: int, step: int, out: Tensor | None = None
) -> Tensor:
    """The numbers of a training step in a tensor on the device, made once for all chunks, without waiting for it.

    A captured CUDA graph reads the tensor again in each replay; ``out`` is the tensor to write over.

    Returns:
        int64 (3,): the random stream of (seed, step); the FP32 patterns of ``lr`` and ``1 - lr * weight_decay``.
    """
    scalars = torch.empty(3, dtype=torch.int64, device=device) if out is None else out
    lr_bits, keep_bits = torch.tensor([lr, 1 - lr * weight_decay]).view(torch.int32).tolist()
    for place, number in enumerate((stream_key(seed, step), lr_bits, keep_bits)):
        scalars[place].fill_(number)
    return scalars


def update_(
    w: ChunkWeights,
    g_LB: Tensor,
    x_BD: Tensor,
    dx_BD: Tensor,
    *,
    lr: float,
    weight_decay: float,
    rounding: str = "stochastic",
    seed: int,
    step: int,
    flags: Tensor,
) -> None:
    """``update_with_`` for one chunk alone: seed, step, label and feature decide the random bits."""
    scalars = step_scalars(w.data_LD.device, lr=lr, weight_decay=weight_decay, seed=seed, step=step)
    update_with_(w, g_LB, x_BD, dx_BD, scalars=scalars, rounding=rounding, flags=flags)


def update_with_(
    w: ChunkWeights, g_LB: Tensor, x_BD: Tensor, dx_BD: Tensor, *, scalars: Tensor, rounding: str, flags: Tensor
) -> None:
    """One step of gradient descent on a chunk in place, and its part of the gradient of the embeddings.

    ``dx_BD += g^T W`` with the weights from before the step; then
    ``W <- round((1 - lr * decay) * W - lr * g x)``. Rows with compensation (``comp_HD``) round to nearest and
    carry the rest to the next step; the others round as ``rounding`` says. An fp8 group takes the exponent of
    its largest new weight; where that weight is not finite, it stays what it was. With a learning rate of 0 the chunk
    and ``flags`` stay as they are, bit for bit, whatever the gradients are.

    Args:
        g_LB: contiguous, from ``logit_grad``. x_BD: from ``operand``. dx_BD: contiguous float32, added to.
        scalars: from ``step_scalars``. rounding: "stochastic" or "nearest".
        flags: int64 (2,): [0] grows by the number of saturated, [1] by the number of non-finite new weights.

    Raises:
        ValueError: for an unknown rounding or tensors that do not fit.
    """
    require_chunk(w)
    require_choice("rounding", rounding, ROUNDINGS)
    (labels, dim), batch = w.data_LD.shape, x_BD.shape[0]
    kind = _operand_type(w.fmt, w.data_LD.device)
    require_tensor("g_LB", g_LB, kind, (labels, batch))
    require_tensor("x_BD", x_BD, kind, (batch, dim))
    require_tensor("dx_BD", dx_BD, torch.float32, (batch, dim))
    require_tensor("scalars", scalars, torch.int64, (3,))
    require_tensor("flags", flags, torch.int64, (2,))
    with torch.cuda.device_of(x_BD):
        backend(w.data_LD.device).update_(w, g_LB, x_BD, dx_BD, scalars=scalars, rounding=rounding, flags=flags)


def topk_merge_(scores_BK: Tensor, ids_BK: Tensor, w: ChunkWeights, x_BD: Tensor) -> None:
    """Merge the logits of a chunk into a running top-k, best first, ties to the lower label id.

    Args:
        scores_BK: float32, -inf at first. ids_BK: int64 label ids, -1 at first and where fewer than K labels
            exist.
        x_BD: embeddings, from ``operand``.

    Raises:
        ValueError: for tensors that do not fit.
    """
    require_chunk(w)
    require_tensor("x_BD", x_BD, _operand_type(w.fmt, w.data_LD.device), (x_BD.shape[0], w.data_LD.shape[1]))
    require_tensor("scores_BK", scores_BK, torch.float32, (x_BD.shape[0], scores_BK.shape[1]))
    require_tensor("ids_BK", ids_BK, torch.int64, tuple(scores_BK.shape))
    with torch.cuda.device_of(x_BD):
        backend(w.data_LD.device).topk_merge_(scores_BK, ids_BK, w, x_BD)


def step_bytes(fmt: str, labels: int, dim: int, batch: int, device: torch.device) -> tuple[int, int]:
    """Bytes that a step takes for a chunk of a format on a device: the gradients of the logits, and all else."""
    gradients = labels * batch * _operand_type(fmt, device).itemsize
    return gradients, backend(device).update_bytes(fmt, labels, dim, batch, device)


def topk_bytes(labels: int, dim: int, batch: int, device: torch.device) -> int:
    """Bytes that ``topk_merge_`` takes for a chunk on a device."""
    return backend(device).topk_bytes(labels, dim, batch)
