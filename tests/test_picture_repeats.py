"""One picture twice: within a class it counts once; in two classes, or in two parts of a split, it is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from picture_folders import fill
from PIL import Image

from harness import picture_folder
from harness.errors import RunError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return fill(tmp_path / "pictures", 5)


def test_repeated_picture_within_a_class_counts_once(images: Path, capsys: pytest.CaptureFixture) -> None:
    (images / "leaf" / "leaf9.png").write_bytes((images / "leaf" / "leaf0.png").read_bytes())
    found = picture_folder.load(images, 32)
    assert found.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert capsys.readouterr().out == (
        f"1 picture(s) passed over that are in a class twice: {images / 'leaf' / 'leaf9.png'}\n"
    )


def test_a_repeated_picture_goes_with_its_square(tmp_path: Path) -> None:
    def found() -> tuple:
        return picture_folder.load(tmp_path, 32), picture_folder.load_test(tmp_path, 32)[0]

    for start, name in enumerate(("train", "val", "test")):
        fill(tmp_path / name, 2, start=500 * start)
    before, before_test = found()
    for name in ("train", "test"):
        apple = tmp_path / name / "apple"
        (apple / "again.png").write_bytes((apple / "apple0.png").read_bytes())
    after, after_test = found()
    for one, other in ((before, after), (before_test, after_test)):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert after.digest == before.digest and all(map(torch.equal, before.given_split, after.given_split))


def test_one_picture_in_two_classes_is_refused_with_both_names(images: Path) -> None:
    copy = images / "sky" / "other.png"
    Image.open(images / "leaf" / "leaf0.png").save(copy, compress_level=0)  # the same pixels in other bytes
    with pytest.raises(RunError, match="are the same picture in two classes") as refused:
        picture_folder.load(images, 32)
    assert str(images / "leaf" / "leaf0.png") in str(refused.value) and str(copy) in str(refused.value)


def test_one_picture_in_train_and_val_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 2, start=500)
    (tmp_path / "val" / "sky" / "copy.png").write_bytes((tmp_path / "train" / "sky" / "sky0.png").read_bytes())
    with pytest.raises(
        RunError, match=r"train/sky/sky0.png and .*val/sky/copy.png are the same picture in train and val"
    ):
        picture_folder.load(tmp_path, 32)


def test_test_picture_that_was_trained_on_is_refused(tmp_path: Path) -> None:
    for start, name in enumerate(("train", "val", "test")):
        fill(tmp_path / name, 2, start=500 * start)
    assert len(picture_folder.load_test(tmp_path, 32)[0].labels) == 6
    (tmp_path / "test" / "sky" / "copy.png").write_bytes((tmp_path / "train" / "sky" / "sky0.png").read_bytes())
    with pytest.raises(RunError, match=r"test/sky/copy.png is in train or val too, pixel for pixel; take it out"):
        picture_folder.load_test(tmp_path, 32)


def test_all_pictures_to_take_out_are_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for start, name in enumerate(("train", "val", "test")):
        fill(tmp_path / name, 6, start=500 * start)
    shutil.copytree(tmp_path / "train" / "sky", tmp_path / "test" / "sky", dirs_exist_ok=True)
    copies = [str(path) for path in sorted((tmp_path / "test" / "sky").iterdir())]
    with pytest.raises(RunError, match=r"sky2.BMP and 3 more are in train or val too.* take them out of test"):
        picture_folder.load_test(tmp_path, 32)
    assert capsys.readouterr().err.splitlines() == copies
    for path in copies:
        Path(path).write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"and 3 more; repair them"):
        picture_folder.load_test(tmp_path, 32)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and all(path in line for path, line in zip(copies, said, strict=True))


def test_test_pictures_are_distinct_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fill(tmp_path / "test", 2)
    sky = (tmp_path / "test" / "sky" / "sky0.png").read_bytes()
    (tmp_path / "test" / "sky" / "again.png").write_bytes(sky)
    assert picture_folder.load_test(tmp_path, 32)[0].labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert "1 picture(s) passed over that are in a class twice" in capsys.readouterr().out
    (tmp_path / "test" / "leaf" / "other.png").write_bytes(sky)
    with pytest.raises(RunError, match=r"test/leaf/other.png and .* are the same picture in two classes"):
        picture_folder.load_test(tmp_path, 32)


def test_all_pictures_in_two_classes_are_counted(images: Path) -> None:
    for number in range(5):
        shutil.copy(next((images / "leaf").glob(f"leaf{number}.*")), images / "sky")
    with pytest.raises(RunError, match=r"in two classes, .* and 2 more; take each out of one of them"):
        picture_folder.load(images, 32)
