"""Files that are either whole or not there at all, and folders that one process at a time fills."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from harness.errors import RunError, reason

LOCK_FILE = ".lock"


@contextlib.contextmanager
def atomic_write(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there takes the place of `path` at once, or not at all.

    The older file is kept under the name `keep` where one is given. Raises RunError naming path and cause where the
    disk is full, the folder read-only or the like.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "r+b") as file:  # Windows synchronises writable handles only
            os.fsync(file.fileno())  # or a power cut could leave the new name with none of the content
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {reason(error)}; make room or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) as a whole. Raises RunError."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they are missing. Raises RunError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the folder {path}: {reason(error)}") from error


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[Path]:
    """Create `folder` where it is missing and hold it for this process alone; another one waits, or is refused.

    The operating system releases the lock however the process ends. Where the file system has no locks, the folder is
    used without one. Raises RunError where the folder cannot be created or written, or is in use.
    """
    make_folder(folder)
    lock = filelock.FileLock(folder / LOCK_FILE, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RunError(f"another run is using {folder}; wait for it or choose another with --out") from None
    except PermissionError as error:
        raise RunError(f"cannot write in {folder}: {reason(error)}; choose another folder") from error
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", None) == errno.EROFS:
            raise RunError(f"cannot write in {folder}: {reason(error)}; choose another folder") from error
    try:
        yield folder
    finally:
        lock.release()
