"""Every promise that `make torture` attacks. Each attack lives in a module of its own beside this one."""

from tests.torture.tally import Promise

PROMISES: list[Promise] = []
