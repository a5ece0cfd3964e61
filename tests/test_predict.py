import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from harness import checkpoint, errors, picture_file, plots, scoring
from harness.cli import Runtime
from harness.images import load_for_network, recorded_source
from harness.machine import start_machine

pytestmark = pytest.mark.usefixtures("small_demo")


def run(*arguments: object) -> int:
    """The command as the terminal runs it; its exit status."""
    words = [str(argument) for argument in arguments]
    return errors.report(lambda: predict.main([*words, "--threads", "1", "--precision", "fp32"]))


def noise(path: Path, seed: int, shape: tuple[int, ...] = (50, 70, 3)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def test_a_picture_is_seen_as_validation_sees_it(tiny_run, tmp_path):
    """Validation images, saved as files, get the very probabilities of the evaluation."""
    trained = checkpoint.load_network(tiny_run)
    dataset, _, val = load_for_network(trained, recorded_source(tiny_run), fetch=False)
    images = dataset.images[val[:5]]
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.png")
    assert run(tiny_run, tmp_path, "--top", 10, "--json", tmp_path / "out.json") == 0
    written = json.loads((tmp_path / "out.json").read_text())
    expected = scoring.logits(trained.model, images, trained.eval_size).softmax(1)
    for number, picture in enumerate(written["pictures"]):
        assert picture["file"] == str(tmp_path / f"{number}.png")
        shares = {choice["class"]: choice["confidence"] for choice in picture["choices"]}
        assert list(shares.values()) == sorted(shares.values(), reverse=True)
        assert [shares[name] for name in dataset.classes] == pytest.approx(expected[number].tolist(), rel=1e-5)
    assert written["size"] == trained.eval_size and written["tta"] == "none" and written["skipped"] == []


def test_a_picture_is_brought_to_the_size_of_the_runs_own(tiny_run, tmp_path):
    payload = checkpoint.load(tiny_run / "last.pt")
    payload["recipe"]["image_size"] = 48
    checkpoint.save(tmp_path / "small.pt", payload)
    trained, picture = checkpoint.load_network(tmp_path / "small.pt"), noise(tmp_path / "a.png", 0)
    machine = start_machine(Runtime(device="cpu", threads=1, precision="fp32"))
    (seen,) = predict.predict(trained, [picture], 10, machine, {}, squares=1)
    assert torch.equal(seen.square, picture_file.open_square(picture, 48))
    expected = scoring.logits(trained.model, seen.square[None], trained.eval_size).softmax(1)[0]
    shares = dict(seen.choices)
    assert [shares[name] for name in trained.classes] == pytest.approx(expected.tolist(), rel=1e-5)


def test_pictures_are_looked_at_in_the_machines_precision(tiny_run, tmp_path):
    trained, seen = checkpoint.load_network(tiny_run), []
    trained.model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in ("fp32", "bf16"):
        machine = start_machine(Runtime(device="cpu", threads=1, precision=precision))
        assert predict.predict(trained, [noise(tmp_path / "a.png", 0)], 2, machine, {})
    assert seen == [torch.float32, torch.bfloat16]


def test_the_last_epoch_s_network_is_asked_unless_the_best_is_wanted(tiny_run, tmp_path):
    picture = noise(tmp_path / "a.png", 0)
    for flags, name in (([], "last.pt"), (["--best"], "best.pt")):
        assert run(tiny_run, picture, "--json", tmp_path / "out.json", *flags) == 0
        assert json.loads((tmp_path / "out.json").read_text())["checkpoint"] == str(tiny_run / name)


def test_the_mirror_is_used_where_the_run_validated_so(tiny_run, tmp_path):
    payload = checkpoint.load(tiny_run / "best.pt")
    payload["recipe"]["tta"] = "mirror"
    checkpoint.save(tmp_path / "mirror.pt", payload)
    left = noise(tmp_path / "left.png", 0)
    Image.open(left).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "right.png")
    shares = {}
    for network in (tiny_run / "best.pt", tmp_path / "mirror.pt"):
        assert run(network, left, tmp_path / "right.png", "--json", tmp_path / "out.json") == 0
        one, other = json.loads((tmp_path / "out.json").read_text())["pictures"]
        shares[network.name] = [picture["choices"][0]["confidence"] for picture in (one, other)]
    assert shares["mirror.pt"][0] == pytest.approx(shares["mirror.pt"][1], rel=1e-5)
    assert shares["best.pt"][0] != pytest.approx(shares["best.pt"][1], rel=1e-5)


def test_table_csv_and_sheet_agree(tiny_run, tmp_path, capsys, monkeypatch):
    paths = [noise(tmp_path / "in" / name, seed) for seed, name in enumerate(("a.png", "deep/b.bmp", "deep/c.tif"))]
    sheets = []
    monkeypatch.setattr(plots, "sample_sheet", lambda path, images, titles, **rest: sheets.append((images, titles)))
    sheet = ["--sheet", tmp_path / "sheet.png"]
    assert run(tiny_run, tmp_path / "in", "--top", 3, "--csv", tmp_path / "out.csv", *sheet) == 0
    said = capsys.readouterr()
    header, *lines = said.out.splitlines()
    assert header.split() == ["file", "class", "confidence", "choice", "2", "choice", "3"] and said.err == ""
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    for row, line, title in zip(rows, lines, sheets[0][1], strict=True):
        first, second, third = (float(row[f"confidence_{number}"]) for number in (1, 2, 3))
        names = [row[f"class_{number}"] for number in (1, 2, 3)]
        shown = [row["file"], names[0], f"{first:.1%}", names[1], f"{second:.1%}", names[2], f"{third:.1%}"]
        assert line.split() == shown and title == f"{names[0]} {first:.0%}\n{Path(row['file']).name}"
        assert first >= second >= third
    assert sheets[0][0].shape == (3, 3, 96, 96) and sheets[0][0].dtype == np.uint8


def test_a_sheet_of_more_pictures_than_it_has_room_for_shows_the_first(tiny_run, tmp_path, monkeypatch):
    for seed in range(3):
        noise(tmp_path / "in" / f"{seed}.png", seed)
    sheets = []
    monkeypatch.setattr(predict, "ON_SHEET", 2)
    monkeypatch.setattr(plots, "sample_sheet", lambda path, images, titles, **rest: sheets.append((images, rest)))
    assert run(tiny_run, tmp_path / "in", "--sheet", tmp_path / "sheet.png") == 0
    ((images, rest),) = sheets
    assert len(images) == 2 and rest["heading"].endswith("last.pt: the first 2 of 3 pictures")


def test_the_sheet_is_drawn_whatever_a_file_is_called(tiny_run, tmp_path):
    noise(tmp_path / "in" / "$x_{^$.png", 0)
    noise(tmp_path / "in" / ("very long name " * 5 + ".png"), 1)
    os.rename(noise(tmp_path / "in" / "plain.png", 2), os.fsencode(tmp_path / "in") + b"/caf\xe9\n.png")
    wanted = ["--csv", tmp_path / "out.csv", "--json", tmp_path / "out.json", "--sheet", tmp_path / "out.png"]
    assert run(tiny_run, tmp_path / "in", *wanted) == 0
    assert r"caf\xe9\n.png" in (tmp_path / "out.csv").read_text()
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width == 1200


def test_what_is_broken_is_skipped_and_told(tiny_run, tmp_path, capsys):
    good = noise(tmp_path / "good.png", 0)
    (tmp_path / "bad.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    named = [good, tmp_path / "bad.png", tmp_path / "missing.png", tmp_path / "empty", good]
    assert run(tiny_run, *named, "--json", tmp_path / "out.json") == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and str(good) in said.out
    assert [line.startswith("skipped: ") for line in said.err.splitlines()] == [True] * 3
    written = json.loads((tmp_path / "out.json").read_text())
    assert {Path(each["file"]).name for each in written["skipped"]} == {"bad.png", "missing.png", "empty"}
    assert all(Path(each["file"]).name in each["reason"] for each in written["skipped"])


def test_more_than_a_batch(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 2)
    for number in range(5):
        noise(tmp_path / f"{number}.png", number)
    (tmp_path / "2.png").write_text("no picture")
    trained = checkpoint.load_network(tiny_run)
    machine = start_machine(Runtime(device="cpu", threads=1))
    skipped = {}
    predictions = predict.predict(trained, sorted(tmp_path.glob("*.png")), 2, machine, skipped, squares=3)
    assert [Path(prediction.file).stem for prediction in predictions] == ["0", "1", "3", "4"]
    assert [prediction.square is None for prediction in predictions] == [False] * 3 + [True]
    assert list(skipped) == [str(tmp_path / "2.png")]


@pytest.mark.parametrize("name, reason", [("empty", "there are no pictures"), ("bad.png", "none of the files")])
def test_nothing_to_see_is_an_error(tiny_run, tmp_path, capsys, name, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").touch()
    assert run(tiny_run, tmp_path / name, "--csv", tmp_path / "out.csv") == 1
    assert f"error: {reason}" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize(
    "arguments, complaint", [("--top 0", "'0' is not"), ("--sheet a.jpg", "should end in .png"), ("", "PICTURE")]
)
def test_usage_errors(tiny_run, tmp_path, capsys, arguments, complaint):
    pictures = [str(tmp_path)] if arguments else []
    with pytest.raises(SystemExit) as caught:
        predict.main([str(tiny_run), *pictures, *arguments.split()])
    assert caught.value.code == 2 and complaint in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_one_line(tiny_run, tmp_path, capsys):
    assert run(tiny_run, noise(tmp_path / "a.png", 0), "--csv", tmp_path / "no" / "out.csv") == 1
    assert f"error: cannot write {tmp_path / 'no' / 'out.csv'}" in capsys.readouterr().err


def test_a_link_to_itself_is_skipped(tiny_run, tmp_path, capsys):
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    assert run(tiny_run, noise(tmp_path / "a.png", 0), tmp_path / "loop.jpg", "--csv", tmp_path / "out.csv") == 1
    said = capsys.readouterr()
    assert "a.png" in said.out and f"skipped: cannot read {tmp_path / 'loop.jpg'}" in said.err


def test_best_is_not_asked_of_a_file(tiny_run, picture, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main([str(tiny_run / "last.pt"), str(picture), "--best"])
    assert stop.value.code == 2 and "--best takes the best epoch of a run folder" in capsys.readouterr().err


def test_more_choices_than_classes_are_all_classes(tiny_run, tmp_path):
    picture = noise(tmp_path / "a.png", 0)
    assert run(tiny_run, picture, "--top", 11, "--json", tmp_path / "out.json") == 0
    (seen,) = json.loads((tmp_path / "out.json").read_text())["pictures"]
    names = [choice["class"] for choice in seen["choices"]]
    assert sorted(names) == sorted(checkpoint.load_network(tiny_run).classes)
