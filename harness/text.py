"""Text for people: tables, lengths of time, and names made printable."""

from __future__ import annotations  # so that a Python too old for the rest gets as far as saying so

import unicodedata
from collections.abc import Sequence
from pathlib import Path

MOST_LISTED = 4
ESCAPED = frozenset(("Cc", "Cs", "Cn", "Zl", "Zp"))  # control codes, surrogates, unassigned, line separators
DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # would turn the rest of a line


def printable(name: Path | str) -> str:
    """A name as text for terminals, tables and files: escapes stand for bytes that are not UTF-8 and for control codes.

    Python holds such bytes as lone surrogates, which can be neither printed nor written. Other kinds of spaces and the
    joiners of some scripts stay, so that a name in a table is still that of its file.
    """
    return "".join(escape(c) if unicodedata.category(c) in ESCAPED or c in DIRECTIONS else c for c in str(name))


def escape(character: str) -> str:
    """A character's escape: for a byte that is not UTF-8 its number, as in \\xe9, else Python's escape."""
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns, the first to the left and the others to the right, two spaces apart."""
    lines = [[printable(cell) for cell in line] for line in (header, *rows)]
    widths = [max(width(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [line[0] + _fill(line[0], widths[0])] + [_fill(c, w) + c for c, w in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    )


def width(text: str) -> int:
    """Terminal columns that a text takes: two for a wide East Asian character, none for accents and joiners."""
    kinds = ((unicodedata.category(c), unicodedata.east_asian_width(c)) for c in text)
    return sum(0 if kind in ("Mn", "Me", "Cf") else 2 if east_asian in "WF" else 1 for kind, east_asian in kinds)


def shortened(text: str, columns: int) -> str:
    """The text in at most `columns` columns: an ellipsis replaces its middle, as names often differ only at the end."""
    if width(text) <= columns:
        return text
    for kept in range(len(text) - 1, -1, -1):
        first, last = text[: kept - kept // 2], text[len(text) - kept // 2 :]
        if width(first + last) < columns:
            break
    return f"{first}…{last}"


def _fill(cell: str, columns: int) -> str:
    return " " * (columns - width(cell))


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def counted(number: int, noun: str) -> str:
    """A number and its noun, in the plural unless the number is one."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def listed(names: Sequence[str]) -> str:
    """Names as part of a sentence: at most MOST_LISTED of them."""
    first = names[: MOST_LISTED - 1]
    shown = [*names] if len(names) <= MOST_LISTED else [*first, f"{len(names) - len(first)} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
