"""Checkpoints made to run something, or to fill the memory, where they are opened: refused, and never run."""

import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import error
from processes import ROOT
from refusals import continued, refused

from harness import checkpoint
from harness.checkpoint import Damaged

pytestmark = pytest.mark.usefixtures("empty_plots")


class Hostile:
    """Leaves a file where it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def hostile_files(run: Path, trace: Path) -> dict[str, Path]:
    thing, recipe = Hostile(trace), checkpoint.load(run / "best.pt")["recipe"]
    files = {name: run / f"{name}.pt" for name in ("pickle", "zip", "inside", "old")}
    files["pickle"].write_bytes(pickle.dumps(thing))
    torch.save(thing, files["zip"])
    torch.save({"format": 1, "kind": "run", "recipe": recipe, "extra": thing}, files["inside"])
    torch.save({"format": 1, "kind": "run", "recipe": thing}, files["old"], _use_new_zipfile_serialization=False)
    return files


@pytest.mark.parametrize("name", ["pickle", "zip", "inside", "old"])
def test_hostile_checkpoint_is_not_run(name: str, run: Path, tiny_run: Path, small_demo, capsys) -> None:
    trace = run / "trace"
    path = hostile_files(run, trace)[name]
    pickle.loads(path.read_bytes()) if name == "pickle" else torch.load(path, weights_only=False)
    assert trace.exists()  # the attack is a real one …
    trace.unlink()
    refused(path, "was not opened: it holds more than plain values|not a checkpoint at all")
    shutil.copy(path, run / "last.pt")
    (run / "previous.pt").unlink()
    assert continued(run, tiny_run) == 1
    error(capsys)
    assert continued(run / "new", tiny_run, "--init", str(path)) == 1
    error(capsys)
    assert not trace.exists()  # … and fails


def test_nothing_else_unpickles() -> None:
    words = ("pickle.load", "weights_only=False", "allow_pickle=True", "joblib", "eval(", "exec(", "torch.jit.load")
    paths = [*ROOT.glob("*.py"), *ROOT.glob("harness/**/*.py")]
    assert {"train.py", "checkpoint.py"} <= {path.name for path in paths}
    for path in paths:
        text = path.read_text(encoding="utf-8").replace(".eval(", "").replace("_eval(", "")
        assert not [word for word in words if word in text], path.name
        assert text.count("torch.load(") == text.count("weights_only=True)"), path.name


def test_a_member_that_claims_to_be_longer_than_its_file_asks_for_no_memory(run: Path) -> None:
    path = run / "best.pt"
    with zipfile.ZipFile(path) as archive:
        longest = max(archive.infolist(), key=lambda member: member.file_size)
    content, size = path.read_bytes(), longest.file_size.to_bytes(4, "little")
    directory = content.rindex(b"PK\x01\x02", 0, content.rindex(longest.filename.encode()))
    entry = content[directory : directory + 46]
    assert entry[24:28] == size  # the uncompressed one, in the archive's directory
    path.write_bytes(content[: directory + 24] + (2**31).to_bytes(4, "little") + content[directory + 28 :])
    refused(path, "is longer than the file", Damaged)


def test_a_compressed_archive_is_not_unpacked(run: Path) -> None:
    """A few kilobytes could hold gigabytes of zeros."""
    path = run / "best.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(path, "is compressed", Damaged)
