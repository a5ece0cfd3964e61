#!/usr/bin/env python3
"""Say what a trained network sees in pictures.

python3 predict.py runs/cpu-seed0 holiday.jpg
python3 predict.py runs/cpu-seed0 pictures/ --sheet sheet.png --csv predictions.csv
"""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness import errors

if __name__ == "__main__":
    errors.before_imports()  # which take seconds

import torch
from torch import Tensor
from tqdm import tqdm

from harness import checkpoint, files, picture_file, picture_search, plots, scoring, text
from harness.checkpoint import TrainedNetwork
from harness.cli import expanded, file_path, machine_settings, network_parser, png_path, refuse_idle_best, whole_number
from harness.errors import RunError
from harness.machine import Machine, start_machine
from harness.picture_search import HARMLESS, PassedOver

BATCH = 64  # pictures that are scored together
ON_SHEET = 120  # pictures
SHEET_COLUMNS = 6
NAME_LENGTH = 22  # characters of a file's name that fit under its picture


class Prediction(NamedTuple):
    """The likeliest classes of a picture with their probabilities, best first; `square` is what the network saw."""

    file: str
    choices: list[tuple[str, float]]
    square: Tensor | None


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    refuse_idle_best(parser, args.best, [args.network])
    machine = start_machine(machine_settings(parser, args))
    trained = checkpoint.load_network(args.network, args.best)
    trained.model.to(machine.device)
    paths, skipped = gather(args.pictures)
    check_outputs(parser, args, [trained.file, *paths])
    predictions = predict(trained, paths, args.top, machine, skipped, squares=ON_SHEET if args.sheet else 0)
    if not predictions:
        raise RunError("there are no pictures to look at" if not paths else "none of the files is a usable picture")
    try:
        if args.csv:
            files.write_text(args.csv, as_csv(predictions))
        if args.json:
            files.write_text(args.json, as_json(predictions, skipped, trained))
        if args.sheet:
            draw_sheet(args.sheet, predictions, trained)
    finally:  # a full disk does not cost the table, nor a closed terminal the files
        print(table(predictions))
    return 1 if skipped else 0


def build_parser() -> argparse.ArgumentParser:
    parser = network_parser(
        "predict.py",
        "Say what a trained network sees in pictures. Each is cropped to its largest centred square and resized to the "
        "size of the training pictures, with white behind transparent parts, and scored as the run was validated. The "
        "exit status is 1 if a picture had to be skipped.",
    )
    parser.add_argument("network", type=file_path, metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint")
    parser.add_argument(
        "pictures",
        nargs="+",
        type=file_path,
        metavar="PICTURE",
        help="picture in any format that Pillow opens, or a folder of them",
    )
    parser.add_argument(
        "--top",
        type=whole_number(1, 1000),
        default=2,
        metavar="N",
        help="classes to list for each picture (default: 2)",
    )
    parser.add_argument("--csv", type=file_path, metavar="FILE", help="write the table as CSV too")
    parser.add_argument(
        "--json", type=file_path, metavar="FILE", help="write it as JSON, with the files that were skipped"
    )
    parser.add_argument(
        "--sheet",
        type=png_path,
        metavar="FILE",
        help=f"draw the first {ON_SHEET} pictures with class and confidence (PNG)",
    )
    return parser


def check_outputs(parser: argparse.ArgumentParser, args: argparse.Namespace, inputs: Sequence[Path]) -> None:
    """End the process with status 2 where an output would replace an input or another output."""
    taken = {files.identity(path) for path in inputs}
    for flag, path in (("csv", args.csv), ("json", args.json), ("sheet", args.sheet)):
        if path is not None and files.identity(path) in taken:
            parser.error(f"--{flag} {path} would replace another file of this command; give it another name")
        taken |= {files.identity(path)} if path is not None else set()


def gather(named: Sequence[Path]) -> tuple[list[Path], dict[str, str]]:
    """The named files and all pictures in the named folders; and by path, why anything else cannot be looked at."""
    paths, skipped = [], {}
    for path in expanded(named):
        if not os.path.isdir(path):  # False if it cannot be reached, where Path.is_dir raises
            paths.append(path)
            continue
        passed = PassedOver()
        found = picture_search.find(path, passed)
        paths += found
        lost = passed.possible_pictures()
        for other, why in lost:
            skip(skipped, other, f"{text.printable(other)}: {why}")
        for line in passed.lines(path, HARMLESS):
            print(line, file=sys.stderr)
        if not found and not lost:
            skip(skipped, path, f"{text.printable(path)} holds no pictures")
    return list(dict.fromkeys(paths)), skipped


def skip(skipped: dict[str, str], path: Path, reason: str) -> None:
    """Note a skipped path, and say so on stderr at once, above a progress bar if there is one."""
    skipped[text.printable(path)] = reason
    tqdm.write(f"skipped: {reason}", file=sys.stderr)


def predict(
    trained: TrainedNetwork,
    paths: Sequence[Path],
    top: int,
    machine: Machine,
    skipped: dict[str, str],
    squares: int = 0,
) -> list[Prediction]:
    """Look at each picture; those that cannot be opened are added to `skipped`. The first `squares` squares are kept.

    A picture is first brought to the size of the training images: enlarged from there it has the sharpness that the
    network knows.
    """
    predictions: list[Prediction] = []
    with tqdm(total=len(paths), unit="picture", leave=False, disable=None) as bar:
        for start in range(0, len(paths), BATCH):
            opened = {}
            for path in paths[start : start + BATCH]:
                try:
                    opened[path] = picture_file.open_square(path, trained.recipe.image_size)
                except RunError as error:
                    skip(skipped, path, str(error))
                bar.update()
            if not opened:
                continue
            batch = torch.stack(list(opened.values()))
            how = {"tta": trained.recipe.tta, "precision": machine.precision}
            scores = scoring.tta_logits(trained.model, batch.to(machine.device), trained.eval_size, **how)
            best = scores.softmax(1).topk(min(top, len(trained.classes)))
            for path, shares, labels in zip(opened, best.values.tolist(), best.indices.tolist(), strict=True):
                choices = [(trained.classes[label], share) for label, share in zip(labels, shares, strict=True)]
                square = opened[path] if len(predictions) < squares else None
                predictions.append(Prediction(text.printable(path), choices, square))
    return predictions


def table(predictions: Sequence[Prediction]) -> str:
    """File, class, confidence and the other choices, one line per picture."""
    others = range(2, len(predictions[0].choices) + 1)
    header = ["file", "class", "confidence", *(f"choice {number}" for number in others)]
    rows = []
    for file, ((name, share), *rest), _ in predictions:
        rows.append([file, name, f"{share:.1%}", *(f"{other} {its_share:.1%}" for other, its_share in rest)])
    return text.table(header, rows)


def as_csv(predictions: Sequence[Prediction]) -> str:
    """The same as CSV, with confidences from 0 to 1."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = range(1, len(predictions[0].choices) + 1)
    writer.writerow(["file", *(f"{what}_{number}" for number in numbers for what in ("class", "confidence"))])
    for file, choices, _ in predictions:
        writer.writerow([file, *(value for name, share in choices for value in (name, f"{share:.6f}"))])
    return out.getvalue()


def as_json(predictions: Sequence[Prediction], skipped: dict[str, str], trained: TrainedNetwork) -> str:
    """The same as JSON, with what was skipped and why, and how the pictures were scored."""
    seen = [
        {"file": file, "choices": [{"class": name, "confidence": share} for name, share in choices]}
        for file, choices, _ in predictions
    ]
    how = {"checkpoint": str(trained.file), "size": trained.eval_size, "tta": trained.recipe.tta}
    left_out = [{"file": file, "reason": reason} for file, reason in skipped.items()]
    return json.dumps({**how, "pictures": seen, "skipped": left_out}, indent=2) + "\n"


def draw_sheet(path: Path, predictions: Sequence[Prediction], trained: TrainedNetwork) -> None:
    shown = [prediction for prediction in predictions if prediction.square is not None]
    titles = []
    for file, ((name, share), *_), _ in shown:
        short = text.shortened(Path(file).name, NAME_LENGTH)
        titles.append(f"{plots.beside(name, f' {share:.0%}', SHEET_COLUMNS)}\n{short}")
    first = "" if len(shown) == len(predictions) else f"the first {len(shown)} of "
    heading = f"{'/'.join(trained.file.absolute().parts[-2:])}: {first}{len(predictions):,} pictures"
    squares = torch.stack([prediction.square for prediction in shown]).numpy()
    plots.sample_sheet(path, squares, titles, columns=SHEET_COLUMNS, heading=heading)


if __name__ == "__main__":
    errors.end_process(errors.report(main))
