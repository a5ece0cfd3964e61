"""Folders as people lay them out: a split is recognised by its names or refused, never taken for classes."""

import unicodedata
from pathlib import Path

import pytest
import torch
from picture_folders import COLOURS, draw, fill

from harness import picture_folder
from harness.errors import RunError
from harness.images import load_images
from harness.picture_search import PassedOver
from harness.picture_split import Layout, find_layout, part_by_name
from recipes import RECIPES, replace


def layout(folder: Path) -> Layout:
    return find_layout(folder, PassedOver())


@pytest.mark.parametrize(
    "part, names",
    [
        ("train", "train Train TRAIN training Training train_set training-set TrainSet trainset seg_train train2017"),
        ("train", "traindata train_images asl_alphabet_train 01_train trn trainval X-train"),
        ("val", "val Val VALID valid validation Validation val_set ValSet devset dev val2017 eval holdout seg_val"),
        ("test", "test Test TESTING testing test_set TestSet testset seg_test tests tst test2017 testdata"),
        (None, "cat latest contest training_test trainer strain value devil evaluate-nothing detest medieval invalid"),
    ],
)
def test_names_of_the_parts(part, names):
    assert {name: part_by_name(name) for name in names.split()} == dict.fromkeys(names.split(), part)


@pytest.mark.parametrize("names", ["Training Testing", "train val test", "seg_train seg_test", "TRAIN VALID", "train"])
def test_split_is_recognised_by_its_names(tmp_path, names, capsys):
    for start, name in enumerate(names.split()):
        fill(tmp_path / name, 3, start=500 * start)
    dataset, train, val = load_images(replace(RECIPES["demo"], {"image_size": 32}), Path("nowhere"), tmp_path)
    assert dataset.classes == ("apple", "leaf", "sky")
    first, *others = names.split()
    assert f"train is {first}" in capsys.readouterr().out
    if "VALID" in others or "val" in others:
        assert (len(train), len(val)) == (9, 9)
    else:  # of each class one in five validates, but at least one
        assert (len(train), len(val)) == (6, 3)
    if len(others) == 2 or others == ["Testing"]:
        assert len(picture_folder.load_test(tmp_path, 32)[0].labels) == 9
    else:
        assert layout(tmp_path).test is None or others == ["seg_test"]


def test_pictures_named_test_neither_train_nor_validate(tmp_path):
    fill(tmp_path / "Training", 3)
    fill(tmp_path / "Testing", 3, start=500)
    everything = picture_folder.load(tmp_path, 32).images
    for image in picture_folder.load_test(tmp_path, 32)[0].images:
        assert not (everything == image).flatten(1).all(1).any()
    (tmp_path / "Testing" / "sky" / "copy.png").write_bytes((tmp_path / "Training" / "sky" / "sky0.png").read_bytes())
    with pytest.raises(RunError, match="Testing/sky/copy.png is in train or val too"):
        picture_folder.load_test(tmp_path, 32)


def test_split_that_repeats_its_name_inside(tmp_path):
    fill(tmp_path / "seg_train" / "seg_train", 2)
    fill(tmp_path / "seg_test" / "seg_test", 2, start=500)
    draw(tmp_path / "seg_pred" / "a.png", COLOURS["sky"], 900)
    passed = PassedOver()
    found = find_layout(tmp_path, passed)
    assert found == Layout(tmp_path / "seg_train" / "seg_train", None, tmp_path / "seg_test" / "seg_test")
    assert passed.paths == {"folder beside a split": [tmp_path / "seg_pred"]}


def test_classes_may_have_the_names_of_parts(tmp_path):
    """The vehicle and the tube, as long as their pictures lie in their own folders."""
    for seed, name in enumerate(("train", "car", "test", "valid ticket")):
        draw(tmp_path / name / "a.png", COLOURS["sky"], seed)
    assert layout(tmp_path) == Layout(tmp_path)
    assert picture_folder.load(tmp_path, 32).classes == ("car", "test", "train", "valid ticket")
    draw(tmp_path / "train" / "steam" / "b.png", COLOURS["sky"], 9)
    with pytest.raises(
        RunError, match="train holds folders itself and is named as a part of a split, but .*car"
    ) as refused:
        picture_folder.load(tmp_path, 32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("names", ["train test1", "Training Testing", "train valid test", "train2017 val2017"])
def test_parts_with_loose_pictures_are_no_classes(tmp_path, names):
    """As archives unpack whose labels stand in the files' names."""
    for seed, name in enumerate(names.split()):
        draw(tmp_path / name / "cat.0.png", COLOURS["sky"], 2 * seed)
        draw(tmp_path / name / "dog.0.png", COLOURS["leaf"], 2 * seed + 1)
    with pytest.raises(RunError, match="named as parts of a split, but hold loose pictures; sort those into"):
        picture_folder.load(tmp_path, 32)
    (tmp_path / "empty").mkdir()  # changes nothing
    with pytest.raises(RunError, match="named as parts of a split"):
        picture_folder.load(tmp_path, 32)


def test_classes_may_hold_folders_of_different_names(tmp_path):
    for seed, name in enumerate(("animals/cats", "animals/dogs", "plants/trees", "plants/dogs")):
        draw(tmp_path / name / "a.png", COLOURS["sky"], seed)
    assert picture_folder.load(tmp_path, 32).classes == ("animals", "plants")


def _copies(*names: str):
    def make(folder: Path) -> None:
        for start, name in enumerate(names):
            fill(folder / name, 1, start=500 * start)

    return make


def _class_first(folder: Path) -> None:
    for start, name in enumerate(("cat/train", "cat/test", "dog/train", "dog/test")):
        draw(folder / name / "a.png", COLOURS["sky"], start)


def _flat_val(folder: Path) -> None:
    fill(folder / "train", 1)
    draw(folder / "val" / "a.png", COLOURS["sky"], 5)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (_copies("A", "B"), "A and .*B both hold folders apple and leaf, as the parts of a split do: name them train"),
        (_copies("fold_1", "fold_2", "fold_3"), "as the parts of a split do"),
        (_copies("2019", "2020"), "as the parts of a split do"),
        (_copies("entrenamiento", "prueba"), "as the parts of a split do"),
        (_copies("train", "Training"), "both look like train"),
        (_copies("train", "valid", "dev"), "both look like val"),
        (_copies("val", "test"), "holds no folder named train with class folders in it"),
        (_copies("test"), "holds no folder named train with class folders in it"),
        (_copies("train", "cat"), "train holds folders itself and is named as a part of a split, but .*cat"),
        (_copies("set"), "holds only one folder, of folders: give --images .*set"),
        (_copies("set/train", "set/val"), "holds only one folder, of folders: give --images .*set"),
        (_class_first, "cat holds a split of its own .*train/CLASS, not CLASS/train"),
        (_flat_val, "val holds no class folders, unlike .*train"),
    ],
)
def test_what_looks_like_a_split_is_refused_with_the_way_out(tmp_path, make, sentence):
    make(tmp_path)
    with pytest.raises(RunError, match=sentence) as refused:
        picture_folder.load(tmp_path, 32)
    assert "\n" not in str(refused.value)


def test_folders_beside_a_split_are_named(tmp_path, capsys):
    _copies("train", "val", "extra")(tmp_path)
    draw(tmp_path / "test_images" / "a.png", COLOURS["sky"], 5)
    draw(tmp_path / "cover.png", COLOURS["sky"], 6)
    draw(tmp_path / "train" / "cover.png", COLOURS["sky"], 7)
    (tmp_path / "old").symlink_to("nowhere")
    assert len(picture_folder.load(tmp_path, 32).labels) == 6
    told = capsys.readouterr().out
    assert "passed over 1, folder beside a split: extra" in told
    assert "passed over 1, part of a split without class folders: test_images" in told
    assert "passed over 2, picture outside the class folders: cover.png, train/cover.png" in told
    assert "passed over 1, link leads nowhere: old" in told


@pytest.mark.parametrize("where", ["train and val", "one folder"])
def test_composed_and_decomposed_names_are_one_class(tmp_path, where, capsys):
    """As a Mac's archive unpacked on Linux leaves them."""
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    places = ("train", "val") if where == "train and val" else (".", ".")
    for number, (place, name) in enumerate(zip(places, (composed, decomposed), strict=True)):
        for seed in range(2):
            draw(tmp_path / place / name / f"{number}{seed}.png", COLOURS["sky"], 10 * number + seed)
            draw(tmp_path / place / "tea" / f"{number}{seed}.png", COLOURS["leaf"], 50 + 10 * number + seed)
    dataset = picture_folder.load(tmp_path, 32)
    assert dataset.classes == (composed, "tea") and dataset.labels.bincount().tolist() == [4, 4]
    assert (dataset.given_split is None) == (where == "one folder")
    assert ("the names of 2 folders look the same" in capsys.readouterr().out) == (where == "one folder")


def test_summary_counts_each_class():
    labels = torch.tensor([0, 0, 0, 1, 1])
    found = picture_folder.summary(("cat", "dog"), labels, torch.tensor([0, 1, 3]), torch.tensor([2, 4]))
    assert found == "2 classes; 3 train + 2 val pictures: cat 2 + 1, dog 1 + 1"
    many = tuple(f"class{number:03}" for number in range(200))
    labels = torch.cat([torch.arange(200), torch.zeros(800, dtype=torch.int64)])
    found = picture_folder.summary(many, labels, torch.arange(1000), torch.arange(0))
    assert found.startswith("200 classes; 1,000 train + 0 val pictures: class000 801 + 0, class001 1 + 0, ")
    assert found.endswith("class011 1 + 0, … (1 to 801 train)")
