"""The README's lines for a notebook, in a real kernel: what a cell starts, prints and shows."""

import shlex
import sys
from pathlib import Path

import pytest
from picture_folders import TINY, fill

PROJECT = Path(__file__).parents[1]
PYTHON = shlex.quote(sys.executable)


def lines_for_colab() -> list[str]:
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    return text[text.index("from google.colab") :].split("\n```")[0].split("\n")


def rendered(line: str) -> str:
    """What a cell shows of a line in which a progress bar was drawn over itself."""
    return next((part for part in reversed(line.split("\r")) if part.strip()), "").strip()


@pytest.mark.slow
def test_the_readmes_cells_train_and_show_the_plot(tmp_path: Path):
    """But for Drive, the network and the size of the run they are as they stand there; the second time they go on."""
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    mount, clone, *lines = lines_for_colab()
    assert mount.endswith('drive.mount("/content/drive")') and clone.startswith("!git clone ADDRESS_OF_THIS_REPOSITORY")
    fill(tmp_path / "drive" / "MyDrive" / "flowers", 5)
    (tmp_path / "stl10").symlink_to(PROJECT)
    lines = [line.replace("/content", str(tmp_path)).replace("python3", PYTHON) for line in lines]
    copying, training, showing = (line.replace("--images", f"{' '.join(TINY)} --images") for line in lines)
    cells = [
        "import os; print(os.environ['MPLBACKEND'])",
        copying,
        training,
        showing,
        f"!cd stl10 && {PYTHON} evaluate.py {tmp_path}/drive/MyDrive/flowers-run --out {tmp_path}/evaluation",
        training,
        "%cd stl10\n%matplotlib inline\nimport harness.plots, matplotlib; matplotlib.get_backend()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    backend, _, trained, picture, evaluation, again, present = (cell.outputs for cell in notebook.cells)
    assert "inline" in backend[0].text  # which the commands inherit
    shown = [rendered(line) for line in "".join(output.text for output in trained).split("\n")]
    epochs = [line for line in shown if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/2", "2/2"] and all("val loss" in line for line in epochs)
    assert len(shown) < 20
    assert "image/png" in picture[0].data
    assert "accuracy" in "".join(output.text for output in evaluation)
    assert "this run is finished" in "".join(output.text for output in again)
    assert "inline" in present[-1].data["text/plain"]  # the user's own plots still go into the notebook
