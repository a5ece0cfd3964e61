import csv
import dataclasses
import json
from pathlib import Path

import pytest

import compare
from harness import errors, plots, text
from harness.metrics import wilson
from harness.run_folder import COLUMNS
from recipes import RECIPES


def make_run(folder: Path, accuracies: list[float | None], **recipe: object) -> Path:
    """A run folder of the original recipe, whose first stage has three epochs; 90 s an epoch."""
    original = RECIPES["original"]
    stages = tuple(dataclasses.replace(stage, epochs=3) for stage in original.stages)
    recipe = dataclasses.replace(original, stages=stages, **recipe)
    folder.mkdir(parents=True)
    config = {"recipe": recipe.as_dict(), "images": {"train": 4000, "val": 1000}, "parameters": 1_996_986}
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "metrics.csv", "w") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, accuracy in enumerate(accuracies, 1):
            row = dict.fromkeys(COLUMNS, 0.5) | {"stage": 1 if number <= 3 else 2, "epoch": number, "seconds": 90.0}
            writer.writerow(row | {"val_accuracy": accuracy, "val_loss": None if accuracy is None else 1.0})
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def run(*arguments: object) -> int:
    return errors.report(lambda: compare.main([str(argument) for argument in arguments]))


def test_the_table_by_hand(tmp_path, capsys):
    """Batches of 128 leave none of 80,000 samples over, nor do those of 64."""
    runs = [
        make_run(tmp_path / "whole", [0.4, 0.5, 0.62, 0.7, 0.75, 0.74], seed=3),
        make_run(tmp_path / "going", [0.41]),
        make_run(tmp_path / "begun", []),
        make_run(tmp_path / "blind", [None, None], train_on="all", views_per_image=1),
    ]
    assert run(*runs) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert cells(header)[:4] == ["run", "recipe", "seed", "epochs"]
    low, high = wilson(740, 1000)
    assert cells(lines[0]) == [
        "whole", "original", "3", "6 of 6", "75.0% in epoch 5", f"74.0% ({low:.1%} to {high:.1%})",
        "9.0 minutes", "480,000", "1,996,986",
    ]  # fmt: skip
    assert cells(lines[1])[3:5] == ["1 of 6", "41.0% in epoch 1"] and "80,000" in lines[1]
    assert cells(lines[2])[3:8] == ["0 of 6", "–", "–", "0 seconds", "0"]
    assert cells(lines[3])[3:8] == ["2 of 6", "–", "–", "3.0 minutes", f"{2 * (4000 // 128 * 128):,}"]


def test_the_plot_shows_every_run(tmp_path, capsys, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        plots, "comparison", lambda path, runs, *, title: drawn.update(path=path, runs=dict(runs), title=title)
    )
    first, second = make_run(tmp_path / "a" / "same", [0.4, 0.6]), make_run(tmp_path / "b" / "same", [0.7])
    assert run(first, second) == 0
    assert drawn["path"] == tmp_path / "a" / "comparison.png" and f"plot: {drawn['path']}" in capsys.readouterr().out
    accuracies = {name: [row["val_accuracy"] for row in rows] for name, rows in drawn["runs"].items()}
    assert accuracies == {str(first): [0.4, 0.6], str(second): [0.7]}
    assert "highest 70.0%" in drawn["title"] and str(second) in drawn["title"]


def test_a_real_run(tiny_run, tmp_path, capsys):
    assert run(tiny_run, "--out", tmp_path / "plot.png") == 0
    summary = json.loads((tiny_run / "summary.json").read_text())
    line = cells(capsys.readouterr().out.splitlines()[1])
    assert line[:4] == ["seed0", "demo", "0", "4 of 4"]
    best = summary["best, selected on these images"]
    assert line[4] == f"{best['val_accuracy']:.1%} in epoch {best['epoch']}"
    assert line[7:] == [f"{summary['samples']:,}", f"{summary['parameters']:,}"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "change, told",
    [
        ({"split_seed": 1}, True),
        ({"val_fraction": 0.3}, True),
        ({"fold": 3}, True),
        ({"tune_fold": 3}, True),
        ({"seed": 1}, False),
    ],
)
def test_other_val_images_are_told(tmp_path, capsys, change, told):
    assert run(make_run(tmp_path / "a", [0.5]), make_run(tmp_path / "b", [0.6], **change)) == 0
    assert ("do not all validate on the same images" in capsys.readouterr().out) == told


def test_other_ways_of_scoring_are_told(tmp_path, capsys):
    """Crops are scored after a run's last epoch alone."""
    finished = make_run(tmp_path / "a", [0.5] * 6, tta="multi")
    going = make_run(tmp_path / "b", [0.6] * 5, tta="multi")
    assert run(finished, going) == 0
    assert "are not scored the same way (144 px, --tta multi; 144 px, --tta mirror)" in capsys.readouterr().out
    (tmp_path / "c").mkdir()
    for others in ([finished, finished], [finished, make_run(tmp_path / "c" / "begun", [])]):
        assert run(*others) == 0
        assert "scored the same way" not in capsys.readouterr().out


def test_settings_that_differ_and_take_effect_are_told(tmp_path, capsys):
    alike, other = make_run(tmp_path / "a", [0.5], warmup=0.1), make_run(tmp_path / "b", [0.6], seed=1)
    assert run(alike, other) == 0
    assert "differ in" not in capsys.readouterr().out  # in seeds, and in a warm-up that restarts do not have
    views = dataclasses.replace(RECIPES["original"].augmentation, erase=0.5)
    changed = make_run(tmp_path / "c", [0.5], label_smoothing=0.1, augmentation=views)
    config = json.loads((changed / "config.json").read_text())
    config["recipe"]["stages"][1]["lr"] = 0.25
    (changed / "config.json").write_text(json.dumps(config))
    assert run(alike, changed, other) == 0
    told = "label_smoothing: 0.0, 0.1; erase: 0.0, 0.5; lr of stage 2: 0.0005, 0.25"
    assert f"note: the runs differ in {told}\n" in capsys.readouterr().out


def test_other_pictures_are_told(tmp_path, capsys):
    runs = [make_run(tmp_path / name, [0.5]) for name in "ab"]
    for folder, digit in zip(runs, "01", strict=True):
        config = json.loads((folder / "config.json").read_text())
        config["images"]["digest"] = digit * 64
        (folder / "config.json").write_text(json.dumps(config))
    assert run(*runs) == 0 and "do not all validate on the same images" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, content", [("config.json", None), ("config.json", "{}"), ("config.json", "{"),
                      ("metrics.csv", "stage,epoch\n1,1\n"), ("metrics.csv", "\x00\xff"),
                      ("metrics.csv", ",".join(COLUMNS) + "\n1,1,0.1,2.0,0.5,2.0,84.4,9,9\n")],
)  # fmt: skip
def test_what_is_no_run_is_one_line(tmp_path, capsys, file, content):
    folder = make_run(tmp_path / "a", [0.5])
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content, encoding="latin-1")
    assert run(folder) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {folder}") and said.count("\n") == 1


def test_a_table_that_excel_has_saved_is_read(tmp_path, capsys):
    folder = make_run(tmp_path / "a", [0.5])
    saved = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(saved, encoding="utf-8-sig")
    assert run(folder) == 0 and "50.0% in epoch 1" in capsys.readouterr().out


def test_columns_are_aligned():
    lines = text.table(["name", "n"], [["a", "1"], ["longer", "200"]]).splitlines()
    assert lines == ["name      n", "a         1", "longer  200"]
