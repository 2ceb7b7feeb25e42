"""Compile every Triton kernel in every format for NVIDIA GPUs, without a GPU, and print what each one needs.

    python tools/aot_report.py --arch sm_80 sm_90

Columns: registers a thread, bytes a thread in local memory (spilled registers), bytes of shared memory a
block. Exit code 1 when a kernel does not compile.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from elmo_kernels import triton_kernels as tk
from elmo_kernels.triton_ops import OPTIONS, TILE_FLAT, TILE_P, TILES
from elmo_kernels.types import BLOCK_LABELS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DEFAULT_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
DIM = 768
BATCH_TILES = 2
DATA_TYPES = {"fp32": "*fp32", "bf16": "*i16", "fp8": "*u8"}
FLOAT_POINTERS = ("x_ptr", "out_ptr", "g_ptr", "loss_ptr", "target_ptr", "partial_ptr", "dx_ptr")
ARGUMENT_TYPES = {
    **dict.fromkeys(FLOAT_POINTERS, "*fp32"),
    **dict.fromkeys(("label_ptr", "instance_ptr", "flags_ptr"), "*i64"),
    **dict.fromkeys(("L", "B", "H", "P", "size", "first_block"), "i32"),
    **dict.fromkeys(("stream", "label_offset"), "i64"),
    **dict.fromkeys(("lr", "decay", "prior"), "fp32"),
    "comp_ptr": "*i16",
    "top_ptr": "*i32",
}
ROW_TILES = {"TILE_L": TILES["TILE_L"], "TILE_D": TILES["TILE_D"]}


def variants() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """Every kernel with its format and its compile-time arguments."""
    yield tk.add_partials_kernel, "fp32", {"N": 64, "TILE": TILE_FLAT}
    yield tk.raise_exponent_kernel, "fp8", {"D": DIM, **ROW_TILES}
    for fmt in DATA_TYPES:
        common = {"D": DIM, "FMT": fmt, "DOT_FP32": fmt == "fp32"}
        for loss in ("bce", "squared_hinge"):
            yield tk.logit_kernel, fmt, {**common, "LOSS": loss, "WANT_LOSS": True, **TILES}
        yield tk.logit_kernel, fmt, {**common, "LOSS": "none", "WANT_LOSS": False, **TILES}
        positive = {"LOSS": "bce", "WANT_LOSS": True, "TILE_P": TILE_P, "TILE_D": TILES["TILE_D"]}
        yield tk.positive_kernel, fmt, {**common, **positive}
        yield tk.input_grad_kernel, fmt, {**common, "BLOCK": BLOCK_LABELS, **TILES}
        yield tk.update_kernel, fmt, {**common, "STOCHASTIC": True, "TILES_B": BATCH_TILES, **TILES}


def compile_for(kernel: Any, fmt: str, constants: dict[str, Any], arch: int) -> Any:
    """The compiled kernel for compute capability ``arch`` (80, 90, ...)."""
    types = {**ARGUMENT_TYPES, "data_ptr": DATA_TYPES[fmt], "exponent_ptr": "*i8"}
    absent = {"fp32": ("exponent_ptr", "comp_ptr", "top_ptr"), "bf16": ("exponent_ptr", "top_ptr"), "fp8": ()}
    constants = {**constants, **{name: None for name in absent[fmt] if name in kernel.arg_names}}
    if not constants.get("WANT_LOSS", True):
        constants["loss_ptr"] = None
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(OPTIONS))


def resources(cubin: bytes) -> tuple[str, str]:
    """Registers and local bytes a thread, read from the binary by Triton's own ``cuobjdump``."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (found[1], found[2]) if found else ("?", "?")


def main() -> int:
    """Print the table; 1 when a kernel does not compile."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--arch", nargs="+", default=DEFAULT_ARCHS, metavar="sm_NN")
    archs = [int(name.removeprefix("sm_")) for name in parser.parse_args().arch]
    failures = 0
    print(f"{'kernel':24} {'loss':14} format  arch    registers  local B  shared B")
    for kernel, fmt, constants in variants():
        for arch in archs:
            name = f"{kernel.__name__:24} {constants.get('LOSS', ''):14} {fmt:7} sm_{arch:<4}"
            try:
                compiled = compile_for(kernel, fmt, constants, arch)
            except Exception as error:  # the report goes on to the other kernels, and ends with exit code 1
                failures += 1
                print(f"{name} FAILED: {type(error).__name__}: {error}")
                continue
            registers, local = resources(compiled.asm["cubin"])
            print(f"{name} {registers:>9} {local:>8} {compiled.metadata.shared:>9}")
    if failures:
        print(f"{failures} kernels did not compile", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
