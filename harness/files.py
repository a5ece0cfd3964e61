"""Files that are either whole or not there at all, and folders that only one process at a time fills."""

import contextlib
import errno
import glob
import inspect
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import filelock

from harness.errors import RunError, reason

LOCK_FILE = ".lock"
STALE = 3600.0  # seconds since a temporary file was last written to
# Seconds between tries to replace a file: Windows replaces none that a program has open, say a virus scanner or Excel.
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6) if os.name == "nt" else ()
NO_ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))


@contextlib.contextmanager
def atomic_write(path: Path, keep: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path; what is written there replaces `path` in one step, or not at all.

    A file that is replaced keeps its mode (not on Windows) and, where the system permits, its owner; for a link, its
    target is replaced. Targets that cannot be replaced are written into instead: a device, a pipe, this process's own
    output, a file that is mounted by itself or lies in a folder where no file can be created. With `keep`, the
    older file is kept under that name, and links are not followed. Raises RunError naming path and cause if writing
    fails, as on a full disk.
    """
    temporary = None
    try:
        target = path if keep is not None else _replaceable(path)
        temporary = _new_file(target)
        yield temporary
        if target is None:
            _write_into(path, temporary)
        else:
            _replace(target, temporary, keep)
    except OSError as error:
        way_out = "make room or choose" if error.errno in NO_ROOM else "choose"
        raise RunError(f"cannot write {path}: {reason(error)}; {way_out} another folder") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _replaceable(path: Path) -> Path | None:
    """The plain file, existing or not, that the links of `path` lead to; None if `path` can only be written into."""
    target = Path(os.path.realpath(path))
    try:
        status = path.stat()
    except FileNotFoundError:
        return target
    if not stat.S_ISREG(status.st_mode) or _own_output(status) is not None:
        return None
    in_fixed_folder = os.access(target, os.W_OK) and not os.access(target.parent, os.W_OK)
    return None if in_fixed_folder else target


def _own_output(status: os.stat_result) -> int | None:
    """The descriptor through which this process prints into that very file, if it does."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # closed
            if status.st_ino and os.path.samestat(status, os.fstat(descriptor)):  # 0 on some Windows volumes
                return descriptor
    return None


def _new_file(target: Path | None) -> Path:
    """Create an empty file, with a name that no other process uses, beside `target` if there is one."""
    folder, name = (target.parent, target.name[:40]) if target is not None else (Path(tempfile.gettempdir()), "output")
    _remove_stale(folder, name)
    return _create(folder, name)


def _create(folder: Path, name: str) -> Path:
    path = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


def _remove_stale(folder: Path, name: str) -> None:
    """Remove what killed processes left of this file long ago; what another process is writing now stays."""
    for path in folder.glob(f".{glob.escape(name)}.????????.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _replace(target: Path, temporary: Path, keep: Path | None) -> None:
    with open(temporary, "r+b") as file:  # Windows synchronises writable handles only
        os.fsync(file.fileno())  # or a power cut could leave the new name with none of the content
    with contextlib.suppress(FileNotFoundError):
        _copy_rights(target.stat(), temporary)
    if keep is not None and target.exists():
        rename(target, keep)
    try:
        rename(temporary, target)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        _write_into(target, temporary)  # a file that is mounted by itself, as in containers


def rename(path: Path, target: Path) -> None:
    """Rename a file, replacing any existing file; on Windows, try again while a program has one of them open."""
    for pause in PAUSES:
        try:
            return os.replace(path, target)
        except PermissionError:
            time.sleep(pause)
    os.replace(path, target)


def _copy_rights(status: os.stat_result, path: Path) -> None:
    with contextlib.suppress(OSError, AttributeError):  # giving a file away takes root, and a system with owners
        os.chown(path, status.st_uid, status.st_gid)
    with contextlib.suppress(OSError):
        if os.name != "nt":  # where a read-only file could not be renamed or removed
            os.chmod(path, stat.S_IMODE(status.st_mode))


def _write_into(path: Path, temporary: Path) -> None:
    own = _own_output(path.stat())
    if own is not None:  # after what has been printed
        sys.stdout.flush()
        sys.stderr.flush()
    with open(temporary, "rb") as content, open(path if own is None else os.dup(own), "wb") as output:
        shutil.copyfileobj(content, output)


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove at once what killed processes left of files of these names (patterns), which no other process writes."""
    for name in names:
        for path in folder.glob(f".{name}.*tmp"):
            path.unlink(missing_ok=True)


def try_to_write_in(folder: Path) -> None:
    """Create an empty file in a folder, and remove it. Raises OSError where that fails."""
    path = _create(folder, "try")
    path.unlink()


def identity(path: Path) -> object:
    """A value that two paths share exactly if they lead to the same file or folder, however their names are written.

    Some file systems ignore case, or how letters are composed; where nothing exists yet, that is assumed.
    """
    with contextlib.suppress(OSError):
        status = os.stat(path)
        if status.st_ino:  # 0 on some Windows volumes
            return status.st_dev, status.st_ino
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a path leads to a folder or to something below it."""
    real = Path(os.path.realpath(path))
    return identity(folder) in map(identity, (real, *real.parents))


def write_text(path: Path, text: str) -> None:
    """Replace a text file (UTF-8, with escapes for bytes in names that are not) as a whole. Raises RunError."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def make_folder(path: Path) -> None:
    """Create a folder and its parents where they are missing. Raises RunError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create the folder {path}: {reason(error)}; choose another folder") from error


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool) -> Iterator[Path]:
    """Create `folder` where it is missing and hold it for this process alone; another one waits, or is refused.

    The operating system releases the lock however the process ends. Where the file system has no locks, the folder is
    used without one: a marker file instead would outlive a killed process. Raises RunError where the folder cannot be
    created or written, or is in use.
    """
    make_folder(folder)
    newer = "fallback_to_soft" in inspect.signature(filelock.FileLock).parameters  # else it never does
    lock = filelock.FileLock(folder / LOCK_FILE, **{"fallback_to_soft": False} if newer else {})
    try:
        _acquire(lock, folder, wait)
    except (OSError, NotImplementedError) as error:  # there are no locks here, unless nothing may be written
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise RunError(f"cannot write in {folder}: {reason(error)}; choose another folder") from error
    try:
        yield folder
    finally:
        lock.release()


def _acquire(lock: filelock.BaseFileLock, folder: Path, wait: bool) -> None:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if not wait:
            raise RunError(f"another run is using {folder}; wait for it or choose another with --out") from None
        print(f"waiting for another process that is filling {folder} …", file=sys.stderr, flush=True)
        lock.acquire()
