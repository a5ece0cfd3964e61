"""Pictures of runs: curves from the rows of metrics.csv, sheets of images, and what a network gets wrong.

Each function draws, saves a PNG at `path` (whole or not at all; RunError if it cannot) and returns the Figure.
`rows` are dicts with the keys stage (from 1), epoch (from 1 over the whole run), train_loss, train_accuracy, val_loss
and val_accuracy (accuracies 0 … 1; None where an epoch was not scored). Sizes suit a page of 800 px; colours are those
of Okabe and Ito, which colour-blind people can tell apart. pyplot, with its global state, is not used.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from harness.canvas import plain, save, styled
from harness.metrics import interval, wilson
from harness.text import printable, shortened

# canvas imports matplotlib in a guarded way, and so comes first
# isort: split
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#666666"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "#000000")
DPI = 150
SHEET_LETTERS = 112  # that fit side by side below a row of a sheet's pictures
NAME_IN_TITLE = 60  # columns of a run's name: facts come after it
NAMED_RUNS = 16  # in a legend
NAMED_CLASSES = 40  # along an axis of the confusion matrix
WORST_CLASSES = 60  # bars

Row = Mapping[str, float | None]


@styled
def accuracy(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    val_images: int,
    val_size: int,
    restarts: Sequence[float] = (),
    stage_names: Sequence[str] = (),
) -> Figure:
    """Validation accuracy with its 95% Wilson interval, and training accuracy; best point labelled.

    `val_images`: how many images each validation accuracy is measured on. `val_size`: their side in px in the last row.
    `restarts`: epochs on the axis of the rows.
    """
    figure, axes = _canvas("epoch", "accuracy")
    epochs, values = _column(rows, "val_accuracy")
    axes.plot(*_column(rows, "train_accuracy"), color=ORANGE, lw=0.9, label="train (augmented views)", **_mark(rows))
    facts = "no validation"
    if len(epochs):
        bounds = np.array([interval(value, val_images) for value in values])
        _band(axes, epochs, bounds)
        axes.plot(epochs, values, color=BLUE, lw=1.5, label=f"val ({val_images:,} images)", **_mark(epochs))
        best = int(np.argmax(values))
        _label_best(axes, epochs[best], values[best])
        low, high = bounds[-1]
        facts = (
            f"val accuracy: last {values[-1]:.1%} at {val_size} px ({low:.1%} to {high:.1%}), "
            f"best {values[best]:.1%} at epoch {epochs[best]:g}, selected on these images"
        )
    _percent(axes.yaxis)
    _timeline(axes, [row["epoch"] for row in rows], [row["stage"] for row in rows], stage_names, restarts)
    axes.legend(loc="lower right", fontsize=9)
    _title(figure, title, facts)
    return save(figure, path)


@styled
def losses(
    path: Path,
    rows: Sequence[Row],
    *,
    title: str,
    restarts: Sequence[float] = (),
    stage_names: Sequence[str] = (),
) -> Figure:
    """Training and validation loss."""
    figure, axes = _canvas("epoch", "loss (nats per image)")
    facts = []
    for name, key, colour in (("train", "train_loss", ORANGE), ("val", "val_loss", BLUE)):
        epochs, values = _column(rows, key)
        if len(epochs):
            axes.plot(epochs, values, color=colour, lw=1.2, label=name, **_mark(epochs))
            least = int(np.argmin(values))
            facts.append(f"{name} loss: last {values[-1]:.3f}, lowest {values[least]:.3f} at epoch {epochs[least]:g}")
    _timeline(axes, [row["epoch"] for row in rows], [row["stage"] for row in rows], stage_names, restarts)
    if axes.lines:
        axes.legend(loc="upper right", fontsize=9)
    _title(figure, title, " · ".join(facts))
    return save(figure, path)


@styled
def learning_rate(
    path: Path,
    epochs: Sequence[float],
    rates: Sequence[float],
    stages: Sequence[int],
    *,
    title: str,
    restarts: Sequence[float] = (),
    stage_names: Sequence[str] = (),
) -> Figure:
    """Learning rate on a logarithmic scale of four decades; one epoch, rate and stage (from 1) per point."""
    figure, axes = _canvas("epoch", "learning rate")
    peak = max(rates)
    axes.plot(epochs, rates, color=BLUE, lw=1.5, **_mark(epochs))
    axes.set_yscale("log", nonpositive="mask")  # the warm-up begins at 0
    axes.set_ylim(peak * 1e-4, peak * 2)
    _timeline(axes, epochs, stages, stage_names, restarts)
    _title(figure, title, f"learning rate: peak {peak:.3g}, last {rates[-1]:.2g}")
    return save(figure, path)


@styled
def comparison(path: Path, runs: Mapping[str, Sequence[Row]], *, title: str) -> Figure:
    """Validation accuracy of several runs, {name: rows}; the legend has the 16 with the highest best accuracy."""
    scored = {name: column for name, rows in runs.items() if len((column := _column(rows, "val_accuracy"))[0])}
    below = len(scored) > 6  # the legend, which would hide curves within the axes
    figure, axes = _canvas("epoch", "val accuracy", 4.5 + below * 0.21 * min(len(scored), NAMED_RUNS + 1))
    named = sorted(scored, key=lambda name: -max(scored[name][1]))[:NAMED_RUNS]
    for name, (epochs, values) in scored.items():
        if name not in named:
            axes.plot(epochs, values, lw=0.8, color="#BBBBBB", zorder=1)
    for index, name in enumerate(name for name in scored if name in named):
        epochs, values = scored[name]
        style = {"color": CYCLE[index % len(CYCLE)], "ls": ("-", "--", ":", "-.")[index // len(CYCLE) % 4]}
        label = f"{_name(name, 40)}: best {max(values):.1%}, last {values[-1]:.1%}"
        label = f" {label}" if label.startswith("_") else label  # which matplotlib would leave out of the legend
        axes.plot(epochs, values, lw=1.3, label=label, **style, **_mark(epochs))
    if len(scored) > NAMED_RUNS:
        axes.plot([], [], lw=0.8, color="#BBBBBB", label=f"{len(scored) - NAMED_RUNS} others")
    _percent(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        place = (
            {"loc": "upper left", "bbox_to_anchor": (0, -0.14), "borderaxespad": 0} if below else {"loc": "lower right"}
        )
        axes.legend(fontsize=9, **place)
    _title(figure, title)
    return save(figure, path)


@styled
def accuracy_against_size(
    path: Path, sizes: Sequence[int], accuracies: Sequence[float], *, title: str, images: int
) -> Figure:
    """Accuracy of one network over the size in px at which `images` images are scored, with 95% intervals."""
    figure, axes = _canvas("eval size in px", "accuracy")
    bounds = np.array([interval(value, images) for value in accuracies])
    _band(axes, sizes, bounds)
    axes.plot(sizes, accuracies, color=BLUE, lw=1.5, marker="o", ms=5, label=f"accuracy ({images:,} images)")
    best = int(np.argmax(accuracies))
    _label_best(axes, sizes[best], accuracies[best])
    if len(sizes) <= 12:
        axes.set_xticks(sizes)
    _percent(axes.yaxis)
    axes.legend(loc="best", fontsize=9)
    _title(figure, title, f"best {accuracies[best]:.1%} at {sizes[best]} px")
    return save(figure, path)


@styled
def confusion(path: Path, matrix: np.ndarray, class_names: Sequence[str], *, title: str) -> Figure:
    """Confusion matrix: counts (K, K), row true class, column predicted; colour is the share of the row.

    More than 40 classes are numbered, not named.
    """
    matrix = np.asarray(matrix)
    figure, axes = _canvas("predicted", "true", height=7.0)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(matrix) if len(class_names) <= 20 else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", fontsize=9, color=colour)
    names = [_name(name) for name in class_names]
    if len(names) <= NAMED_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=10 if len(names) <= 20 else 7)
    else:
        axes.set(xlabel="predicted (classes by number, from 0)", ylabel="true")
    axes.grid(False)
    _title(figure, title, f"{np.trace(matrix):,} of {matrix.sum():,} right: {np.trace(matrix) / matrix.sum():.1%}")
    return save(figure, path)


@styled
def per_class(path: Path, matrix: np.ndarray, class_names: Sequence[str], *, title: str) -> Figure:
    """Accuracy of the worst classes, 60 at most, with 95% intervals, from the counts of a confusion matrix (K, K)."""
    matrix = np.asarray(matrix)
    hits, totals = matrix.diagonal(), matrix.sum(1)
    shares = hits / np.maximum(totals, 1)
    scored = [int(index) for index in np.argsort(-shares, kind="stable") if totals[index]]
    order = scored[-WORST_CLASSES:]
    figure, axes = _canvas("accuracy", "", height=0.32 * len(order) + 1.6)
    for place, index in enumerate(order):
        low, high = wilson(int(hits[index]), int(totals[index]))
        axes.barh(place, shares[index], color=SKY, height=0.7)
        axes.plot([low, high], [place, place], color="black", lw=1.2)
        axes.text(1.01, place, f"{shares[index]:.1%} of {totals[index]:,}", va="center", fontsize=9)
    axes.set_yticks(range(len(order)), [_name(class_names[index]) for index in order])
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.8, len(order) - 0.2)
    axes.grid(False, axis="y")
    _percent(axes.xaxis)
    part = f"the {len(order)} worst of {len(scored):,} classes; " if len(order) < len(scored) else ""
    _title(figure, title, f"{part}mean over classes {shares[scored].mean():.1%}; line: 95% interval")
    return save(figure, path)


@styled
def reliability(
    path: Path, count: np.ndarray, confidence: np.ndarray, share: np.ndarray, *, title: str, error: float
) -> Figure:
    """Accuracy over confidence, from equal bins of it (`metrics.reliability`), with the share of images in each.

    `error`: the expected calibration error, 0 … 1, for the title.
    """
    count, confidence, share = (np.asarray(values, dtype=float) for values in (count, confidence, share))
    edges = np.linspace(0, 1, len(count) + 1)
    figure, axes = _canvas("confidence", "accuracy", height=5.0)
    width = {"width": 0.9 / len(count), "align": "center"}
    middle = (edges[1:] + edges[:-1]) / 2
    axes.bar(middle, count / count.sum(), color="#BBBBBB", label="share of images", **width)
    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="perfectly calibrated")
    filled = count > 0
    axes.plot(confidence[filled], share[filled], color=BLUE, marker="o", ms=5, lw=1.5, label="network")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        _percent(axis)
    axes.legend(loc="upper left", fontsize=9)
    _title(figure, title, f"expected calibration error {error:.1%} over {count.sum():,.0f} images")
    return save(figure, path)


@styled
def sample_sheet(path: Path, images: np.ndarray, titles: Sequence[str], *, columns: int = 8, heading: str) -> Figure:
    """A contact sheet of images (N, 3, s, s), uint8 or float in [0, 1], each with its title below."""
    images = np.asarray(images)
    images = images if images.dtype == np.uint8 else (images.clip(0, 1) * 255).round().astype(np.uint8)
    columns, size = min(columns, len(images)), images.shape[-1]
    lines = 1 + max(title.count("\n") for title in titles)
    width = 8.0
    cell = width / columns  # inches
    gap = max(2, round(size / 24))
    below = gap + round(lines * 0.17 / cell * size)
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (size + below), columns * (size + gap), 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(width, width * sheet.shape[0] / sheet.shape[1] + 0.35), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for index, (image, title) in enumerate(zip(images, titles, strict=True)):
        top, left = index // columns * (size + below), index % columns * (size + gap)
        sheet[top : top + size, left : left + size] = image.transpose(1, 2, 0)
        axes.text(left + size / 2, top + size + gap / 4, plain(title), ha="center", va="top", fontsize=8)
    axes.imshow(sheet, interpolation="bilinear")
    axes.set_axis_off()
    _title(figure, heading)
    return save(figure, path)


def beside(name: str, words: str = "", columns: int = 8, before: str = "") -> str:
    """A class name, shortened so that with `before` and `words` around it fits on a line below a sheet's picture."""
    return before + shortened(printable(name), SHEET_LETTERS // columns - len(before + words)) + words


def _canvas(x_label: str, y_label: str, height: float = 4.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color="#E5E5E5", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _name(name: str, columns: int = 30) -> str:
    """The name of a class or run as it is drawn: on one line, and shortened to `columns`."""
    return plain(shortened(printable(name), columns))


def _title(figure: Figure, title: str, facts: str = "") -> None:
    figure.suptitle(plain(f"{title}\n{facts}" if facts else title), fontsize=10.5, x=0.01, ha="left")


def _column(rows: Sequence[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the rows that have a value."""
    points = [(row["epoch"], row[key]) for row in rows if row[key] is not None and np.isfinite(row[key])]
    epochs, values = np.array(points, dtype=float).reshape(-1, 2).T
    return epochs, values


def _mark(points: Sequence) -> dict:
    """Markers for short runs, where a line alone shows little or (one epoch) nothing."""
    return {"marker": "o", "ms": 3} if len(points) <= 30 else {}


def _label_best(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], color=RED, marker="o", ms=6, ls="none", zorder=5)
    inward = "right" if x > sum(axes.get_xlim()) / 2 else "left"
    axes.annotate(f"best {y:.1%}", (x, y), (0, 9), textcoords="offset points", ha=inward, color=RED, fontsize=9)
    axes.margins(y=0.12)


def _band(axes: Axes, x: Sequence[float], bounds: np.ndarray) -> None:
    style = {"color": BLUE, "alpha": 0.18, "label": "95% interval"}
    if len(x) == 1:  # a band has no area there
        axes.vlines(x, *bounds.T, lw=8, **style)
    else:
        axes.fill_between(x, *bounds.T, lw=0, **style)


def _percent(axis: Axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _timeline(
    axes: Axes, epochs: Sequence[float], stages: Sequence[int], names: Sequence[str], restarts: Sequence[float]
) -> None:
    """Faint lines at restarts, firm ones between stages, and each stage's name above its part."""
    if not len(epochs):
        return
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(epochs) == 1:
        axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
    for epoch in restarts:
        if epochs[0] < epoch <= epochs[-1]:
            axes.axvline(epoch, color=GREY, lw=0.6, ls=":", alpha=0.7, zorder=0)
    starts = [i for i in range(len(stages)) if i == 0 or stages[i] != stages[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(stages)], strict=True):
        if start:
            axes.axvline((epochs[start - 1] + epochs[start]) / 2, color=GREY, lw=1.2, zorder=0)
        if names:
            _name_stage(axes, names[stages[start] - 1], epochs[start], epochs[end - 1], start == 0, end == len(stages))


def _name_stage(axes: Axes, name: str, start: float, end: float, first: bool, last: bool) -> None:
    """The outer names face inwards, so that those of very short stages stay legible."""
    x, side = (start, "left") if first else (end, "right") if last else ((start + end) / 2, "center")
    axes.text(x, 1.01, name, transform=axes.get_xaxis_transform(), ha=side, fontsize=9, color=GREY)
