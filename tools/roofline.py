"""What the machine can do: copies in its memory, products of matrices, transfers over PCIe.

    python -m tools.roofline --json roofline.json

Rates are medians over random data, since zeros run faster than real numbers. A copy counts the bytes read and
written. FP32 products have TF32 off, as the fp32 kernels do.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from tools.measuring import finish, median_ms, parser
from tools.tables import Row

COLUMNS = ("what", "rate", "unit")


@dataclass(frozen=True)
class Roofline:
    """Measured rates of a device; 0 where it cannot do that.

    Attributes:
        copy: bytes a second, read plus written. gemm: operations a second of products, by type of the operands.
        to_device, to_host, both_ways: bytes a second over PCIe with pinned memory; the last is the sum of both
            directions at once.
    """

    copy: float
    gemm: dict[str, float]
    to_device: float
    to_host: float
    both_ways: float

    def bound_ms(self, *, data: float, operations: float, fmt: str) -> float:
        """The least time of work that moves so many bytes of the device's memory and does so many operations.

        Products take operands of bf16 for bf16 and fp8 weights, and of fp32 otherwise.
        """
        rate = self.gemm["fp32" if fmt == "fp32" else "bf16"]
        return 1e3 * max(data / self.copy, operations / rate)

    def as_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def copy_rate(device: torch.device, size: int, repeats: int) -> float:
    """Bytes a second, read plus written, of a copy of ``size`` bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device, repeats=repeats) / 1e3)


def gemm_rate(device: torch.device, kind: str, size: int, repeats: int) -> float:
    """Operations a second of a square product with operands of a type: "fp32", "bf16" or "fp8" (E4M3)."""
    a, b = torch.randn(2, size, size, device=device)
    if kind == "fp8":
        one = torch.ones((), device=device)
        left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        ms = median_ms(
            lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16), device, repeats=repeats
        )
    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        left, right = a.to(dtype), b.to(dtype)
        ms = median_ms(lambda: left @ right, device, repeats=repeats)
    return 2 * size**3 / (ms / 1e3)


def pcie_rates(device: torch.device, size: int, repeats: int) -> tuple[float, float, float]:
    """Bytes a second from pinned host memory to the device, back, and the sum of both at once."""
    host_in, host_out = (torch.randint(0, 256, (size,), dtype=torch.uint8).pin_memory() for _ in range(2))
    there, back = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    inward, outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def both() -> None:
        current = torch.cuda.current_stream(device)
        for stream in (inward, outward):
            stream.wait_stream(current)
        with torch.cuda.stream(inward):
            there.copy_(host_in, non_blocking=True)
        with torch.cuda.stream(outward):
            host_out.copy_(back, non_blocking=True)
        for stream in (inward, outward):
            current.wait_stream(stream)

    to_device = median_ms(lambda: there.copy_(host_in, non_blocking=True), device, repeats=repeats)
    to_host = median_ms(lambda: host_out.copy_(back, non_blocking=True), device, repeats=repeats)
    together = median_ms(both, device, repeats=repeats)
    return size / to_device * 1e3, size / to_host * 1e3, 2 * size / together * 1e3


def has_fp8_products(device: torch.device) -> bool:
    """Whether the device has tensor cores for FP8 (Ada, Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def measure(device: torch.device, *, tiny: bool = False) -> Roofline:
    """The rates of a device in about ten seconds of a GPU; ``tiny`` measures next to nothing, to try the code."""
    gpu = device.type == "cuda"
    copy_size, gemm_size, pcie_size, repeats = (2**31, 8192, 2**28, 20) if gpu else (2**28, 1536, 0, 5)
    if tiny:
        copy_size, gemm_size, pcie_size, repeats = 2**20, 128, 2**20, 2
    torch.backends.cuda.matmul.allow_tf32 = False
    kinds = ["fp32", "bf16", *(["fp8"] if has_fp8_products(device) else [])]
    to_device, to_host, both_ways = pcie_rates(device, pcie_size, repeats) if gpu else (0.0, 0.0, 0.0)
    return Roofline(
        copy=copy_rate(device, copy_size, repeats),
        gemm={kind: gemm_rate(device, kind, gemm_size, repeats) for kind in kinds},
        to_device=to_device,
        to_host=to_host,
        both_ways=both_ways,
    )


def rows_of(rates: Roofline) -> list[Row]:
    """The rates as lines of a table."""
    rows: list[Row] = [{"what": "copy in memory, read + written", "rate": rates.copy / 1e9, "unit": "GB/s"}]
    rows += [{"what": f"product, {kind}", "rate": rate / 1e12, "unit": "TFLOP/s"} for kind, rate in rates.gemm.items()]
    if rates.to_device:
        rows.append({"what": "pinned host to device", "rate": rates.to_device / 1e9, "unit": "GB/s"})
        rows.append({"what": "device to pinned host", "rate": rates.to_host / 1e9, "unit": "GB/s"})
        rows.append({"what": "both at once, summed", "rate": rates.both_ways / 1e9, "unit": "GB/s"})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    options = parser(__doc__, tiny="tiny sizes: tries the code, the rates mean nothing").parse_args(arguments)
    rates = measure(options.device, tiny=options.tiny)
    return finish(options, rows_of(rates), COLUMNS, roofline=rates.as_dict())


if __name__ == "__main__":
    sys.exit(main())
