"""Which files in a folder were written by a run or an evaluation: only those are replaced or removed unasked."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from harness import files, scoring_ledger
from harness.checkpoint import WEIGHTS, TrainedNetwork
from harness.errors import RunError
from harness.report import PICTURES, REPORT
from harness.tensorboard_log import EVENT_FILES
from harness.text import listed, printable

BEFORE_FIRST_EPOCH = ("config.json", "views-stage[0-9].png")  # what a run writes before it has a state to continue
RUN_FILES = (
    "previous.pt",
    "last.pt",
    *WEIGHTS,
    "metrics.csv",
    "summary.json",
    *BEFORE_FIRST_EPOCH,
    "accuracy.png",
    "losses.png",
    "learning_rate.png",
    EVENT_FILES,
)
OVERWRITTEN = ".overwritten.pt"  # the state of a run that is being removed


def require_no_other(folder: Path) -> None:
    """Raise RunError if a folder without a run's state holds files named like a run's: nobody knows whose they are."""
    killed_early = _is_config(folder / "config.json")
    names = [name for name in RUN_FILES if not (killed_early and name in BEFORE_FIRST_EPOCH)]
    found = [path.name for path in _matching(folder, names)]
    if found:
        raise RunError(
            f"{folder} holds {listed(found)}, but no run that can be continued "
            "(last.pt); give another --out, or --overwrite, which removes all files named like a run's"
        )


def _is_config(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(content, dict) and {"recipe", "runtime", "images"} <= content.keys()
    return False


def overwriting(folder: Path) -> bool:
    """Whether removing a run was begun here, then killed."""
    return (folder / OVERWRITTEN).exists()


def remove_run(folder: Path) -> None:
    """Remove what a run, its evaluations and its count of test scorings have left; exports are named and stay.

    A kill midway leaves either a whole run, or a removal that the next call completes.
    """
    last, previous = folder / "last.pt", folder / "previous.pt"
    if last.exists():
        previous.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        files.rename(last if last.exists() else previous, folder / OVERWRITTEN)
    for path in _matching(folder, (*RUN_FILES, scoring_ledger.FILE)):
        path.unlink()
    for report in _matching(folder, [f"evaluation-*/{REPORT}"]):
        with contextlib.suppress(RunError):  # another program's
            remove_evaluation(report.parent, pictures_written(report.parent))
    exports = [path.name for path in _matching(folder, ["model.onnx", "model.pt2", "model.pt"])]
    if exports:
        print(f"note: {listed(exports)} in {folder} stays, though the network it was made from is gone")
    (folder / OVERWRITTEN).unlink(missing_ok=True)


def pictures_written(folder: Path) -> Sequence[str]:
    """The pictures of the evaluation whose report a folder holds; none where it holds none.

    Raises RunError if there is a report, or a picture, that no evaluation wrote and that one would replace.
    """
    try:
        report: Any = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        report = {"networks": [], "protocol": "", "pictures": []}
    except (OSError, ValueError):
        report = None
    foreign = [REPORT]
    if isinstance(report, dict) and {"networks", "protocol"} <= report.keys():
        pictures = report.get("pictures", PICTURES)  # older reports do not list them
        foreign = [name for name in PICTURES if (folder / name).exists() and name not in pictures]
    if foreign:
        raise RunError(f"{folder} holds {listed(foreign)}, which no evaluation wrote; name another folder with --out")
    return [name for name in PICTURES if name in pictures]


def require_own_report(folder: Path, networks: Iterable[TrainedNetwork]) -> None:
    """Raise RunError if the report in a folder has figures for networks other than `networks`, which would be lost."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        entries = [*report["networks"], *report.get("against", {"networks": []})["networks"]]
        scored = [(member["checkpoint"], member["sha256"]) for entry in entries for member in entry["members"]]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no report, or one of another form
        return
    paths, digests = zip(*((files.identity(network.file), network.sha256) for network in networks), strict=True)
    for path, digest in scored:
        if digest not in digests and files.identity(Path(path)) not in paths:
            raise RunError(f"{folder} holds the figures of {printable(path)} too; name another folder with --out")


def remove_evaluation(folder: Path, pictures: Iterable[str]) -> None:
    """Remove the report and the `pictures` of an evaluation, and its folder where nothing else is in it."""
    for name in (*pictures, REPORT):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in folder.glob(pattern)]
