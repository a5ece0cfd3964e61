"""Names of any kind, in files, on terminals and in plots; plots of other people's classes, runs and settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import evaluate
import export
import predict
import train
from harness import canvas, errors, files, plots, text
from harness.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
NAME = os.fsdecode(b"caf\xe9")


# names that are not UTF-8


def test_names_that_are_not_utf_8_go_the_whole_way(tiny_run, picture, tmp_path, monkeypatch, capsys) -> None:
    run, odd = tmp_path / NAME, tmp_path / f"{NAME}.png"
    shutil.copytree(tiny_run, run)
    picture.rename(odd)
    flags = [
        "--csv",
        tmp_path / f"{NAME}.csv",
        "--json",
        tmp_path / f"{NAME}.json",
        "--sheet",
        tmp_path / f"s{NAME}.png",
    ]
    assert errors.report(lambda: predict.main([str(word) for word in (run, odd, *flags)])) == 0
    assert r"caf\xe9.png" in capsys.readouterr().out
    assert r"caf\xe9.png" in (tmp_path / f"{NAME}.csv").read_text(encoding="utf-8")
    assert errors.report(lambda: compare.main([str(run), "--out", str(tmp_path / f"c{NAME}.png")])) == 0
    assert r"caf\xe9" in capsys.readouterr().out
    for name in (f"s{NAME}.png", f"c{NAME}.png"):
        assert canvas.drawn_here(tmp_path / name)


def test_onnx_under_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    helper = pytest.importorskip("onnx").helper
    pytest.importorskip("onnxruntime")
    ends = [helper.make_tensor_value_info(name, 1, ["n"]) for name in ("pixels", "logits")]
    graph = helper.make_graph([helper.make_node("Neg", ["pixels"], ["logits"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    (tmp_path / NAME).write_bytes(model.SerializeToString())
    assert export.FORMATS["onnx"].read(tmp_path / NAME)(torch.ones(3)).tolist() == [-1, -1, -1]


def test_tensorboard_says_that_it_cannot(tmp_path, small_demo, capsys) -> None:
    pytest.importorskip("tensorboard")
    flags = ["--demo", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / NAME), "--tensorboard"]
    with pytest.raises(RunError, match="a name that TensorBoard cannot write"):
        train.main(flags)


def test_text_files_take_any_name(tmp_path: Path) -> None:
    files.write_text(tmp_path / "t", f"{NAME} 目")
    assert (tmp_path / "t").read_text(encoding="utf-8") == r"caf\udce9 目"


# plots of other people's classes and runs


@pytest.fixture
def said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(canvas, "letters_noted", set())
    return lambda: capsys.readouterr().err


def test_letters_that_no_font_has_are_named_once(tmp_path: Path, said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canvas, "OTHER_LETTERS", ())
    strange = "\U00011013\U00011014"  # Brahmi, which matplotlib's own font lacks
    for _ in range(2):
        plots.per_class(tmp_path / "p.png", np.eye(2, dtype=int), [strange[0], strange[1]], title="t")
    words = said()
    assert words == f"note: no font here has the letters {strange}; plots show boxes for them\n"


def test_classes_of_any_name_are_drawn(tmp_path: Path, said) -> None:
    odd = ["猫", "a$b$c", "$$", NAME, "line\nbreak", "x" * 300, "\x1b[31m", " ", "👍", "ไทย"]
    plots.per_class(tmp_path / "p.png", np.eye(10, dtype=int), odd, title="".join(odd))
    figure = plots.confusion(tmp_path / "c.png", np.eye(10, dtype=int), odd, title=odd[0])
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[1:7] == [r"a\$b\$c", r"\$\$", r"caf\xe9", r"line\nbreak", "x" * 15 + "…" + "x" * 14, r"\x1b[31m"]
    plots.sample_sheet(tmp_path / "s.png", np.zeros((10, 3, 32, 32), np.uint8), odd, heading=odd[3])
    plots.comparison(tmp_path / "r.png", {name: [{"epoch": 1, "val_accuracy": 0.5}] for name in odd}, title=odd[4])
    assert all(canvas.drawn_here(path) for path in tmp_path.iterdir())
    assert "Warning" not in said()


def test_1400_classes(tmp_path: Path) -> None:
    matrix = np.diag(np.arange(1, 1401))
    matrix[np.arange(1400), (np.arange(1400) + 1) % 1400] = 1  # class n: n + 1 of n + 2 right
    classes = [f"class {n}" for n in range(1400)]
    figure = plots.per_class(tmp_path / "p.png", matrix, classes, title="t")
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown == [f"class {n}" for n in range(59, -1, -1)]  # the worst is the uppermost
    said = figure.get_suptitle()
    mean = np.mean([(n + 1) / (n + 2) for n in range(1400)])
    assert "the 60 worst of 1,400 classes" in said and f"mean over classes {mean:.1%}" in said
    plots.confusion(tmp_path / "c.png", matrix, classes, title="t")
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert max(picture.size) < 4000


def test_of_many_runs_the_best_are_named(tmp_path: Path) -> None:
    runs = {f"run {n}": [{"epoch": 1, "val_accuracy": n / 100}] for n in range(90)}
    figure = plots.comparison(tmp_path / "c.png", runs, title="t")
    legend = [words.get_text() for words in figure.axes[0].get_legend().get_texts()]
    assert [words.split(":")[0] for words in legend] == [*(f"run {n}" for n in range(74, 90)), "74 others"]


def draw(path: Path) -> bytes:
    rows = [{"epoch": n, "stage": 1, "train_loss": 1 / n, "val_loss": 1 / n} for n in range(1, 5)]
    plots.losses(path, rows, title="t")
    return path.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"text.usetex": True, "savefig.format": "pdf", "figure.facecolor": "black"},
        {"savefig.bbox": "tight", "font.family": "fantasy", "axes.grid": True, "savefig.dpi": 10},
        {"axes.spines.left": False, "lines.linestyle": ":", "figure.constrained_layout.use": False, "font.size": 4},
    ],
)
def test_plots_do_not_depend_on_the_users_settings(settings: dict, tmp_path: Path) -> None:
    import matplotlib

    expected = draw(tmp_path / "a.png")
    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams)
        assert draw(tmp_path / "b.png") == expected
        assert dict(matplotlib.rcParams) == before


def test_no_matplotlibrc_hinders_a_command(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"nosuch.key: 1\naxes.grid: caf\xe9")
    code = "from harness.errors import before_imports; before_imports()\nfrom harness import plots; import sys\n"
    code += f"plots.losses({str(tmp_path / 'p.png')!r}, [], title='t'); assert 'matplotlib.pyplot' not in sys.modules"
    environment = os.environ | {"MATPLOTLIBRC": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert canvas.drawn_here(tmp_path / "p.png")


def test_a_matplotlibrc_that_ends_matplotlibs_import_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_bytes(b"axes.grid: caf\xe9")
    result = subprocess.run([sys.executable, ROOT / "compare.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: matplotlib cannot read this folder's matplotlibrc, which is not UTF-8; rename it\n"


def test_pyplots_backend_is_left_alone() -> None:
    """In a notebook matplotlib runs already when this is imported, and the user may have changed its backend since."""
    code = "import matplotlib; matplotlib.use('agg'); import matplotlib.pyplot as plt; plt.figure()\n"
    code += "from harness import plots; assert matplotlib.rcParams['backend'] == 'agg' and plt.get_fignums() == [1]"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "svg"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_long_tables_of_classes_end_on_the_terminal() -> None:
    shares = {f"class {n}": n / 100 for n in range(100)}
    result = {"size": 32, "tta": "none", "accuracy": 0.5, "interval_95": [0, 1], "loss": 1.0, "calibration_error": 0.1}
    entry = {"name": "n", "members": [1], "notes": [], "shown": 0, "results": [result | {"per_class": shares}]}
    said = evaluate.report.text([entry])
    assert "class 19 19.0% … (100 in report.json)" in said and "class 20" not in said


def test_names_are_shortened_by_what_they_take() -> None:
    assert text.shortened("cat", 3) == "cat" and text.shortened("cats", 3) == "c…s"
    assert text.shortened("猫" * 4, 8) == "猫" * 4 and text.shortened("猫" * 5, 8) == "猫猫…猫"
