"""Breaks what the project promises not to lose, and prints one table: ``python -m tests.torture [--long]``.

Exit code 1 when a promise was broken. ``--only R4`` runs the promises of that number; ``--json`` writes the table to a
file.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.promises import PROMISES
from tests.torture.tally import Tally, Unavailable, table


def main() -> int:
    parser = argparse.ArgumentParser(description="Break what must not break, and count.")
    parser.add_argument("--long", action="store_true", help="the tries of make torture-long")
    parser.add_argument("--only", action="append", default=[], metavar="R4", help="promises of this number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[tuple[str, Tally, float]] = []
    for promise in PROMISES:
        if options.only and promise.name.split()[0] not in options.only:
            continue
        started = time.monotonic()
        tries = promise.long_tries if options.long else promise.short_tries
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            try:
                tally = promise.attack(tries, Path(folder), options.seed)
            except Unavailable as error:
                print(f"{promise.name}: left out, it {error}", file=sys.stderr, flush=True)
                continue
        rows.append((promise.name, tally, time.monotonic() - started))
        print(table(rows[-1:]).splitlines()[1], *tally.notes[:20], sep="\n  ", file=sys.stderr, flush=True)
    print(table(rows))
    if options.json:
        found = [{"promise": name, **vars(tally), "seconds": seconds} for name, tally, seconds in rows]
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(tally.failed for _, tally, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
