"""Makes picture files with whole pixels but other broken parts readable, without touching the pixels.

Pillow refuses a PNG for broken metadata (a profile, a comment, a time) and a JPEG for its missing last two bytes. It
could be made lenient altogether, but would then also show cut-off pictures, with grey where data is missing.
"""

import hashlib
import io
import re
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # these decide the pixels
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
MARK = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])", re.DOTALL)  # of a segment; the others occur in or between pixels
SCAN = b"\xda"
FRAMES = (0xC0, 0xC1, 0xC2)  # sequential and progressive, Huffman-coded
RESTARTS = re.compile(rb"\xff([\xd0-\xd7])")
# different data for pixels that may be missing, without a byte that marks anything
FILLINGS = tuple(hashlib.sha512(bytes([number])).digest().replace(b"\xff", b"\0") for number in range(4))


def repaired(data: bytes, decode: Callable[[io.BytesIO], Image.Image]) -> Image.Image | None:
    """The picture in a file that `decode` has refused; None if its pixels are not whole, or for another kind of file.

    Raises what `decode` raises.
    """
    if data.startswith(PNG_START):
        return decode(io.BytesIO(_without_metadata(data)))
    if data.startswith(JPEG_START) and not data.endswith(JPEG_END):
        return _with_end(data.rstrip(b"\xff"), decode)
    return None


def _without_metadata(png: bytes) -> bytes:
    """The chunks that decide the pixels, and the orientation if its chunk is whole."""
    kept, position = [PNG_START], len(PNG_START)
    while position + 12 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        chunk = png[position : position + 12 + length]
        whole = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind in PNG_KEPT or (kind == b"eXIf" and whole):
            kept.append(chunk)
        position += 12 + length
    return b"".join([*kept, png[position:]])


def _with_end(jpeg: bytes, decode: Callable[[io.BytesIO], Image.Image]) -> Image.Image | None:
    """The picture with an end marker added; None unless all scans are there and data added to them changes no pixel."""
    if not _has_all_scans(jpeg):
        return None
    restarts = RESTARTS.findall(jpeg)
    restart = b"\xff" + (bytes([0xD0 + (restarts[-1][0] + 1) % 8]) if restarts else b"\xd0")
    picture, *others = [decode(io.BytesIO(jpeg + filling + restart + filling + JPEG_END)) for filling in FILLINGS]
    same = all(np.array_equal(np.asarray(picture), np.asarray(other)) for other in others)
    return picture if same else None


def _has_all_scans(jpeg: bytes) -> bool:
    """Whether the scans that have begun give each coefficient of each component to its last bit.

    A progressive JPEG gives them bit by bit over several scans; without the last it is still a picture, if a poor one.
    """
    missing: dict[int, list[int]] = {}  # by component: bits of each coefficient that are not yet given
    position = len(JPEG_START)
    while mark := MARK.search(jpeg, position):
        position = mark.start() + 2
        length = int.from_bytes(jpeg[position : position + 2], "big")
        content = jpeg[position + 2 : position + length]
        if len(content) + 2 < length:
            return False
        if mark[1][0] in FRAMES:
            missing = {content[6 + 3 * number]: [1] * 64 for number in range(content[5])}
        elif mark[1] == SCAN:
            first, last, bits = content[-3:]
            for number in range(content[0]):
                missing[content[1 + 2 * number]][first : last + 1] = [bits & 15] * (last + 1 - first)
        position += length
    return bool(missing) and not any(any(bits) for bits in missing.values())
