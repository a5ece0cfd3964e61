import csv
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import official_files
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import data
import evaluate
from harness import checkpoint, demo_shapes, download, errors, metrics, plots, report, scoring, scoring_ledger
from harness.images import load_for_network, load_test_images, recorded_source

PICTURES = {"confusion.png", "per_class.png", "mistakes.png", "reliability.png"}
SAVE = Figure.savefig
pytestmark = pytest.mark.usefixtures("small_demo", "empty_plots")


def run(*arguments: object) -> int:
    """The command as the terminal runs it; its exit status."""
    words = [str(argument) for argument in arguments]
    return errors.report(lambda: evaluate.main([*words, "--threads", "1", "--precision", "fp32"]))


def read(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def rows(folder: Path) -> list[dict[str, float]]:
    with open(folder / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def by_hand(path: Path, size: int, split: str = "val", **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of a checkpoint's images."""
    trained = checkpoint.load_network(path)
    if split == "test":
        dataset = load_test_images(trained, recorded_source(path))
        pixels, labels = dataset.images, dataset.labels
    else:
        dataset, _, val = load_for_network(trained, recorded_source(path), fetch=False)
        pixels, labels = dataset.images[val], dataset.labels[val]
    return scoring.logits(trained.model, pixels, size, **options), labels


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of correct predictions, from logits (N, K) and labels (N,)."""
    return (logits.argmax(1) == labels).double().mean().item()


def test_the_report_repeats_what_training_measured(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "CHUNK", 16)  # of 40 images
    for flags, row, selected in (
        (["--best"], max(rows(tiny_run), key=lambda row: row["val_accuracy"]), True),
        ([], rows(tiny_run)[-1], False),
    ):
        assert run(tiny_run, "--out", tmp_path, *flags) == 0
        (entry,), said = read(tmp_path)["networks"], capsys.readouterr().out
        (result,), (member,) = entry["results"], entry["members"]
        assert result["accuracy"] == row["val_accuracy"] and result["images"] == 40
        assert result["loss"] == pytest.approx(row["val_loss"], rel=1e-5)
        assert result["interval_95"] == list(metrics.wilson(round(40 * row["val_accuracy"]), 40))
        assert result["tta"] == "none" and result["size"] == (40 if row["stage"] == 2 else 32)
        assert statistics.fmean(result["per_class"].values()) == pytest.approx(result["accuracy"])
        assert (member["selected_on_val"], member["epoch"]) == (selected, row["epoch"])
        assert f"{row['val_accuracy']:.1%}" in said
        assert ("selected on these very images" in said) == selected
        assert ("these images did not select the network" in said) != selected
        assert {path.name for path in tmp_path.iterdir()} == PICTURES | {"report.json"}


def test_pictures_are_pictures(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", SAVE)
    assert run(tiny_run, "--size", 32, 64, "--out", tmp_path) == 0
    drawn = list(tmp_path.glob("*.png"))
    assert {path.name for path in drawn} == PICTURES | {"sizes.png"}
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width == 1200


def test_the_drawn_confusion_has_a_row_for_each_true_class(tiny_run, tmp_path, monkeypatch):
    drawn = {}
    for name in ("confusion", "per_class"):
        monkeypatch.setattr(plots, name, lambda path, *given, **_: drawn.update({path.name: given}))
    assert run(tiny_run, "--out", tmp_path) == 0
    scores, labels = by_hand(tiny_run / "last.pt", 40)
    expected = np.zeros((10, 10), int)
    for true, answer in zip(labels.tolist(), scores.argmax(1).tolist(), strict=True):
        expected[true, answer] += 1
    assert not np.array_equal(expected, expected.T) and drawn.keys() == {"confusion.png", "per_class.png"}
    for matrix, classes in drawn.values():
        assert np.array_equal(matrix, expected) and classes == demo_shapes.DEMO_CLASSES


def test_accuracy_against_size(tiny_run, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "accuracy_against_size", lambda path, *args, **options: drawn.append((path.name, *args)))
    assert run(tiny_run / "last.pt", "--size", 48, 32, 40, 32, "--out", tmp_path) == 0
    (entry,) = read(tmp_path)["networks"]
    assert [result["size"] for result in entry["results"]] == [32, 40, 48]
    expected = [accuracy(*by_hand(tiny_run / "last.pt", size)) for size in (32, 40, 48)]
    assert [result["accuracy"] for result in entry["results"]] == expected
    assert drawn == [("sizes.png", (32, 40, 48), tuple(expected))]
    assert entry["shown"] == 1  # the eval size of the last stage
    assert "the best of several sizes" in capsys.readouterr().out


def test_default_folders(tiny_runs, tmp_path):
    def folder(*arguments: object) -> Path:
        args = evaluate.build_parser().parse_args([str(argument) for argument in arguments])
        paths, *_ = evaluate.checkpoints_of(evaluate.build_parser(), args)
        return evaluate.default_folder(args, [checkpoint.load_network(path) for path in paths])

    first, second = tiny_runs
    assert folder(first) == first / "evaluation-val"
    assert folder(first, "--best", "--split", "test") == first / "evaluation-test-best"
    assert folder(first / "stage1.pt") == first / "evaluation-val-stage1"
    assert folder(first, "--protocol", "original") == first / "evaluation-val-original"
    assert folder(first, "--against", second) == first / "evaluation-val-against"
    assert folder(first, second) == first.parent / "evaluation-val"
    assert folder(first, second, "--ensemble", "--best") == first.parent / "evaluation-val-best-ensemble"


def test_several_runs_give_mean_and_deviation(tiny_runs, tmp_path, capsys):
    earlier = {"networks": [], "protocol": "clean", "pictures": ["sizes.png"]}
    (tmp_path / "report.json").write_text(json.dumps(earlier))
    (tmp_path / "sizes.png").touch()
    assert run(*tiny_runs, "--size", 32, 40, "--out", tmp_path) == 0
    found, said = read(tmp_path), capsys.readouterr()
    for place, size in enumerate((32, 40)):
        accuracies = [accuracy(*by_hand(folder / "last.pt", size)) for folder in tiny_runs]
        assert [entry["results"][place]["accuracy"] for entry in found["networks"]] == accuracies
        together = found["over the networks"][place]
        assert together["mean"] == pytest.approx(sum(accuracies) / 2) and together["networks"] == 2
        assert together["standard_deviation"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
        spread = f"accuracy {together['mean']:.1%} ± {together['standard_deviation']:.1%} at {size} px"
        assert spread in said.out
    assert "warning" not in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}


def test_runs_that_differ_in_more_than_seeds_are_not_averaged_silently(tiny_run, altered, tmp_path, capsys):
    assert run(tiny_run, altered(weight_decay=0.5), "--out", tmp_path / "out") == 0
    assert "differ in more than their seeds" in capsys.readouterr().err


def test_an_ensemble_averages_and_says_so(tiny_runs, tmp_path, capsys):
    assert run(*tiny_runs, "--ensemble", "--tta", "mirror", "--out", tmp_path) == 0
    shares = [by_hand(folder / "last.pt", 40, mirror=True)[0].softmax(1) for folder in tiny_runs]
    labels = by_hand(tiny_runs[0] / "last.pt", 40)[1]
    (entry,) = read(tmp_path)["networks"]
    mean = sum(shares) / 2
    assert entry["results"][0]["accuracy"] == (mean.argmax(1) == labels).double().mean().item()
    assert entry["results"][0]["loss"] == pytest.approx(-mean[range(40), labels].log().mean().item(), rel=1e-4)
    single = sum(p.numel() for p in checkpoint.load_network(tiny_runs[0]).model.parameters())
    assert entry["parameters"] == 2 * single
    assert f"an ensemble of 2 networks with {2 * single:,} parameters together" in capsys.readouterr().out


def test_an_ensemble_is_not_scored_on_what_a_member_has_learnt(tiny_run, altered, tmp_path, capsys):
    assert run(tiny_run, altered(split_seed=1), "--ensemble", "--out", tmp_path / "out") == 1
    assert "do not have the same val images" in capsys.readouterr().err


def test_the_original_protocol(tiny_run, tmp_path, capsys):
    """Of stage 2: 20 views of 40 images at 32 px in 25 batches of 32."""
    before = (tiny_run / "last.pt").read_bytes()
    assert run(tiny_run, "--protocol", "original", "--out", tmp_path) == 0
    trained = checkpoint.load_network(tiny_run / "last.pt")
    dataset, _, val = load_for_network(trained, recorded_source(tiny_run), fetch=False)
    scores, index = scoring.original_logits(trained.model, dataset.images[val], 32, 32)
    (entry,) = read(tmp_path)["networks"]
    (result,) = entry["results"]
    assert result["accuracy"] == accuracy(scores, dataset.labels[val][index])
    assert (result["predictions"], result["images"], result["batch"], result["size"]) == (800, 40, 32, 32)
    assert "20 random views of each image, 800 in batches of 32" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"report.json"}
    assert (tiny_run / "last.pt").read_bytes() == before


def test_a_network_that_cannot_be_scored_does_not_cost_the_others_tables(tiny_run, altered, tmp_path, capsys):
    folder, tiny_run = altered(name="original"), shutil.copytree(tiny_run, tmp_path / "run")
    assert run(tiny_run, folder, "--split", "test", "--out", folder / "out") == 1
    said = capsys.readouterr()
    assert "the test images are missing" in said.err
    accuracy = json.loads((tiny_run / scoring_ledger.FILE).read_text())[-1]["accuracy"]
    assert f"{accuracy:.1%}" in said.out and not (folder / "out" / report.REPORT).exists()


def test_what_lies_beside_runs_is_passed_over(tiny_runs, tmp_path, capsys):
    runs = tmp_path / "runs"
    for number, folder in enumerate(tiny_runs):
        shutil.copytree(folder, runs / f"{number}")
    assert run(*sorted(runs.iterdir())) == 0
    (runs / "comparison.png").touch()
    capsys.readouterr()
    assert run(*sorted(runs.iterdir())) == 0
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"skipped: {runs / name} is neither a folder with a checkpoint nor a .pt file"
        for name in ("comparison.png", "evaluation-val")
    ]
    assert "of 2 networks" in said.out
    for flags in (["--ensemble"], ["--against", *sorted(runs.iterdir())], ["--split", "test"]):
        assert run(*sorted(runs.iterdir()), *flags) != 0 and "skipped" not in capsys.readouterr().err
    assert run(runs / "0", runs / "none") == 1 and "cannot read" in capsys.readouterr().err
    (runs / "1" / "last.pt").write_bytes(b"PK")
    assert run(runs / "0", runs / "1") == 1 and "is damaged" in capsys.readouterr().err


def test_missing_val_images_are_fetched(tiny_run, altered, tmp_path, capsys, monkeypatch):
    """As `train.py` does. The download is of the drawn pictures here, in the official files' format."""

    def fetch(data_dir: Path) -> None:
        dataset = demo_shapes.load("train")
        for path in official_files.write(data_dir, "train", dataset.images, dataset.labels).iterdir():
            official_files.expect(path, monkeypatch)

    monkeypatch.setattr(download, "fetch", fetch)
    monkeypatch.setattr(data, "CLASSES", demo_shapes.DEMO_CLASSES)
    folder, place = altered(name="original"), tmp_path / "place"
    assert run(folder, "--data-dir", place, "--out", tmp_path / "out") == 0
    assert f"train_X.bin and train_y.bin not found in {place / data.FOLDER}" in capsys.readouterr().out
    (entry,) = read(tmp_path / "out")["networks"]
    assert entry["results"][0]["accuracy"] == rows(tiny_run)[-1]["val_accuracy"]
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched again"))
    assert run(folder, "--data-dir", place, "--out", tmp_path / "out") == 0


def test_a_network_trained_on_all_has_no_val_images(altered, capsys):
    folder = altered(train_on="all")
    for name in ("best.pt", "last.pt"):
        payload = checkpoint.load(folder / name)
        payload["images"] = {"train": 200, "val": 0}
        checkpoint.save(folder / name, payload)
    assert run(folder) == 1
    assert "was trained on all images" in capsys.readouterr().err


def test_most_confident_mistakes_come_first(tiny_run, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(plots, "sample_sheet", lambda path, images, titles, **options: sheets.append((images, titles)))
    assert run(tiny_run, "--out", tmp_path) == 0
    scores, labels = by_hand(tiny_run / "last.pt", 40)
    trained = checkpoint.load_network(tiny_run / "last.pt")
    dataset, _, val = load_for_network(trained, recorded_source(tiny_run), fetch=False)
    confidence, predicted = scores.softmax(1).max(1)
    wrong = [i for i in np.argsort(-confidence.numpy(), kind="stable") if predicted[i] != labels[i]][: report.MISTAKES]
    ((pixels, titles),) = sheets
    assert np.array_equal(pixels, dataset.images[val][torch.tensor(wrong)].numpy())
    names = dataset.classes
    assert titles == [f"{names[predicted[i]]} {confidence[i]:.0%}\n(is {names[labels[i]]})" for i in wrong]


def test_notes_tell_of_foreign_weights_and_unfinished_runs(tiny_run, altered, tmp_path, capsys):
    stages = checkpoint.load(tiny_run / "last.pt")["recipe"]["stages"]
    folder = altered(init="elsewhere.pt", stages=[{**stage, "epochs": 9} for stage in stages])
    assert run(folder, "--size", 32, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "began with another run's weights" in said and "is from epoch 4 of 18, not the last" in said


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ("--size 31", "'31' is not a whole number from 32 to 1024"),
        ("--protocol original --tta none", "--protocol original and --tta cannot be combined"),
        ("--protocol original --split test", "--protocol original and --split test cannot be combined"),
        ("--split test --size 32 64", "several sizes are compared on clean val images only"),
        ("--ensemble", "--ensemble needs at least two networks"),
        ("--threads -1", "--threads"),
        ("{run}/last.pt", "the same network is given twice"),
        ("--split train", "invalid choice"),
    ],
)
def test_usage_errors(tiny_run, capsys, arguments, complaint):
    words = [str(tiny_run), *arguments.replace("{run}", str(tiny_run)).split()]
    with pytest.raises(SystemExit) as caught:
        evaluate.main(words)
    assert caught.value.code == 2 and complaint in capsys.readouterr().err


def test_what_cannot_be_read_or_written_is_one_line(tiny_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    for arguments, name in (
        ([tmp_path / "nothing"], "nothing"),
        ([tmp_path], "last.pt"),
        ([tmp_path, "--best"], "best.pt"),
        ([tmp_path / "file"], "file"),
        ([tiny_run, "--out", tmp_path / "file"], "file"),
        ([tiny_run, "--out", tmp_path / "out", "--images", tmp_path / "none"], str(tmp_path / "none")),
    ):
        assert run(*arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and name in said


def test_several_from_within_a_run_folder_are_reported_beside_it(tiny_runs, tmp_path, monkeypatch):
    for folder in tiny_runs:
        shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.chdir(tmp_path / "seed0")
    assert run(".") == 0
    before = (tmp_path / "seed0" / "evaluation-val" / report.REPORT).read_bytes()
    assert run(".", "../seed1") == 0
    assert (tmp_path / "seed0" / "evaluation-val" / report.REPORT).read_bytes() == before
    assert len(read(tmp_path / "evaluation-val")["networks"]) == 2


def test_the_weights_of_a_stage_are_not_called_the_last_epochs(tiny_run, tmp_path, capsys):
    assert run(tiny_run / "stage1.pt", "--out", tmp_path) == 0
    said = capsys.readouterr().out
    assert "these images did not select the network\n" in said and "is from epoch 3 of 4, not the last" in said


def test_images_are_scored_in_the_machines_precision(tiny_run, tmp_path):
    assert evaluate.main([str(tiny_run), "--threads", "1", "--precision", "bf16", "--out", str(tmp_path)]) == 0
    (result,) = read(tmp_path)["networks"][0]["results"]
    low, full = (
        torch.nn.functional.cross_entropy(*by_hand(tiny_run / "last.pt", 40, precision=precision)).item()
        for precision in (torch.bfloat16, None)
    )
    assert result["loss"] == pytest.approx(low, rel=1e-6) and result["loss"] != pytest.approx(full, rel=1e-6)


def test_the_original_protocol_at_another_size(tiny_run, tmp_path):
    assert run(tiny_run, "--protocol", "original", "--size", 48, "--out", tmp_path) == 0
    trained = checkpoint.load_network(tiny_run / "last.pt")
    dataset, _, val = load_for_network(trained, recorded_source(tiny_run), fetch=False)
    scores, index = scoring.original_logits(trained.model, dataset.images[val], 48, 32)
    (result,) = read(tmp_path)["networks"][0]["results"]
    assert (result["size"], result["accuracy"]) == (48, accuracy(scores, dataset.labels[val][index]))


def test_the_pictures_are_of_the_size_that_is_shown(tiny_run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "reliability", lambda path, *bins, **how: drawn.append((bins, how)))
    assert run(tiny_run, "--size", 32, 40, 48, "--out", tmp_path) == 0
    scores, labels = by_hand(tiny_run / "last.pt", 40)
    ((bins, how),) = drawn
    for found, expected in zip(bins, metrics.reliability(scores.softmax(1), labels), strict=True):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
    assert how["title"].endswith("at 40 px")
    assert how["error"] == pytest.approx(metrics.calibration_error(scores.softmax(1), labels))
