"""The kept squares: a change of content is noticed however it came about, and nothing else is opened again."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folders import TINY, draw
from PIL import Image

import train
from harness import picture_cache, picture_file, picture_folder
from harness.errors import RunError

MOMENT = (10**18, 10**18)  # nanoseconds since 1970


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Bitmaps of one size and one modification time, as an archive leaves them."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            path = tmp_path / "set" / name / f"{number}.bmp"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            os.utime(path, ns=MOMENT)
    return tmp_path / "set"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The pictures that are opened from now on."""
    paths: list[Path] = []
    really = picture_file.open_square
    monkeypatch.setattr(picture_file, "open_square", lambda path, size: paths.append(path) or really(path, size))
    return paths


def load(folder: Path) -> torch.Tensor:
    """The squares, which must be those of the files as they are now."""
    paths = sorted(folder.glob("*/*.*"))
    squares = picture_folder.load(folder, 32).images
    assert torch.equal(
        squares, torch.stack([torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths])
    )
    return squares


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def _swap_pictures(folder: Path) -> None:
    swap(folder / "cat" / "0.bmp", folder / "dog" / "0.bmp")


def _swap_classes(folder: Path) -> None:
    swap(folder / "cat", folder / "dog")


def _write_over(folder: Path) -> None:
    content = bytearray((folder / "cat" / "0.bmp").read_bytes())
    content[-100:] = bytes(100)
    with open(folder / "cat" / "0.bmp", "r+b") as file:  # the same inode
        file.write(content)


def _copy_over(folder: Path) -> None:
    shutil.copy2(folder / "cat" / "0.bmp", folder.parent / "kept.bmp")
    swap(folder / "cat" / "1.bmp", folder / "dog" / "1.bmp")


def _exchange_contents(folder: Path) -> None:
    one, other = folder / "cat" / "0.bmp", folder / "dog" / "0.bmp"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _turn_link(folder: Path) -> None:
    target = folder.parent / "other.bmp"
    draw(target, (9, 9, 200), 3, (32, 32))
    (folder / "cat" / "0.bmp").unlink()
    (folder / "cat" / "0.bmp").symlink_to(target)


@pytest.mark.parametrize(
    "change", [_swap_pictures, _swap_classes, _write_over, _copy_over, _exchange_contents, _turn_link]
)
def test_change_of_content_is_noticed_behind_equal_names_sizes_and_times(images, change):
    before = load(images)
    change(images)
    for path in images.glob("*/*.bmp"):
        os.utime(path, ns=MOMENT)
    assert not torch.equal(load(images), before)


def test_run_on_swapped_pictures_is_refused(images, empty_plots):
    command = [
        *TINY,
        "--images",
        str(images),
        "--image-size",
        "32",
        "--views",
        "4",
        "--out",
        str(images.parent / "run"),
    ]
    assert train.main(command) == 0
    _swap_pictures(images)
    with pytest.raises(RunError, match="holds a run with other settings.*digest"):
        train.main(command)


def test_only_new_contents_are_opened(images, opened):
    load(images)
    assert len(opened) == 8
    opened.clear()
    _swap_pictures(images)
    (images / "dog" / "3.bmp").rename(images / "dog" / "new name.bmp")
    for path in images.glob("*/*.bmp"):
        os.utime(path)  # as after a copy to another disk
    draw(images / "cat" / "4.bmp", (200, 9, 9), 5, (32, 32))
    (images / "dog" / "2.bmp").unlink()
    load(images)
    assert opened == [images / "cat" / "4.bmp"]
    opened.clear()
    load(images)
    assert opened == []


def test_an_interrupted_opening_goes_on_where_it_was(images, opened, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    really, last = picture_file.open_square, images / "dog" / "1.bmp"

    def interrupt(path: Path, size: int) -> torch.Tensor:
        if path == last:
            raise KeyboardInterrupt
        return really(path, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(picture_file, "open_square", interrupt)
        picture_folder.load(images, 32)
    done = {Path(path) for path in opened}
    assert 5 <= len(done) < 8
    opened.clear()
    load(images)
    assert {*opened} == {*images.glob("*/*.bmp")} - done


def test_an_interruption_costs_nothing_that_was_kept_before(images, opened, monkeypatch):
    load(images)
    for path in images.glob("*/*.bmp"):
        os.utime(path)  # as after a copy to another disk: all are hashed again
    really, last = picture_cache.digest_of, images / "dog" / "1.bmp"

    def interrupt(path: Path) -> str:
        if path == last:
            raise KeyboardInterrupt
        return really(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(picture_cache, "digest_of", interrupt)
        picture_folder.load(images, 32)
    opened.clear()
    load(images)
    assert opened == []


def test_what_is_unchanged_is_not_written_again(images, monkeypatch):
    load(images)
    monkeypatch.setattr(picture_cache, "TRUSTS_STATUS", False)
    before = (images / ".squares-32px.npz").stat().st_ino
    load(images)
    assert (images / ".squares-32px.npz").stat().st_ino == before


def test_what_lacks_memory_is_opened_once_more_alone(images, monkeypatch):
    really, tried = picture_file.decode, []

    def scarce(file: Path) -> Image.Image:
        tried.append(file)
        if tried.count(images / "cat" / "2.bmp") == 1 and file == images / "cat" / "2.bmp":
            raise MemoryError
        return really(file)

    monkeypatch.setattr(picture_file, "decode", scarce)
    load(images)
    assert len(tried) == 9 and tried[-1] == images / "cat" / "2.bmp"


def test_what_always_lacks_memory_is_named(images, monkeypatch):
    def scarce(image: Image.Image, *_: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", scarce)
    with pytest.raises(RunError, match=r"cannot read .*0.bmp: not enough memory.* and 5 more; repair them"):
        picture_folder.load(images, 32)


def test_unchanged_files_are_not_read(images, monkeypatch):
    load(images)
    monkeypatch.setattr(picture_cache, "digest_of", lambda path: pytest.fail("a picture was read again"))
    load(images)


def test_where_times_do_not_tell_of_changes_all_files_are_hashed(images, opened, monkeypatch):
    """As on Windows, whose files have no time of change."""
    monkeypatch.setattr(picture_cache, "TRUSTS_STATUS", False)
    monkeypatch.setattr(picture_cache, "status_of", lambda path: [1, 2, 3, 4])
    load(images)
    opened.clear()
    _write_over(images)
    load(images)
    assert opened == [images / "cat" / "0.bmp"]


def test_squares_of_another_version_are_not_used(images, opened, monkeypatch):
    load(images)
    opened.clear()
    monkeypatch.setattr(picture_cache, "VERSION", picture_cache.VERSION + 1)
    load(images)
    assert len(opened) == 8


def test_index_says_of_which_files_the_squares_are(images):
    load(images)
    with np.load(images / ".squares-32px.npz") as kept:
        names = [name for name, _, _ in json.loads(str(kept["index"]))["files"]]
        assert names == [path.relative_to(images).as_posix() for path in sorted(images.glob("*/*.bmp"))]
        assert kept["images"].shape == (8, 3, 32, 32)
