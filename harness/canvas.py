"""Matplotlib as this project uses it: without pyplot, and the same whatever the user's settings, style or notebook."""

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec

# A notebook's kernel sets MPLBACKEND for every process that it starts. If that backend is not installed here,
# importing matplotlib fails. No plot here needs a backend, so matplotlib is given it only after the import.
_backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from PIL import Image

from harness.files import atomic_write
from harness.text import printable

SOFTWARE = "STL-10 from scratch"  # the note in a PNG that tells this program's pictures from others
LETTERS = "DejaVu Sans"  # comes with matplotlib
OTHER_LETTERS = (  # what systems have for the scripts it lacks
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang HK",
    "Apple SD Gothic Neo",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Thai",
    "Noto Sans Devanagari",
    "Nirmala UI",
    "Arial Unicode MS",
)

Arguments = ParamSpec("Arguments")
letters_noted: set[str] = set()


def styled(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Figure]:
    """Let a function draw in matplotlib's own style, with letters of any script that an installed font has.

    The user's settings are restored when it returns. Letters that no font has are named on stderr, each once; other
    matplotlib warnings are dropped.
    """

    @functools.wraps(draw)
    def styled_draw(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Figure:
        with contextlib.ExitStack() as stack:
            stack.enter_context(matplotlib.style.context("default"))
            matplotlib.rcParams["font.family"] = _font_families()
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            figure = draw(*args, **kwargs)
        _note_missing_letters(str(warning.message) for warning in caught)
        return figure

    return styled_draw


def _font_families() -> list[str]:
    installed = {font.name for font in fontManager.ttflist}
    return [LETTERS, *(name for name in OTHER_LETTERS if name in installed)]


def _note_missing_letters(messages: Iterable[str]) -> None:
    found = (re.match(r"Glyph (\d+) ", message) for message in messages)
    missing = dict.fromkeys(chr(int(match[1])) for match in found if match)
    new = [letter for letter in missing if letter not in letters_noted]
    if new:
        letters_noted.update(new)
        shown = printable("".join(new[:10])) + (" …" if len(new) > 10 else "")
        print(f"note: no font here has the letters {shown}; plots show boxes for them", file=sys.stderr)


def save(figure: Figure, path: Path) -> Figure:
    """Save a figure as PNG, whole or not at all. Raises RunError."""
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": SOFTWARE})
    return figure


def drawn_here(path: Path) -> bool:
    """Whether a file is a picture that `save` wrote."""
    with contextlib.suppress(Exception), Image.open(path) as picture:  # Pillow raises anything on foreign bytes
        return picture.info.get("Software") == SOFTWARE
    return False


def plain(text: str) -> str:
    """Text as it is drawn: names of files and classes are not formulas, whatever dollar signs they contain."""
    return "\n".join(map(printable, text.split("\n"))).replace("$", r"\$")
