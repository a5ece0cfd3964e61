"""What is looked for in folders, and that nothing is passed over without a word."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from picture_folders import COLOURS, draw, fill
from PIL import Image

import predict
from harness import picture_file, picture_folder, picture_search
from harness.errors import RunError
from harness.picture_search import HARMLESS, PassedOver, find


def search(folder: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Pictures found and what is passed over by the reason, as relative names."""
    passed = PassedOver()
    found = [path.relative_to(folder).as_posix() for path in find(folder, passed)]
    return found, {why: [p.relative_to(folder).as_posix() for p in paths] for why, paths in passed.paths.items()}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_every_entry_is_found_or_passed_over_for_a_reason(tmp_path):
    pictures = ["a.png", "b.JPG", "deep/er/c.webp"]
    touch(
        tmp_path, *pictures, "notes.txt", "deep/Thumbs.db", "new.heic", ".hidden.png", ".thumbs/d.png", "deep/._c.webp"
    )
    touch(tmp_path, "__MACOSX/._a.png", "deep/@eaDir/a.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    touch(tmp_path, "raw.PEF", ".far.jpg.icloud", ".notes.txt.icloud")
    found, passed = search(tmp_path)
    assert found == pictures
    assert {why: sorted(names) for why, names in passed.items()} == {
        "hidden": [".hidden.png", ".notes.txt.icloud", ".thumbs", "deep/._c.webp"],
        "not downloaded from iCloud": [".far.jpg.icloud"],
        "left by the system or an archiver": ["__MACOSX", "deep/@eaDir"],
        "not a picture by its name": ["deep/Thumbs.db", "notes.txt"],
        "picture of a kind that must be converted first": ["new.heic", "raw.PEF"],
        "neither a file nor a folder": ["pipe.png"],
        "link leads nowhere": ["lost.jpg", "self.jpg"],
    }


def test_linked_pictures_and_folders_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "elsewhere", "a.png", "more/b.png")
    folder = tmp_path / "class"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "c.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "elsewhere" / "more" / "up").symlink_to(folder)
    (folder / "self").symlink_to(".")
    touch(folder, ".hidden")
    found, passed = search(folder)
    assert found == ["c.png", "linked/a.png", "linked/more/b.png"]
    back = "link leads back to a folder above it"
    assert passed == {back: ["linked/more/up", "self"], "hidden": [".hidden"]}  # each named once


def test_a_class_that_leads_back_to_the_others_does_not_take_their_pictures(tmp_path, capsys):
    images = fill(tmp_path / "set", 2)
    (images / "sky" / "up").symlink_to("..")
    assert len(picture_folder.load(images, 32).labels) == 6
    assert f"passed over 1, link leads back to a folder above it: {Path('sky', 'up')}" in capsys.readouterr().out


def test_pictures_that_this_pillow_does_not_know_are_pictures_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_search, "suffixes", lambda: frozenset((".png",)))
    touch(tmp_path, "a.png", "b.avif", "c.webp", "d.txt")
    converted = "picture of a kind that must be converted first"
    assert search(tmp_path) == (["a.png"], {converted: ["b.avif", "c.webp"], "not a picture by its name": ["d.txt"]})


def test_folders_are_told_apart_where_files_have_no_number(tmp_path, monkeypatch):
    """Some Windows volumes give every path the inode 0."""
    touch(tmp_path, "a.png", "deep/er/b.png")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    stat = os.stat

    def without_number(path, *args, **named):
        status = stat(path, *args, **named)
        return os.stat_result((status.st_mode, 0, *status[2:]))

    monkeypatch.setattr(os, "stat", without_number)
    assert search(tmp_path) == (["a.png", "deep/er/b.png"], {"link leads back to a folder above it": ["deep/up"]})


def test_order_is_by_the_characters_of_names_whatever_the_system_compares(tmp_path, monkeypatch):
    touch(tmp_path, "DSCF0001.JPG", "DSC_0001.JPG", "a.jpg", "Z.jpg", "b/z.jpg")
    touch(tmp_path, "e\u0301.jpg", "f.jpg")  # as a Mac writes é, which comes after f when it is composed
    expected = ["DSCF0001.JPG", "DSC_0001.JPG", "Z.jpg", "a.jpg", "b/z.jpg", "f.jpg", "e\u0301.jpg"]
    assert search(tmp_path)[0] == expected
    monkeypatch.setattr(Path, "__lt__", lambda one, other: str(one).lower() < str(other).lower())  # as on Windows
    assert search(tmp_path)[0] == expected


def test_a_file_that_went_away_is_no_link(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "b.png")
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: [*names(folder), "c.png"])
    assert search(tmp_path) == (["a.png", "b.png"], {"gone, or its path is too long": ["c.png"]})


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_every_kind_that_pillow_decodes_is_looked_for(tmp_path):
    """All suffixes of the formats that Pillow here can write and read, against a picture written in each."""
    Image.init()
    image = Image.new("RGB", (16, 16), "red")
    tried = 0
    for suffix, kind in sorted(Image.EXTENSION.items()):
        path = tmp_path / f"picture{suffix}"
        try:
            image.save(path, kind)
            Image.open(path).load()
        except Exception:
            path.unlink(missing_ok=True)
            continue
        if kind in ("EPS", "PDF"):  # opened by another program, or not at all
            path.unlink()
            continue
        tried += 1
        assert search(tmp_path)[0] == [path.name], suffix
        assert picture_file.open_square(path, 8).shape == (3, 8, 8)
        path.unlink()
    assert tried >= 20


@pytest.fixture
def without_rights(open_folder: Path) -> Iterator[Path]:
    """A folder that everybody may enter, read by somebody who is not the superuser."""
    user = os.geteuid()
    yield open_folder
    os.seteuid(user)


def become_nobody() -> None:
    if not os.geteuid():
        os.seteuid(65534)


def test_folders_without_rights_are_named(without_rights, capsys):
    images = fill(without_rights / "set", 3)
    draw(images / "sky" / "2024" / "more.png", COLOURS["sky"], 7)
    (images / "sky" / "2024").chmod(0)
    become_nobody()
    assert len(picture_folder.load(images, 32).labels) == 9
    assert "passed over 1, folder cannot be read (Permission denied): sky/2024" in capsys.readouterr().out


def test_class_without_rights_is_refused(without_rights):
    images = fill(without_rights / "set", 3)
    (images / "leaf").chmod(0)
    become_nobody()
    with pytest.raises(RunError, match=r"class leaf has no pictures: .*leaf.*cannot be read \(Permission denied\)"):
        picture_folder.load(images, 32)


def test_reports_count_name_the_first_and_tell_the_kinds(tmp_path):
    touch(tmp_path, *(f"cat/{i}.txt" for i in range(1200)), "cat/plain", "dog/x.heic")
    passed = PassedOver()
    assert find(tmp_path, passed) == []
    assert passed.lines(tmp_path) == [
        f"{tmp_path}: passed over 1,201, not a picture by its name (.txt 1,200, no suffix 1): "
        "cat/0.txt, cat/1.txt, cat/10.txt, …",
        f"{tmp_path}: passed over 1, picture of a kind that must be converted first: dog/x.heic",
    ]
    assert passed.lines(tmp_path, HARMLESS) == passed.lines(tmp_path)[:1]
    assert passed.possible_pictures() == [(tmp_path / "dog" / "x.heic", picture_search.NOT_READ)]


def test_this_programs_own_files_are_no_news(tmp_path, capsys):
    images = fill(tmp_path / "set", 2)
    picture_folder.load(images, 32)
    (images / "..squares-32px.npz.tmp").touch()  # of a killed run
    picture_folder.load(images, 32)
    assert capsys.readouterr().out == ""


def test_what_lies_beside_the_classes_is_named(tmp_path, capsys):
    images = fill(tmp_path / "set", 2)
    touch(images, "__MACOSX/apple/._apple0.png", ".DS_Store", "labels.csv")
    draw(images / "cover.png", (1, 2, 3), 5)
    (images / "pear").symlink_to(tmp_path / "nowhere")
    assert picture_folder.load(images, 32).classes == ("apple", "leaf", "sky")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("passed over ")[2] for line in lines] == [
        "1, hidden: .DS_Store",
        "1, left by the system or an archiver: __MACOSX",
        "1, not a picture by its name: labels.csv",
        "1, link leads nowhere: pear",
        "1, picture outside the class folders: cover.png",
    ]


def test_names_of_any_bytes_are_escaped(tmp_path, capsys):
    images = fill(tmp_path / "set", 2)
    (images / "sky").rename(images / os.fsdecode(b"caf\xe9"))
    (images / "leaf" / os.fsdecode(b"\xff.txt")).touch()
    assert picture_folder.load(images, 32).classes == ("apple", "caf\\xe9", "leaf")
    assert "leaf/\\xff.txt" in capsys.readouterr().out


def test_predict_names_what_it_leaves_out_and_its_status_says_whether_pictures_are_among_it(tiny_run, tmp_path, capsys):
    def status() -> int:
        words = [tiny_run, tmp_path / "set", "--json", tmp_path / "out.json", "--threads", "1", "--precision", "fp32"]
        return predict.main([str(word) for word in words])

    draw(tmp_path / "elsewhere" / "b.png", COLOURS["sky"], 1)
    draw(tmp_path / "set" / "a.png", COLOURS["sky"], 0)
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    touch(tmp_path / "set", "notes.txt", ".DS_Store")
    assert status() == 0
    said = capsys.readouterr()
    assert "a.png" in said.out and "linked/b.png" in said.out
    assert said.err.splitlines() == [
        f"{tmp_path / 'set'}: passed over 1, hidden: .DS_Store",
        f"{tmp_path / 'set'}: passed over 1, not a picture by its name: notes.txt",
    ]
    (tmp_path / "set" / "lost.jpg").symlink_to("nowhere.jpg")
    touch(tmp_path / "set", "new.heic")
    assert status() == 1
    assert f"skipped: {tmp_path / 'set' / 'lost.jpg'}: link leads nowhere" in capsys.readouterr().err.splitlines()
    skipped = json.loads((tmp_path / "out.json").read_text())["skipped"]
    left_out = {Path(each["file"]).name: each["reason"] for each in skipped}
    assert left_out.keys() == {"lost.jpg", "new.heic"} and "converted" in left_out["new.heic"]
