#!/usr/bin/env python3
"""Draw the original's published curve and those measured here into one picture.

python3 docs/original/curves.py     # reads the CSV files beside it, writes img/original-curves.png
"""

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from harness import canvas  # noqa: E402
from harness.plots import BLUE, GREY, ORANGE, RED  # noqa: E402

# isort: split
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

PUBLISHED = {1: 41.5, 10: 68, 31: 72, 70: 73.8, 143: 74.1, 300: 73.5, 302: 77, 310: 83.8, 331: 83.8, 372: 84, 440: 84}
STAGE_1 = 300  # epochs
TENTH_STAGE_1 = 30


def rows(name: str) -> list[dict[str, str]]:
    with open(HERE / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def accuracy(name: str) -> list[tuple[int, float]]:
    """Epoch and clean validation accuracy in percent, of each row of a run."""
    return [(int(row["epoch"]), 100 * float(row["val_accuracy"])) for row in rows(name)]


def draw_scores(axes: Axes, scored: list[dict[str, str]], label: str, colour: str = ORANGE) -> None:
    """Squares for accuracies by the protocol, with their intervals."""
    epochs, values, low, high = ([float(row[key]) for row in scored] for key in ("epoch", "accuracy", "low", "high"))
    axes.vlines(epochs, low, high, color=colour)
    axes.plot(epochs, values, "s", color=colour, ms=5, label=label)


def draw_whole(axes: Axes) -> None:
    """The original's curve, and the first epochs of the same run here."""
    clean = {
        "two Zen 4 cores": accuracy("metrics.csv"),
        "two Zen 5 cores": accuracy("metrics-zen5.csv"),
        "an H200": accuracy("metrics-h200.csv"),
    }
    by_protocol = [row for row in rows("scores.csv") if (row["protocol"], row["size"]) == ("original", "70")]
    scored = [row for row in by_protocol if not row["run"].startswith("tenth")]
    theirs = {"color": GREY, "marker": "o", "ms": 4}
    axes.plot(*zip(*PUBLISHED.items(), strict=True), **theirs, label="the original, by its protocol (published)")
    for (machine, points), style in zip(
        clean.items(), ({"marker": "."}, {"lw": 1}, {"lw": 1, "ls": "--"}), strict=True
    ):
        axes.plot(*zip(*points, strict=True), color=BLUE, **style, label=f"here, clean images, 96 px, {machine}")
    draw_scores(axes, scored, "here, by its protocol, 70 px (95 % interval)")
    axes.axvline(STAGE_1 + 0.5, color=RED, lw=0.8, ls=":")
    axes.text(STAGE_1 * 0.97, 33, "120 px from here (theirs)", ha="right", color=RED, fontsize=8)
    axes.set(xscale="log", xlabel="epoch of 80,000 samples", ylabel="validation accuracy, %", ylim=(30, 90))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="upper left", fontsize=8)


def draw_tenth(axes: Axes) -> None:
    """Both stages on a tenth of the views, and the second one at 70 px instead."""
    run, control = accuracy("tenth.csv"), accuracy("tenth-control.csv")
    stage_2 = run[TENTH_STAGE_1:]
    later = [(TENTH_STAGE_1 + epoch, value) for epoch, value in control]
    axes.plot(*zip(*run[:TENTH_STAGE_1], strict=True), color=BLUE, marker=".", label="70 px; clean images, 96 px")
    axes.plot(*zip(*stage_2, strict=True), color=BLUE, marker="^", ms=4, label="then 120 px; clean images, 144 px")
    axes.plot(*zip(*later, strict=True), color=GREY, marker="v", ms=4, label="or 70 px again; clean images, 96 px")
    scored = {
        (row["run"], row["epoch"], row["size"]): row for row in rows("scores.csv") if row["protocol"] == "original"
    }
    ours = [scored["tenth", "30", "70"], scored["tenth", "40", "120"]]
    draw_scores(axes, ours, "by the protocol, at the training size (95 % interval)")
    draw_scores(axes, [scored["tenth-control", "40", "70"]], "the same, at 70 px again", RED)
    axes.set(xlabel="epoch of 8,000 samples", ylim=(10, 80))
    axes.legend(loc="lower right", fontsize=8)


@canvas.styled
def draw() -> Figure:
    figure = Figure(figsize=(12, 4.4), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_whole(left)
    draw_tenth(right)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return canvas.save(figure, ROOT / "img" / "original-curves.png")


if __name__ == "__main__":
    draw()
