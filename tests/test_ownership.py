"""Nothing that a run or an evaluation did not write is replaced or removed unasked; what it wrote goes with it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import trained
from picture_folders import TINY, fill
from run_contents import hashes

import compare
import evaluate
import export
from harness import checkpoint, cli, ownership, scoring_ledger
from harness.errors import RunError
from harness.files import LOCK_FILE

pytestmark = pytest.mark.usefixtures("empty_plots", "small_demo")


# a run's folder


def every_file(folder: Path) -> dict[str, str]:
    """What tells each file from another version of itself; but the lock's, which old filelocks write anew."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): tag(path) for path in files}


def tag(path: Path) -> str:
    return f"{path.stat().st_ino} {path.stat().st_mtime_ns} {path.stat().st_size}"


def test_a_run_without_its_state_is_not_taken_over(run: Path) -> None:
    (run / "last.pt").unlink()
    (run / "previous.pt").unlink()
    before = every_file(run)
    with pytest.raises(RunError, match=r"holds best.pt, stage1.pt, metrics.csv and .* more, but no run .*--overwrite"):
        trained(run, "--seed", 5)
    assert every_file(run) == before
    assert trained(run, "--seed", 5, "--overwrite") == 0
    assert checkpoint.load_network(run).recipe.seed == 5


FOREIGN = ["best.pt", "metrics.csv", "summary.json", "config.json", "accuracy.png", "views-stage1.png", "stage2.pt"]


@pytest.mark.parametrize("name", FOREIGN)
def test_another_projects_file_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("{}")
    with pytest.raises(RunError, match=f"holds {name}, but no run that can be continued .*another --out"):
        trained(tmp_path / "run")
    assert (tmp_path / "run" / name).read_text() == "{}"
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {name, ".lock"}


@pytest.mark.parametrize("name", ["last.pt", "previous.pt"])
def test_nor_is_its_checkpoint_with_a_states_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_bytes(b"of another project")
    with pytest.raises(RunError, match=f"{name} is damaged, or not a checkpoint at all.*--overwrite"):
        trained(tmp_path / "run")
    assert (tmp_path / "run" / name).read_bytes() == b"of another project"


def test_files_of_other_names_stay_even_when_a_run_is_overwritten(run: Path) -> None:
    others = [
        "notes.txt",
        "own.png",
        "best.pth",
        "stages.pt",
        "stage1-keep.pt",
        "views-stage1-old.png",
        "my-last.pt",
        "model.bin",
        ".own.tmp",
        "evaluation.txt",
    ]
    others += [
        "events.out.tfevents.1.host.2.0",
        "evaluation-mine/sizes.png",
        "evaluation-mine/report.json",
        "sub/last.pt",
    ]
    for name in others:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    assert trained(run, "--overwrite", "--seed", 5) == 0
    assert [(run / name).read_text() for name in others] == ["mine"] * len(others)


@pytest.mark.parametrize("flag", ["--init", "--teacher"])
def test_a_run_is_not_overwritten_by_one_that_learns_from_it(flag: str, run: Path, capsys) -> None:
    before = (run / "last.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        trained(run, "--overwrite", flag, run / "last.pt")
    assert (
        stop.value.code == 2 and f"but the run learns from {run / 'last.pt'}, which is there" in capsys.readouterr().err
    )
    assert (run / "last.pt").read_bytes() == before


def test_a_run_is_not_removed_for_weights_that_do_not_fit(run: Path) -> None:
    before = (run / "last.pt").read_bytes()
    other = shutil.copy(run / "last.pt", run.parent / "other.pt")
    with pytest.raises(RunError, match="nothing.pt"):
        trained(run, "--overwrite", "--init", run.parent / "nothing.pt")
    with pytest.raises(RunError, match="does not fit"):
        trained(run, "--overwrite", "--init", other, "--planes", 4, 4, 16)
    assert (run / "last.pt").read_bytes() == before
    assert trained(run, "--overwrite", "--init", other, "--seed", 5) == 0
    assert checkpoint.load_network(run).recipe.seed == 5


def test_a_run_that_was_killed_in_its_first_epoch_begins_again(run: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("config.json", "views-stage1.png", ".lock"):
            path.unlink()
    (run / ".last.pt.0123abcd.tmp").write_text("half")
    assert trained(run) == 0 and checkpoint.load(run / "last.pt")["epoch"] == 4
    assert not list(run.glob(".*.tmp"))


def test_overwriting_takes_all_that_is_of_the_network_that_is_gone(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert evaluate.main([str(run), "--data-dir", str(run.parent / "data")]) == 0
    assert evaluate.main([str(run), "--best", "--data-dir", str(run.parent / "data"), "--size", "32", "48"]) == 0
    assert export.main([str(run), "--format", "weights"]) == 0
    scoring_ledger.add(run, accuracy=0.5)
    (run / "evaluation-val" / "notes.txt").write_text("mine")
    assert len(list(run.glob("evaluation-*/report.json"))) == 2
    capsys.readouterr()
    assert trained(run, "--overwrite", "--seed", 5) == 0
    assert "model.pt" in capsys.readouterr().out and (run / "model.pt").exists()
    assert scoring_ledger.read(run) == []
    assert [str(path.relative_to(run)) for path in run.glob("evaluation-*/*")] == ["evaluation-val/notes.txt"]
    assert not (run / "evaluation-val-best").exists()


@pytest.mark.parametrize("lost", [None, "last.pt"])  # as a kill between the two renames of a commit leaves it
@pytest.mark.parametrize("step", range(1, 8))
def test_a_removal_that_is_killed_leaves_a_run_or_goes_on(step: int, lost: str | None, run: Path, monkeypatch) -> None:
    """At each step but a whole run's first the next start, without --overwrite, begins from nothing."""
    if lost:
        (run / lost).unlink()
    calls = 0

    def counted(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == step + 1:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            ownership.remove_run(run)
    if step == 1 and not lost:
        assert not (run / "previous.pt").exists() and checkpoint.resume(run)[0]["epoch"] == 4
        return
    assert ownership.overwriting(run) and checkpoint.resume(run) == (None, None)
    assert trained(run, "--seed", 5) == 0
    assert checkpoint.load_network(run).recipe.seed == 5 and not ownership.overwriting(run)


def test_event_files_of_others_stay(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    folder.mkdir()
    theirs = folder / "events.out.tfevents.1234.host.5.0"
    theirs.write_text("theirs")
    for flags in ([], [], ["--overwrite"]):
        assert trained(folder, "--tensorboard", *flags) == 0
        ours = set(folder.glob("events.out.tfevents.*")) - {theirs}
        assert len(ours) == 1 and theirs.read_text() == "theirs"


@pytest.mark.parametrize("lost", ["best.pt", "stage1.pt"])
def test_weights_of_a_lost_epoch_go_with_it_and_come_back(lost: str, run: Path, capsys) -> None:
    """If last.pt is damaged, the run falls back by one epoch: files of that epoch's weights are of no known run."""
    epoch = checkpoint.load(run / lost)["epoch"]
    shutil.copy(run / "stage1.pt", run / "kept.pt")
    state = checkpoint.load(run / "last.pt")
    rows = state["rows"][: epoch - 1]
    checkpoint.save(run / "previous.pt", checkpoint.load(run / "previous.pt") | {"epoch": epoch - 1, "rows": rows})
    (run / "last.pt").write_bytes(b"damaged")
    state, damage = checkpoint.resume(run)
    assert (run / lost).exists()  # to read changes nothing
    warning = checkpoint.go_back(run, state, damage)
    assert state["epoch"] == epoch - 1 and "continuing from the state before it" in warning and lost in warning
    assert not (run / lost).exists() and (run / "kept.pt").exists()


def test_weights_of_earlier_epochs_stay_where_a_run_falls_back(run: Path, capsys) -> None:
    (run / "last.pt").write_bytes(b"damaged")
    best = checkpoint.load(run / "best.pt")["epoch"]
    assert trained(run) == 0
    said = capsys.readouterr().err
    assert ("best.pt from the lost epoch" in said) == (best == 4)
    assert [checkpoint.load(run / name)["epoch"] for name in ("stage1.pt", "best.pt")] == [3, best]


# where a run may lie


@pytest.mark.parametrize("out", [".", "cat/run", "run", "../pictures/run", "link/run"])
def test_no_run_lies_among_its_pictures(out: str, tmp_path: Path, capsys) -> None:
    """There its folder would be one more class, or its plots pictures of one."""
    pictures = fill(tmp_path / "pictures", 2)
    (tmp_path / "link").symlink_to(pictures)
    place = tmp_path / out if out.startswith("link") else pictures / out
    with pytest.raises(SystemExit) as stop:
        cli.parse_train([*TINY, "--images", str(pictures), "--out", str(place)])
    assert stop.value.code == 2 and "lies in the picture folder" in capsys.readouterr().err


def test_nor_by_default(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(fill(tmp_path / "pictures", 2))
    with pytest.raises(SystemExit):
        cli.parse_train([*TINY, "--images", "."])
    assert "the folder runs/pictures-demo-seed0 lies in the picture folder" in capsys.readouterr().err
    assert cli.parse_train([*TINY, "--images", ".", "--out", "../runs/a"])


@pytest.mark.parametrize("main", [evaluate.main, export.main])
def test_nor_an_evaluation_or_an_export(main, run: Path, tmp_path: Path, capsys) -> None:
    pictures = fill(tmp_path / "pictures", 2)
    copied = shutil.copy(run / "last.pt", pictures)
    before = hashes(pictures)
    for words in ([run, "--out", pictures / "report"], [copied]):
        with pytest.raises(SystemExit) as stop:
            main([*map(str, words), "--images", str(pictures)])
        assert stop.value.code == 2 and "lies in the picture folder" in capsys.readouterr().err
        assert hashes(pictures) == before


# evaluations


@pytest.mark.parametrize("name", ["sizes.png", "confusion.png", "report.json"])
def test_an_evaluation_replaces_nothing_of_others(name: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("{}")
    flags = [str(run), "--data-dir", str(tmp_path / "data"), "--out", str(out)]
    with pytest.raises(RunError, match=f"holds {name}, which no evaluation wrote; name another folder with --out"):
        evaluate.main(flags)
    assert hashes(out) == {name: "99914b932bd37a50b983c5e7c90ae93b"}
    (out / name).unlink()
    assert evaluate.main(flags) == 0
    (out / "sizes.png").write_text("mine, beside the others")
    with pytest.raises(RunError, match="holds sizes.png, which no evaluation wrote"):
        evaluate.main(flags)


def test_an_evaluation_replaces_the_one_before(run: Path, tmp_path: Path) -> None:
    flags = [str(run), "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert evaluate.main([*flags, "--size", "32", "40"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "sizes.png" in report["pictures"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", *report["pictures"]}
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert evaluate.main(flags) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "sizes.png" not in report["pictures"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "notes.txt", *report["pictures"]}


def test_reports_of_older_versions_are_known(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"networks": [], "protocol": "clean"}')
    (tmp_path / "sizes.png").touch()
    assert "sizes.png" in ownership.pictures_written(tmp_path)
    (tmp_path / "report.json").write_text('{"networks": [], "protocol": "clean", "pictures": ["../x", "sizes.png"]}')
    assert ownership.pictures_written(tmp_path) == ["sizes.png"]


@pytest.mark.parametrize("content", ["", "[]", "1", "null", '{"networks": 1}', "\0"])
def test_what_is_no_report_is_not_taken_for_one(content: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(RunError, match="report.json, which no evaluation wrote"):
        ownership.pictures_written(tmp_path)


# exports and comparisons


def test_an_export_replaces_exports_of_its_run_alone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    path = out / export.FORMATS["onnx"].file
    network = checkpoint.load_network(run)
    path.write_bytes(b"of another project")
    with pytest.raises(RunError, match=f"{path.name} exists and was not written by export.py"):
        export.require_replaceable(path, network)
    path.write_text("… {input} … {source} …".format(**export.metadata(network)))
    export.require_replaceable(path, dataclasses.replace(network, epoch=network.epoch + 1))
    other = dataclasses.replace(network, recipe=dataclasses.replace(network.recipe, seed=9))
    with pytest.raises(RunError, match=f"{path.name} exists and is not known to be from this run"):
        export.require_replaceable(path, other)
    path.write_text(f"… {export.INPUT} …")  # of a version that did not name the run
    with pytest.raises(RunError, match=f"{path.name} exists and is not known to be from this run"):
        export.require_replaceable(path, network)


def test_an_export_does_not_replace_what_it_is_made_of(run: Path) -> None:
    shutil.copy(run / "best.pt", run / "model.pt")
    before = hashes(run, "model.pt")
    with pytest.raises(RunError, match="model.pt exists and was not written"):
        export.main([str(run / "model.pt"), "--format", "weights"])
    assert hashes(run, "model.pt") == before


def test_what_lies_beside_the_runs_is_named_and_passed_over(tiny_runs, tmp_path, capsys) -> None:
    runs = tmp_path / "runs"
    for number, folder in enumerate(tiny_runs):
        shutil.copytree(folder, runs / f"run{number}")
    (runs / "comparison.png").write_text("drawn by hand")
    (runs / "evaluation-val").mkdir()
    (runs / "notes.txt").touch()
    (runs / "link").symlink_to("nowhere")
    (runs / "again").symlink_to("run0")
    everything = sorted(map(str, runs.iterdir()))
    assert compare.main([*everything, "--out", str(tmp_path / "c.png")]) == 0
    said = capsys.readouterr()
    assert said.out.count("\nrun") == 2 and "again" not in said.out  # each run once, under its own name
    for name in ("comparison.png", "evaluation-val", "notes.txt", "link"):
        assert f"skipped: {runs / name} is not a run folder" in said.err
    with pytest.raises(RunError, match="comparison.png was drawn by another program"):
        compare.main(everything)
    assert (runs / "comparison.png").read_text() == "drawn by hand"


def test_a_pattern_that_no_shell_has_expanded(tiny_runs, tmp_path, capsys) -> None:
    for number, folder in enumerate(tiny_runs):
        shutil.copytree(folder, tmp_path / "runs" / f"run{number}")
    assert compare.main([str(tmp_path / "runs" / "*"), "--out", str(tmp_path / "c.png")]) == 0
    said = capsys.readouterr().out
    assert "run0" in said and "run1" in said


def test_a_run_in_its_first_epoch_is_shown_and_a_broken_one_named(tiny_runs, tmp_path, capsys) -> None:
    good, young, broken = (Path(shutil.copytree(tiny_runs[0], tmp_path / name)) for name in ("good", "young", "broken"))
    (young / "metrics.csv").unlink()
    (broken / "metrics.csv").write_text("stage,epoch\n1,1\n")
    assert compare.main([str(good), str(young), str(broken), "--out", str(tmp_path / "c.png")]) == 1
    said = capsys.readouterr()
    assert "0 of 4" in said.out and f"skipped: {broken} holds a run that cannot be read" in said.err
    assert f"{young}" not in said.err
