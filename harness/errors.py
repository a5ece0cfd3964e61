"""Errors that the user can act on, how a command reports them, and what can go wrong before a command begins."""

from __future__ import annotations  # so that a Python too old for the rest gets as far as saying so

import codecs
import contextlib
import errno
import importlib.util
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from harness.text import escape, printable

OLDEST_PYTHON = (3, 11)
PACKAGES = ("torch", "numpy", "matplotlib", "tqdm", "filelock", "PIL")  # without which no command works
WINDOWS_NO_MEMORY = (8, 14, 1455)  # the last: "The paging file is too small"
# what PyTorch's allocators on CPU and CUDA, its loaders' workers, cuBLAS, cuDNN, oneDNN, C++ and the dynamic linker say
NO_MEMORY = re.compile(
    r"can'?t allocate memory|cannot allocate memory|not enough memory|out of memory|alloc_failed|bad_alloc"
    r"|failed to map segment|shared memory\(shm\)|out of shared memory|DataLoader worker .*(killed|exited unexpectedly)"
    r"|could not (create|execute) a primitive$|FIND was unable to find an engine",
    re.IGNORECASE,
)
OF_A_GPU = re.compile(r"CUDA|cudnn|FIND was unable", re.IGNORECASE)
HARDWARE = re.compile(r"ECC error|unknown error|launch timed out|unavailable|GPU is lost")  # else it may be a bug
AFTER_A_FAILURE = (
    "start the same command again (in a notebook, restart the kernel first): a run goes on after its last epoch"
)
PLACE_IN_SOURCE = re.compile(r"^\[enforce fail[^]]*] [^.]*\. ")  # compiled here, as later there may be no memory for it


class RunError(Exception):
    """Something outside the program went wrong: a file, a disk, a number. One sentence, with the way out."""


def reason(error: BaseException) -> str:
    """What went wrong, in the operating system's words if it has any, else in the exception's."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one during whose handling it was raised, says that the computer or its GPU lacks memory.

    For the computer's memory PyTorch raises a plain RuntimeError, which only its message tells from others. A RunError
    does not count, as it already says what is wrong.
    """
    return _lack_of_memory(error) is not None


def _lack_of_memory(error: BaseException | None) -> BaseException | None:
    """The exception itself, or the one behind it, that is about memory."""
    while error is not None and not isinstance(error, RunError):
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
            return error
        number = getattr(error, "winerror", None)
        if isinstance(error, OSError) and (error.errno == errno.ENOMEM or number in WINDOWS_NO_MEMORY):
            return error
        if isinstance(error, RuntimeError | ImportError) and NO_MEMORY.search(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def memory_reported(what: Callable[[], str]) -> Iterator[None]:
    """Raise a RunError that says what there is not enough memory for, if the block runs out of it."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"not enough memory for {what()}") from error


def before_imports() -> None:
    """Prepare a command's process for its heavy imports, which take seconds: to be called before them.

    Until `report` takes over, Ctrl-C ends the process without a word, as there is nothing to save or explain. A Python
    that is too old, a missing package, too little memory for the imports, and a TQDM_… variable or a matplotlibrc that
    cannot be used are reported in one line, with status 1.
    """
    # not where a shell ignores it, after `&`, nor in a notebook or at a Python prompt, which it would end
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and not in_a_session():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.version_info < OLDEST_PYTHON:
        oldest, this = (".".join(map(str, version[:2])) for version in (OLDEST_PYTHON, sys.version_info))
        sys.exit(_fail(f"this needs Python {oldest} or newer, but this is {this}; use another environment"))
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        way_out = "activate the environment made for it, or pip install -r requirements.txt"
        sys.exit(_fail(f"{' and '.join(missing)} cannot be imported by {sys.executable}: {way_out}"))
    sys.excepthook = _report_memory
    os.environ["MATPLOTLIBRC"] = os.devnull  # plots have their own style: a user's settings do not matter
    _require_readable_matplotlibrc()
    try:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread besides ours
        tqdm.set_lock(threading.RLock())  # nor a process that tracks semaphores
        tqdm.format_meter(0, 1, 0.0, bar_format=os.environ.get("TQDM_BAR_FORMAT"))  # or the next line's bar complains
        tqdm(total=1, file=io.StringIO(), disable=False).close()
    except (KeyError, ValueError, IndexError) as error:  # tqdm reads its variables on import, and uses some later
        names = ", ".join(sorted(name for name in os.environ if name.startswith("TQDM_")))
        sys.exit(_fail(f"tqdm cannot use {names} from the environment ({reason(error)}); unset it"))


def in_a_session() -> bool:
    """Whether the process goes on after the command: a notebook's kernel, IPython, or Python with -i."""
    return bool({"ipykernel", "IPython"} & sys.modules.keys()) or hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _require_readable_matplotlibrc() -> None:
    """Exit with one line where importing matplotlib would fail on the current folder's settings, which come first."""
    try:
        Path("matplotlibrc").read_text(encoding="utf-8")
    except OSError:  # there is none
        pass
    except UnicodeDecodeError:
        sys.exit(_fail("matplotlib cannot read this folder's matplotlibrc, which is not UTF-8; rename it"))


def _report_memory(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if is_out_of_memory(error):
        _fail(_no_memory(error))
    else:
        traceback.print_exception(kind, error, trace)


def report(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and return its exit status; what the user can act on becomes one line on stderr.

    The status is 1 then, 130 after Ctrl-C. Other exceptions are bugs and keep their traceback. What stdout and stderr
    cannot encode is printed as escapes.
    """
    codecs.register_error("escape", _escaped)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process (`2>&-`)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):  # a notebook's cannot
            with contextlib.suppress(OSError):  # closed, full: the first print will say so
                stream.reconfigure(errors="escape")
    try:
        with _interrupts_raised():
            status = main() or 0
    except RunError as error:
        status = _fail(str(error))
    except KeyboardInterrupt:
        status = _fail("interrupted", 130)
    except SystemExit as stop:  # argparse's
        status = stop.code
    except Exception as error:
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # what the work held: reporting takes memory too
            status = _fail(_no_memory(error))
        elif isinstance(error, OSError):  # from a file that nobody expected trouble with, or a print
            status = _fail(_cause(error))
        elif type(error).__name__ == "AcceleratorError" and HARDWARE.search(str(error)):  # torch's
            status = _fail(f"the GPU failed ({reason(error)}); {AFTER_A_FAILURE}")
        else:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try and complain again at exit
        status = status or _fail(_cause(error))
    return status


def end_process(status: int) -> NoReturn:
    """End a command's process with the exit status of `report`; a command that a signal stopped ends by that signal.

    A shell that runs commands in a loop goes on with the next one if Ctrl-C merely leads to a status.
    """
    if status - 128 in (signal.SIGINT, signal.SIGTERM) and not in_a_session():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed by the reader or the parent process
                stream.flush()
        die_of(status - 128)
    sys.exit(status)


def die_of(number: int) -> None:
    """End the process as the signal `number` by itself would.

    This returns in process 1 of a container, which ignores its own signals, and on Windows, where they end it with the
    number as its status.
    """
    if os.name != "nt":
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _escaped(error: UnicodeEncodeError) -> tuple[str, int]:
    return "".join(map(escape, error.object[error.start : error.end])), error.end


@contextlib.contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Where Ctrl-C would end the process (see `before_imports`) it raises KeyboardInterrupt in the block."""
    ends = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _no_memory(error: BaseException) -> str:
    lack = _lack_of_memory(error)
    words = PLACE_IN_SOURCE.sub("", reason(lack))
    if type(lack).__name__ == "OutOfMemoryError" or OF_A_GPU.search(words):
        return f"the GPU does not have enough memory ({words}); stop other programs on it, or use --device cpu"
    return f"there is not enough memory ({words}); stop other programs, or use a machine that has more"


def _cause(error: OSError) -> str:
    return f"{error.filename or 'cannot write the output'}: {reason(error)}"


def _fail(sentence: str, status: int = 1) -> int:
    print(f"error: {printable(sentence)}", file=sys.stderr)
    return status
