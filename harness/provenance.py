"""Which code a run used: its versions, as recorded in `config.json`."""

import contextlib
import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any


def as_dict() -> dict[str, Any]:
    """Versions of Python, of the packages that decide a result, and of this project where it is a git repository."""
    packages = {name: _version(name) for name in ("torch", "torchvision", "numpy", "matplotlib")}
    return {"versions": {"python": platform.python_version(), **packages}, "git": revision()}


def _version(package: str) -> str | None:
    """The version of a package; None where it is not installed, as torchvision need not be for training."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


@functools.cache  # of the code as this process has loaded it: files may be edited while a run, or a notebook, goes on
def revision() -> str | None:
    """This project's git revision, with "-dirty" if files differ from it; None if it is not in a git repository."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
