"""Fetch the labelled part of STL-10: about 0.3 GB of the official 2.6 GB archive.

The four labelled members come first in the archive, so that the transfer can stop before the unlabelled images. Each is
written under a temporary name, and renamed once it is checked. The connection is plain http: what protects the
files are the checksums in `data.OFFICIAL`.
"""

import hashlib
import http.client
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data import FOLDER, OFFICIAL, FileSpec, Specs, read_file
from harness.errors import RunError, reason
from harness.files import atomic_write, locked

URL = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
ARCHIVE = "stl10_binary.tar.gz"
LABELLED: Specs = {name: spec for name, spec in OFFICIAL.items() if name.endswith(".bin")}
TIMEOUT = 30.0  # seconds without a byte
PAUSES = (2.0, 10.0)  # seconds before the second and the third attempt
CHUNK = 1 << 20  # bytes
# what sockets, gzip and tarfile raise for truncated or foreign bytes
STREAM_ERRORS = (OSError, EOFError, ValueError, zlib.error, tarfile.TarError, http.client.HTTPException)


class _Broken(Exception):
    """The archive is damaged or not the official one, or the connection broke."""


def fetch(data_dir: Path, specs: Specs = LABELLED, url: str = URL, pauses: Sequence[float] = PAUSES) -> None:
    """Fetch those files of `specs` that are missing or wrong in `data_dir/stl10_binary/`.

    An archive `data_dir/stl10_binary.tar.gz` is used instead of the network. A broken transfer is retried after
    each of `pauses` (seconds). Raises RunError if no attempt succeeds or the folder cannot be written; what is
    there by then is whole and checked.
    """
    data_dir = Path(data_dir)
    with locked(data_dir / FOLDER, wait=True) as folder:
        missing = {name for name, spec in specs.items() if not _is_right(folder / name, spec)}
        if not missing:
            return
        archive = data_dir / ARCHIVE
        if archive.exists():
            _unpack_local(archive, folder, specs, missing)
        else:
            _download(url, folder, specs, missing, pauses)


def _is_right(path: Path, spec: FileSpec) -> bool:
    try:
        read_file(path, spec)
    except RunError:
        return False
    return True


def _unpack_local(archive: Path, folder: Path, specs: Specs, missing: set[str]) -> None:
    try:
        with archive.open("rb") as source:
            _unpack(source, folder, specs, missing)
    except (OSError, _Broken) as error:
        raise RunError(
            f"{archive} is damaged or not the official archive ({_cause(error)}): copy it again, or delete it so that "
            f"{_names(missing)} can be downloaded"
        ) from error


def _download(url: str, folder: Path, specs: Specs, missing: set[str], pauses: Sequence[float]) -> None:
    print(f"fetching {_names(missing)} from {url} into {folder}", file=sys.stderr)
    for pause in (*pauses, None):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
                return _unpack(response, folder, specs, missing)
        except (*STREAM_ERRORS, _Broken) as error:
            if pause is None:
                raise RunError(
                    f"cannot fetch {_names(missing)} from {url}: {_cause(error)}; try again later, put {ARCHIVE} into "
                    f"{folder.parent}, name a folder that holds {FOLDER}/ with --data-dir, or try `train.py --demo`"
                ) from error
            print(f"the transfer broke ({_cause(error)}): next attempt in {pause:g} s", file=sys.stderr)
            time.sleep(pause)


def _unpack(source: BinaryIO, folder: Path, specs: Specs, missing: set[str]) -> None:
    """Write the missing members as they arrive, remove each from `missing`, and stop reading after the last."""
    members = {f"{FOLDER}/{name}": name for name in specs}  # exact names: nothing is written anywhere else
    total = sum(spec.bytes for spec in specs.values())
    try:
        with (
            tarfile.open(fileobj=source, mode="r|gz") as archive,
            tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar,  # None: on a terminal only
        ):
            for member in archive:
                name = members.get(member.name)
                if name is None or not member.isreg():
                    continue
                bar.set_description(name)
                content = _chunks(archive.extractfile(member), bar)
                if name in missing:
                    _write(folder / name, content, specs[name])
                    missing.remove(name)
                else:  # already there: read anyway, so that the bar moves on
                    for _ in content:
                        pass
                if not missing:
                    return
    except STREAM_ERRORS as error:
        raise _Broken(_cause(error)) from error
    raise _Broken(f"it ends before {_names(missing)}")


def _chunks(source: BinaryIO, bar: tqdm) -> Iterator[bytes]:
    try:
        while chunk := source.read(CHUNK):
            bar.update(len(chunk))
            yield chunk
    except STREAM_ERRORS as error:  # caught here, apart from errors of writing
        raise _Broken(_cause(error)) from error


def _write(path: Path, content: Iterator[bytes], spec: FileSpec) -> None:
    size, md5 = 0, hashlib.md5(usedforsecurity=False)
    with atomic_write(path) as temporary:
        with temporary.open("wb") as file:
            for chunk in content:
                size += len(chunk)
                if size > spec.bytes:
                    break
                md5.update(chunk)
                file.write(chunk)
        if (size, md5.hexdigest()) != spec:
            raise _Broken(f"{path.name} in it is not the official file: wrong size or MD5")


def _cause(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    return reason(error)


def _names(missing: set[str]) -> str:
    return ", ".join(sorted(missing))
