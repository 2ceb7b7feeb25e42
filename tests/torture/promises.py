"""Every promise that `make torture` attacks. Each attack lives in a module of its own beside this one."""

from tests.torture import conversions, faults, kills, locks, power_cuts, signals
from tests.torture.tally import Promise

PROMISES: list[Promise] = [
    Promise("R1 kill -9 of a training", kills.attack, 2, 20, 300),
    Promise("R2 power cut after any call", power_cuts.attack, 100, 3_000, 1_000_000),
    Promise("R3 the N-th system call fails", faults.attack, 2, 40, 1_000_000),
    Promise("R7 SIGTERM and SIGINT", signals.attack, 2, 15, 200),
    Promise("R8 two in one folder, stale locks", locks.attack, 2, 6, 20),
    Promise("R13 kill -9 of a conversion", conversions.attack, 4, 25, 100),
]
