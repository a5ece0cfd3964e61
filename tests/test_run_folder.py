"""What a run leaves in its folder: pictures of training views, rates, notes and the summary."""

import dataclasses
import errno
import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, trained
from picture_folders import TINY, fill

import evaluate
import train
from augment import denormalise, draw_epoch, make_batch
from harness import checkpoint, cli, errors, files, plots, provenance, run_folder, run_plots
from harness.demo_shapes import DEMO_CLASSES
from harness.images import recorded_source
from harness.machine import Machine
from harness.metrics import wilson
from harness.run_folder import RunFolder
from recipes import RECIPES, Stage
from scheduler import warmup_cosine_rate

MIXED = "--mixup 1 --cutmix 1 --mix-probability 0.8 --erase 0.5".split()


def test_a_run_goes_on_beside_a_program_that_shows_its_pictures(
    tmp_path: Path, small_demo, empty_plots, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """As Windows refuses to replace a file that is open."""
    rename = os.replace

    def held(source: Path, target: Path) -> None:
        if Path(target).suffix in (".png", ".csv"):
            raise PermissionError(errno.EACCES, "Access is denied", target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(files, "PAUSES", (0.0,))
    flags = [*TINY_RUN, "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    for name in ("metrics.csv", "accuracy.png", "losses.png", "learning_rate.png", "views-stage1.png"):
        assert f"note: {name} is open in another program" in said
    monkeypatch.setattr(os, "replace", rename)
    assert train.main(flags) == 0
    assert {"metrics.csv", "accuracy.png", "losses.png"} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("flags", [[], MIXED], ids=["plain", "mixed and erased"])
def test_sheets_of_views_show_the_first_batch_of_each_stage(flags, tmp_path, small_demo, empty_plots, monkeypatch):
    sheets, batches, step = {}, [], train.Trainer.step

    def note(trainer: train.Trainer, batch: train.Batch) -> tuple:
        batches.append(batch._replace(x=batch.x.clone()))
        return step(trainer, batch)

    def keep(path, images, titles, **_) -> None:
        sheets[path.name] = (images, titles)

    monkeypatch.setattr(train.Trainer, "step", note)
    monkeypatch.setattr(plots, "sample_sheet", keep)
    place = ["--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert train.main([*TINY_RUN, *flags, "--epochs", "1", "1", *place]) == 0
    assert list(sheets) == ["views-stage1.png", "views-stage2.png"]
    steps = len(batches) // 2
    for batch, (images, titles) in zip((batches[0], batches[steps]), sheets.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(images), denormalise(batch.x).clamp(0, 1))
        assert len(titles) == 32
        two = 0
        for title, label, other, share in zip(titles, *(part.tolist() for part in batch[1:]), strict=True):
            shown = dict(re.findall(r"(\w+) (\d+)%", title)) or {title: "100"}
            expected = dict.fromkeys(DEMO_CLASSES, 0.0)
            expected[DEMO_CLASSES[label]] += share
            expected[DEMO_CLASSES[other]] += 1 - share
            for name, value in expected.items():
                assert float(shown.get(name, 0)) == pytest.approx(100 * value, abs=0.51), (title, name, value)
            assert list(shown) == sorted(shown, key=lambda name: -int(shown[name])), title
            two += len(shown) == 2
        assert (two > 0) == bool(flags)


def test_a_sheet_shows_the_views_of_the_leaders_share_of_the_batch(tmp_path: Path, monkeypatch) -> None:
    """Of two processes each mixes samples only within its own."""
    images, labels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 2
    recipe = dataclasses.replace(RECIPES["cpu-long"], stages=(Stage(1, (32,), 32, 16, 0.1),))
    draws = draw_epoch(torch.arange(16), 1, 16, recipe.augmentation, (0,))
    sheets = []
    monkeypatch.setattr(run_plots, "views", lambda path, heading, batch, classes: sheets.append(batch))
    for world in (1, 2):
        machine = Machine(torch.device("cpu"), torch.float32, compile=False, world=world)
        folder = run_folder.RunFolder(tmp_path, recipe, ("a", "b"), {"train": 16, "val": 0}, machine)
        folder.draw_views(0, images, labels, draws, 32)
        expected = make_batch(images, labels, draws, 0, machine.share_of_batch(0, 16), 32, recipe.augmentation)
        assert all(map(torch.equal, sheets[-1], expected))
    assert [len(sheet.x) for sheet in sheets] == [16, 8]


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("done", [0, 3])
def test_the_way_out_of_a_number_gone_wrong(precision: torch.dtype, done: int, tmp_path: Path) -> None:
    machine = Machine(torch.device("cpu"), precision, compile=False)
    folder = run_folder.RunFolder(tmp_path, RECIPES["demo"], ("a", "b"), {"train": 16, "val": 4}, machine)
    folder.rows = [{}] * done
    folder.require_finite(torch.zeros(2), True, 0.5)
    with pytest.raises(errors.RunError) as stop:
        folder.require_finite(torch.tensor([0.0, torch.nan]), True, 0.5)
    expected = f"the loss of step 2 of epoch {done + 1} is not a finite number, so the run has stopped. "
    if precision is torch.float16:
        goes_on = "goes on after epoch 3" if done else "begins again"
        expected += f"The same command with --precision fp32 {goes_on}. If that does not help, try a lower --lr"
    else:
        expected += "Try a lower --lr"
    expected += ", with another --out; --init " if done else ""
    assert str(stop.value).startswith(expected) and str(stop.value).endswith("of epoch 3" if done else "--lr")


def test_the_best_epoch_is_the_first_of_equals() -> None:
    rows = [{"epoch": n, "val_accuracy": value} for n, value in enumerate([0.5, None, 0.7, 0.7, 0.6])]
    assert run_folder.best_row(rows)["epoch"] == 2
    assert run_folder.best_row(rows[1:2]) is None


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path, small_demo, empty_plots) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_a_finished_runs_summary_names_the_machine_that_trained_it(run: Path) -> None:
    before = (run / "summary.json").read_bytes()
    assert json.loads(before)["precision"] == "fp32"
    assert trained(run, "--precision", "bf16") == 0
    assert (run / "summary.json").read_bytes() == before


def test_intervals_and_restarts_are_those_of_the_run(
    tmp_path: Path, small_demo, empty_plots, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Forty validation images, at the second stage's 40 px; cycles of 1, 2 … epochs in each stage."""
    drawn = []
    keys = ("val_images", "val_size", "restarts")
    monkeypatch.setattr(plots, "accuracy", lambda path, rows, **how: drawn.append([how[key] for key in keys]))
    assert trained(tmp_path / "run", "--epochs", 3, 2, "--cycle", 1) == 0
    said, summary = capsys.readouterr().out, json.loads((tmp_path / "run" / "summary.json").read_text())
    for key in ("last", "best, selected on these images"):
        found = summary[key]
        bounds = list(wilson(round(40 * found["val_accuracy"]), 40))
        assert found["interval_95"] == bounds
        assert f"(epoch {found['epoch']}, 95 % interval {bounds[0]:.1%} to {bounds[1]:.1%})" in said
    assert summary["finished"] and drawn[-1] == [40, 40, [1, 4]]


def test_notes_outlive_the_process_that_made_them(tmp_path: Path, small_demo, empty_plots) -> None:
    folder = tmp_path / "run"
    flags = ["--crop-size", "32,40,48", "32", "--epochs", 2, 1]
    assert trained(folder, *flags, "--max-minutes", 1e-6) == 3
    noted = checkpoint.load(folder / "last.pt")["notes"]
    assert any("too few for its crop size(s) 48 px" in note for note in noted)
    assert trained(folder, *flags, "--precision", "bf16") == 0
    told = json.loads((folder / "summary.json").read_text())["notes"]
    assert told[: len(noted)] == noted and "has been trained in fp32 so far, and goes on in bf16" in told[-1]
    assert checkpoint.load(folder / "last.pt")["notes"] == told


@pytest.mark.parametrize("schedule", ["restarts", "cosine"])
def test_the_plotted_rates_are_those_of_the_rows(schedule: str, tmp_path: Path, small_demo, empty_plots, monkeypatch):
    """One that changes with the epoch is a step as long as it; one that changes with each step is drawn at eighths."""
    drawn = []
    monkeypatch.setattr(plots, "learning_rate", lambda path, epochs, rates, *_, **how: drawn.append((epochs, rates)))
    assert trained(tmp_path / "run", "--schedule", schedule, "--epochs", 3, 1) == 0
    (epochs, rates), rows = drawn[-1], checkpoint.load(tmp_path / "run" / "last.pt")["rows"]
    assert epochs == [n / 8 for n in range(32)]
    assert rates[::8] == pytest.approx([row["lr"] for row in rows], rel=1e-6)
    if schedule == "cosine":
        expected = [warmup_cosine_rate(n / 24, 0.02, 0.1) for n in range(24)]
        expected += [warmup_cosine_rate(n / 8, 0.01, 0.1) for n in range(8)]
    else:
        expected = [row["lr"] for row in rows for _ in range(8)]
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "name, other, told",
    [
        ("processes", 2, "by 2 process(es) so far, and goes on by 1 process(es)"),
        ("device", "cuda", "with cuda so far, and goes on with cpu"),
        ("code", "0a1b2c3d4e5f", "with revision 0a1b2c3d4e5f so far, and goes on with revision f00f"),
    ],
)
def test_other_conditions_are_noted(name: str, other: object, told: str, run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(provenance, "revision", lambda: "f00f")
    payload = checkpoint.load(run / "previous.pt")
    checkpoint.save(run / "last.pt", payload | {"code": "f00f", name: other})
    assert trained(run) == 0
    assert f"note: the run has been trained {told}\n" in capsys.readouterr().out
    (noted,) = json.loads((run / "summary.json").read_text())["notes"]
    assert noted.endswith(told) and checkpoint.load(run / "last.pt")["notes"] == [noted]


def test_conditions_that_are_not_recorded_or_not_known_are_not_noted(run: Path, monkeypatch) -> None:
    """Older runs have recorded fewer; what is no git repository has no revision."""
    monkeypatch.setattr(provenance, "revision", lambda: None)
    payload = checkpoint.load(run / "previous.pt")
    checkpoint.save(run / "last.pt", {k: v for k, v in payload.items() if k != "device"} | {"code": "0a1b2c3d4e5f"})
    assert trained(run) == 0
    assert json.loads((run / "summary.json").read_text())["notes"] == []


def test_a_requeued_job_goes_on_also_with_overwrite(tmp_path: Path, small_demo, empty_plots, monkeypatch, capsys):
    """SLURM runs a requeued job's script again, with all flags in it, and counts how often."""
    folder = tmp_path / "run"
    assert trained(folder, "--overwrite", "--max-minutes", 1e-6) == 3
    (first,) = checkpoint.load(folder / "last.pt")["rows"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert trained(folder, "--overwrite") == 0
    assert "SLURM has restarted this command, so --overwrite is ignored" in capsys.readouterr().out
    assert checkpoint.load(folder / "last.pt")["rows"][0] == first  # its seconds too
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert trained(folder, "--overwrite") == 0
    assert checkpoint.load(folder / "last.pt")["rows"][0]["seconds"] != first["seconds"]


@pytest.mark.parametrize("seconds, drawn", [(0.0, [1, 2, 3, 4, 4]), (1e9, [4])])
def test_plots_are_drawn_now_and_then_and_at_the_end(seconds, drawn, tmp_path, small_demo, empty_plots, monkeypatch):
    found = []
    monkeypatch.setattr(plots, "losses", lambda path, rows, **_: found.append(len(rows)))
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_PLOTS", seconds)
    assert trained(tmp_path / "run") == 0
    assert found == drawn


def test_a_run_in_the_current_folder_has_its_name(tmp_path: Path, small_demo, empty_plots, monkeypatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert train.main([*TINY_RUN, "--epochs", "1", "0", "--data-dir", str(tmp_path / "data"), "--out", "."]) == 0
    assert json.loads(Path("summary.json").read_text())["run"] == "mine"


def test_too_little_memory_names_the_epoch_and_the_way_out(
    tmp_path: Path, small_demo, empty_plots, monkeypatch, capsys
):
    steps, really = [], train.Trainer.step

    def step(trainer: train.Trainer, batch: train.Batch) -> tuple:
        steps.append(batch)
        if len(steps) > 5:  # an epoch has five
            raise MemoryError
        return really(trainer, batch)

    monkeypatch.setattr(train.Trainer, "step", step)
    assert errors.report(lambda: trained(tmp_path / "run", "--views", 1)) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: not enough memory for epoch 2: batches of 32 views of 32 px, scored at 32 px; give a "
    )
    last = tmp_path / "run" / "last.pt"
    assert said.endswith(f", with another --out; --init {last} starts from the weights of epoch 1\n")
    assert said.count("\n") == 1 and checkpoint.load(last)["epoch"] == 1


def test_captured_and_compiled_steps_need_memory_too(tmp_path: Path) -> None:
    for compiled, graphs in ((False, False), (True, False), (False, True)):
        machine = Machine(torch.device("cuda", 0), torch.float32, compiled, graphs)
        run = RunFolder(tmp_path, RECIPES["cpu"], ("a", "b"), {"train": 1, "val": 1}, machine)
        assert ("try the same command with --no-compile; else give" in run.what_needs_memory()) == (compiled or graphs)
        assert "--init" not in run.what_needs_memory() and "--image-size" not in run.what_needs_memory()
    run.images = {"train": 1, "val": 1, "digest": "0" * 64}
    assert "or --image-size" in run.what_needs_memory()


# what a run says of itself


def test_a_run_is_found_from_anywhere(tmp_path: Path, small_demo, empty_plots, monkeypatch) -> None:
    fill(tmp_path / "pictures", 5)
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, "--images", "pictures", "--data-dir", "data", "--out", "run"]) == 0
    runtime = json.loads((tmp_path / "run" / "config.json").read_text())["runtime"]
    assert {name: runtime[name] for name in ("images", "data_dir", "out")} == {
        "images": str(tmp_path / "pictures"),
        "data_dir": str(tmp_path / "data"),
        "out": str(tmp_path / "run"),
    }
    monkeypatch.chdir("/")
    assert evaluate.main([str(tmp_path / "run")]) == 0


def test_a_run_from_another_machine_looks_where_train_does(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    for there in (tmp_path / "here", tmp_path / "of another machine"):
        config["runtime"]["data_dir"] = str(there)
        (run / "config.json").write_text(json.dumps(config))
        (tmp_path / "here").mkdir(exist_ok=True)
        expected = there if there.name == "here" else cli.Runtime.data_dir
        assert recorded_source(run / "last.pt").data_dir == expected


@pytest.mark.parametrize(
    ("epochs", "sizes", "unused"),
    [
        (8, (32, 48, 48, 64), ()),
        (4, (32, 48, 48, 64), ()),
        (3, (32, 48, 48, 64), (64,)),
        (2, (32, 48, 48, 64), (64,)),
        (1, (32, 48, 48, 64), (48, 64)),
        (0, (32, 48), ()),
    ],
)
def test_crop_sizes_that_no_epoch_has(epochs: int, sizes: tuple, unused: tuple) -> None:
    stage = Stage(epochs, sizes, 32, 8, 0.1)
    assert stage.unused_crop_sizes == unused
    assert {stage.crop_size_in(epoch) for epoch in range(epochs)} == set(sizes if epochs else ()) - set(unused)


def test_too_few_epochs_for_the_crop_sizes_are_said(tmp_path: Path, small_demo, empty_plots, capsys) -> None:
    assert trained(tmp_path / "run", "--epochs", 1, 1, "--crop-size", "32,40,48", "32") == 0
    sentence = "stage 1 has 1 epoch: too few for its crop size(s) 40, 48 px"
    assert capsys.readouterr().out.count(f"note: {sentence}") == 1
    assert sentence in json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]


def test_a_stopped_runs_summary_is_of_the_epochs_that_it_has(tmp_path: Path, small_demo, empty_plots) -> None:
    for epochs in (1, 2, 3):
        assert trained(tmp_path / "run", "--max-minutes", 1e-9) == 3
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["finished"], summary["epochs"], summary["samples"]) == (False, epochs, 160 * epochs)
        rows = checkpoint.load(tmp_path / "run" / "last.pt")["rows"]
        assert summary["seconds"] == round(sum(row["seconds"] for row in rows), 1)


def test_what_is_printed_of_an_epoch_is_its_row(tmp_path: Path, small_demo, empty_plots, capsys) -> None:
    assert trained(tmp_path / "run") == 0
    number = r"([\d.]+)"
    form = rf"^epoch (\d+)/4  train loss {number} accuracy {number}%  val loss {number} accuracy {number}%"
    found = re.findall(form, capsys.readouterr().out, re.MULTILINE)
    for row, (epoch, *values) in zip(checkpoint.load(tmp_path / "run" / "last.pt")["rows"], found, strict=True):
        expected = [row["train_loss"], 100 * row["train_accuracy"], row["val_loss"], 100 * row["val_accuracy"]]
        assert int(epoch) == row["epoch"] and list(map(float, values)) == pytest.approx(expected, abs=0.051)


def test_a_package_that_training_does_without_need_not_be_there(tmp_path, small_demo, empty_plots, monkeypatch):
    version = importlib.metadata.version

    def without_torchvision(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_torchvision)
    assert trained(tmp_path / "run") == 0
    versions = json.loads((tmp_path / "run" / "config.json").read_text())["versions"]
    assert versions["torchvision"] is None and versions["torch"] == version("torch")
