import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from harness import picture_file
from harness.errors import RunError

GREY = np.array([[0, 64, 255], [128, 32, 200], [250, 7, 99]], np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def save(image: np.ndarray | Image.Image, path: Path, **options: object) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def pixels(array: np.ndarray) -> torch.Tensor:
    """(H, W, 3) or grey (H, W) as (3, H, W)."""
    return torch.from_numpy(np.stack([array] * 3) if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def centre(array: np.ndarray) -> np.ndarray:
    return array[:, 8:40]


def test_a_square_of_the_right_size_keeps_its_pixels(tmp_path):
    opened = picture_file.open_square(save(centre(COLOUR), tmp_path / "a.png"), 32)
    assert opened.dtype == torch.uint8 and opened.is_contiguous()
    assert torch.equal(opened, pixels(centre(COLOUR)))


@pytest.mark.parametrize("size", [16, 32, 45])
@pytest.mark.parametrize("upright", [False, True])
def test_centre_crop_and_antialiased_bilinear_resize(tmp_path, size, upright):
    array = COLOUR.transpose(1, 0, 2) if upright else COLOUR
    square = array[8:40] if upright else centre(array)
    opened = picture_file.open_square(save(array, tmp_path / "a.png"), size)
    expected = TF.resize(pixels(square).float(), [size, size], InterpolationMode.BILINEAR, antialias=True)
    assert (opened.float() - expected).abs().max() <= 1.01


def test_an_odd_rest_is_cut_at_whole_pixels(tmp_path):
    assert torch.equal(picture_file.open_square(save(COLOUR[:, :33], tmp_path / "a.png"), 32), pixels(COLOUR[:, :32]))


@pytest.mark.parametrize(
    "name, make, expected",
    [
        ("grey.png", lambda: Image.fromarray(GREY), GREY),
        ("palette.png", lambda: Image.fromarray(GREY).convert("P"), GREY),
        ("palette.gif", lambda: Image.fromarray(GREY).convert("P"), GREY),
        ("one_bit.png", lambda: Image.fromarray(GREY > 100), (GREY > 100) * np.uint8(255)),
        ("16_bit.png", lambda: Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("16_bit.tif", lambda: Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
        ("dark_16_bit.png", lambda: Image.fromarray(GREY.astype(np.uint16)), np.round(GREY / 257).astype(np.uint8)),
        ("32_bit.tif", lambda: Image.fromarray(GREY.astype(np.int32) * 257), GREY),
        ("float.tif", lambda: Image.fromarray(GREY.astype(np.float32) / 255), GREY),
        ("float_255.tif", lambda: Image.fromarray(GREY.astype(np.float32)), GREY),
        ("cmyk.tif", lambda: Image.fromarray(COLOUR[:3, :3]).convert("CMYK"), COLOUR[:3, :3]),
        ("colour.bmp", lambda: Image.fromarray(COLOUR[:3, :3]), COLOUR[:3, :3]),
        ("lossless.webp", lambda: Image.fromarray(COLOUR[:3, :3]), COLOUR[:3, :3]),
    ],
)  # fmt: skip
def test_modes(tmp_path, name, make, expected):
    options = {"lossless": True} if name.endswith("webp") else {}
    assert torch.equal(picture_file.open_square(save(make(), tmp_path / name, **options), 3), pixels(expected))


def test_16_bit_colour(tmp_path):
    """Pillow writes no such file: here is one, of one row of one pixel for each of three rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + (GREY[row].astype(np.uint16) * 257).astype(">u2").tobytes() for row in range(3))
    header = struct.pack(">IIBBBBB", 1, 3, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert picture_file.open_square(tmp_path / "a.png", 1).flatten().tolist() == GREY[1].tolist()  # the middle row


def test_16_bit_grey_of_a_portable_graymap(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 3 3 65535\n" + (GREY.astype(np.uint16) * 257).astype(">u2").tobytes())
    assert torch.equal(picture_file.open_square(tmp_path / "a.pgm", 3), pixels(GREY))


@pytest.mark.parametrize("name", ["rgba.png", "grey_alpha.png", "palette.png", "key.png", "palette.gif"])
def test_transparency_shows_white(tmp_path, name):
    """Left pixel opaque red (or its grey), right one transparent black."""
    image = Image.fromarray(np.array([[[200, 0, 0, 255], [0, 0, 0, 0]]] * 2, np.uint8))
    left, options = [200, 0, 0], {}
    if name == "grey_alpha.png":
        image, left = image.convert("LA"), [60] * 3
    elif name.startswith("palette"):
        image = Image.fromarray(np.array([[0, 1]] * 2, np.uint8)).convert("P")
        image.putpalette([200, 0, 0, 0, 0, 0])
        options = {"transparency": 1}
    elif name == "key.png":
        image, options = image.convert("RGB"), {"transparency": (0, 0, 0)}
    opened = picture_file.open_square(save(image, tmp_path / name, **options), 2)
    assert opened[:, 0].T.tolist() == [left, [255, 255, 255]]


def test_half_transparent_is_mixed_with_white(tmp_path):
    path = save(np.full((2, 2, 4), (100, 0, 200, 51), np.uint8), tmp_path / "a.png")
    expected = [round(255 * 0.8 + 0.2 * value) for value in (100, 0, 200)]
    assert picture_file.open_square(path, 2)[:, 0, 0].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.T),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].T),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_the_camera_says_which_side_is_up(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = picture_file.open_square(save(GREY, tmp_path / "a.png", exif=exif), 3)
    assert torch.equal(opened, pixels(upright(GREY).copy()))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_first_frame_of_an_animation(tmp_path, name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    path = save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], duration=50, **options)
    assert picture_file.open_square(path, 4)[:, 0, 0].tolist() == [255, 0, 0]


def test_no_other_program_is_started_whatever_a_file_is_called(tmp_path, monkeypatch):
    """Pillow goes by the content, and would have Ghostscript run what a PostScript file says."""
    path = tmp_path / "cat.jpg"
    Image.new("RGB", (40, 40)).save(path, format="EPS")
    with Image.open(path) as image:
        assert image.format == "EPS"
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("started"))
    with pytest.raises(RunError, match="cat.jpg is not a picture, or is of a kind that Pillow cannot open"):
        picture_file.open_square(path, 32)


def test_what_cannot_be_used_is_one_sentence_with_the_name(tmp_path):
    whole = save(COLOUR, tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.gif").touch()
    (tmp_path / "folder.png").mkdir()
    save(np.full((2, 2), 70_000, np.int32), tmp_path / "deep.tif")
    save(np.full((2, 2), np.nan, np.float32), tmp_path / "nan.tif")
    for name, reason in {
        "cut.jpg": "truncated", "text.png": "not a picture", "empty.gif": "not a picture",
        "folder.png": "directory", "missing.png": "No such file", "deep.tif": "70000", "nan.tif": "nan",
    }.items():  # fmt: skip
        with pytest.raises(RunError, match=f"{name}.*{reason}") as caught:
            picture_file.open_square(tmp_path / name, 8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("factor", [0.9, 0.4])  # Pillow warns at its limit and raises at twice that
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, factor):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(32 * 48 * factor))
    with pytest.raises(RunError, match="a.png has more than .* pixels, .*: make it smaller"):
        picture_file.open_square(save(COLOUR, tmp_path / "a.png"), 8)
