"""What a torture run counts, promise by promise, and the table it prints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


class Unavailable(Exception):
    """This machine lacks what an attack needs; says what."""


@dataclass
class Tally:
    """Tries of one promise: each ends as survived, lost, silent or with a traceback; ``notes`` name what went wrong."""

    tries: int = 0
    lost: int = 0
    silent: int = 0
    tracebacks: int = 0
    notes: list[str] = field(default_factory=list)

    def judge(self, note: str, *, traceback: bool, lost: bool, silent: Callable[[], bool]) -> bool:
        """Count how a try ended, by the first that is true, with a note of what broke; whether it survived.

        ``silent`` is asked last, for it may read what is there only where nothing was lost.
        """
        if traceback:
            self.tracebacks += 1
        elif lost:
            self.lost += 1
        elif silent():
            self.silent += 1
        else:
            return True
        self.notes.append(note)
        return False

    @property
    def failed(self) -> int:
        """Tries that broke the promise."""
        return self.lost + self.silent + self.tracebacks


Attack = Callable[[int, Path, int], Tally]
"""``attack(tries, folder, seed)``: works in the empty ``folder``; the same seed makes the same tries."""


@dataclass(frozen=True)
class Promise:
    """A line of the table: its name, as in docs/reliability.md, its attack, and how many tries each length makes."""

    name: str
    attack: Attack
    slice_tries: int
    short_tries: int
    long_tries: int


def table(rows: Sequence[tuple[str, Tally, float]]) -> str:
    """One line a promise: tries, survived, lost, silent, tracebacks, seconds."""
    lines = [
        f"{'promise':<44} {'tries':>8} {'survived':>8} {'lost':>5} {'silent':>6} {'tracebacks':>10} {'seconds':>8}"
    ]
    for name, tally, seconds in rows:
        survived = tally.tries - tally.failed
        lines.append(
            f"{name:<44} {tally.tries:>8,} {survived:>8,} {tally.lost:>5} {tally.silent:>6} "
            f"{tally.tracebacks:>10} {seconds:>8.0f}"
        )
    return "\n".join(lines)
