"""How a finished run's command ends on its changed folder, and how a reader refuses a checkpoint."""

from functools import partial
from pathlib import Path

import pytest
from conftest import TINY_RUN

import train
from harness import checkpoint, errors
from harness.errors import RunError


def continued(run: Path, tiny_run: Path, *flags: str) -> int:
    """The exit status of `tiny_run`'s command, reported as for a user, in the folder `run`."""
    argv = [*TINY_RUN, "--seed", "0", "--data-dir", str(tiny_run.parent / "data"), "--out", str(run), *flags]
    return errors.report(partial(train.main, argv))


def refused(path: Path, reason: str, kind: type[RunError] = RunError) -> None:
    """By each of the readers, for that reason."""
    for reader in (checkpoint.load, checkpoint.load_network):
        with pytest.raises(kind, match=reason) as caught:
            reader(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
