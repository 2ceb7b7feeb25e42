"""TensorBoard's event files, written in place: its own writer does so in a thread, where a full disk is a traceback."""

import os
import platform
import time
from pathlib import Path
from typing import Any

from elmo_stream.files import naming


class Board:
    """Scalars for TensorBoard in a new file of ``folder``; values of ``first_step`` and later in older files are void.

    Raises:
        OSError: the file cannot be written; names it.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9:010d}.{platform.node()}.{os.getpid()}.{now % 10**9}"
        self._path = folder / name
        self._event, self._summary = Event, Summary
        self._stream = open(self._path, "wb")  # noqa: SIM115  closed by ``close``
        self._records = RecordWriter(self._stream)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step."""
        value = [self._summary.Value(tag=name, simple_value=number) for name, number in values.items()]
        self._write(step=step, summary=self._summary(value=value))

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._stream.close()

    def _write(self, **parts: Any) -> None:
        with naming(self._path):
            self._records.write(self._event(wall_time=time.time(), **parts).SerializeToString())
            self._stream.flush()
