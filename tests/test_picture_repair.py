"""Files with broken metadata or without their last bytes: read where the pixels are whole, else refused."""

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.errors import RunError
from harness.picture_file import open_square

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
PHOTO = Image.fromarray(RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
UP = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # Exif: turn right


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(file, kind, **options)
    return file.getvalue()


def square(folder: Path, content: bytes, name: str = "a.png") -> torch.Tensor:
    (folder / name).write_bytes(content)
    return open_square(folder / name, 32)


def chunk(kind: bytes, content: bytes, flip: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ flip)


def with_chunks(*chunks: bytes) -> bytes:
    """A PNG with more chunks in front of its pixels."""
    png = encoded("PNG")
    return png[:33] + b"".join(chunks) + png[33:]


def packed(size: int) -> bytes:
    return zlib.compress(RNG.bytes(size))


NOTES = {
    "foreign Exif": chunk(b"eXIf", b"garbage!"),
    "cut Exif": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "empty Exif": chunk(b"eXIf", b""),
    "Exif, wrong sum": chunk(b"eXIf", UP, flip=1),
    "large profile": chunk(b"iCCP", b"p\0\0" + packed(1_500_000)),
    "broken profile": chunk(b"iCCP", b"p\0\0garbage"),
    "empty profile": chunk(b"iCCP", b""),
    "large text": chunk(b"zTXt", b"p\0\0" + packed(1_500_000)),
    "large international text": chunk(b"iTXt", b"p\0\1\0\0\0" + packed(1_500_000)),
    "text, wrong sum": chunk(b"tEXt", b"a\0b", flip=1),
    "short resolution": chunk(b"pHYs", b"a"),
    "short gamma": chunk(b"gAMA", b"a"),
    "short primaries": chunk(b"cHRM", b"a"),
    "short animation": chunk(b"acTL", b"a"),
    "private": chunk(b"vpAg", b"abc", flip=1),
}


@pytest.mark.parametrize("note", NOTES)
def test_png_is_read_despite_a_broken_note(tmp_path, note):
    assert torch.equal(square(tmp_path, with_chunks(NOTES[note])), torch.from_numpy(PIXELS).permute(2, 0, 1))


def test_whole_notes_count_beside_broken_ones(tmp_path):
    turned = torch.from_numpy(np.rot90(PIXELS, -1).copy()).permute(2, 0, 1)
    assert torch.equal(square(tmp_path, with_chunks(chunk(b"eXIf", UP), NOTES["large profile"])), turned)
    key = chunk(b"tRNS", b"".join(struct.pack(">H", value) for value in PIXELS[0, 0].tolist()))
    opened = square(tmp_path, with_chunks(NOTES["text, wrong sum"], key))
    assert opened[:, 0, 0].tolist() == [255] * 3 and torch.equal(
        opened[:, 1:], torch.from_numpy(PIXELS).permute(2, 0, 1)[:, 1:]
    )


@pytest.mark.parametrize("kind, name", [("JPEG", "a.jpg"), ("WEBP", "a.webp"), ("PNG", "a.png"), ("TIFF", "a.tif")])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x05", b"garbage", b"Exif\0\0"])
def test_broken_exif_in_any_format_turns_nothing(tmp_path, kind, name, exif):
    whole = {"lossless": True} if kind == "WEBP" else {}
    if kind == "TIFF":
        content = encoded(kind, tiffinfo={0x0112: 99})
    else:
        content = encoded(kind, exif=exif, **whole)
    assert torch.equal(square(tmp_path, content, name), square(tmp_path, encoded(kind, **whole), name))


@pytest.mark.parametrize("kind, name", [("JPEG", "a.jpg"), ("WEBP", "a.webp"), ("PNG", "a.png"), ("TIFF", "a.tif")])
def test_any_format_is_turned_upright_once(tmp_path, kind, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = square(tmp_path, encoded(kind, PHOTO), name)
    assert torch.equal(square(tmp_path, encoded(kind, PHOTO, exif=exif), name), plain.rot90(-1, (1, 2)))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
@pytest.mark.parametrize("image", [PHOTO, Image.fromarray(PIXELS), PHOTO.convert("L")], ids=["photo", "noise", "grey"])
def test_jpeg_without_its_end_mark_is_whole(tmp_path, image, options):
    content = encoded("JPEG", image, quality=90, **options)
    right = square(tmp_path, content, "a.jpg")
    for missing in (1, 2):
        assert torch.equal(square(tmp_path, content[:-missing], "a.jpg"), right)
    assert torch.equal(square(tmp_path, content + b"trailing", "a.jpg"), right)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}], ids=str)
def test_cut_jpeg_is_refused_or_has_all_its_pixels(tmp_path, options):
    """A few last bits may be padding: then nothing is missing. Whatever else is cut must not be shown as a picture."""
    refused = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((32, 32))
        content = encoded("JPEG", image, quality=85, **options)
        right = square(tmp_path, content, "a.jpg")
        for missing in (3, 4, 5, 8, 16, 40, len(content) // 2):
            try:
                assert torch.equal(square(tmp_path, content[:-missing], "a.jpg"), right), (seed, missing)
            except RunError as error:
                assert "truncated" in str(error).lower() and "\n" not in str(error)
                refused += 1
    assert refused >= 60


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_half_a_picture_is_refused_in_any_format(tmp_path, kind):
    content = encoded(kind, **({"lossless": True} if kind == "WEBP" else {}))
    with pytest.raises(RunError, match=r"a\.png"):
        square(tmp_path, content[: len(content) // 2])


@pytest.mark.parametrize("missing", [1, 2, 4, 8, 12, 14])
def test_png_without_its_end_is_whole(tmp_path, missing):
    assert torch.equal(square(tmp_path, encoded("PNG")[:-missing]), torch.from_numpy(PIXELS).permute(2, 0, 1))


def test_progressive_jpeg_without_its_last_scans_is_refused(tmp_path):
    content = encoded("JPEG", PHOTO, quality=90, progressive=True)
    scans = [match.start() for match in re.finditer(rb"\xff\xda", content)]
    assert len(scans) > 5
    for start in scans[1:]:
        with pytest.raises(RunError, match="truncated"):
            square(tmp_path, content[:start], "a.jpg")
