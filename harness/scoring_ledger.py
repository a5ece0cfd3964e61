"""How often a run has been scored on the test images: a list in its folder, so that nobody loses count.

Test images choose nothing. Scoring runs again and again and keeping the best would be choosing by them.
"""

import datetime
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import files
from harness.errors import RunError, reason

FILE = "test-scorings.json"


def read(folder: Path) -> list[dict[str, Any]]:
    """The scorings so far, oldest first; empty if there were none. Raises RunError for a file that is not a list."""
    path = folder / FILE
    try:
        scorings = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(scorings, list) and all(isinstance(scoring, dict) for scoring in scorings):
            return scorings
        cause = "it is not a list of scorings"
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        cause = reason(error)
    raise RunError(f"{path}, which counts how often the run was scored on test, is unreadable ({cause}); move it away")


def add(folder: Path, **scoring: Any) -> None:
    """Note one more scoring, with date and time. Raises RunError where it cannot be noted."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    text = json.dumps([*read(folder), {"date": now, **scoring}], indent=2)
    files.write_text(folder / FILE, text + "\n")


def warn(folders: Iterable[Path]) -> None:
    """Say on stderr which of the run folders have been scored before.

    Raises RunError as `read` does, and for a folder in which the next scoring could not be noted.
    """
    for folder in folders:
        before = read(folder)
        try:
            files.try_to_write_in(folder)
        except OSError as error:
            raise RunError(
                f"{folder} cannot be written ({reason(error)}), so a scoring on the test images could not be noted "
                "there; copy the run to a writable folder"
            ) from error
        if before:
            times = "once" if len(before) == 1 else f"{len(before)} times"
            members = before[-1].get("members", before[-1:])
            scored = "".join(f"{Path(each['checkpoint']).name}, " for each in members if "checkpoint" in each)
            last = f"last {before[-1].get('date')}: {scored}accuracy {before[-1].get('accuracy')}"
            print(
                f"warning: {folder} was scored on test {times} before ({last}); test chooses nothing", file=sys.stderr
            )
