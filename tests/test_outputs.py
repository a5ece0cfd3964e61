"""Where outputs go: plain files, links, devices and pipes; beside other processes."""

import csv
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folders import fill

import evaluate
import predict
from harness import files, picture_cache
from harness.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
NAME = os.fsdecode(b"caf\xe9")


def write(path: Path, content: str = "new") -> None:
    files.write_text(path, content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# plain files and links


def test_a_file_that_another_program_holds_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows refuses it while a virus scanner reads the older file."""
    path, rename, refusals = tmp_path / "metrics.csv", os.replace, [1, 2, 3]

    def held(source: Path, target: Path) -> None:
        if refusals:
            refusals.pop()
            raise PermissionError(errno.EACCES, "Access is denied", target)
        rename(source, target)

    write(path, "old")
    monkeypatch.setattr(os, "replace", held)
    with pytest.raises(RunError, match="cannot write .*metrics.csv: "):
        write(path)
    assert path.read_text() == "old" and names(tmp_path) == ["metrics.csv"]
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))
    write(path)
    assert path.read_text() == "new" and not refusals and names(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755, 0o664])
def test_a_replaced_file_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")
    path.chmod(mode)
    write(path)
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_open_gives(tmp_path: Path) -> None:
    (tmp_path / "by open").touch()
    write(tmp_path / "by us")
    assert (tmp_path / "by us").stat().st_mode == (tmp_path / "by open").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="to give files away takes root")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.touch()
    os.chown(path, 12345, 23456)
    write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456) and path.read_text() == "new"


def test_of_a_link_the_target_is_replaced(tmp_path: Path) -> None:
    target, link, second = tmp_path / "deep" / "target.csv", tmp_path / "link", tmp_path / "second"
    target.parent.mkdir()
    link.symlink_to(target)
    second.symlink_to("link")
    write(link, "made through a link that led nowhere yet")
    assert target.read_text().startswith("made")
    target.chmod(0o600)
    write(second)
    assert link.is_symlink() and second.is_symlink() and target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600 and names(target.parent) == ["target.csv"]


def test_a_link_in_a_circle_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(RunError, match=f"cannot write {tmp_path}/a: "):
        write(tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_file_that_is_kept_takes_a_link_along(tmp_path: Path) -> None:
    """A commit renames last.pt to previous.pt: if it was a link, the link becomes previous.pt and nothing is lost."""
    (tmp_path / "big").write_text("old")
    (tmp_path / "last.pt").symlink_to(tmp_path / "big")
    with files.atomic_write(tmp_path / "last.pt", keep=tmp_path / "previous.pt") as temporary:
        temporary.write_text("new")
    assert ((tmp_path / "last.pt").read_text(), (tmp_path / "previous.pt").read_text()) == ("new", "old")


@pytest.mark.parametrize("name", ["x" * 255, "目" * 85, "%s.csv", "-", "a b", NAME])
def test_any_name_that_the_system_takes(name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    assert (tmp_path / name).read_text() == "new" and len(names(tmp_path)) == 1


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, happened, fsync, rename = tmp_path / "last.pt", [], os.fsync, os.replace
    write(path, "old")

    def synced(descriptor: int) -> None:
        status = os.fstat(descriptor)
        happened.append(("synced", status.st_ino, status.st_size))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        happened.append(("renamed", os.stat(source).st_ino, os.stat(source).st_size))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with files.atomic_write(path, keep=tmp_path / "previous.pt") as temporary:
        temporary.write_text("newer")
    inode = path.stat().st_ino
    assert happened[0] == ("synced", inode, 5) and happened[-1] == ("renamed", inode, 5)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    write(path, "old")
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and names(tmp_path) == ["out.csv"]


# what is no plain file


def test_a_pipe_gets_the_content_and_stays(tmp_path: Path) -> None:
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    write(path, "x" * 200_000)
    reader.join(timeout=30)
    assert got == ["x" * 200_000] and stat.S_ISFIFO(path.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_devices_are_written_into() -> None:
    before = os.stat("/dev/null").st_ino
    write(Path("/dev/null"))
    assert os.stat("/dev/null").st_ino == before and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(RunError, match="cannot write /dev/full: No space left on device; make room"):
        write(Path("/dev/full"))


def test_a_link_to_a_device_stays(tmp_path: Path) -> None:
    (tmp_path / "nothing").symlink_to("/dev/null")
    write(tmp_path / "nothing")
    assert os.readlink(tmp_path / "nothing") == "/dev/null" and names(tmp_path) == ["nothing"]


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot write .*: Is a directory"):
        write(tmp_path)


@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "file", "link"])
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_own_output_is_written_behind_what_is_printed(path: str, to: str, tmp_path: Path) -> None:
    """Also where it is a plain file that the shell has opened, under its own name or by a link."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = "import sys; from pathlib import Path; from harness.files import write_text\n"
    code += f"print('printed'); write_text(Path({path!r}), 'written\\n'); print('after')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if path == "file" and to == "pipe":
        pytest.skip("that is an ordinary file")
    with open(tmp_path / "file", "w") as file:
        output = file if to == "file" else subprocess.PIPE
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, cwd=tmp_path, env=environment, stdout=output, text=True, check=True)
    said = (tmp_path / "file").read_text() if to == "file" else result.stdout
    assert said == "printed\nwritten\nafter\n" and names(tmp_path) == ["file", "link"]


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A file that is mounted alone, as containers have them."""
    (tmp_path / "source").write_text("old")
    (tmp_path / "mounted").touch()
    command = ["mount", "--bind", str(tmp_path / "source"), str(tmp_path / "mounted")]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path / "mounted"
    subprocess.run(["umount", str(tmp_path / "mounted")], check=True)


def test_a_mounted_file_is_written_into(mounted: Path) -> None:
    write(mounted)
    assert mounted.read_text() == (mounted.parent / "source").read_text() == "new"
    assert names(mounted.parent) == ["mounted", "source"]


def test_a_file_in_a_folder_that_takes_no_others_is_written_into(open_folder: Path) -> None:
    """Tested as another user where this one is root, whom no mode holds back."""
    path = open_folder / "fixed" / "out.csv"
    path.parent.mkdir()
    path.write_text("an older and longer text")
    path.chmod(0o666)
    path.parent.chmod(0o555)
    code = (
        "import os; from pathlib import Path; from harness.files import write_text\nos.getuid() or os.setuid(65534)\n"
    )
    code += f"write_text(Path({str(path)!r}), 'new')"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert path.read_text() == "new" and names(path.parent) == ["out.csv"]
    path.parent.chmod(0o755)


# beside other processes


def test_many_writers_of_one_file_leave_one_whole_content(tmp_path: Path) -> None:
    path, contents = tmp_path / "out.csv", [str(n) * 50_000 for n in range(10)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda content: write(path, content), contents * 5))
    assert path.read_text() in contents and names(tmp_path) == ["out.csv"]


def test_parallel_starts_on_a_fresh_folder_of_pictures(tmp_path: Path, monkeypatch, capsys) -> None:
    """Each has the squares and keeps them, though all are writing the same file at the same time."""
    folder = fill(tmp_path / "pictures", 3)
    paths, all_write, save = sorted(folder.glob("*/*")), threading.Barrier(4, timeout=60), np.savez

    def save_together(file, **arrays) -> None:
        all_write.wait()
        save(file, **arrays)
        all_write.wait()

    monkeypatch.setattr(np, "savez", save_together)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: picture_cache.squares(folder, paths, 32), range(4)))
    assert all(torch.equal(images, found[0]) for images in found) and "cannot be kept" not in capsys.readouterr().out
    assert [path.name for path in folder.iterdir() if path.is_file()] == [".squares-32px.npz"]
    assert torch.equal(picture_cache.squares(folder, paths, 32), found[0])


def test_leftovers_of_killed_writers_go_with_time_and_others_stay(tmp_path: Path) -> None:
    old, young, foreign = (tmp_path / name for name in (".out.csv.0123abcd.tmp", ".out.csv.0123abce.tmp", ".x.csv.tmp"))
    for path in (old, young, foreign):
        path.touch()
    hour_ago = time.time() - files.STALE - 60
    os.utime(old, (hour_ago, hour_ago))
    os.utime(foreign, (hour_ago, hour_ago))
    write(tmp_path / "out.csv")
    assert names(tmp_path) == sorted([young.name, foreign.name, "out.csv"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_room_is_asked_for_where_there_is_none(number: int, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="make room or choose another folder"), files.atomic_write(tmp_path / "a"):
        raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EIO])
def test_and_not_elsewhere(number: int, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{os.strerror(number)}; choose another folder"):
        with files.atomic_write(tmp_path / "a"):
            raise OSError(number, os.strerror(number))


# commands and their outputs


def test_predict_writes_through_links_and_keeps_the_table(tiny_run, picture, tmp_path, capsys) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "table.csv")
    flags = ["--csv", tmp_path / "link.csv", "--json", "/dev/null"]
    assert predict.main([str(word) for word in (tiny_run, picture, *flags)]) == 0
    rows = list(csv.reader((tmp_path / "table.csv").open()))
    assert (tmp_path / "link.csv").is_symlink() and rows[1][0] == str(picture)
    assert rows[1][1] in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["csv", "json"])
def test_a_disk_that_is_full_does_not_cost_the_table(flag: str, tiny_run, picture, capsys) -> None:
    with pytest.raises(RunError, match="cannot write /dev/full"):
        predict.main([str(tiny_run), str(picture), f"--{flag}", "/dev/full"])
    assert str(picture) in capsys.readouterr().out


class Closed:
    """A terminal that takes nothing."""

    encoding = "utf-8"

    def write(self, _: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        pass


def test_a_table_that_cannot_be_printed_costs_no_file(tiny_run, picture, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        predict.main(
            [str(tiny_run), str(picture), "--csv", str(tmp_path / "t.csv"), "--json", str(tmp_path / "t.json")]
        )
    assert str(picture) in (tmp_path / "t.csv").read_text() and (tmp_path / "t.json").exists()


def test_nor_an_evaluation(tiny_run, small_demo, empty_plots, tmp_path, monkeypatch) -> None:
    printed = print
    monkeypatch.setattr(evaluate.report, "text", lambda *_: sys.stdout.write("") or printed(file=Closed()))
    with pytest.raises(BrokenPipeError):
        evaluate.main([str(tiny_run), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "report.json").exists() and (tmp_path / "out" / "confusion.png").exists()
