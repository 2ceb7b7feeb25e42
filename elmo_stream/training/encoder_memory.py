"""How many bytes the encoder takes in training: by running a step of it on tensors that have no memory.

Fake tensors have shapes and devices but no data, so a forward and backward pass of any model tells every allocation it
would make, in a second or two and without the memory that it asks about.
"""

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elmo_stream.config import Config
from elmo_stream.model.encoder import Encoder
from elmo_stream.training.embedding_cache import CACHED_AT_ONCE

HEAP_BYTES = 32 << 20
"""The C library takes larger tensors from the system one by one, and gives them back; smaller ones share a heap."""
HEAP_GAPS = 0.6
"""What a heap holds beyond the tensors in it, whose sizes change from batch to batch (measured with glibc)."""
# A weight's bytes in each tensor of state: both moments, and where they are 8-bit codes the scales of blocks of 256.
_STATE_BYTES = {"fp32": (4.0, 4.0), "bf16": (2.0, 2.0), "8bit": (1.0, 4 / 256, 1.0, 4 / 256)}


@dataclass(frozen=True)
class EncoderMemory:
    """Bytes of the encoder's weights, gradients, optimizer state, and of what a step takes beside them at its peak.

    ``optimizer_held`` is what the optimizer's state takes where it lives: torch's page-locked memory, for a state that
    is offloaded from a GPU, comes in powers of two. ``activations`` is the peak of everything that the forward and
    backward pass allocate and free again: stored activations, temporary tensors, and a gradient that is summed up
    beside its sum. ``gaps`` is what a CPU's heap takes beyond that.
    """

    weights: int
    gradients: int
    optimizer: int
    optimizer_held: int
    activations: int
    gaps: int


def encoder_memory(encoder: Encoder, config: Config, *, length: int, device: torch.device) -> EncoderMemory:
    """The memory of training an encoder, whose weights may be on the meta device, with texts of ``length`` tokens.

    The batch is ``train.batch``, or ``train.micro_batch`` where set; the body of a frozen encoder embeds the batches of
    the cache alone. FP8 products are counted as BF16 ones.
    """
    trained = [p for p in encoder.parameters() if p.requires_grad]
    weights = sum(map(_bytes, (*encoder.parameters(), *encoder.buffers())))
    instances = min(config.train.micro_batch or config.train.batch, config.train.batch)
    states = [size for parameter in trained for size in _state_sizes(parameter, config)]
    locked = config.optimizer.offload and device.type == "cuda"
    again = 0 < config.train.micro_batch < config.train.batch
    peak, small = _peak_of_step(encoder, instances, length, device, accumulate=again, frozen=config.encoder.frozen)
    return EncoderMemory(
        weights=weights,
        gradients=sum(map(_bytes, trained)),
        optimizer=sum(states),
        optimizer_held=sum(1 << (size - 1).bit_length() for size in states) if locked else sum(states),
        activations=peak,
        gaps=int(HEAP_GAPS * small) if device.type == "cpu" else 0,
    )


def evaluation_bytes(encoder: Encoder, *, instances: int, length: int, device: torch.device) -> int:
    """Peak of what a forward pass without gradients allocates."""
    return _peak_of_step(encoder, instances, length, device, accumulate=False, training=False)[0]


def _state_sizes(parameter: Tensor, config: Config) -> list[int]:
    """Bytes of each tensor of a parameter's optimizer state."""
    compensated = config.encoder.format != "fp32" and config.encoder.rounding == "kahan"
    each = (*_STATE_BYTES[config.optimizer.states], *((2.0,) if compensated else ()))
    return [math.ceil(parameter.numel() * size) for size in each]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _peak_of_step(
    encoder: Encoder,
    instances: int,
    length: int,
    device: torch.device,
    *,
    accumulate: bool,
    frozen: bool = False,
    training: bool = True,
) -> tuple[int, int]:
    """Peak of a forward and backward pass beyond weights and gradients, and that of tensors below HEAP_BYTES alone.

    ``accumulate``: gradients are there already. ``frozen``: the body fills the cache before, and only what is behind it
    is trained. Without ``training`` it is the forward pass of an evaluation.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _without_data(encoder, device).train(training)
        trained = [p for p in model.parameters() if p.requires_grad]
        texts = min(instances, CACHED_AT_ONCE) if frozen else instances
        token_ids_BT = torch.zeros(texts, length, dtype=torch.int64, device=device)
        mask_BT = torch.ones(texts, length, dtype=torch.bool, device=device)
        if accumulate:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in trained if p.grad is not None)]
        with _Allocations([*known, token_ids_BT, mask_BT]) as allocations, torch.set_grad_enabled(training):
            if frozen:
                model.embed(token_ids_BT, mask_BT)
                x_BD = model.head(torch.empty(instances, model.dim, device=device))
            else:
                x_BD = model(token_ids_BT, mask_BT)
            if trained and training:
                x_BD.backward(torch.empty_like(x_BD))
        gradients = [_bytes(p) for p in trained if training and not accumulate]
        small = sum(size for size in gradients if size < HEAP_BYTES)
        return max(0, allocations.peak - sum(gradients)), max(0, allocations.small_peak - small)


def _without_data(encoder: Encoder, device: torch.device) -> Encoder:
    """A copy whose tensors are fake ones of the device; called under a fake mode."""
    memo: dict[int, Any] = {}
    for parameter in encoder.parameters():
        fake = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device))
        memo[id(parameter)] = fake.requires_grad_(parameter.requires_grad)
    for buffer in encoder.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(encoder, memo)


class _Allocations(TorchDispatchMode):
    """Adds up the storages that operations return, until they are freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.small = self.small_peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self._sizes:
                    self._sizes[key] = storage.nbytes()
                    self._count(storage.nbytes())
                    weakref.finalize(storage, self._free, key)
        return result

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)
        if abs(size) < HEAP_BYTES:
            self.small += size
            self.small_peak = max(self.small_peak, self.small)

    def _free(self, key: int) -> None:
        self._count(-self._sizes.pop(key))
