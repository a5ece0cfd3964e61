"""Files that are either whole or not there at all, and folders that one process at a time fills."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from errors import RunError


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there takes the place of `path` at once, or not at all.

    The older file is kept under the name `keep` where one is given. Raises RunError naming path and cause where the
    disk is full, the folder read-only or the like.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name with none of the content
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        cause = error.strerror or error
        raise RunError(f"cannot write {path}: {cause}; make room or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8) as a whole. Raises RunError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they are missing. Raises RunError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the folder {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def held(folder: Path, *, wait: bool) -> Iterator[Path]:
    """Create `folder` where it is missing and hold it for this process alone; another one waits, or is refused.

    The system lets go of it however the process ends. Raises RunError where it cannot be created, opened or had.
    """
    make_folder(folder)
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"cannot open {folder}: {error.strerror}; choose another folder") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another run is using {folder}; wait for it or choose another with --out") from None
        except OSError:
            pass  # a file system without locks
        yield folder
    finally:
        os.close(descriptor)
