"""Worker processes that cannot outlive the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self, TypeVar

from elmo_stream.errors import ElmoStreamError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """Runs functions of a module over tasks, in ``count`` spawned processes, or in this process when
    ``count`` is 1.

    The processes hold the reading end of a pipe whose only writing end is here: it closes when this process
    ends in whatever way, SIGKILL included, and then they end too. (A pool alone would leave them waiting for
    ever.)
    """

    def __init__(self, count: int) -> None:
        self._executor: ProcessPoolExecutor | None = None
        if count > 1:
            context = multiprocessing.get_context("spawn")
            lifeline, self._lifeline = context.Pipe(duplex=False)
            self._executor = ProcessPoolExecutor(count, context, initializer=_start_worker, initargs=(lifeline,))

    def map(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], tick: Callable[[int, int], None]
    ) -> list[Result]:
        """Results in the order of the tasks; ``tick(done, total)`` after each; raises what the first to fail raises.

        Raises:
            ElmoStreamError: a worker process died.
        """
        results: list[Result] = []
        run = map if self._executor is None else self._executor.map
        try:
            with _interrupts_held():
                pending = run(function, tasks)
            for result in pending:
                results.append(result)
                tick(len(results), len(tasks))
        except BrokenProcessPool as error:
            raise ElmoStreamError(
                "a worker process died (killed, or out of memory); run the same command again to continue, "
                "with fewer --workers if memory was short."
            ) from error
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is None:
            return
        if kind is not None:
            self._lifeline.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._lifeline.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C or SIGTERM to the whole group; they wait for this process."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(lifeline: Connection) -> None:
    # Ctrl-C reaches the whole process group; only the parent reacts to it, by letting go of the lifeline.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # The processes are the parallelism; threads inside each would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)
