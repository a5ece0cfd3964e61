"""A folder of the user's own pictures: what is read, how it is split, what is kept beside it, and what is refused."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_folders import COLOURS, TINY, draw, fill, save_untrained
from PIL import Image

import data
import recipes
import train
from harness import checkpoint, cli, picture_file, picture_folder
from harness.errors import RunError
from harness.images import Source, load_for_network, load_images, load_test_images, recorded_source
from model import count_parameters


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return fill(tmp_path / "pictures", 5)


def recipe(**changes: object) -> recipes.Recipe:
    return recipes.replace(recipes.RECIPES["demo"], {"image_size": 32, **changes})


def test_every_picture_arrives_as_its_square_under_its_class(images: Path) -> None:
    (images / "apple" / ".hidden.png").write_bytes(b"no picture")
    (images / ".hidden").mkdir()
    found = picture_folder.load(images, 32)
    assert found.given_split is None and found.classes == ("apple", "leaf", "sky")
    assert found.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 and found.labels.dtype == torch.int64
    paths = [path for name in found.classes for path in sorted((images / name).glob("[!.]*"))]
    assert torch.equal(found.images, torch.stack([picture_file.open_square(path, 32) for path in paths]))


def test_pictures_of_any_mode_arrive_in_eight_bit_colours(tmp_path: Path) -> None:
    size, red = (50, 40), (255, 0, 0)
    animation = [Image.new("RGB", size, colour) for colour in ((0, 0, 255), red)]
    half_red = Image.new("RGBA", size, (*red, 128))
    pages = {
        "a.png": (Image.new("L", size, 100), (100, 100, 100)),
        "b.png": (Image.new("RGB", size, red).quantize(4), red),
        "c.png": (half_red, (255, 127, 127)),  # on white
        "d.png": (Image.fromarray(np.full(size[::-1], 40_000, np.uint16)), (156, 156, 156)),
        "e.png": (Image.new("1", size, 1), (255, 255, 255)),
        "f.tif": (Image.new("CMYK", size, (255, 0, 255, 0)), (0, 255, 0)),
        "g.gif": (animation[0], (0, 0, 255)),
    }
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    draw(tmp_path / "two" / "two.png", (9, 9, 9), 0)
    for name, (page, _) in pages.items():
        more = {"save_all": True, "append_images": animation[1:]} if name == "g.gif" else {}
        page.save(tmp_path / "one" / name, **more)
    found = picture_folder.load(tmp_path, 32)
    for image, (name, (_, colour)) in zip(found.images, pages.items(), strict=False):
        assert torch.equal(image, torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, 32, 32)), name


def test_pictures_in_folders_below_a_class_belong_to_it(images: Path) -> None:
    draw(images / "leaf" / "2024" / "may" / "new.png", COLOURS["leaf"], 77)
    assert picture_folder.load(images, 32).labels.tolist() == [0] * 5 + [1] * 6 + [2] * 5


def test_split_follows_the_rule_for_stl10(images: Path) -> None:
    found, training, val = load_images(recipe(val_fraction=0.4, split_seed=3), Path("nowhere"), images)
    expected_train, expected_val = [], []
    for label in range(3):
        members = sorted(range(5 * label, 5 * label + 5), key=str)
        random.Random(3).shuffle(members)
        expected_train += members[:3]
        expected_val += members[3:]
    assert training.tolist() == sorted(expected_train) and val.tolist() == sorted(expected_val)
    assert load_images(recipe(train_on="all"), Path("nowhere"), images)[2].tolist() == []


def test_given_split_is_taken_as_it_is(tmp_path: Path) -> None:
    fill(tmp_path / "train", 4)
    fill(tmp_path / "val", 2, start=500)
    fill(tmp_path / "test", 1, start=900)
    found, training, val = load_images(recipe(), Path("nowhere"), tmp_path)
    assert training.tolist() == list(range(12)) and val.tolist() == list(range(12, 18))
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [0, 0, 1, 1, 2, 2]
    first_val = min((tmp_path / "val" / "apple").glob("[!.]*"))
    assert torch.equal(found.images[12], picture_file.open_square(first_val, 32))
    test, others = picture_folder.load_test(tmp_path, 32)
    assert test.labels.tolist() == [0, 1, 2] and test.classes == found.classes
    assert others.digest == found.digest and torch.equal(others.given_split[1], val)


def test_squares_are_kept_and_used_again(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = picture_folder.load(images, 32)
    assert [path.name for path in images.iterdir() if path.name.startswith(".")] == [".squares-32px.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(picture_file, "open_square", lambda *_: pytest.fail("a picture was opened again"))
        again = picture_folder.load(images, 32)
    assert torch.equal(again.images, first.images) and again.digest == first.digest
    assert picture_folder.load(images, 40).images.shape[-1] == 40
    assert torch.equal(picture_folder.load(images, 32).images, first.images)


@pytest.mark.parametrize("change", ("changed", "touched", "added", "removed", "renamed"))
def test_kept_squares_are_made_anew_when_the_pictures_are_others(images: Path, change: str) -> None:
    before = picture_folder.load(images, 32)
    path = images / "sky" / "sky0.png"
    if change == "changed":
        draw(path, (0, 0, 0), 5)
    elif change == "touched":  # other pixels, same number of bytes
        pixels = np.asarray(Image.open(images / "sky" / "sky2.BMP"))
        path = images / "sky" / "sky2.BMP"
        Image.fromarray(255 - pixels).save(path)
        os.utime(path, ns=(0, 1))
    elif change == "added":
        draw(images / "sky" / "sky9.png", COLOURS["sky"], 99)
    elif change == "removed":
        path.unlink()
    else:
        path.rename(path.with_name("sky9.png"))
    after = picture_folder.load(images, 32)
    paths = [path for name in after.classes for path in sorted((images / name).iterdir())]
    assert torch.equal(after.images, torch.stack([picture_file.open_square(path, 32) for path in paths]))
    assert (after.digest == before.digest) is False


@pytest.mark.parametrize("damage", ("emptied", "cut", "flipped", "foreign"))
def test_damaged_squares_are_made_anew(images: Path, damage: str) -> None:
    right = picture_folder.load(images, 32)
    kept = images / ".squares-32px.npz"
    content = bytearray(kept.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    kept.write_bytes({"emptied": b"", "cut": content[:middle], "flipped": content, "foreign": b"hello"}[damage])
    assert torch.equal(picture_folder.load(images, 32).images, right.images)
    assert np.load(kept)["images"].shape == (15, 3, 32, 32)


def test_folder_that_cannot_be_written_is_read_and_says_so(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")  # the superuser may write anywhere, so it cannot be tried

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        found = picture_folder.load(images, 32)
    told = capsys.readouterr().out
    assert len(found.labels) == 15 and told.count("\n") == 1 and "Permission denied" in told and "again" in told
    assert not list(images.glob(".*"))


def test_a_picture_that_changes_its_class_makes_another_data_set(images: Path) -> None:
    before = picture_folder.load(images, 32)
    last = max((images / "apple").iterdir())
    last.rename(images / "leaf" / f"a{last.suffix}")
    after = picture_folder.load(images, 32)
    assert torch.equal(after.images, before.images) and after.labels.tolist() == [0] * 4 + [1] * 6 + [2] * 5
    assert after.digest != before.digest


def test_all_takes_the_pictures_of_val_too(tmp_path: Path) -> None:
    fill(tmp_path / "train", 4)
    fill(tmp_path / "val", 2, start=500)
    _, training, val = load_images(recipe(train_on="all"), Path("nowhere"), tmp_path)
    assert training.tolist() == list(range(18)) and val.tolist() == []


def test_broken_files_are_named_and_the_others_kept(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "apple" / "a.png").write_bytes(b"not a picture")
    whole = (images / "sky" / "sky1.jpg").read_bytes()
    (images / "sky" / "sky1.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"apple/a\.png.*and .*sky/sky1\.jpg.*; repair them or take them out"):
        picture_folder.load(images, 32)
    opened, really = [], picture_file.open_square
    monkeypatch.setattr(picture_file, "open_square", lambda path, size: opened.append(path) or really(path, size))
    (images / "sky" / "sky1.jpg").write_bytes(whole)
    with pytest.raises(RunError, match=r"apple/a\.png.*; repair it or take it out"):
        picture_folder.load(images, 32)
    assert {path.name for path in opened} == {"a.png", "sky1.jpg"}  # the others' squares were kept


def test_other_files_are_passed_over_aloud(images: Path, capsys: pytest.CaptureFixture) -> None:
    (images / "apple" / "notes.txt").write_text("red")
    assert len(picture_folder.load(images, 32).labels) == 15
    assert "passed over 1, not a picture by its name: apple/notes.txt" in capsys.readouterr().out


def _nothing(images: Path) -> None:
    for path in sorted(images.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _absent(images: Path) -> None:
    images.rename(images.with_name("elsewhere"))


def _one_class(images: Path) -> None:
    for name in ("leaf", "sky"):
        (images / name).rename(images / f".{name}")


def _empty_class(images: Path) -> None:
    (images / "pear").mkdir()


def _no_val(images: Path) -> None:
    _one_class(images)
    (images / "apple").rename(images / "train")
    fill(images / "test", 1)


def _class_missing_in_val(images: Path) -> None:
    _nothing(images)
    fill(images / "train", 2)
    fill(images / "val", 2, start=500)
    (images / "val" / "leaf").rename(images / "val" / ".leaf")


def _one_picture(images: Path) -> None:
    draw(images / "pear" / "one.png", (200, 200, 0), 1)


@pytest.mark.parametrize(
    ("spoil", "told"),
    (
        (_nothing, "pictures holds no class folders"),
        (_absent, "cannot read the folder .*pictures: No such file"),
        (_one_class, r"pictures holds only one class \(apple\)"),
        (_empty_class, "class pear has no pictures"),
        (_no_val, "pictures/train holds no class folders, unlike .*pictures/test"),
        (_class_missing_in_val, "class leaf is in only one of .*train and .*val"),
        (_one_picture, "class pear has only one picture"),
    ),
)
def test_what_cannot_be_trained_on_is_told_in_one_sentence(images: Path, spoil, told: str) -> None:
    spoil(images)
    with pytest.raises(RunError, match=told) as refused:
        load_images(recipe(), Path("nowhere"), images)
    assert "\n" not in str(refused.value)


def test_training_on_a_folder_keeps_its_classes_and_refuses_other_images(
    tmp_path: Path, empty_plots: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    images = fill(tmp_path / "pictures", 14)
    monkeypatch.chdir(tmp_path)
    command = [*TINY, "--images", "pictures", "--image-size", "40", "--val-fraction", "0.3", "--lr", "0.01", "0.01"]
    assert train.main(command) == 0
    run = tmp_path / "runs" / "pictures-demo-seed0"
    config = json.loads((run / "config.json").read_text())
    assert config["images"] == {"train": 30, "val": 12, "digest": picture_folder.load(images, 40).digest}
    trained = checkpoint.load_network(run)
    assert trained.classes == ("apple", "leaf", "sky") and trained.model.fc.out_features == 3
    assert recorded_source(run) == recorded_source(run / "best.pt") == (Path("data"), images)
    found, training, val = load_for_network(trained, recorded_source(run), fetch=False)
    assert found.images.shape == (42, 3, 40, 40) and (len(training), len(val)) == (30, 12)
    assert train.main(command) == 0 and "this run is finished" in capsys.readouterr().out

    draw(images / "sky" / "sky0.png", (0, 0, 0), 5)
    with pytest.raises(RunError, match="holds a run with other settings.*digest"):
        train.main(command)
    with pytest.raises(RunError, match="does not hold the images that this network was trained with"):
        load_for_network(trained, recorded_source(run), fetch=False)
    with pytest.raises(RunError, match="was trained with a folder of pictures; name it with --images"):
        load_for_network(trained, Source(Path("data"), None), fetch=False)


def test_a_picture_folder_that_is_gone_is_asked_for(images: Path, empty_plots: None) -> None:
    run = images.with_name("run")
    assert train.main([*TINY, "--images", str(images), "--out", str(run)]) == 0
    images.rename(images.with_name("moved"))
    assert recorded_source(run).images is None
    with pytest.raises(RunError, match="was trained with a folder of pictures; name it with --images"):
        load_for_network(checkpoint.load_network(run), recorded_source(run), fetch=False)


def test_pictures_are_not_what_a_network_of_an_official_fold_was_trained_with(images: Path, tmp_path: Path) -> None:
    save_untrained(tmp_path / "last.pt", images, 32)
    trained = checkpoint.load_network(tmp_path / "last.pt")
    of_a_fold = recipes.replace(trained.recipe, {"fold": 0})
    trained = dataclasses.replace(trained, recipe=of_a_fold, images={"train": 1_000, "val": 4_000})
    with pytest.raises(RunError, match="was not trained with a folder of pictures.*evaluate.py --split test scores it"):
        load_for_network(trained, Source(tmp_path, images), fetch=False)


def test_test_images_beside_other_pictures_than_the_networks_are_refused(tmp_path: Path, empty_plots: None) -> None:
    """What lies in test today may have been in train when the network learnt."""
    images = tmp_path / "pictures"
    for start, name in enumerate(("train", "val", "test")):
        fill(images / name, 4, start=500 * start)
    assert train.main([*TINY, "--images", str(images), "--out", str(tmp_path / "run")]) == 0
    trained = checkpoint.load_network(tmp_path / "run")
    assert len(load_test_images(trained, Source(Path("data"), images)).labels) == 12
    with pytest.raises(RunError, match="was trained with a folder of pictures; name it with --images"):
        load_test_images(trained, Source(Path("data"), None))
    (images / "train" / "sky" / "sky0.png").rename(images / "test" / "sky" / "new.png")
    with pytest.raises(RunError, match="are not those that this network was trained with, so it may have learnt some"):
        load_test_images(trained, Source(Path("data"), images))


def test_a_folder_that_is_not_there_is_not_said_to_lack_test(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot read the folder .*nowhere: No such file"):
        picture_folder.load_test(tmp_path / "nowhere", 32)
    with pytest.raises(RunError, match="holds no folder named test"):
        picture_folder.load_test(fill(tmp_path / "pictures", 2), 32)


def test_test_images_of_other_classes_are_refused(tmp_path: Path, empty_plots: None) -> None:
    images = fill(tmp_path / "pictures", 4)
    assert train.main([*TINY, "--images", str(images), "--out", str(tmp_path / "run")]) == 0
    trained = checkpoint.load_network(tmp_path / "run")
    others = tmp_path / "others"
    fill(others / "test", 1, start=900)
    assert len(load_test_images(trained, Source(Path("data"), others)).labels) == 3
    draw(others / "test" / "pear" / "one.png", (200, 200, 0), 1)
    with pytest.raises(RunError, match="have the classes apple, leaf, pear, sky, but the network has apple, leaf, sky"):
        load_test_images(trained, Source(Path("data"), others))


@pytest.mark.parametrize(
    ("flags", "told"),
    (
        (["--demo", "--fold", "3"], "other pictures have none"),
        (["--val-fraction", "0"], "--val-fraction must be above 0.0 and at most 0.9, not 0.0"),
    ),
)
def test_flags_that_do_not_go_together_are_a_usage_error(flags, told, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse_train(flags)
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_two_classes_take_less_smoothing_than_ten(tmp_path: Path, empty_plots: None, capsys) -> None:
    images, run = fill(tmp_path / "pictures", 6), tmp_path / "run"
    shutil.rmtree(images / "apple")
    line = [*TINY, "--images", str(images), "--out", str(run), "--label-smoothing"]
    with pytest.raises(SystemExit) as ended:
        train.main([*line, "0.6"])
    told = "smoothing over 2 classes must be from 0 to 0.5, not 0.6"
    assert ended.value.code == 2 and told in capsys.readouterr().err and not run.exists()
    assert train.main([*line, "0.5"]) == 0


def test_parameter_budget_holds_unless_it_is_raised(images: Path, empty_plots: None, capsys) -> None:
    parameters = count_parameters(recipes.build_network(recipe(planes=(2, 2, 2)), 3))
    line = [*TINY, "--images", str(images), "--out", str(images.with_name("run"))]
    with pytest.raises(SystemExit) as ended:
        train.main([*line, "--budget", str(parameters - 1)])
    told = f"the network has {parameters:,} parameters, 1 over the budget of {parameters - 1:,}: give smaller --layers"
    assert ended.value.code == 2 and told in capsys.readouterr().err and not images.with_name("run").exists()
    assert train.main([*line, "--budget", str(parameters)]) == 0


def official(folder: Path, per_class: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in STL-10's file format, and two folds of half of them each: odd and even ones."""
    rng = np.random.default_rng(0)
    count = per_class * 10
    files = {
        "train_X.bin": rng.integers(0, 256, count * data.IMAGE_BYTES, dtype=np.uint8).tobytes(),
        "train_y.bin": (np.arange(count) % 10 + 1).astype(np.uint8).tobytes(),
        data.FOLDS_FILE: "".join(" ".join(map(str, range(k, count, 2))) + " \n" for k in (1, 0)).encode(),
    }
    (folder / data.FOLDER).mkdir()
    for name, content in files.items():
        (folder / data.FOLDER / name).write_bytes(content)
        monkeypatch.setitem(data.OFFICIAL, name, data.FileSpec(len(content), hashlib.md5(content).hexdigest()))


def test_fold_trains_on_its_images_and_validates_on_the_others(tmp_path: Path, empty_plots: None, monkeypatch) -> None:
    official(tmp_path, 4, monkeypatch)
    monkeypatch.chdir(tmp_path)
    command = [*TINY, "--recipe", "original", "--views", "1", "--data-dir", str(tmp_path), "--layers", "1", "1", "1"]
    assert train.main([*command, "--fold", "1"]) == 0
    trained = checkpoint.load_network(tmp_path / "runs" / "original-fold1-seed0")
    assert trained.images == {"train": 20, "val": 20} and trained.recipe.fold == 1
    _, training, val = load_for_network(trained, Source(tmp_path, None), fetch=False)
    assert training.tolist() == list(range(0, 40, 2)) and val.tolist() == list(range(1, 40, 2))

    path = tmp_path / data.FOLDER / data.FOLDS_FILE
    path.unlink()
    with pytest.raises(RunError, match=f"the official folds need {path}, which is missing.*put it there"):
        train.main([*command, "--fold", "0"])


def test_the_digest_of_pictures_written_out(images: Path) -> None:
    """By another, each run on such a folder begun before would be refused as one on other pictures."""
    found = picture_folder.load(images, 32)
    content = found.images.numpy().tobytes() + found.labels.numpy().astype("<i8").tobytes()
    assert found.digest == hashlib.sha256(content).hexdigest()
