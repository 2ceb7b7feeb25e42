"""Run the Triton code in its interpreter, in a process of its own since the mode is fixed at import.

TRITON_INTERPRET=1 python interpreted.py rounding IN.safetensors OUT.safetensors
TRITON_INTERPRET=1 ELMO_KERNELS=triton python interpreted.py ops IN.safetensors OUT.safetensors
TRITON_INTERPRET=1 ELMO_KERNELS=triton python interpreted.py pairs IN.safetensors OUT.safetensors
"""

import sys
from typing import Any

import elmo_kernels
import torch
import triton
import triton.language as tl
from backend_cases import CASES, LARGE_CASES, run_case, run_pairs
from elmo_kernels import rounding_triton as rt
from safetensors.torch import load_file, save_file

TILE = 1 << 16
SHIFT_SCALE, UNSHIFT_SCALE = tl.constexpr(2.0**-120), tl.constexpr(2.0**120)


@triton.jit
def _in_range(v):  # type: ignore[no-untyped-def]
    """What a kernel rounds at exponent 0: no NaN, and nothing that saturates."""
    return tl.minimum(tl.maximum(tl.where(v == v, v, 0.0), -448.0), 448.0)


@triton.jit
def _round(v_ptr, random_ptr, out_ptr, n, RULE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    v = tl.load(v_ptr + place, mask=place < n, other=0.0)
    random = tl.load(random_ptr + place, mask=place < n, other=0).to(tl.uint32)
    if RULE == "bf16_stochastic":
        code = rt.bf16_stochastic(rt.mend_bf16(v), random)
    elif RULE == "bf16_nearest":
        code = rt.bf16_nearest(rt.mend_bf16(v))
    elif RULE == "fp8_stochastic":
        code = rt.fp8_code(rt.fp8_stochastic(_in_range(v) * SHIFT_SCALE, random), False).to(tl.uint32)
    elif RULE == "fp8_nearest":
        code = rt.fp8_code(rt.fp8_nearest(_in_range(v)), False).to(tl.uint32)
    elif RULE == "fp8_value":
        code = rt.fp32_bits(rt.fp8_placed(random & 0xFF) * UNSHIFT_SCALE)
    else:
        code = rt.weight_bits(rt.row_key(random.to(tl.int64), place.to(tl.int64)), rt.feature_key(place))
    tl.store(out_ptr + place, code.to(tl.int64), mask=place < n)


def rounding(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The codes of every rule for the given values and random words."""
    v, random = inputs["v"], inputs["random"]
    rules = ("bf16_stochastic", "bf16_nearest", "fp8_stochastic", "fp8_nearest", "fp8_value", "bits")
    out = {rule: torch.empty_like(random) for rule in rules}
    for rule, code in out.items():
        _round[(triton.cdiv(len(v), TILE),)](v, random, code, len(v), RULE=rule, TILE=TILE)
    return out


def ops(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Everything that the operations of each case leave behind; the large ones where ``large`` is not 0."""
    assert elmo_kernels.backend_name("cpu") == "triton"
    results: dict[str, Any] = {}
    for case in LARGE_CASES if inputs["large"] else CASES:
        results.update({f"{case.name}.{name}": tensor for name, tensor in run_case(case).items()})
    return results


def pairs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What ``run_pairs`` leaves behind."""
    assert elmo_kernels.backend_name("cpu") == "triton"
    return run_pairs(int(inputs["labels"]))


if __name__ == "__main__":
    mode, source, target = sys.argv[1:]
    save_file({"rounding": rounding, "ops": ops, "pairs": pairs}[mode](load_file(source)), target)
