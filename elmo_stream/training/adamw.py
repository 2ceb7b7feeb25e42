"""AdamW for weights and states of few bytes: everything is computed in FP32 and stored rounded.

BF16 weights are rounded stochastically, or keep what rounding took off in a Kahan compensation. States are FP32, BF16,
or 8 bits in blocks of 256 values that share the largest one (Dettmers et al., "8-bit Optimizers via Block-wise
Quantization", ICLR 2022). All rounding but that of FP32 is stochastic, so that a change far below a code's distance
is not lost: at a decay of 0.99 a second moment in 8 bits would else never fall.

Random bits come from torch's generators, which ``EncoderStep`` seeds from (run seed, step). Parameters are worked on in
slices, so that temporary memory does not depend on their size; offloaded states lie in pinned host memory and visit the
GPU slice by slice, with the same results.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

BLOCK = 256
_SLICE = 1 << 20
# An 8-bit code is the exponent and the first three bits of the mantissa of the FP32 pattern, relative to a block's
# largest value, which is 1.0 and has the last code.
_CUT_BITS = 20
_TOP = 0x3F800000 >> _CUT_BITS


class CompactAdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019) with compact weights and states.

    Args:
        groups: parameter groups; weights are float32 or bfloat16.
        states: "fp32", "bf16" or "8bit".
        kahan: bfloat16 weights carry a compensation; else they are rounded stochastically.
        offload: states stay in host memory.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        states: str,
        kahan: bool,
        offload: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "step": 0})
        self._states, self._kahan, self._offload = states, kahan, offload

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; the state of a parameter begins with its first gradient.

        As with torch's fused optimizers, an attribute ``found_inf`` (0-dim float32 on the device) of 1 leaves weights,
        states and counters as they are, without a look from the host.
        """
        skip: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            group["step"] = group["step"] + (1 if skip is None else 1 - skip.double())
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(self._first_state(parameter))
                    _update_(parameter, state, group, skip)

    def place(self, state: Tensor, parameter: Tensor) -> Tensor:
        """A state tensor where the states of a parameter live."""
        if not self._offload:
            return state.to(parameter.device)
        return state.cpu().pin_memory() if parameter.is_cuda else state.cpu()

    def _first_state(self, parameter: Tensor) -> dict[str, Tensor]:
        size = parameter.numel()
        state = {}
        for name in ("mean", "square"):
            if self._states == "8bit":
                state[name] = torch.zeros(size, dtype=torch.uint8)
                state[f"{name}_scale"] = torch.zeros(-(-size // BLOCK))
            else:
                state[name] = torch.zeros(size, dtype=torch.float32 if self._states == "fp32" else torch.bfloat16)
        if self._kahan and parameter.dtype == torch.bfloat16:
            state["compensation"] = torch.zeros(size, dtype=torch.bfloat16)
        return {name: self.place(value, parameter) for name, value in state.items()}


def _update_(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
    (beta1, beta2), steps = group["betas"], int(group["step"]) if skip is None else group["step"]
    weight_N, gradient_N = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
    for first in range(0, len(weight_N), _SLICE):
        part = slice(first, first + _SLICE)
        g = gradient_N[part].float()
        mean = _read(state, "mean", part, g.device, signed=True).lerp_(g, 1 - beta1)
        square = _read(state, "square", part, g.device, signed=False).lerp_(g * g, 1 - beta2)
        _write_(state, "mean", part, mean, skip, signed=True)
        _write_(state, "square", part, square, skip, signed=False)
        change = mean.div_(1 - beta1**steps) / square.div_(1 - beta2**steps).sqrt_().add_(group["eps"])
        w = weight_N[part].float()
        if "compensation" in state:
            w += state["compensation"][part].to(w.device, non_blocking=True).float()
        w = w - group["lr"] * (change + group["weight_decay"] * w)  # not in place: of FP32 weights it is a view
        if "compensation" in state:
            rounded = w.bfloat16()
            _move_(weight_N[part], rounded, skip)
            _move_(state["compensation"][part], (w - rounded.float()).bfloat16(), skip)
        else:
            _store_(weight_N[part], w, skip)


def _store_(target_N: Tensor, value_N: Tensor, skip: Tensor | None) -> None:
    """Round float32 values to the type of the target, stochastically to bfloat16."""
    if target_N.dtype == torch.bfloat16:
        bits = value_N.view(torch.int32) + torch.randint_like(value_N, 1 << 16, dtype=torch.int32)
        value_N = (bits & -(1 << 16)).view(torch.float32)
    _move_(target_N, value_N.to(target_N.dtype), skip)


def _move_(target_N: Tensor, value_N: Tensor, skip: Tensor | None) -> None:
    if skip is not None:
        value_N = torch.where(skip != 0, target_N.to(value_N.device, non_blocking=True), value_N)
    # Without waiting: what reads it next is in the same stream, or synchronises (``optimizer_tensors``).
    target_N.copy_(value_N, non_blocking=True)


def _read(state: dict[str, Tensor], name: str, part: slice, device: torch.device, *, signed: bool) -> Tensor:
    stored = state[name][part].to(device, non_blocking=True)
    if stored.dtype != torch.uint8:
        return stored.to(torch.float32, copy=True)
    scale = state[f"{name}_scale"][part.start // BLOCK : -(-part.stop // BLOCK)].to(device, non_blocking=True)
    return _decode(stored.int(), signed) * scale.repeat_interleave(BLOCK)[: len(stored)]


def _write_(
    state: dict[str, Tensor], name: str, part: slice, value_N: Tensor, skip: Tensor | None, *, signed: bool
) -> None:
    if state[name].dtype != torch.uint8:
        _store_(state[name][part], value_N, skip)
        return
    blocks = -(-len(value_N) // BLOCK)
    padded = torch.nn.functional.pad(value_N, (0, blocks * BLOCK - len(value_N))).view(blocks, BLOCK)
    scale = padded.abs().amax(1, keepdim=True)
    relative = padded / scale.clamp_min(torch.finfo(torch.float32).tiny)
    _move_(state[name][part], _encode(relative.view(-1)[: len(value_N)], signed), skip)
    _move_(state[f"{name}_scale"][part.start // BLOCK : part.start // BLOCK + blocks], scale.view(-1), skip)


def _encode(relative_N: Tensor, signed: bool) -> Tensor:
    """Codes (uint8) of values in [-1, 1], or [0, 1]: with a sign 128 magnitudes down to 2^-16, without 256 to 2^-32.

    Without a sign the least code is no zero, by which a step would be divided.
    """
    bits = relative_N.abs().view(torch.int32) + torch.randint_like(relative_N, 1 << _CUT_BITS, dtype=torch.int32)
    codes = 128 if signed else 256
    magnitude = ((bits >> _CUT_BITS) - (_TOP - codes + 1)).clamp_(0, codes - 1)
    if signed:
        magnitude = torch.where(relative_N < 0, magnitude + 128, magnitude)
    return magnitude.to(torch.uint8)


def _decode(code_N: Tensor, signed: bool) -> Tensor:
    magnitude = code_N & 127 if signed else code_N
    value = ((magnitude + (_TOP - (127 if signed else 255))) << _CUT_BITS).view(torch.float32)
    if not signed:
        return value
    return torch.where(magnitude == 0, 0.0, torch.where(code_N > 127, -value, value))
