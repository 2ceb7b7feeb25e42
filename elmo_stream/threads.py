"""Threads that a process can end without: one that hangs in a read of a dead file system holds nobody up."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class DaemonThreads:
    """Runs calls in ``count`` threads, first come, first served. (Those of an executor are waited for at exit.)"""

    def __init__(self, count: int, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._calls,), name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], Any]) -> "Future[Any]":
        """What the call gives or raises, later."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def close(self, *, seconds: float) -> None:
        """Let the threads end behind the calls at hand, and wait so long for them; cancelled ones are not begun."""
        for _ in self._threads:
            self._calls.put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


def _work(calls: "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]") -> None:
    while (item := calls.get()) is not None:
        future, call = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        del item, future, call  # which hold the result, while the next call is waited for
