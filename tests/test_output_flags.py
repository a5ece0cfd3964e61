"""Outputs that a command line names: what may not be one ends with status 2, before anything is read or written."""

import os
from pathlib import Path

import pytest
from test_outputs import names

import compare
import evaluate
import export
import predict
import train
from harness import cli, errors


def status_2(main, capsys: pytest.CaptureFixture, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_tilde_is_the_home_folder_unless_it_is_a_name(tmp_path, monkeypatch) -> None:
    """Shells leave it as it is after --flag=, and on Windows."""
    monkeypatch.chdir(tmp_path)
    flags = ["--data-dir=~/data", "--init=~/first.pt", "--teacher", "~/a.pt", "~nobody-of-that-name/b.pt"]
    recipe, runtime = cli.parse_train(flags)
    home = Path.home()
    assert (runtime.data_dir, recipe.init) == (home / "data", str(home / "first.pt"))
    assert runtime.teacher == (home / "a.pt", Path("~nobody-of-that-name/b.pt"))
    (tmp_path / "~").mkdir()
    assert cli.parse_train(["--data-dir=~"])[1].data_dir == Path("~")


@pytest.mark.parametrize("flag", ["csv", "json", "sheet"])
def test_no_output_replaces_what_is_read(flag: str, tiny_run, picture, tmp_path, capsys) -> None:
    link = tmp_path / "link.png"
    link.symlink_to(picture)
    for path in (picture, link):
        assert f"--{flag} {path}" in status_2(predict.main, capsys, tiny_run, picture.parent, f"--{flag}", path)
    if flag != "sheet":
        status_2(predict.main, capsys, tiny_run / "last.pt", picture, f"--{flag}", tiny_run / "last.pt")


def test_nor_under_another_name(tiny_run, picture, tmp_path, capsys) -> None:
    """As on a disk that ignores case; here by a second name of the file."""
    other = tmp_path / "other.png"
    os.link(picture, other)
    assert "would replace another file" in status_2(predict.main, capsys, tiny_run, picture, "--sheet", other)
    words = ("--csv", tmp_path / "caf\u00e9", "--json", tmp_path / "CAFE\u0301")
    assert "would replace another file" in status_2(predict.main, capsys, tiny_run, picture, *words)


def test_no_output_replaces_another(tiny_run, picture, tmp_path, capsys) -> None:
    status_2(predict.main, capsys, tiny_run, picture, "--csv", tmp_path / "t", "--json", tmp_path / "in" / ".." / "t")


@pytest.mark.parametrize("name", ["x.pdf", "x", "png", "x.png.jpg", ".png"])
def test_plots_are_png_files_by_name(name: str, tiny_run, picture, tmp_path, capsys) -> None:
    assert "should end in .png" in status_2(compare.main, capsys, tiny_run, "--out", tmp_path / name)
    assert "should end in .png" in status_2(predict.main, capsys, tiny_run, picture, "--sheet", tmp_path / name)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (train.main, ["--out"]),
        (train.main, ["--images"]),
        (train.main, ["--data-dir"]),
        (evaluate.main, ["run", "--out"]),
        (evaluate.main, []),
        (train.main, ["--demo", "--init"]),
        (train.main, ["--demo", "--teacher"]),
        (evaluate.main, ["run", "--against"]),
        (predict.main, ["run", "a.png", "--csv"]),
        (predict.main, ["run"]),
        (export.main, ["run", "--out"]),
        (compare.main, ["run", "--out"]),
    ],
)
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_path_is_a_wrong_flag_and_not_the_current_folder(main, words, empty, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "expected a path" in status_2(main, capsys, *words, empty)
    assert names(tmp_path) == []


@pytest.mark.parametrize("device", "nosuch gpu mps cuda: cuda:x cuda:-1 cuda:01 cuda:256 cpu:7 CPU".split() + [""])
def test_a_device_that_cannot_be_is_a_wrong_flag(device: str, tiny_run, picture, capsys) -> None:
    for main, words in ((train.main, ["--demo"]), (predict.main, [tiny_run, picture]), (evaluate.main, [tiny_run])):
        said = status_2(main, capsys, *words, f"--device={device}")
        assert "--device is cpu, cuda" in said and ("a Mac's GPU is not supported" in said) == (device == "mps")


def test_the_exit_status_tells_what_could_not_be_written(tiny_run, picture, capfd) -> None:
    command = lambda: predict.main([str(tiny_run), str(picture), "--csv", "/dev/full"])  # noqa: E731
    assert errors.report(command) == 1
    assert capfd.readouterr().err.startswith("error: cannot write /dev/full: No space left on device")
