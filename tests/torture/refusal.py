"""What must be refused in one sentence: counts a try, and whether it was."""

from collections.abc import Callable

from elmo_stream.errors import CorruptError, UserError
from tests.torture.tally import Tally


def expect_refusal(tally: Tally, what: str, call: Callable[[], object], *words: str) -> str:
    """Count a call that must raise an error for the user which has all ``words``; returns its message.

    A call that returns is silent, an error without the words is lost, any other error is a traceback.
    """
    tally.tries += 1
    try:
        call()
    except (CorruptError, UserError) as error:
        if missing := [word for word in words if word not in str(error)]:
            tally.lost += 1
            tally.notes.append(f"{what}: does not say {missing[0]!r}: {error}")
        return str(error)
    except Exception as error:
        tally.tracebacks += 1
        tally.notes.append(f"{what}: {type(error).__name__}: {error}")
        return ""
    tally.silent += 1
    tally.notes.append(f"{what}: was not noticed")
    return ""
