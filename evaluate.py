#!/usr/bin/env python3
"""Score trained networks, and show what they get wrong.

python3 evaluate.py runs/cpu-seed0                               # on the run's own validation images
python3 evaluate.py runs/cpu-seed0 --size 64 80 96 112           # accuracy against size
python3 evaluate.py runs/cpu-seed0 runs/cpu-seed1                # mean and standard deviation, and which is better
python3 evaluate.py runs/new-seed* --against runs/old-seed*      # pairs of networks on the same images
python3 evaluate.py runs/cpu-seed0 --split test                  # at the very end
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from harness import errors

if __name__ == "__main__":
    errors.before_imports()  # which take seconds

import torch
from torch import Tensor
from tqdm import tqdm

import data
from harness import checkpoint, files, metrics, ownership, report, scoring, scoring_ledger
from harness.checkpoint import TrainedNetwork
from harness.cli import (
    expanded,
    file_path,
    machine_settings,
    network_parser,
    refuse_among_pictures,
    refuse_idle_best,
    whole_number,
)
from harness.errors import RunError
from harness.images import load_for_network, load_test_images, recorded_source
from harness.machine import Machine, start_machine
from harness.report import Evaluation
from harness.text import printable
from recipes import TTA, TTA_HELP, Recipe

CHUNK = 250  # images between two ticks of the progress bar


class Scored(NamedTuple):
    """Images uint8 (N, 3, H, W), their labels int64 (N,), and logits (n, K) of them or of n views of them."""

    images: Tensor
    labels: Tensor
    scores: Tensor


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    paths = checkpoints_of(parser, args)
    machine = start_machine(machine_settings(parser, args))
    sides = [[checkpoint.load_network(path) for path in side] for side in paths]
    networks, everyone = sides[0], [network for side in sides for network in side]
    out = args.out or default_folder(args, networks)
    for network in everyone:
        refuse_among_pictures(parser, out, recorded_source(network.file, args.data_dir, args.images).images)
    if not args.out and len(everyone) > 1:  # a single network has a folder of its own
        ownership.require_own_report(out, everyone)
    if args.split == "test":
        scoring_ledger.warn(dict.fromkeys(network.file.parent for network in everyone))
    files.make_folder(out)
    earlier = ownership.pictures_written(out)
    evaluated: list[list[Evaluation]] = [[] for _ in sides]
    pairs: list[dict[str, Any]] = []
    try:
        for side, evaluations in zip(sides, evaluated, strict=True):
            for members in [side] if args.ensemble else [[network] for network in side]:
                evaluation, scored = evaluate(members, args, machine)
                if args.split == "test":
                    note_scoring(members, evaluation)  # or it is not shown: no scoring may go uncounted
                evaluations.append(evaluation)
            if len({(averaged_over(each.recipe), each.classes, each.images.get("digest")) for each in side}) > 1:
                print("warning: these networks differ in more than their seeds and splits", file=sys.stderr)
        entries, *opposed = entries_of(evaluated)
        drawn = len(entries) == 1 and not opposed and args.protocol == "clean"
        whole = {"split": args.split, "protocol": args.protocol, **machine.as_dict(), **report.side(entries)}
        whole |= {"against": report.side(opposed[0])} if opposed else {}
        wrong_pair = None
        try:
            pairs = compare(evaluated, args)
        except RunError as error:  # costs only the pairs
            wrong_pair = error
        whole |= {"pairs": pairs} if pairs else {}
        whole["pictures"] = report.pictures(entries[0]) if drawn else []
        for picture in earlier:
            with contextlib.suppress(PermissionError):  # on Windows it may be open: the report does not name it
                (out / picture).unlink(missing_ok=True)
        files.write_text(out / report.REPORT, json.dumps(whole, indent=2) + "\n")
        if drawn:
            report.draw(out, entries[0], networks[0].classes, *scored)
        if wrong_pair:
            raise wrong_pair
    finally:  # a failing network or a full disk must not cost the tables, nor a closed terminal the report
        scored_sides = entries_of(evaluated)
        if scored_sides:
            print(report.text(*scored_sides))
        if pairs:
            print(report.pairs_text(pairs))
    print(f"report: {out / report.REPORT}")
    return 0


def entries_of(sides: list[list[Evaluation]]) -> list[list[dict[str, Any]]]:
    """The report entries of each side that has at least one scored network."""
    return [[evaluation.entry for evaluation in side] for side in sides if side]


def build_parser() -> argparse.ArgumentParser:
    parser = network_parser(
        "evaluate.py", "Score trained networks on the images that they validate on, or on the test images."
    )
    parser.add_argument(
        "networks",
        nargs="+",
        type=file_path,
        metavar="RUN_OR_CHECKPOINT",
        help="run folder or checkpoint; several are scored one by one, with mean and standard deviation, and anything "
        "else among them, as in runs/*, is skipped",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        type=file_path,
        default=[],
        metavar="RUN_OR_CHECKPOINT",
        help="as many networks again: the first is compared with the first, the second with the second, on the same "
        "images, and all pairs together by McNemar's test. Two networks given without this flag are compared too, the "
        "second with the first",
    )
    parser.add_argument(
        "--split",
        choices=("val", "test"),
        default="val",
        help="val: the images that the run itself validates on (default); test: those that no run ever uses",
    )
    parser.add_argument(
        "--size",
        type=whole_number(32, 1024),
        nargs="+",
        metavar="N",
        help="side in px at which images are scored, or several to compare (default: the run's eval size)",
    )
    parser.add_argument(
        "--tta",
        choices=TTA,
        help=f"{TTA_HELP} (default: as the run validates)",
    )
    parser.add_argument("--ensemble", action="store_true", help="average the predictions of the networks into one")
    parser.add_argument(
        "--protocol",
        choices=("clean", "original"),
        default="clean",
        help=f"original: {scoring.ORIGINAL_VIEWS} random training views of each image by batch statistics, to compare "
        "with the original project's figures (default: clean: the images themselves, in eval mode)",
    )
    parser.add_argument(
        "--out",
        type=file_path,
        metavar="FOLDER",
        help="folder for report and plots (default: evaluation-… in the run folder, or beside the runs if several)",
    )
    text = "folder that holds {} (default: where the run found them, as its config.json says)"
    parser.add_argument("--data-dir", type=file_path, metavar="PATH", help=text.format("stl10_binary"))
    parser.add_argument("--images", type=file_path, metavar="PATH", help=text.format("the user's own pictures"))
    return parser


def checkpoints_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[list[Path]]:
    """The checkpoint files that are meant, and those to compare them with, if any.

    Options that cannot be combined end the process with status 2.
    """
    if args.protocol == "original":
        excluded = {"ensemble": args.ensemble, "tta": args.tta, "split test": args.split == "test"}
        for flag, used in (excluded | {"against": args.against}).items():
            if used:
                parser.error(f"--protocol original and --{flag} cannot be combined")
    if args.size and len(args.size) > 1 and (args.protocol == "original" or args.split == "test"):
        parser.error("several sizes are compared on clean val images only: the test images choose nothing")
    args.size = sorted(set(args.size)) if args.size else [None]
    args.networks, args.against = expanded(args.networks), expanded(args.against)
    if not (args.against or args.ensemble or args.split == "test"):  # there every path counts, so none is skipped
        args.networks = networks_among(args.networks)
    refuse_idle_best(parser, args.best, [*args.networks, *args.against])
    sides = [side for side in (args.networks, args.against) if side]
    if args.ensemble and any(len(side) < 2 for side in sides):
        parser.error("--ensemble needs at least two networks")
    if args.against and not args.ensemble and len(args.against) != len(args.networks):
        parser.error(f"--against takes as many networks as come before it, {len(args.networks)}: pairs are compared")
    paths = [[checkpoint.weights_file(path, args.best) for path in side] for side in sides]
    known: dict[object, Path] = {}
    for path in (path for side in paths for path in side):
        first = known.setdefault(files.identity(path), path)
        if first is not path:
            parser.error(f"the same network is given twice, as {first} and {path}")
    return paths


def networks_among(paths: list[Path]) -> list[Path]:
    """Those of several paths that may be networks: in runs/*, evaluations and plots lie beside the runs.

    Skipped paths are named on stderr. A path that does not exist stays, as no pattern can have matched it.
    """
    others = [path for path in paths if os.path.exists(path) and not may_be_network(path)]
    if len(others) == len(paths):  # the first one's error will say what is wrong
        return paths
    for path in others:
        print(f"skipped: {printable(path)} is neither a folder with a checkpoint nor a .pt file", file=sys.stderr)
    return [path for path in paths if path not in others]


def may_be_network(path: Path) -> bool:
    """Whether a folder holds a checkpoint, or a file is called one."""
    return checkpoint.weights_file(path).exists() if path.is_dir() else path.suffix == ".pt"


def default_folder(args: argparse.Namespace, networks: list[TrainedNetwork]) -> Path:
    """Within the run folder for one network, beside it for several; the name says what was scored, and how."""
    file = networks[0].file
    parts = ["evaluation", args.split] + ([] if file.name == "last.pt" else [file.stem])
    parts += ["ensemble"] if args.ensemble else []
    parts += ["against"] if args.against else []
    parts += ["original"] if args.protocol == "original" else []
    return (file.parent if len(networks) == 1 else file.absolute().parent.parent) / "-".join(parts)


def averaged_over(recipe: Recipe) -> Recipe:
    """A recipe without what may differ within a mean: seeds, splits, and its teachers, which follow from the split."""
    teachers = ("any",) * len(recipe.teachers)
    return dataclasses.replace(recipe, seed=0, split_seed=0, fold=None, tune_fold=None, teachers=teachers)


def compare(sides: list[list[Evaluation]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare, at each size, the networks before --against with those after it, or the second of two with the first.

    Raises RunError where --against was given, but a pair was not scored on the same images.
    """
    if args.against:
        ours, baselines = sides
    elif len(sides[0]) == 2 and args.protocol == "clean":
        baselines, ours = sides[0][:1], sides[0][1:]
    else:
        return []
    for own, baseline in zip(ours, baselines, strict=True):
        if own.entry["images_sha256"] != baseline.entry["images_sha256"]:
            if not args.against:
                return []
            raise RunError(
                f"{own.entry['name']} and {baseline.entry['name']} were not scored on the same images, so they are not "
                "a pair; --against takes its networks in the same order as those before it"
            )
    return report.pairs(ours, baselines)


def evaluate(members: list[TrainedNetwork], args: argparse.Namespace, machine: Machine) -> tuple[Evaluation, Scored]:
    """Score one network, or several as one, at each size: the figures to report, and the scores to draw."""
    for member in members:
        member.model.to(machine.device)
    images, labels = images_of(members, args)
    labels = labels.to(machine.device)
    print(f"{report.name(members)}: {len(labels):,} {args.split} images, {machine}", flush=True)
    results, right, shown = [], [], 0
    for size in args.size:
        if args.protocol == "original":
            how, scores, truth = score_original(members[0], images, labels, size, machine)
        else:
            how, scores, truth = *score_clean(members, images, size, args.tta, machine), labels
        results.append(how | metrics.figures(scores, truth, members[0].classes, len(images)))
        right.append((scores.argmax(1) == truth).cpu())
        if len(results) == 1 or size == members[0].eval_size:
            shown, scored = len(results) - 1, Scored(images, labels, scores)
    entry = report.entry(members, args.split, results, shown, data.images_digest(images, labels))
    return Evaluation(entry, right), scored


def note_scoring(members: list[TrainedNetwork], evaluation: Evaluation) -> None:
    """Note in the folder of each member that it was scored on the test images. Raises RunError where that fails."""
    about, (first, *_) = evaluation.entry["members"], evaluation.entry["results"]
    result = {key: first[key] for key in ("size", "tta", "accuracy")}
    together = {"members": about} if len(members) > 1 else about[0]
    for folder in dict.fromkeys(member.file.parent for member in members):
        scoring_ledger.add(folder, **together, ensemble_of=len(members), **result)


def images_of(members: list[TrainedNetwork], args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The images and labels that all members are to be scored on. Raises RunError where they are not the same ones."""
    images, labels = split_of(members[0], args)
    for member in members[1:]:
        others, other_labels = split_of(member, args)
        same_classes = member.classes == members[0].classes
        if not (same_classes and torch.equal(other_labels, labels) and torch.equal(others, images)):
            raise RunError(
                f"{members[0].file} and {member.file} do not have the same {args.split} images, so an ensemble "
                "would be scored on images that one of them was trained on"
            )
    return images, labels


def split_of(member: TrainedNetwork, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A network's validation or test images and their labels. Raises RunError where there are none."""
    source = recorded_source(member.file, args.data_dir, args.images)
    if args.split == "val":
        dataset, _, val = load_for_network(member, source, fetch=True)
        if not len(val):
            raise RunError(f"{member.file} was trained on all images: none are left to validate on (see --split test)")
        return dataset.images[val], dataset.labels[val]
    try:
        dataset = load_test_images(member, source)
    except data.MissingFiles as error:
        raise RunError(
            f"the test images are missing: test_X.bin and test_y.bin of the official archive belong in "
            f"{source.data_dir / data.FOLDER} (or see --data-dir); if the training files are missing too, "
            "evaluate.py without --split test fetches all four"
        ) from error
    return dataset.images, dataset.labels


def score_clean(
    members: list[TrainedNetwork], images: Tensor, size: int | None, tta: str | None, machine: Machine
) -> tuple[dict[str, Any], Tensor]:
    """How the images were scored, and their logits (N, K); where `size` or `tta` is None, each member's own is used."""
    sizes = [size or member.eval_size for member in members]
    kinds = [tta or member.recipe.tta for member in members]
    scores = []
    with progress(len(images) * len(members), sizes[0]) as bar:
        for member, own_size, kind in zip(members, sizes, kinds, strict=True):
            parts = []
            for part in images.split(CHUNK):
                parts.append(scoring.tta_logits(member.model, part, own_size, kind, precision=machine.precision))
                bar.update(len(part))
            scores.append(torch.cat(parts))
    how = {"size": report.shared(sizes), "tta": report.shared(kinds)}
    return how, scoring.average(scores) if len(scores) > 1 else scores[0]


def score_original(
    member: TrainedNetwork, images: Tensor, labels: Tensor, size: int | None, machine: Machine
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """How the views were made, their logits (n, K) and their labels (n,); size and batch as in the network's stage."""
    epoch = member.recipe.at(member.epoch - 1)
    size, batch = size or epoch.crop_size, epoch.stage.batch
    try:
        with progress(len(images) * scoring.ORIGINAL_VIEWS, size) as bar:
            scores, index = scoring.original_logits(
                member.model,
                images.to(machine.device),
                size,
                batch,
                precision=machine.precision,
                tick=bar.update,
            )
    except ValueError as error:
        raise RunError(f"{member.file} cannot be scored as the original was: {error}") from error
    return {"size": size, "tta": "original", "batch": batch}, scores, labels[index]


def progress(total: int, size: int) -> tqdm:
    return tqdm(total=total, desc=f"{size} px", unit="image", leave=False, disable=None)


if __name__ == "__main__":
    errors.end_process(errors.report(main))
