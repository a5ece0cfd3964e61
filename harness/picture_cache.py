"""The squares of a folder's pictures, kept in one hidden file beside them, so that each picture is opened once.

A kept square is reused for a picture whose file has the same size, times and inode as before (not on Windows, whose
files have no change time). Otherwise its bytes are hashed, and a square made from the same bytes is reused, whatever
their file was called. Only the rest are decoded.
"""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from harness import distributed, picture_file
from harness.errors import RunError, is_out_of_memory, reason
from harness.files import atomic_write
from harness.picture_search import CACHE_PREFIX, named_in_full
from harness.text import printable

TRUSTS_STATUS = os.name != "nt"  # what Windows calls ctime is the creation time, so all files are hashed there
MANY = 2000  # pictures: opening them takes a while
VERSION = 2  # of what `picture_file.open_square` returns; squares kept by another version are not used


class _Kept(NamedTuple):
    """What the file holds: `status` and `digests` (SHA-256 of the picture's bytes, hexadecimal) by relative path."""

    status: dict[str, list[int]]
    digests: dict[str, str]
    images: np.ndarray  # uint8 (N, 3, size, size), in the order of the two

    def same_files(self, other: "_Kept") -> bool:
        return [*self.status.items()] == [*other.status.items()] and self.digests == other.digests


def squares(folder: Path, paths: Sequence[Path], size: int) -> Tensor:
    """The pictures `paths` below `folder` as uint8 (N, 3, size, size).

    Raises a RunError naming those that cannot be opened; the others are kept for the next time.
    """
    file = folder / f"{CACHE_PREFIX}{size}px.npz"
    names = [path.relative_to(folder).as_posix() for path in paths]
    kept = _read(file, size)
    status = [status_of(path) for path in paths]
    trusted = kept.status if TRUSTS_STATUS else {}
    if [*trusted.items()] == [*zip(names, status, strict=True)]:
        return torch.from_numpy(kept.images)
    row_of = {digest: row for row, digest in enumerate(kept.digests.values())}
    unchanged = {name for name, now in zip(names, status, strict=True) if trusted.get(name) == now}
    images = np.empty((len(paths), 3, size, size), np.uint8)
    digests = [kept.digests[name] if name in unchanged else "" for name in names]
    done = np.array([name in unchanged for name in names], dtype=bool)
    for index in done.nonzero()[0]:
        images[index] = kept.images[row_of[digests[index]]]

    def open_one(index: int) -> None:
        digests[index] = digest_of(paths[index])
        row = row_of.get(digests[index])
        images[index] = picture_file.open_square(paths[index], size) if row is None else kept.images[row]
        done[index] = True

    try:
        broken = _for_each(open_one, (~done).nonzero()[0].tolist())
    finally:  # after Ctrl-C, too: the next time goes on from here
        rows = done.nonzero()[0].tolist()  # once: after a second Ctrl-C threads may still be at work
        whole = len(rows) == len(paths)
        of_rows = ({names[i]: values[i] for i in rows} for values in (status, digests))
        opened = _Kept(*of_rows, images if whole else images[rows])
        if not opened.same_files(kept):
            _keep(file, size, opened if whole else _joined(opened, kept))
    if broken:
        them = "it" if len(broken) == 1 else "them"
        sentences = named_in_full(list(map(str, broken.values())))
        raise RunError(f"{sentences}; repair {them} or take {them} out of the folder")
    return torch.from_numpy(images)


def _joined(opened: _Kept, earlier: _Kept) -> _Kept:
    """What has been opened, and what was kept earlier under other names: useful if the same bytes come again."""
    left = {name: row for row, name in enumerate(earlier.status) if name not in opened.status}
    return _Kept(
        opened.status | {name: earlier.status[name] for name in left},
        opened.digests | {name: earlier.digests[name] for name in left},
        np.concatenate([opened.images, earlier.images[list(left.values())]]),
    )


def _keep(file: Path, size: int, squares: _Kept) -> None:
    files = [(name, status, squares.digests[name]) for name, status in squares.status.items()]
    index = json.dumps({"version": VERSION, "size": size, "files": files})
    try:
        with atomic_write(file) as temporary, open(temporary, "wb") as written:
            np.savez(written, index=np.array(index), images=squares.images)
    except RunError as error:
        print(f"the pictures have to be opened again each time, as their squares cannot be kept: {error}")


def _read(file: Path, size: int) -> _Kept:
    """What is kept; nothing if there is no file, or only one of another version."""
    # A damaged file raises anything from OSError to NotImplementedError, and is replaced like a missing one.
    with contextlib.suppress(Exception), np.load(file) as archive:  # a zip file, read with its checksums
        index = json.loads(str(archive["index"]))
        if (index["version"], index["size"]) == (VERSION, size):
            status = {name: status for name, status, _ in index["files"]}
            images = archive["images"]
            if len(status) == len(index["files"]) == len(images):
                return _Kept(status, {name: digest for name, _, digest in index["files"]}, images)
    return _Kept({}, {}, np.empty((0, 3, size, size), np.uint8))


def status_of(path: Path) -> list[int]:
    """What changes with a file's content, even if its mtime is set back: size in bytes, mtime, ctime and inode."""
    try:
        status = path.stat()
    except OSError as error:
        raise RunError(f"cannot read {printable(path)}: {reason(error)}") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def digest_of(path: Path) -> str:
    """The SHA-256 of a file. Raises RunError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"cannot read {printable(path)}: {reason(error)}") from error


def _for_each(work: Callable[[int], None], indices: Sequence[int]) -> dict[int, RunError]:
    """Call `work` for each index, on many threads. Returns its RunErrors by index, in order.

    What fails for want of memory is tried once more, alone.
    """
    broken: dict[int, RunError] = {}
    starved: list[int] = []

    def attempt(index: int, again: bool = False) -> None:
        try:
            work(index)
        except RunError as error:
            if is_out_of_memory(error.__cause__) and not again:
                starved.append(index)
            else:
                broken[index] = RunError(str(error))  # without its traceback, which holds the picture's memory

    if len(indices) >= MANY:  # where there is no terminal, and so no bar
        print(f"opening {len(indices):,} pictures …", flush=True)
    pool = ThreadPoolExecutor(distributed.threads_while_others_wait())
    try:
        with warnings.catch_warnings():
            # open_square sets these two as well, but threads undo each other's filters
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            list(tqdm(pool.map(attempt, indices), "opening pictures", len(indices), leave=False, disable=None))
            for index in starved:
                attempt(index, again=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return dict(sorted(broken.items()))
