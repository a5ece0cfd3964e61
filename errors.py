"""The one kind of failure that the user can act on, and how a command reports it."""

import os
import sys
from collections.abc import Callable


class RunError(Exception):
    """Something outside the program went wrong: a file, a disk, a number. One sentence, with the way out."""


def report(main: Callable[[], int | None]) -> int:
    """Run a command's `main`; a RunError becomes one line on stderr and exit status 1 instead of a traceback."""
    try:
        return main() or 0
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has gone (`| head`); Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
