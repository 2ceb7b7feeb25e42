"""A thread that hangs in a read must not keep the process from ending."""

import subprocess
import sys

SCRIPT = """
import threading
from elmo_stream.threads import DaemonThreads

DaemonThreads(1, "hanging").submit(threading.Event().wait)
print("at its end")
"""


def test_a_process_ends_while_one_of_its_threads_hangs() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "at its end\n"
