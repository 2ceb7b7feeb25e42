"""The errors that a user meets, each with the exit code of the command line.

An ``OSError`` (disk full, permission denied, ...) is passed through as it is and also ends with exit code 74.
"""


class ElmoStreamError(Exception):
    """Base of all errors whose message is one sentence for the user."""

    exit_code = 1


class UserError(ElmoStreamError):
    """A mistake in the user's input, options or configuration: names the file and line, or the key, and what to do."""

    exit_code = 2


class CorruptError(ElmoStreamError):
    """A store, checkpoint or other file of ours is damaged or incomplete: names the file."""

    exit_code = 74


class LockedError(ElmoStreamError):
    """Another process is working in the same folder."""

    exit_code = 75


_OUT_OF_MEMORY = ("out of memory", "allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch has a kind for most of a GPU's, and none for the others."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)
