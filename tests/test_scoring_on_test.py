"""Scoring on the test images: it is counted, and nothing is scored that could not be counted."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_evaluate import accuracy, by_hand, read, run

import data
from harness import checkpoint, download, scoring_ledger
from harness.errors import RunError

pytestmark = pytest.mark.usefixtures("small_demo", "empty_plots")


def test_scoring_on_test_is_counted(tiny_run, altered, capsys):
    folder = altered(seed=5)
    size = checkpoint.load_network(folder).eval_size
    expected = accuracy(*by_hand(folder / "last.pt", size, "test"))
    for times in (1, 2, 3):
        assert run(folder, "--split", "test") == 0
        said = capsys.readouterr()
        assert "50 test images" in said.out and "selected on these" not in said.out
        assert ("was scored on test" in said.err) == (times > 1)
        if times == 3:
            assert "2 times before" in said.err
        scorings = json.loads((folder / scoring_ledger.FILE).read_text())
        assert len(scorings) == times
        facts = {"accuracy": expected, "size": size, "tta": "none", "ensemble_of": 1}
        assert facts.items() <= scorings[-1].items()
        assert scorings[-1]["checkpoint"] == str(folder / "last.pt") and len(scorings[-1]["sha256"]) == 64
    assert read(folder / "evaluation-test")["networks"][0]["results"][0]["accuracy"] == expected


def test_a_broken_count_is_not_passed_over(altered, capsys):
    folder = altered()
    (folder / scoring_ledger.FILE).write_text('{"not": "a list"}')
    assert run(folder, "--split", "test") == 1
    assert f"{folder / scoring_ledger.FILE}, which counts" in capsys.readouterr().err
    assert (folder / scoring_ledger.FILE).read_text() == '{"not": "a list"}'


def test_what_cannot_be_counted_is_not_scored(open_folder):
    folder, user = open_folder / "run", os.geteuid()
    folder.mkdir()
    folder.chmod(0o555)
    try:
        if not user:
            os.seteuid(65534)
        with pytest.raises(RunError, match=r"run cannot be written \(Permission denied\), so .* copy the run"):
            scoring_ledger.warn([folder])
    finally:
        os.seteuid(user)


def test_a_score_that_could_not_be_counted_is_not_shown(altered, capsys, monkeypatch):
    def full(folder: Path, **scoring: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(scoring_ledger, "add", full)
    assert run(altered(), "--split", "test") == 1
    said = capsys.readouterr()
    assert "the disk is full" in said.err and "%" not in said.out


def test_missing_test_images_are_not_fetched(altered, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    assert run(altered(name="original"), "--split", "test", "--data-dir", tmp_path) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the test images are missing: test_X.bin") and said.count("\n") == 1
    assert said.endswith("without --split test fetches all four\n")
    assert not (tmp_path / data.FOLDER).exists()


def test_the_count_refuses_what_is_no_list(tmp_path):
    assert scoring_ledger.read(tmp_path) == []
    for text in ("", "[1]", "\xff"):
        (tmp_path / scoring_ledger.FILE).write_text(text, encoding="latin-1")
        with pytest.raises(RunError, match="move it away"):
            scoring_ledger.add(tmp_path, accuracy=1.0)


def test_an_ensemble_of_one_folder_is_one_scoring(tiny_run, tmp_path, capsys):
    folder = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    both = (folder / "last.pt", folder / "previous.pt")
    for times in (1, 2):
        assert run(*both, "--ensemble", "--split", "test") == 0
        assert len(scoring_ledger.read(folder)) == times
    assert [facts["epoch"] for facts in scoring_ledger.read(folder)[-1]["members"]] == [4, 3]
    assert capsys.readouterr().err.count("was scored on test once before") == 1


def test_every_network_of_an_ensemble_or_a_pair_is_counted_and_warned_of(tiny_runs, tmp_path, capsys):
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in tiny_runs]
    assert run(*folders, "--ensemble", "--split", "test") == 0
    for folder in folders:
        (scoring,) = scoring_ledger.read(folder)
        assert scoring["ensemble_of"] == len(folders)
        assert [each["checkpoint"] for each in scoring["members"]] == [str(each / "last.pt") for each in folders]
    capsys.readouterr()
    assert run(folders[0], "--against", folders[1], "--split", "test") == 0
    said = capsys.readouterr().err
    assert all(f"{folder} was scored on test once before" in said for folder in folders[:2])
    assert [len(scoring_ledger.read(folder)) for folder in folders[:2]] == [2, 2]


def test_the_warning_is_of_the_last_scoring(tmp_path, capsys):
    for accuracy_then in (0.25, 0.75):
        scoring_ledger.add(tmp_path, checkpoint=f"a/{accuracy_then}.pt", accuracy=accuracy_then)
    first, second = scoring_ledger.read(tmp_path)
    assert (first["accuracy"], second["accuracy"]) == (0.25, 0.75)
    scoring_ledger.warn([tmp_path])
    assert f"2 times before (last {second['date']}: 0.75.pt, accuracy 0.75)" in capsys.readouterr().err
