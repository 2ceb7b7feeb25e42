"""Every promise that `make torture` attacks. Each attack lives in a module of its own beside this one."""

from tests.torture import bit_rot, hostile
from tests.torture.tally import Promise

PROMISES: list[Promise] = [
    Promise("R4 bit rot", bit_rot.attack, slice_tries=300, short_tries=3_000, long_tries=10_000),
    Promise("R6 hostile artefacts", hostile.attack, slice_tries=1, short_tries=1, long_tries=1),
]
