"""The encoder's optimizer and the learning rate as a function of the step."""

import math

import torch
from torch import Tensor, nn

from elmo_stream.config import OptimizerConfig
from elmo_stream.training.adamw import CompactAdamW

BETAS = (0.9, 0.99)
EPS = 1e-6


def lr_factor(step: int, *, total: int, warmup: int, schedule: str) -> float:
    """Factor in 0..1 on the peak learning rate at ``step`` (0-based): linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 - done if schedule == "linear" else 1.0


def build_optimizer(
    encoder: nn.Module, config: OptimizerConfig, *, rounding: str = "kahan", skips: bool = False
) -> torch.optim.Optimizer | None:
    """AdamW over the trainable parameters, or None when all are frozen.

    Vectors (biases, norms, token weights) are not decayed. FP32 weights with FP32 states are torch's, BF16 weights with
    Kahan compensation and BF16 states torch-optimi's, which has kernels for them; all else is ``CompactAdamW``.

    Args:
        rounding: of BF16 weights: "kahan" keeps a compensation, without which updates below 2^-9 of a weight are lost
            by rounding to nearest (Zamirai et al., arXiv 2010.06192); "stochastic" needs none.
        skips: it has to leave out the steps that its attribute ``found_inf`` marks, which torch-optimi's cannot.
    """
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    if not parameters:
        return None
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    kind = (parameters[0].dtype, config.states, config.offload)
    if kind == (torch.float32, "fp32", False):
        return torch.optim.AdamW(groups, lr=config.encoder_lr, betas=BETAS, eps=EPS, fused=True)
    if kind == (torch.bfloat16, "bf16", False) and rounding == "kahan" and not skips:
        import optimi

        # Left to itself, it would choose its kernel in the first step only, and a resumed run has none.
        on_gpu = parameters[0].is_cuda
        return optimi.AdamW(groups, lr=config.encoder_lr, betas=BETAS, eps=EPS, kahan_sum=True, triton=on_gpu)
    return CompactAdamW(
        groups,
        lr=config.encoder_lr,
        betas=BETAS,
        eps=EPS,
        states=config.states,
        kahan=rounding == "kahan",
        offload=config.offload,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The optimizer's state as tensors named ``parameter.name``, and the step counters of its groups by number.

    torch keeps its counters with the parameters, the others with the groups.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # offloaded states are on their way to host memory
    tensors = {
        f"{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    counters = {str(i): int(group["step"]) for i, group in enumerate(optimizer.param_groups) if "step" in group}
    return tensors, counters


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], counters: dict[str, int]
) -> None:
    """Restore what ``optimizer_tensors`` gave, bit for bit: torch's own way would turn codes into floats."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    place = optimizer.place if isinstance(optimizer, CompactAdamW) else lambda state, at: state.to(at.device)
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        optimizer.state[parameter][name] = place(value, parameter)
    for number, steps in counters.items():
        optimizer.param_groups[int(number)].update(step=torch.tensor(steps, dtype=torch.int32), setup=True)
