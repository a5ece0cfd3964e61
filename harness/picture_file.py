"""Any picture that Pillow opens, as the square of pixels that a network takes."""

import contextlib
import functools
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from harness.errors import RunError, is_out_of_memory, reason
from harness.picture_repair import repaired
from harness.picture_search import NOT_DECODED
from harness.text import printable

# Exif's tag for how the camera was held, and what turns the picture upright
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # of a TIFF
# Pillow spreads the values of a PNG with few grey levels over 0 … 255, but not the transparent one
SPREAD = {"L;2": 85, "L;4": 17}


def open_square(path: Path, size: int) -> Tensor:
    """The largest centred square of a picture at size × size px: uint8 (3, size, size), RGB.

    It is resampled once, bilinearly with antialiasing; a square already of that size keeps its exact pixels. Of an
    animation the first frame is taken; the Exif orientation is applied; transparent parts are put on white; 16 bits
    are scaled to 8 by their full range, not by their brightest pixel.
    Raises RunError for a file that is missing, broken, not a picture, or larger than Pillow's guard against
    decompression bombs permits (89 million pixels).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # about odd but harmless metadata
            picture = _read(path)
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RunError(
            f"{printable(path)} has more than {Image.MAX_IMAGE_PIXELS:,} pixels, beyond Pillow's guard against "
            "decompression bombs: make it smaller"
        ) from error
    except UnidentifiedImageError as error:
        raise RunError(f"{printable(path)} is not a picture, or is of a kind that Pillow cannot open") from error
    except Exception as error:  # on broken files Pillow's readers raise anything from OSError to struct.error
        cause = "not enough memory" if is_out_of_memory(error) else reason(error)
        raise RunError(f"cannot read {printable(path)}: {cause}") from error


def _read(path: Path) -> Image.Image:
    try:
        return decode(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise
    except Exception:
        with contextlib.suppress(Exception):  # the first error says what is wrong
            picture = repaired(path.read_bytes(), decode) if path.is_file() else None
            if picture is not None:
                return picture
        raise


def decode(file: Path | io.BytesIO) -> Image.Image:
    """The pixels in RGB, upright; only of kinds that Pillow decodes by itself, whatever the file is called."""
    with Image.open(file, formats=_decoded_kinds()) as image:
        _fit_transparent_value(image)
        image.load()
        try:
            turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
        except Exception:  # broken metadata raise anything, as broken files do
            turn = None
        picture = _rgb(image)
    return picture if turn is None else picture.transpose(turn)


@functools.cache
def _decoded_kinds() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in NOT_DECODED)


def _fit_transparent_value(image: Image.Image) -> None:
    """A PNG states its transparent value at its own bit depth: convert it to the depth of Pillow's pixels."""
    value = image.info.get("transparency")
    if image.format != "PNG" or value is None or not image.tile:
        return
    depth = image.tile[0][3]
    if depth in SPREAD:
        image.info["transparency"] = value * SPREAD[depth]
    elif depth == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Map grey values of more than 8 bits to 0 … 255, and transparent ones to white.

    In 16 bits white is 65535, however dark the picture. Files of 32 bits or of floats do not say what white is: it is
    taken to be the smallest of 1, 255 and 65535 that no value exceeds. Raises ValueError for values above 65535, below
    0, or nan.
    """
    values = np.asarray(image, dtype=np.float64)
    low, high = values.min(), values.max()
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    white = next((white for white in ((65535,) if sixteen else (1, 255, 65535)) if high <= white), None)
    if white is None or not low >= 0:  # nan is refused as well
        raise ValueError(f"grey values from {low:g} to {high:g}, whose black and white are unknown")
    levels = values * (255 / white)
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow heeds it up to 8 bits
        levels = 255 - levels
    levels[values == image.info.get("transparency")] = 255
    return Image.fromarray((levels + 0.5).astype(np.uint8))
