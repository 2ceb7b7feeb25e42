"""SIGTERM and SIGINT, which end training after the step at hand."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """The signal that came first while they were caught.

    Attributes:
        number: of the signal; None as long as none came.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note the first signal; a second one ends the process at once."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.number = number
            for each in before:
                signal.signal(each, signal.SIG_DFL)

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for number in before:
                signal.signal(number, stop)
        except ValueError:  # not the main thread: the caller's own handlers stay
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
