"""The one kind of failure that the user can act on, and how a command reports it."""

import os
import sys
from collections.abc import Callable


class RunError(Exception):
    """Something outside the program went wrong: a file, a disk, a number. One sentence, with the way out."""


def reason(error: BaseException) -> str:
    """What went wrong, in the operating system's words if it has any, else in the exception's."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def report(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and return its exit status; what the user can act on becomes one line on stderr.

    The status is 1 then, 130 after Ctrl-C. Other exceptions are bugs and keep their traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us (`2>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    try:
        status = main() or 0
    except RunError as error:
        status = _fail(str(error))
    except OSError as error:  # of a file that nobody foresaw trouble with, or of a print
        status = _fail(_cause(error))
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    except SystemExit as stop:  # argparse's
        status = stop.code
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try and complain again at exit
        status = status or _fail(_cause(error))
    return status


def _cause(error: OSError) -> str:
    return f"{error.filename or 'cannot write the output'}: {reason(error)}"


def _fail(sentence: str, status: int = 1) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return status
