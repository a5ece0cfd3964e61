#!/usr/bin/env python3
"""Draw the original's published curve and the one measured here into one picture.

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
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter  # noqa: E402

PUBLISHED = {1: 41.5, 10: 68, 31: 72, 70: 73.8, 143: 74.1, 300: 73.5, 302: 77, 310: 83.8, 331: 83.8, 372: 84, 440: 84}
STAGE_1 = 300  # epochs


def rows(name: str) -> list[dict[str, str]]:
    with open(HERE / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@canvas.styled
def draw() -> Figure:
    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    clean = {
        machine: [(int(row["epoch"]), 100 * float(row["val_accuracy"])) for row in rows(name)]
        for machine, name in (
            ("two Zen 4 cores", "metrics.csv"),
            ("two Zen 5 cores", "metrics-zen5.csv"),
            ("an H200", "metrics-h200.csv"),
        )
    }
    scored = [row for row in rows("scores.csv") if (row["protocol"], row["size"]) == ("original", "70")]
    theirs = {"color": GREY, "marker": "o", "ms": 4}
    axes.plot(*zip(*PUBLISHED.items(), strict=True), **theirs, label="the original, by its protocol (published)")
    for (machine, points), style in zip(
        clean.items(), ({"marker": "."}, {"lw": 1}, {"lw": 1, "ls": "--"}), strict=True
    ):
        axes.plot(*zip(*points, strict=True), color=BLUE, **style, label=f"here, clean images, 96 px, {machine}")
    points = [[float(row[key]) for row in scored] for key in ("epoch", "accuracy", "low", "high")]
    epochs, accuracy, low, high = points
    axes.vlines(epochs, low, high, color=ORANGE)
    axes.plot(epochs, accuracy, "s", color=ORANGE, ms=5, label="here, by its protocol, 70 px (95 % interval)")
    axes.axvline(STAGE_1 + 0.5, color=RED, lw=0.8, ls=":")
    axes.text(STAGE_1 * 0.97, 33, "120 px from here (theirs)", ha="right", color=RED, fontsize=8)
    axes.set(xscale="log", xlabel="epoch of 80,000 samples", ylabel="validation accuracy, %", ylim=(30, 90))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    return canvas.save(figure, ROOT / "img" / "original-curves.png")


if __name__ == "__main__":
    draw()
