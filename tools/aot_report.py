"""Compile every Triton kernel in every format for NVIDIA GPUs, without a GPU, and print what each one needs.

    python tools/aot_report.py --arch sm_80 sm_90

Columns: registers and bytes of local memory a thread (spilled registers), shared memory a block and the share of
what the architecture has, and of the hot loop, the first with matrix products: their instruction, and integer, FP32
and all instructions a weight (those of a thread over the weights that it handles; a loop inside counts once).

Exit code 1 when a kernel does not compile, spills, needs more shared memory than the architecture has, flushes
subnormals, or fuses a multiplication with an addition outside of FP32 matrix products.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from elmo_kernels import triton_config as config
from elmo_kernels import triton_logits, triton_update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB a block may use, CUDA C++ Programming Guide, table of technical specifications by compute capability."""
DIM, TOPK_STAGES, BLOCKS = 768, config.MIN_STAGES_K, 44
DATA_TYPES = {"fp32": "*fp32", "bf16": "*i16", "fp8": "*u8"}
ARGUMENT_TYPES = {
    **dict.fromkeys(("loss_ptr", "target_ptr", "partial_ptr", "dx_ptr", "scores_ptr"), "*fp32"),
    **dict.fromkeys(("label_ptr", "instance_ptr", "flags_ptr", "scalars_ptr", "ids_ptr", "key_ptr"), "*i64"),
    **dict.fromkeys(("count_ptr", "feature_ptr"), "*i32"),
    "skipped_ptr": "*i8",
    **dict.fromkeys(("L", "B", "H", "K", "P", "LABELS", "size"), "i32"),
    "label_offset": "i64",
    "prior": "fp32",
    "comp_ptr": "*i16",
    **dict.fromkeys(("exponent_ptr", "instance_exponent_ptr"), "*i8"),
    "code_ptr": "*u8",
    "value_ptr": "*bf16",
}
FP8_LOGITS, FP8_ARCH = "fp8 logits", 89
MULTIPLES_OF_16 = ("L", "B", "LABELS", "size", "label_offset")
FLOATING = re.compile(r"F(ADD|MUL|FMA|MNMX|SEL|SETP|CHK)|MUFU|F2F|I2F|F2I")
INTEGER = re.compile(r"LOP|SHF|PRMT|I?MAD|IADD|VIADD|LEA|VIMNMX|IMNMX|ISETP|SEL|MOV|SGXT|F2FP|POPC|IABS|LOP3|I2I")


@dataclass(frozen=True)
class Variant:
    """A kernel with what is known when it is compiled."""

    kernel: str
    fmt: str
    name: str
    constants: dict[str, Any]

    def compile(self, arch: int) -> Any:
        """The kernel compiled for compute capability ``arch`` (80, 90, ...)."""
        kernel = getattr(triton_update, self.kernel, None) or getattr(triton_logits, self.kernel)
        operand = "*fp32" if self.fmt == "fp32" else "*bf16"
        types = {**ARGUMENT_TYPES, "data_ptr": DATA_TYPES[self.fmt], "x_ptr": operand, "g_ptr": operand}
        if FP8_LOGITS in self.name:
            types["x_ptr"] = "*u8"
        options = {name: value for name, value in self.constants.items() if name not in kernel.arg_names}
        constants = {name: self.constants.get(name) for name in kernel.arg_names if name not in types}
        constants |= {name: None for name in self._absent() if name in kernel.arg_names}
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        aligned = [
            place
            for place, name in enumerate(kernel.arg_names)
            if name not in constants and (name in MULTIPLES_OF_16 or name.endswith("_ptr"))
        ]
        attributes = {(place,): [["tt.divisibility", 16]] for place in aligned}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    def _absent(self) -> list[str]:
        absent = [] if self.fmt == "fp8" else ["exponent_ptr"]
        absent += [] if FP8_LOGITS in self.name else ["instance_exponent_ptr"]
        absent += [] if "kahan" in self.name else ["comp_ptr"]
        absent += [] if self.constants.get("WANT_LOSS") else ["loss_ptr"]
        if self.kernel == "update_kernel" and not self.constants["FUSED"]:
            absent += ["partial_ptr"]
        return absent

    @property
    def weights(self) -> float:
        """Weights that a thread handles in a turn of its hot loop."""
        return self.constants.get("TILE_L", 0) * self.constants.get("TILE_D", 0) / 32 / self.constants["num_warps"]


def variants(arch: int, batches: list[int]) -> Iterator[Variant]:
    """Every kernel with its formats and options, for a compute capability."""
    flat = config.flat_options()
    yield Variant("add_partials_kernel", "fp32", "", {"N": BLOCKS, "TILE": config.TILE_FLAT, **flat})
    yield Variant("merge_kernel", "fp32", "", {"TILE_K": 1 << TOPK_STAGES, "STAGES": TOPK_STAGES, **flat})
    for fmt in DATA_TYPES:
        common = {"D": DIM, "FMT": fmt, "DOT_FP32": fmt == "fp32", "EVEN": True}
        tiles = config.logit_tiles(fmt, batches[0], arch)
        bce, hinge = ({"LOSS": loss, "WANT_LOSS": loss != "bce", **common} for loss in ("bce", "squared_hinge"))
        yield Variant("slope_kernel", fmt, "bce", {**bce, **tiles})
        yield Variant("slope_kernel", fmt, "hinge, masked", {**hinge, **tiles, "EVEN": False})
        if fmt == "fp8" and arch >= FP8_ARCH:
            yield Variant("fp8_operand_kernel", fmt, "", {"D": DIM, "TILE": 1 << (DIM - 1).bit_length(), **flat})
            yield Variant("slope_kernel", fmt, f"bce, {FP8_LOGITS}", {**bce, **tiles})
            yield Variant("slope_kernel", fmt, f"{FP8_LOGITS}, masked", {**hinge, **tiles, "EVEN": False})
        yield Variant("candidate_kernel", fmt, "", {**common, **tiles})
        positive = {"TILE_P": config.TILE_P, "TILE_D": tiles["TILE_D"], **flat}
        yield Variant("positive_kernel", fmt, "bce", {**bce, **positive})
        for batch in batches if fmt != "fp32" else batches[:1]:
            fused, size = config.is_fused(fmt, batch, arch), f"batch {batch}"

            def update(name: str, *, plain: bool = False, **changes: Any) -> Variant:
                tiles = config.update_tiles(fmt, batch, arch, plain=plain)  # noqa: B023
                rest = {"STOCHASTIC": True, "FUSED": fused, "TILES_B": -(-batch // tiles["TILE_B"])}  # noqa: B023
                return Variant("update_kernel", fmt, name, {**common, **tiles, **rest, **changes})  # noqa: B023

            yield update(size, plain=True)
            if batch == batches[0]:
                yield update(f"{size}, masked", EVEN=False)
                if fmt != "fp32":
                    yield update(f"{size}, kahan")
                mend = config.mend_tiles(fmt, batch, arch)
                sizes = {"TILES_B": -(-batch // mend["TILE_B"]), "STOCHASTIC": True}
                name = size if fmt == "fp32" else f"{size}, kahan"
                yield Variant("mend_kernel", fmt, name, {**common, **mend, **sizes})
            if not fused or batch == batches[0]:
                yield Variant("input_grad_kernel", fmt, size, {**common, **config.input_grad_tiles(fmt, batch, arch)})


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([path, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def hot_loop(sass: str) -> Counter[str]:
    """How often each instruction stands in the first loop with matrix products, loops inside it included."""
    lines = sass.splitlines()
    label = {line.strip(" :"): place for place, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line.strip())}
    found = []
    for place, line in enumerate(lines):
        branch = re.search(r"BRA\b[^`]*`\((\.L_x_\d+)\)", line)
        start = label.get(branch[1], place) if branch else place
        if start < place:
            loop = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", "\n".join(lines[start : place + 1])))
            # A jump back over the end of the kernel is the return from code that was moved out of the way.
            if _product(loop) and not loop["EXIT"]:
                found.append((start, -place, loop))
    return min(found, key=lambda entry: entry[:2])[2] if found else Counter()


def _product(loop: Counter[str]) -> str:
    """The instruction of the matrix products: of tensor cores, where there are any."""
    fp32 = next((name for name in ("FFMA2", "FFMA") if loop[name]), "")
    return max((name for name in loop if "MMA" in name), key=loop.__getitem__, default=fp32)


def measure(variant: Variant, arch: int) -> tuple[str, bool]:
    """A line of the table, and whether the kernel is as it must be."""
    name = f"{variant.kernel.removesuffix('_kernel'):12} {variant.name:18} {variant.fmt:5} sm_{arch:<3}"
    try:
        compiled = variant.compile(arch)
    except Exception as error:  # the report goes on to the other kernels, and ends with exit code 1
        return f"{name} FAILED: {type(error).__name__}: {str(error).splitlines()[0]}", False
    usage = _tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage")
    registers, local = (int(number) for number in re.findall(r"(?:REG|STACK):(\d+)", usage))
    shared, limit = compiled.metadata.shared, SHARED_LIMIT[arch] << 10
    line = f"{name} {registers:>9} {local:>7} {shared:>8} {shared / limit:>5.0%}"
    sass = _tool("nvdisasm", compiled.asm["cubin"], "--print-code")
    loop = hot_loop(sass)
    if variant.weights and loop:
        kinds = [sum(n for name, n in loop.items() if kind.match(name)) for kind in (INTEGER, FLOATING)]
        per_weight = (number / variant.weights for number in (*kinds, sum(loop.values())))
        line += f"  {_product(loop):9}" + "".join(f"{number:>6.1f}" for number in per_weight)
    faults = {
        "spills": local > 0,
        "shared memory": shared > limit,
        "flushes subnormals": ".ftz" in compiled.asm["ptx"] or ".FTZ" in sass,
        "fused multiply-add": variant.fmt != "fp32" and re.search(r"\bFFMA", sass),
    }
    return " ".join([line, *(f"BAD: {fault}" for fault, found in faults.items() if found)]), not any(faults.values())


def main() -> int:
    """Print the table; 1 when a kernel does not fit."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--arch", nargs="+", default=[f"sm_{arch}" for arch in SHARED_LIMIT], metavar="sm_NN")
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 512], help="instances (default: 128 512)")
    parser.add_argument("--brief", action="store_true", help="one variant of a kernel in a format")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    arguments = parser.parse_args()
    archs = [int(name.removeprefix("sm_")) for name in arguments.arch]
    work = [(variant, arch) for arch in archs for variant in variants(arch, arguments.batch)]
    if arguments.brief:
        work = list({(variant.kernel, variant.fmt, arch): (variant, arch) for variant, arch in reversed(work)}.values())
    print(f"Triton {triton.__version__}, {DIM} features")
    print(f"{'kernel':12} {'':18} {'':5} {'':6} registers local B shared B   of   product  int  FP32   all")
    bad = 0
    with ExitStack() as stack:
        spread: Any = map
        if arguments.jobs > 1:
            spread = stack.enter_context(ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"))).map
        for line, fits in spread(measure, *zip(*work, strict=True)):
            print(line, flush=True)
            bad += not fits
    if bad:
        print(f"{bad} of {len(work)} kernels are not as they must be", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
