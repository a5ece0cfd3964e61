"""Grey levels of every depth, and what is transparent among them, against the values that were written."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from picture_folders import fill
from PIL import Image

from harness import picture_folder
from harness.errors import RunError
from harness.picture_file import open_square

LEVELS = np.array([[0, 64], [128, 255]])


def opened(path: Path, size: int = 2) -> list[list[int]]:
    red, green, blue = open_square(path, size).tolist()
    assert red == green == blue
    return red


def tiff(path: Path, values: np.ndarray, photometric: int = 1) -> Path:
    """An uncompressed grey TIFF of any type of number, written by hand: Pillow has no signed or inverted ones."""
    height, width = values.shape
    data, sample = values.tobytes(), {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: len(data), 339: sample}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags))
    path.write_bytes(header + directory + bytes(4))
    return path


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.float32, np.int16])
def test_values_to_255_keep_their_greys_in_types_without_a_range(tmp_path, kind):
    assert opened(tiff(tmp_path / "a.tif", LEVELS.astype(kind))) == LEVELS.tolist()


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.float32, np.uint16])
def test_values_to_65535_are_brought_down(tmp_path, kind):
    assert opened(tiff(tmp_path / "a.tif", (LEVELS * 257).astype(kind))) == LEVELS.tolist()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_to_one_are_black_and_white(tmp_path, kind):
    assert opened(tiff(tmp_path / "a.tif", (LEVELS > 100).astype(kind))) == [[0, 0], [255, 255]]


def test_array_as_numpy_users_save_it(tmp_path):
    Image.fromarray(LEVELS.astype(np.int32)).save(tmp_path / "a.tif")
    assert opened(tmp_path / "a.tif") == LEVELS.tolist()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_keep_their_range_however_dark(tmp_path, name):
    if name == "a.pgm":
        (tmp_path / name).write_bytes(b"P5 2 2 65535\n" + LEVELS.astype(">u2").tobytes())
    else:
        Image.fromarray(LEVELS.astype(np.uint16)).save(tmp_path / name)
    assert opened(tmp_path / name) == [[0, 0], [0, 1]]


@pytest.mark.parametrize("kind, unit", [(np.uint8, 1), (np.uint16, 257)])
def test_tiff_whose_zero_is_white(tmp_path, kind, unit):
    assert opened(tiff(tmp_path / "a.tif", (LEVELS * unit).astype(kind), photometric=0)) == (255 - LEVELS).tolist()


@pytest.mark.parametrize("values", [[-5, 9], [0, 70_000]])
def test_values_without_known_white_are_refused(tmp_path, values):
    with pytest.raises(RunError, match="black and white are unknown"):
        open_square(tiff(tmp_path / "a.tif", np.array([values] * 2, np.int32)), 2)


def png(path: Path, depth: int, colour: int, row: bytes, key: bytes) -> Path:
    """A PNG of two equal rows of two pixels, of which those of the colour `key` are transparent."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(2 * (b"\0" + row)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", key) + pixels + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(
    "depth, row, values",
    [
        (1, bytes([0b01000000]), (0, 1)),
        (2, bytes([0b01100000]), (1, 2)),
        (4, bytes([0x39]), (3, 9)),
        (8, bytes([30, 90]), (30, 90)),
        (16, struct.pack(">HH", 30, 40_000), (30, 40_000)),
    ],
)
@pytest.mark.parametrize("transparent", [0, 1])
def test_transparent_grey_of_any_depth_lies_on_white(tmp_path, depth, row, values, transparent):
    expected = [round(value * 255 / (2**depth - 1)) for value in values]
    expected[transparent] = 255
    path = png(tmp_path / "a.png", depth, 0, row, struct.pack(">H", values[transparent]))
    assert opened(path) == [expected] * 2


@pytest.mark.parametrize("colour", [(5, 5, 5), (40_000, 300, 0)])
def test_transparent_colour_of_sixteen_bits_lies_on_white(tmp_path, colour):
    row = struct.pack(">6H", *colour, 20_000, 20_000, 20_000)
    square = open_square(png(tmp_path / "a.png", 16, 2, row, struct.pack(">3H", *colour)), 2)
    assert square[:, 0].T.tolist() == [[255] * 3, [78] * 3]


def test_folder_of_pictures_that_arrive_almost_black_says_so(tmp_path, capsys):
    """Twelve bits in sixteen, as microscopes and X-ray machines write them."""
    images = fill(tmp_path / "set", 2)
    for name in ("x", "y"):
        values = np.random.default_rng(len(name)).integers(0, 4096, (40, 40)).astype(np.uint16)
        Image.fromarray(values + (name == "y")).save(images / "sky" / f"{name}.png")
    assert len(picture_folder.load(images, 32).labels) == 8
    told = capsys.readouterr().out
    names = " and ".join(str(images / "sky" / f"{name}.png") for name in ("x", "y"))
    assert f"2 picture(s) are almost black, with no value above 15 of 255 ({names})" in told
