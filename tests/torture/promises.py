"""Every promise that `make torture` attacks. Each attack lives in a module of its own beside this one."""

from tests.torture import bit_rot, hostile, loader_workers, malformed, nonfinite, object_store, same_numbers
from tests.torture.tally import Promise

PROMISES: list[Promise] = [
    Promise("R4 bit rot", bit_rot.attack, slice_tries=300, short_tries=3_000, long_tries=10_000),
    Promise("R5 malformed input", malformed.attack, slice_tries=8, short_tries=1_000, long_tries=1_000),
    Promise("R5 fuzzed input", malformed.fuzz_attack, slice_tries=600, short_tries=10_000, long_tries=200_000),
    Promise("R6 hostile artefacts", hostile.attack, slice_tries=1, short_tries=1, long_tries=1),
    Promise("R9 non-finite numbers", nonfinite.attack, slice_tries=3, short_tries=12, long_tries=60),
    Promise("R10 readers die or stall", loader_workers.attack, slice_tries=4, short_tries=25, long_tries=250),
    Promise("R11 same numbers", same_numbers.attack, slice_tries=6, short_tries=60, long_tries=400),
    Promise("R14 object stores that fail", object_store.attack, slice_tries=2, short_tries=20, long_tries=200),
]
