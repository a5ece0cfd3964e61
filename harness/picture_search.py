"""The pictures below a folder, and everything else there, which is passed over, but never silently."""

import errno
import functools
import os
import stat
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from harness import files
from harness.errors import reason
from harness.text import MOST_LISTED, listed, printable

CACHE_PREFIX = ".squares-"  # of the files in which picture_cache keeps what has been read
# what file systems, archivers and Python leave beside people's files, in lower case
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
)
# formats that Pillow knows without decoding them, or only by running another program
NOT_DECODED = frozenset(("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"))
# pictures by their names, even if this Pillow cannot read them
OTHER_PICTURES = frozenset(
    ".3fr .ai .arw .avif .avifs .cr2 .cr3 .crw .dcr .dng .emf .eps .erf .gpr .heic .heif .hif .iiq .jxl .kdc .mrw .nef "
    ".nrw .orf .pef .ps .raf .rw2 .rwl .sr2 .srf .srw .svg .webp .wmf .x3f".split()
)
SHOWN = 3  # names of a kind

HIDDEN = "hidden"
IN_THE_CLOUD = "not downloaded from iCloud"
SYSTEM = "left by the system or an archiver"
OTHER_KIND = "not a picture by its name"
NOWHERE = "link leads nowhere"
GONE = "gone, or its path is too long"
LOOP = "link leads back to a folder above it"
NOT_A_FILE = "neither a file nor a folder"
OUTSIDE = "picture outside the class folders"
NOT_READ = "picture of a kind that must be converted first"
HARMLESS = (HIDDEN, SYSTEM, OTHER_KIND)  # anything passed over for another reason may be a picture


class PassedOver:
    """What was passed over, by reason."""

    def __init__(self) -> None:
        self.paths: dict[str, list[Path]] = {}

    def add(self, why: str, path: Path) -> None:
        self.paths.setdefault(why, []).append(path)

    def update(self, other: "PassedOver") -> None:
        for why, paths in other.paths.items():
            self.paths.setdefault(why, []).extend(paths)

    def lines(self, folder: Path, reasons: tuple[str, ...] | None = None) -> list[str]:
        """A line for each reason (of `reasons` only, where given) with the number of paths and the first few names."""
        lines = []
        for why, paths in self.paths.items():
            if reasons is not None and why not in reasons:
                continue
            names = ", ".join(printable(path.relative_to(folder)) for path in sorted(paths)[:SHOWN])
            more = ", …" if len(paths) > SHOWN else ""
            lines.append(f"{printable(folder)}: passed over {len(paths):,}, {why}{_kinds(paths, why)}: {names}{more}")
        return lines

    def possible_pictures(self) -> list[tuple[Path, str]]:
        """Those that may be pictures, or folders of them, each with its reason."""
        return [(path, why) for why, paths in self.paths.items() if why not in HARMLESS for path in sorted(paths)]


def _kinds(paths: list[Path], why: str) -> str:
    """How many have each suffix, for files passed over because of their names."""
    if why not in (OTHER_KIND, NOT_READ) or len(paths) == 1:
        return ""
    counts = Counter(path.suffix.lower() or "no suffix" for path in paths).most_common(SHOWN + 2)
    return f" ({', '.join(f'{suffix} {count:,}' for suffix, count in counts)})"


def named_in_full(sentences: list[str]) -> str:
    """The sentences joined into one. If that leaves some out, all are printed on stderr first, one per line."""
    if len(sentences) > MOST_LISTED:
        print(*sentences, sep="\n", file=sys.stderr)
    return listed(sentences)


@functools.cache
def suffixes() -> frozenset[str]:
    """Lower-case suffixes of the pictures to look for: all that Pillow decodes by itself."""
    known = Image.registered_extensions().items()
    return frozenset(name for name, kind in known if kind in Image.OPEN and kind not in NOT_DECODED) | {".mpo"}


def find(folder: Path, passed: PassedOver, above: Sequence[object] = ()) -> list[Path]:
    """All pictures in a folder and below it, by their names, links followed. The rest goes into `passed`.

    `above`: the identities of folders that links must not lead back to either.

    They are sorted by the composed characters of their names, in the same way on every system: the
    split and a data set's digest depend on it.
    """
    return sorted(_find(folder, [*above], passed), key=_order)


def _order(path: Path) -> tuple[list[str], tuple[str, ...]]:
    """Windows ignores case when it compares paths, and a Mac may decompose the letters of names."""
    return [unicodedata.normalize("NFC", part) for part in path.parts], path.parts


def _find(folder: Path, above: list[object], passed: PassedOver) -> Iterator[Path]:
    identity = files.identity(folder)
    if identity in above:
        passed.add(LOOP, folder)
        return
    try:
        folders, pictures = look_into(folder, passed)
    except OSError as error:
        passed.add(f"folder cannot be read ({reason(error)})", folder)
        return
    yield from pictures
    for path in folders:
        yield from _find(path, [*above, identity], passed)


def look_into(folder: Path, passed: PassedOver) -> tuple[list[Path], list[Path]]:
    """The folders and the pictures directly in a folder, each sorted; the rest goes into `passed`. Raises OSError."""
    folders, pictures = [], []
    for name in sorted(os.listdir(folder)):
        path = folder / name
        if name.startswith((CACHE_PREFIX, f".{CACHE_PREFIX}")):  # finished or half written
            continue
        why, is_folder = _judge(path)
        if why is not None:
            passed.add(why, path)
        else:
            (folders if is_folder else pictures).append(path)
    return folders, pictures


def _judge(path: Path) -> tuple[str | None, bool]:
    """Why a path is passed over, None if it is not; and whether it is a folder."""
    if path.name.startswith("."):
        placeholder = path.suffix == ".icloud" and Path(path.stem).suffix.lower() in suffixes() | OTHER_PICTURES
        return IN_THE_CLOUD if placeholder else HIDDEN, False
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return f"cannot be looked at ({reason(error)})", False
        return NOWHERE if os.path.islink(path) else GONE, False
    if stat.S_ISDIR(mode):
        return (SYSTEM if path.name.lower() in SYSTEM_FOLDERS else None), True
    if not stat.S_ISREG(mode):
        return NOT_A_FILE, False
    suffix = path.suffix.lower()
    if suffix in suffixes():
        return None, False
    return (NOT_READ if suffix in OTHER_PICTURES else OTHER_KIND), False
