"""Any picture that Pillow opens, as the square of pixels that a network takes; and where in a folder pictures are."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from harness.errors import RunError, reason

SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()
)  # what is looked for in a folder; a file that is named itself may be called anything


def find(folder: Path) -> list[Path]:
    """Files with a picture's suffix in a folder and all below it, sorted; names that begin with a dot are passed by."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def open_square(path: Path, size: int) -> Tensor:
    """The largest centred square of a picture at size × size px: uint8 (3, size, size), RGB.

    It is brought to that size by one bilinear resampling with antialiasing; one that has the size keeps its very
    pixels. Of an animation the first frame counts; the camera's note on which side is up is followed; what is
    transparent lies on white; 16 bits become 8 by their range, not by their brightest pixel.
    Raises RunError for a file that is missing, broken, no picture, or implausibly large (Pillow's guard against
    decompression bombs, 89 million pixels).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)  # of odd but harmless notes in a file
            with Image.open(path) as image:
                picture = _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise RunError(f"{path} is implausibly large: more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except UnidentifiedImageError as error:
        raise RunError(f"{path} is not a picture, or of a kind that Pillow cannot open") from error
    except Exception as error:  # on broken files Pillow's readers raise anything from OSError to struct.error
        raise RunError(f"cannot read {path}: {reason(error)}") from error
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(np.asarray(image, dtype=np.float64), whole=image.mode != "F")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, whole: bool) -> Image.Image:
    """Deep grey values (H, W) to 0 … 255. Whole numbers are 16 bit; white in floats is the least usual that holds them.

    Raises ValueError for values beyond.
    """
    low, high = values.min(), values.max()
    white = next((white for white in ((65535,) if whole else (1, 255, 65535)) if high <= white), None)
    if white is None or not low >= 0:  # nan is refused as well
        raise ValueError(f"grey values from {low:g} to {high:g}, of which black and white are not known")
    return Image.fromarray((values * (255 / white) + 0.5).astype(np.uint8))
