"""The one exception that bad input raises, and how a process ends on it."""

BAD_INPUT = 2  # exit status


class InputError(Exception):
    """Bad input from outside: a file, a config field, a flag.

    Its text is one sentence that names where the fault is (file, line, field or flag), the value
    found and the values allowed. Entry points print it without a traceback and exit with status 2.
    """


class LocalError(InputError):
    """What this process alone has met, of several in one run: the others know nothing of it."""


def is_local(error: Exception) -> bool:
    """Whether this process alone may know of it, of several in one run: bad input all meet."""
    return isinstance(error, LocalError) or not isinstance(error, InputError)
