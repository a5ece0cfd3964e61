"""What the commands that use a trained network share: their common flags, and tables on the terminal."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import engine
from settings import Runtime


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A command line with `--last`, and with `--device`, `--threads` and `--precision` as `train.py` has them."""
    result = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False)
    result.add_argument("--last", action="store_true", help="take a run folder's last.pt (default: its best.pt)")
    group = result.add_argument_group("machine")
    for item in (Runtime.__dataclass_fields__[field] for field in ("device", "threads", "precision")):
        text = item.metadata["help"] + f" (default: {item.default})"
        choices, kind = item.metadata.get("choices"), type(item.default)
        metavar = None if choices else {int: "N", str: "NAME"}[kind]
        group.add_argument(
            f"--{item.name}", type=kind, default=item.default, choices=choices, metavar=metavar, help=text
        )
    return result


def start(line: argparse.ArgumentParser, given: argparse.Namespace) -> engine.Engine:
    """Set up the machine that a command line made by `parser` asks for. Raises RunError where it is not there."""
    try:
        runtime = Runtime(device=given.device, threads=given.threads, precision=given.precision)
    except ValueError as error:
        line.error(f"--{error}")
    return engine.start(runtime)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument's type: a whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return convert


def printable(path: Path) -> str:
    """A path as text for tables and files, whatever bytes a file name may hold."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned columns, the first to the left and the others to the right, two spaces apart."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)])
        for line in lines
    )
