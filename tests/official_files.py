"""Files in the official format, of other images, that are taken for the official ones."""

import hashlib
from pathlib import Path

import pytest
from torch import Tensor

import data
from harness import download


def write(data_dir: Path, split: str, images: Tensor, labels: Tensor) -> Path:
    """Write images uint8 (N, 3, 96, 96) and their labels, from 0, as `split`; returns the folder of the files."""
    folder = data_dir / data.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}_X.bin").write_bytes(images.transpose(2, 3).contiguous().numpy().tobytes())
    (folder / f"{split}_y.bin").write_bytes((labels + 1).byte().numpy().tobytes())
    return folder


def expect(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file's present content be the right one."""
    content = path.read_bytes()
    spec = data.FileSpec(len(content), hashlib.md5(content).hexdigest())
    monkeypatch.setitem(data.OFFICIAL, path.name, spec)
    if path.name in download.LABELLED:
        monkeypatch.setitem(download.LABELLED, path.name, spec)
