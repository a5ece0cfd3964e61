"""TensorBoard, for those who use it: the numbers of metrics.csv again, in the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import RunError, reason

SUFFIX = ".metrics"  # by which a run tells its own files from those of others
EVENT_FILES = f"events.out.tfevents.*{SUFFIX}"


class TensorBoardLog:
    """Writes rows as scalars over the epoch. Raises RunError if the package is missing or rejects the folder's name."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise RunError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
        except Exception as error:  # an old one can raise anything next to newer packages
            raise RunError(f"--tensorboard: {reason(error)}; pip install --upgrade tensorboard") from error
        try:
            str(folder).encode("utf-8")
        except UnicodeEncodeError as error:
            raise RunError(f"{folder} is a name that TensorBoard cannot write: choose another with --out") from error
        self._folder, self._open, self._written = folder, SummaryWriter, 0
        self._writer: SummaryWriter | None = None

    def follow(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows that are new since the last call; the first call starts over, so that no point repeats."""
        try:
            if self._writer is None:
                for old in self._folder.glob(EVENT_FILES):
                    old.unlink()
                self._writer = self._open(str(self._folder), filename_suffix=SUFFIX)
            for row in rows[self._written :]:
                for name in row.keys() - {"stage", "epoch"}:
                    if row[name] is not None:
                        self._writer.add_scalar(name, row[name], row["epoch"])
            self._writer.flush()
        except OSError as error:
            raise RunError(f"cannot write for TensorBoard in {self._folder}: {reason(error)}") from error
        self._written = len(rows)

    def close(self) -> None:
        """End the writer's thread, which would otherwise live as long as a notebook's kernel."""
        if self._writer is not None:
            self._writer.close()
