import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:  # each of several workers takes one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it of what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["no_proxy"] = "127.0.0.1"  # the tests' own servers are not asked for through anybody's proxy

import train
from harness import checkpoint, demo_shapes

TINY_RUN = (
    "--demo --threads 1 --precision fp32 --no-compile --epochs 3 1 --crop-size 32 32 --eval-size 32 40 --batch 32 32 "
    "--lr 0.02 0.01 --planes 4 4 8 --vflip 0"
).split()


def pytest_configure(config: pytest.Config) -> None:
    """All but the tests of a GPU are of the CPU's figures, and so see none, processes that they start included."""
    if "cuda" not in config.option.markexpr.replace("not cuda", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws from the global generator does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be fetched from anywhere but a test's own server is an error of the test."""
    fetch = urllib.request.urlopen

    def from_here(url: str, *rest: object, **options: object) -> object:
        assert urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost"), f"a test would fetch {url}"
        return fetch(url, *rest, **options)

    monkeypatch.setattr(urllib.request, "urlopen", from_here)


@pytest.fixture
def stl10_dir() -> Path:
    """The folder that holds the official `stl10_binary/`; the test is skipped where there is none."""
    if "STL10_DIR" not in os.environ:
        pytest.skip("needs the official files: set STL10_DIR to the folder that holds stl10_binary/")
    return Path(os.environ["STL10_DIR"])


@pytest.fixture
def emulated_card(monkeypatch: pytest.MonkeyPatch) -> str:
    """The program that runs a Python on an emulated CUDA device; the test is skipped where there is none."""
    if "FAKECUDA" not in os.environ:
        pytest.skip("needs an emulated CUDA device: set FAKECUDA to the program that starts Python with one")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    build(os.environ["FAKECUDA"])
    return os.environ["FAKECUDA"]


@functools.cache
def build(emulator: str) -> None:
    """Its first call on a machine builds it, and leaves the folder that it was called in."""
    subprocess.run([emulator, sys.executable, "-c", ""], check=True)


drawn_once = functools.cache(demo_shapes.draw_shapes)


def shrink_demo(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(demo_shapes, "IMAGES_PER_CLASS", {"train": 20, "test": 5})
    patch.setattr(demo_shapes, "draw_shapes", drawn_once)  # they are the same each time


def save_empty_plots(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Figure, "savefig", lambda figure, path, **_: path.touch())


def trained(folder: Path, *flags: object) -> int:
    """The exit status of a tiny run into `folder`, on the demo's pictures beside it."""
    place = ["--data-dir", str(folder.parent / "data"), "--out", str(folder)]
    return train.main([*TINY_RUN, *place, *map(str, flags)])


def error(capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's pictures as the tiny runs know them: 160 train, 40 val and 50 test images."""
    shrink_demo(monkeypatch)


@pytest.fixture
def empty_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are empty files: writing real ones takes half of a tiny run's time."""
    save_empty_plots(monkeypatch)


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two finished runs of seeds 0 and 1 on the small demo: three epochs, then one; plots are empty."""
    root = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        shrink_demo(patch)
        save_empty_plots(patch)
        for seed in "01":
            place = ["--data-dir", f"{root / 'data'}", "--out", f"{root / f'seed{seed}'}"]
            assert train.main([*TINY_RUN, "--seed", seed, *place]) == 0
    return root / "seed0", root / "seed1"


@pytest.fixture(scope="session")
def tiny_run(tiny_runs: tuple[Path, Path]) -> Path:
    """The first of the two: its `best.pt`, `last.pt`, `config.json`, `metrics.csv` … are to be read, not changed."""
    return tiny_runs[0]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run, of the same name, that may be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / tiny_run.name))


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter and write in, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "a.png"
    path.parent.mkdir()
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(path)
    return path


@pytest.fixture
def altered(tiny_run: Path, tmp_path: Path):
    """A copy of the tiny run whose checkpoints say something else about their recipe."""

    def alter(**recipe: object) -> Path:
        folder = tmp_path / "altered"
        folder.mkdir()
        shutil.copy(tiny_run / "config.json", folder)
        for name in ("best.pt", "last.pt"):
            payload = checkpoint.load(tiny_run / name)
            payload["recipe"] |= recipe
            checkpoint.save(folder / name, payload)
        return folder

    return alter
