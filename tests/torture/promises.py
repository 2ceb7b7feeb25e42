"""Every promise that `make torture` attacks. Each attack lives in a module of its own beside this one."""

from tests.torture import (
    bit_rot,
    conversions,
    faults,
    hostile,
    kills,
    loader_workers,
    locks,
    malformed,
    nonfinite,
    object_store,
    power_cuts,
    same_numbers,
    signals,
)
from tests.torture.tally import Promise

PROMISES: list[Promise] = [
    Promise("R1 kill -9 of a training", kills.attack, 1, 20, 300),
    Promise("R2 power cut after any call", power_cuts.attack, 40, 3_000, 1_000_000),
    Promise("R3 the N-th system call fails", faults.attack, 2, 200, 1_000_000),
    Promise("R4 bit rot", bit_rot.attack, 200, 3_000, 10_000),
    Promise("R5 malformed input", malformed.attack, 8, 1_000, 1_000),
    Promise("R5 fuzzed input", malformed.fuzz_attack, 600, 10_000, 200_000),
    Promise("R6 hostile artefacts", hostile.attack, 1, 1, 1),
    Promise("R7 SIGTERM and SIGINT", signals.attack, 4, 15, 200),
    Promise("R8 two in one folder, stale locks", locks.attack, 1, 6, 20),
    Promise("R9 non-finite numbers", nonfinite.attack, 1, 12, 60),
    Promise("R10 readers die or stall", loader_workers.attack, 2, 25, 250),
    Promise("R11 same numbers", same_numbers.attack, 6, 60, 400),
    Promise("R13 kill -9 of a conversion", conversions.attack, 5, 25, 100),
    Promise("R14 object stores that fail", object_store.attack, 2, 20, 200),
]
