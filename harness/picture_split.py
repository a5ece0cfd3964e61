"""How a folder of pictures is laid out: class folders, or a split (train, val, test) into folders of class folders.

People name their splits in many ways: Training and Testing, seg_train, valid, val2017, DevSet. A split by any of these
is recognised. Folders that look like a split without being named as one are refused: they would be taken for classes.
"""

import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from harness.errors import RunError
from harness.picture_search import OUTSIDE, PassedOver, look_into
from harness.text import printable

PARTS = {
    "train": "train training trainval trn".split(),
    "val": "val valid validation validate validating dev development eval evaluation holdout".split(),
    "test": "test testing tst".split(),
}
PART_OF = {word: part for part, words in PARTS.items() for word in words}
FILLER = ("set", "data", "dataset", "images", "imgs", "pictures", "split", "s")  # trainset, testdata, tests
AS_SPLIT = "name them train and val (and test)"


class Layout(NamedTuple):
    """Folders of class folders. Without `val`, some pictures of `train` (which may be the root) will validate."""

    train: Path | None
    val: Path | None = None
    test: Path | None = None


class _Contents(NamedTuple):
    """What lies directly in a folder; its folders by their visible names."""

    folders: dict[str, Path]
    pictures: list[Path]


def visible_name(path: Path) -> str:
    """The name of a file or folder as a person sees it: composed (NFC), however a Mac wrote it, and printable."""
    return printable(unicodedata.normalize("NFC", path.name))


def part_by_name(name: str) -> str | None:
    """Which of train, val and test a folder's name means; None for none or several of them."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = re.split(r"[\W\d_]+", words.casefold())
    words += [word.removesuffix(filler) for word in words for filler in FILLER]
    parts = {PART_OF[word] for word in words if word in PART_OF}
    return parts.pop() if len(parts) == 1 else None


def find_layout(folder: Path, passed: PassedOver) -> Layout:
    """How a folder is laid out; folders beside a split go into `passed`.

    Raises RunError where two folders claim the same part, where a part is named but no class folders are in it, and
    where folders look like a split without being named as one, or the other way round.
    """
    beside = PassedOver()
    inside = _contents(folder, beside)
    contents = {path: _contents(path) for path in inside.folders.values()}
    parts = {path: part_by_name(path.name) for path in contents}
    split = {path: part for path, part in parts.items() if part and contents[path].folders}
    if not split:
        _refuse_loose_parts(contents, parts)
        _refuse_unnamed_split(folder, contents)
        return Layout(folder)
    others = [path for path in contents if path not in split]
    foreign = [path for path in others if parts[path] is None and (contents[path].pictures or contents[path].folders)]
    first = min(split)
    if len(set(split.values())) == 1 and foreign:
        raise RunError(
            f"{printable(first)} holds folders itself and is named as a part of a split, but {printable(min(foreign))} "
            f"beside it is not: for a split, {AS_SPLIT}; for a class, put its pictures directly into its folder"
        )
    found: dict[str, Path] = {}
    for path, part in sorted(split.items()):
        if part in found:
            raise RunError(f"{printable(found[part])} and {printable(path)} both look like {part}: {AS_SPLIT}")
        found[part] = path
    for path in others:
        if parts[path] in ("train", "val") and parts[path] not in found:
            raise RunError(f"{printable(path)} holds no class folders, unlike {printable(first)}")
        passed.add("folder beside a split" if parts[path] is None else "part of a split without class folders", path)
    passed.update(beside)
    for path in inside.pictures:
        passed.add(OUTSIDE, path)
    return Layout(**{part: _unwrapped(found[part], passed) if part in found else None for part in PARTS})


def _contents(folder: Path, passed: PassedOver | None = None) -> _Contents:
    """A folder that cannot be read seems empty here; it is reported when it is searched."""
    try:
        folders, pictures = look_into(folder, PassedOver() if passed is None else passed)
    except OSError:
        folders, pictures = [], []
    return _Contents({visible_name(path): path for path in folders}, pictures)


def _unwrapped(folder: Path, passed: PassedOver) -> Path:
    """`folder`, or the one in it that repeats its name or its part, as in seg_train/seg_train/CLASS."""
    beside = PassedOver()
    inside = _contents(folder, beside)
    if len(inside.folders) == 1 and not inside.pictures:
        (only,) = inside.folders.values()
        same = only.name.casefold() == folder.name.casefold() or part_by_name(only.name) == part_by_name(folder.name)
        if same and _contents(only).folders:
            passed.update(beside)
            return only
    return folder


def _refuse_loose_parts(contents: dict[Path, _Contents], parts: dict[Path, str | None]) -> None:
    """Raise RunError where the folders are all named as parts of a split, but hold loose pictures."""
    filled = sorted(path for path, inside in contents.items() if inside.pictures or inside.folders)
    named = [parts[path] for path in filled]
    if "train" in named and len(filled) > 1 and None not in named:
        raise RunError(
            f"{' and '.join(map(printable, filled))} are named as parts of a split, but hold loose pictures; "
            "sort those into a folder for each class, train/CLASS"
        )


def _refuse_unnamed_split(folder: Path, contents: dict[Path, _Contents]) -> None:
    """Raise RunError where folders are parts of a split by their content, or classes that are each split."""
    if len(contents) == 1:
        (path, inside), *_ = contents.items()
        if len(inside.folders) > 1 and not inside.pictures:
            raise RunError(f"{printable(folder)} holds only one folder, of folders: give --images {printable(path)}")
    for path, inside in contents.items():
        parts = {part_by_name(name) for name in inside.folders} - {None}
        if len(parts) > 1:
            raise RunError(
                f"{printable(path)} holds a split of its own ({', '.join(inside.folders)}); "
                "put the classes into the split: train/CLASS, not CLASS/train"
            )
    first_with: dict[str, Path] = {}
    for path, inside in contents.items():
        if inside.pictures:
            continue
        for other, shared in Counter(first_with[name] for name in inside.folders if name in first_with).items():
            if shared > 1:
                one, two, *_ = (name for name in inside.folders if first_with.get(name) == other)
                raise RunError(
                    f"{printable(other)} and {printable(path)} both hold folders {one} and {two}, as the parts of a "
                    f"split do: {AS_SPLIT}; for classes, put the pictures directly into their folders"
                )
        for name in inside.folders:
            first_with.setdefault(name, path)
