"""The four lines for a notebook, in a real kernel: what a cell starts, prints and shows."""

import shlex
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PYTHON = shlex.quote(sys.executable)
TINY = "--demo --epochs 2 1 --crop-size 32 32 --eval-size 32 40 --batch 32 32 --planes 4 4 8 --threads 1"


def rendered(line: str) -> str:
    """What a cell shows of a line in which a progress bar was drawn over itself."""
    return next((part for part in reversed(line.split("\r")) if part.strip()), "").strip()


@pytest.mark.slow
def test_a_cell_trains_and_shows_the_plot(tmp_path: Path):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    cells = [
        "import os; print(os.environ['MPLBACKEND'])",
        f"%cd {PROJECT}",
        f"!{PYTHON} train.py {TINY} --data-dir {tmp_path} --out {tmp_path / 'drive' / 'run'}",
        f"from IPython.display import Image; Image('{tmp_path / 'drive' / 'run' / 'accuracy.png'}')",
        f"!{PYTHON} evaluate.py {tmp_path / 'drive' / 'run'}",
        "%matplotlib inline\nimport harness.plots, matplotlib; matplotlib.get_backend()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    backend, _, training, picture, evaluation, present = (cell.outputs for cell in notebook.cells)
    assert "inline" in backend[0].text  # which the commands inherit
    shown = [rendered(line) for line in "".join(output.text for output in training).split("\n")]
    epochs = [line for line in shown if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/3", "2/3", "3/3"] and all("val loss" in line for line in epochs)
    assert len(shown) < 20
    assert "image/png" in picture[0].data
    assert "accuracy" in "".join(output.text for output in evaluation)
    assert "inline" in present[-1].data["text/plain"]  # plots of one's own still go into the notebook
