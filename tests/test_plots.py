import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from harness import plots, run_plots
from harness.errors import RunError
from harness.metrics import wilson
from recipes import RECIPES

NAMES = ["70 px crops", "120 px crops"]


def made_up_rows(first: int = 6, second: int = 4) -> list[dict]:
    rows = []
    for epoch in range(1, first + second + 1):
        share = 1 - 0.9 / epoch
        rows.append(
            {
                "stage": 1 if epoch <= first else 2, "epoch": epoch, "lr": 1e-3 / epoch,
                "train_loss": 2 / epoch, "train_accuracy": share - 0.05,
                "val_loss": 2.1 / epoch, "val_accuracy": round(share - (0.1 if epoch == 10 else 0), 3),
            }
        )  # fmt: skip
    return rows


def column(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows]


def line(figure, label: str):
    return next(line for line in figure.axes[0].lines if str(line.get_label()).startswith(label))


def words(figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def marks(figure, width: float) -> list[float]:
    """Places of vertical lines of a line width."""
    lines = [line for line in figure.axes[0].lines if line.get_lw() == width]
    return [line.get_xdata()[0] for line in lines if len(line.get_xdata()) == 2]


def assert_picture(path, width: int, height: int | None = None) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == width
        assert height is None or picture.height == height
        assert len(np.unique(np.asarray(picture.convert("L")))) > 2  # something is drawn
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_accuracy_shows_the_rows(tmp_path):
    rows = made_up_rows()
    path = tmp_path / "accuracy.png"
    figure = plots.accuracy(
        path, rows, title="tiny · 96 px", val_images=1000, val_size=112, restarts=[1, 3, 9, 20], stage_names=NAMES
    )
    assert_picture(path, 1200, 675)
    for label, key in (("val", "val_accuracy"), ("train", "train_accuracy")):
        assert line(figure, label).get_xdata().tolist() == column(rows, "epoch")
        assert line(figure, label).get_ydata().tolist() == column(rows, key)
    outline = figure.axes[0].collections[0].get_paths()[0].vertices
    for row in rows:
        heights = outline[outline[:, 0] == row["epoch"], 1]
        bounds = wilson(round(row["val_accuracy"] * 1000), 1000)
        assert (heights.min(), heights.max()) == pytest.approx(bounds)
    assert marks(figure, 1.2) == [6.5]  # between the stages
    assert marks(figure, 0.6) == [3, 9]  # only the restarts that have been reached
    said = words(figure)
    for part in ("tiny · 96 px", *NAMES, "last 81.0% at 112 px (78.5% to 83.3%)", "best 90.0% at epoch 9, selected"):
        assert part in said
    assert figure.axes[0].yaxis.get_major_formatter()(0.825, None) == "82.5%"


def test_accuracy_without_validation(tmp_path):
    rows = [row | {"val_accuracy": None, "val_loss": None} for row in made_up_rows()]
    figure = plots.accuracy(tmp_path / "accuracy.png", rows, title="tiny", val_images=0, val_size=96)
    assert "no validation" in words(figure) and "best" not in words(figure)
    assert line(figure, "train").get_ydata().tolist() == column(rows, "train_accuracy")


def test_accuracy_scored_now_and_then_and_a_loss_that_diverged(tmp_path):
    rows = [row | {"val_accuracy": row["val_accuracy"] if row["epoch"] % 3 == 0 else None} for row in made_up_rows()]
    rows[-1]["train_loss"] = float("nan")
    figure = plots.accuracy(tmp_path / "accuracy.png", rows, title="tiny", val_images=50, val_size=96)
    assert line(figure, "val").get_xdata().tolist() == [3, 6, 9]
    figure = plots.losses(tmp_path / "losses.png", rows, title="tiny")
    assert line(figure, "train").get_ydata().tolist() == column(rows[:-1], "train_loss")


def test_one_epoch_and_none(tmp_path):
    path = tmp_path / "plot.png"
    for rows in (made_up_rows(1, 0), []):
        plots.accuracy(path, rows, title="tiny", val_images=10, val_size=96, restarts=[1, 2], stage_names=NAMES)
        assert_picture(path, 1200, 675)
        plots.losses(path, rows, title="tiny", stage_names=NAMES)
        assert_picture(path, 1200, 675)
        plots.comparison(path, {"one": rows}, title="runs")
        assert_picture(path, 1200, 675)
    figure = plots.accuracy(path, made_up_rows(1, 0), title="tiny", val_images=10, val_size=96)
    low, high = wilson(1, 10)
    assert figure.axes[0].collections[0].get_segments()[0][:, 1].tolist() == pytest.approx([low, high])


def test_losses_show_the_rows(tmp_path):
    rows = made_up_rows()
    figure = plots.losses(tmp_path / "losses.png", rows, title="tiny", restarts=[3], stage_names=NAMES)
    assert_picture(tmp_path / "losses.png", 1200, 675)
    for label in ("train", "val"):
        assert line(figure, label).get_ydata().tolist() == column(rows, f"{label}_loss")
    assert "val loss: last 0.210, lowest 0.210 at epoch 10" in words(figure)


def test_learning_rate_shows_the_plan(tmp_path):
    rates = [1e-3, 5e-4, 0.0, 4e-4]
    figure = plots.learning_rate(
        tmp_path / "rate.png",
        [1, 2, 3, 4],
        rates,
        [1, 1, 1, 2],
        title="tiny",
        restarts=[4],
        stage_names=NAMES,
    )
    assert_picture(tmp_path / "rate.png", 1200, 675)
    axes = figure.axes[0]
    assert axes.lines[0].get_ydata().tolist() == rates
    assert axes.get_yscale() == "log" and axes.get_ylim() == pytest.approx((1e-7, 2e-3))
    assert marks(figure, 1.2) == [3.5]
    assert "peak 0.001, last 0.0004" in words(figure)


def test_comparison_draws_each_run_in_its_own_colour(tmp_path):
    runs = {f"seed {seed}": made_up_rows(6, seed) for seed in range(9)}
    figure = plots.comparison(tmp_path / "comparison.png", runs, title="nine seeds")
    assert_picture(tmp_path / "comparison.png", 1200, 958)
    axes = figure.axes[0]
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0  # it hides no curve
    lines = figure.axes[0].lines
    assert [len(line.get_xdata()) for line in lines] == [6 + seed for seed in range(9)]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9
    assert "seed 4: best 90.0%, last 81.0%" in words(figure)


def test_a_run_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path):
    runs = {name: made_up_rows(6, 0)[:3] for name in ("_baseline", "new")}
    figure = plots.comparison(tmp_path / "comparison.png", runs, title="two")
    assert [text.get_text().split(":")[0] for text in figure.axes[0].get_legend().get_texts()] == [" _baseline", "new"]


def test_comparison_of_short_runs_shows_whole_epochs(tmp_path):
    figure = plots.comparison(tmp_path / "comparison.png", {"short": made_up_rows(6, 0)[:3]}, title="one")
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_accuracy_against_size(tmp_path):
    figure = plots.accuracy_against_size(
        tmp_path / "sizes.png", [70, 96, 144], [0.7, 0.84, 0.81], title="tiny · val", images=1000
    )
    assert_picture(tmp_path / "sizes.png", 1200, 675)
    assert line(figure, "accuracy (1,000").get_ydata().tolist() == [0.7, 0.84, 0.81]
    assert "best 84.0% at 96 px" in words(figure)


def test_confusion_and_per_class(tmp_path):
    matrix = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    figure = plots.confusion(tmp_path / "confusion.png", matrix, ["cat", "dog", "emu"], title="tiny · val")
    assert "11 of 14 right: 78.6%" in words(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["8", "2", "1", "3"]
    shares = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[0.8, 0.2, 0], [0.25, 0.75, 0], [0, 0, 0]])
    (tmp_path / "confusion.png").unlink()

    figure = plots.per_class(tmp_path / "classes.png", matrix, ["cat", "dog", "emu"], title="tiny · val")
    assert_picture(tmp_path / "classes.png", 1200)
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.8, 0.75]  # a class without images has no bar
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog"]
    assert figure.axes[0].lines[1].get_xdata() == pytest.approx(wilson(3, 4))
    assert "mean over classes 77.5%" in words(figure)


def test_reliability(tmp_path):
    nan = float("nan")
    figure = plots.reliability(
        tmp_path / "r.png", torch.tensor([0, 30, 10]), [nan, 0.5, 0.9], [nan, 0.4, 1.0], title="tiny", error=0.1
    )
    assert_picture(tmp_path / "r.png", 1200)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0, 0.75, 0.25]
    assert line(figure, "network").get_xdata().tolist() == [0.5, 0.9]
    assert line(figure, "network").get_ydata().tolist() == [0.4, 1.0]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in figure.axes[0].patches]
    assert centres == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert "expected calibration error 10.0% over 40 images" in words(figure)


@pytest.mark.parametrize("titles", [["a", "", "c", "d", "e"], ["a", "b\nc", "d", "e", "f"]])
@pytest.mark.parametrize("kind", ["uint8", "float", "tensor"])
def test_sample_sheet_holds_every_image_in_its_place(tmp_path, titles, kind):
    grey = np.array([10, 60, 110, 160, 210], dtype=np.uint8)
    images = np.broadcast_to(grey[:, None, None, None], (5, 3, 20, 20))
    given = {"uint8": images, "float": images / 255, "tensor": torch.from_numpy(images / 255)}[kind]
    figure = plots.sample_sheet(tmp_path / "sheet.png", given, titles, columns=3, heading="views")
    assert_picture(tmp_path / "sheet.png", 1200)
    sheet = figure.axes[0].images[0].get_array()
    left, below = sheet.shape[1] // 3, sheet.shape[0] // 2
    for index, value in enumerate(grey):
        top = index // 3 * below
        assert (sheet[top : top + 20, index % 3 * left : index % 3 * left + 20] == value).all()
    assert (sheet[below : below + 20, 2 * left :] == 255).all()  # the sixth place is empty
    assert [text.get_text() for text in figure.axes[0].texts] == titles


def test_counts_stand_in_their_cells_and_captions_below_their_pictures(tmp_path):
    axes = plots.confusion(tmp_path / "c.png", np.array([[8, 2], [0, 3]]), ["cat", "dog"], title="t").axes[0]
    assert {text.get_text(): text.get_position() for text in axes.texts} == {"8": (0, 0), "2": (1, 0), "3": (1, 1)}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    images = np.zeros((5, 3, 20, 20), np.uint8)
    axes = plots.sample_sheet(tmp_path / "s.png", images, list("abcde"), columns=3, heading="h").axes[0]
    height, width = axes.images[0].get_array().shape[:2]
    for index, text in enumerate(axes.texts):
        x, y = text.get_position()
        assert (x // (width // 3), y // (height // 2)) == (index % 3, index // 3) and y % (height // 2) >= 20


def test_class_names_fit_below_the_pictures_of_a_sheet():
    assert plots.beside("airplane", " 93%") == "airplane 93%"
    assert plots.beside("Tomato__Tomato_YellowLeaf__Curl_Virus", " 93%") == "Tomat…irus 93%"
    assert plots.beside("Tomato__Tomato_YellowLeaf__Curl_Virus", " 93%", 6) == "Tomato_…_Virus 93%"


def test_images_keep_channels_rows_and_columns(tmp_path):
    image = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(1, 3, 4, 4)
    figure = plots.sample_sheet(tmp_path / "sheet.png", image, [""], heading="one")
    sheet = figure.axes[0].images[0].get_array()
    assert all(sheet[row, column, c] == image[0, c, row, column] for c, row, column in np.ndindex(3, 4, 4))


def test_a_failed_save_leaves_the_last_picture_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "losses.png"
    plots.losses(path, made_up_rows(), title="tiny")
    before = path.read_bytes()

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RunError, match="cannot write .*losses.png: No space left"):
        plots.losses(path, made_up_rows(3, 0), title="tiny")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(RunError, match="cannot write .*absent/losses.png: No such file"):
        plots.losses(tmp_path / "absent" / "losses.png", made_up_rows(), title="tiny")


def test_the_same_rows_give_the_same_file(tmp_path):
    for name in ("first.png", "second.png"):
        plots.losses(tmp_path / name, made_up_rows(), title="tiny")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_stages_are_named_above_their_own_parts(tmp_path):
    """The original's: 300 epochs of 70 px, 140 of 120; rates at eighths of epochs, from 0."""
    drawn = run_plots.curves(tmp_path, "tiny", RECIPES["original"], made_up_rows(), 1000)
    figures = {path.stem: draw() for path, draw in drawn.items()}
    for name, ends in {"accuracy": (1, 10), "losses": (1, 10), "learning_rate": (0, 439.875)}.items():
        places = {text.get_text(): text.get_position()[0] for text in figures[name].axes[0].texts}
        assert (places["70 px"], places["120 px"]) == ends
