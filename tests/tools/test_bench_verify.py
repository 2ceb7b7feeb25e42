"""The benchmark of ``verify`` measures every way on a whole store, so that its table can be trusted unattended."""

import sys

import pytest

from elmo_stream.data.index import BACKENDS
from tools.bench_verify import main


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_reads_the_store(backend, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_verify", "--gib", "0.001", "--repeats", "1", "--store", backend])
    assert main() == 0
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 6 and all(row.endswith("MB/s") for row in rows[1:])
