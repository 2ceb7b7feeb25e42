"""A call that ``failing_calls.c`` overlooks would never fail in R3: it must count as many as strace sees."""

import re
from contextlib import closing
from pathlib import Path

import pytest

from tests.torture.faults import VERBS, Bench
from tests.torture.tally import Unavailable
from tests.torture.tracing import require_strace

KINDS = "open read write truncate sync mkdir rename remove"
LEFT_ALONE = "access close fadvise64 fcntl flock fstat ioctl lseek mmap newfstatat statfs statx utimensat"
"""Of all calls with a path or a descriptor, those that R3 does not make fail."""


@pytest.mark.slow
def test_what_strace_sees_is_counted(tmp_path: Path) -> None:
    try:
        require_strace()
        bench = Bench(tmp_path)
    except Unavailable as error:
        pytest.skip(str(error))
    pattern = re.compile(rf'^\d+ +(\w+)\((AT_FDCWD<[^>]*>, "|\d+<|"){re.escape(str(bench.folder))}/')
    with closing(bench):
        for verb in VERBS:
            matches = map(pattern.match, bench.trace(verb, ["-y", "-e", "trace=%file,%desc"]))
            calls = [match[1] for match in matches if match]
            assert bench.count(verb, KINDS) == sum(call not in LEFT_ALONE.split() for call in calls), verb
