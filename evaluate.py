#!/usr/bin/env python3
"""Score trained networks, and show what they get wrong.

python3 evaluate.py runs/original-seed0                          # on the run's own validation images
python3 evaluate.py runs/original-seed0 --size 80 96 112 144     # accuracy against size
python3 evaluate.py runs/cpu-seed0 runs/cpu-seed1 --last         # mean and standard deviation
python3 evaluate.py runs/original-seed0 --split test             # at the very end
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import checkpoint
import commands
import data
import dataset
import errors
import files
import report
import scoring
import testcount
from checkpoint import Trained
from engine import Engine
from errors import RunError

CHUNK = 250  # images between two ticks of the progress bar


class Scored(NamedTuple):
    """Images uint8 (N, 3, H, W), their labels int64 (N,), and logits (n, K) of them or of n views of them."""

    images: Tensor
    labels: Tensor
    scores: Tensor


def main(argv: list[str] | None = None) -> int:
    line = build_parser()
    given = line.parse_args(argv)
    paths = check(line, given)
    machine = commands.start(line, given)
    networks = [checkpoint.load_network(path) for path in paths]
    for network in networks:
        network.model.to(machine.device)
    out = given.out or default_folder(given, networks)
    files.make_folder(out)
    entries, scored = [], None
    for members in [networks] if given.ensemble else [[network] for network in networks]:
        entry, scored = evaluate(members, given, machine)
        entries.append(entry)
    if len({dataclasses.replace(network.recipe, seed=0, split_seed=0, fold=None) for network in networks}) > 1:
        print("warning: these networks differ in more than their seeds and splits", file=sys.stderr)
    print(report.text(entries))
    whole = {"split": given.split, "protocol": given.protocol, **machine.as_dict(), "networks": entries}
    whole |= {"over the networks": report.over_networks(entries)} if len(entries) > 1 else {}
    files.write_text(out / "report.json", json.dumps(whole, indent=2) + "\n")
    report.clear_pictures(out)
    if len(entries) == 1 and given.protocol == "clean":
        report.draw(out, entries[0], networks[0].classes, *scored)
    print(f"report: {out / 'report.json'}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    line = commands.parser(
        "evaluate.py", "Score trained networks on the images that they validate on, or on the test images."
    )
    line.add_argument(
        "networks",
        nargs="+",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="run folder or checkpoint; several are scored one by one, with mean and standard deviation",
    )
    line.add_argument(
        "--split",
        choices=("val", "test"),
        default="val",
        help="val: the images that the run itself validates on (default); test: those that no run ever uses",
    )
    line.add_argument(
        "--size",
        type=commands.whole_number(32, 1024),
        nargs="+",
        metavar="N",
        help="side in px at which images are scored, or several to compare (default: the run's eval size)",
    )
    line.add_argument(
        "--views",
        choices=scoring.VIEWS,
        help="of each image, predictions are averaged over: "
        + "; ".join(f"{name}: {what}" for name, what in scoring.VIEWS.items())
        + " (default: none, or mirror where the run validates so)",
    )
    line.add_argument("--ensemble", action="store_true", help="average the predictions of the networks into one")
    line.add_argument(
        "--protocol",
        choices=("clean", "original"),
        default="clean",
        help=f"original: {scoring.ORIGINAL_VIEWS} random training views of each image by batch statistics, to compare "
        "with the original project's figures (default: clean: the images themselves, in eval mode)",
    )
    line.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder for report and plots (default: evaluation-… by the run)"
    )
    text = "folder that holds {} (default: where the run found them, as its config.json says)"
    line.add_argument("--data-dir", type=Path, metavar="PATH", help=text.format("stl10_binary"))
    line.add_argument("--images", type=Path, metavar="PATH", help=text.format("pictures of one's own"))
    return line


def check(line: argparse.ArgumentParser, given: argparse.Namespace) -> list[Path]:
    """The checkpoint files that are meant. Options that exclude each other end the process with status 2."""
    if given.protocol == "original":
        for flag, used in (("ensemble", given.ensemble), ("views", given.views), ("split test", given.split == "test")):
            if used:
                line.error(f"--protocol original and --{flag} exclude each other")
    if given.size and len(given.size) > 1 and (given.protocol == "original" or given.split == "test"):
        line.error("several sizes are compared on clean val images only: the test images choose nothing")
    given.size = sorted(set(given.size)) if given.size else [None]
    if given.ensemble and len(given.networks) < 2:
        line.error("--ensemble takes two networks or more")
    paths = [checkpoint.weights_file(path, given.last) for path in given.networks]
    if len({path.resolve() for path in paths}) < len(paths):
        line.error("the same network is given twice")
    return paths


def default_folder(given: argparse.Namespace, networks: list[Trained]) -> Path:
    """Within the run folder for one network, beside it for several; the name tells what was scored, and how."""
    file = networks[0].file
    parts = ["evaluation", given.split] + ([] if file.name == "best.pt" else [file.stem])
    parts += ["ensemble"] if given.ensemble else []
    parts += ["original"] if given.protocol == "original" else []
    return (file.parent if len(networks) == 1 else file.parent.parent) / "-".join(parts)


def evaluate(members: list[Trained], given: argparse.Namespace, machine: Engine) -> tuple[dict[str, Any], Scored]:
    """Score one network, or several as one, at each size: the report's entry, and the scores that are drawn."""
    images, labels = (part.to(machine.device) for part in images_of(members, given))
    print(f"{report.name(members)}: {len(labels):,} {given.split} images, {machine}", flush=True)
    if given.split == "test":
        testcount.warn([member.file.parent for member in members])
    about, results, shown = [report.about(member) for member in members], [], 0
    for size in given.size:
        if given.protocol == "original":
            how, scores, truth = score_original(members[0], images, labels, size, machine)
        else:
            how, scores, truth = *score_clean(members, images, size, given.views, machine), labels
        results.append(how | scoring.figures(scores, truth, members[0].classes, len(images)))
        if len(results) == 1 or size == members[0].eval_size:
            shown, scored = len(results) - 1, Scored(images, labels, scores)
    entry = report.entry(members, about, given.split, results, shown)
    if given.split == "test":
        for member, facts in zip(members, about, strict=True):
            result = {key: results[0][key] for key in ("size", "views", "accuracy")}
            testcount.add(member.file.parent, **facts, ensemble_of=len(members), **result)
    return entry, scored


def images_of(members: list[Trained], given: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The images and labels that all members are to be scored on. Raises RunError where they are not the same ones."""
    images, labels = split_of(members[0], given)
    for member in members[1:]:
        others, other_labels = split_of(member, given)
        same_classes = member.classes == members[0].classes
        if not (same_classes and torch.equal(other_labels, labels) and torch.equal(others, images)):
            raise RunError(
                f"{members[0].file} and {member.file} have not the same {given.split} images, so that an ensemble of "
                "them would be scored on what one of them has learnt"
            )
    return images, labels


def split_of(member: Trained, given: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A network's validation or test images and their labels. Raises RunError where there are none."""
    data_dir, own = dataset.places(member.file)
    own = given.images or (None if given.data_dir else own)
    data_dir = given.data_dir or data_dir
    try:
        if given.split == "test":
            found = dataset.load_test(member, data_dir, own)
            return found.images, found.labels
        found, _, val = dataset.of_trained(member, data_dir, own)
    except data.MissingFiles as error:
        part = "test" if given.split == "test" else "train"
        raise RunError(
            f"the {given.split} images are missing: {part}_X.bin and {part}_y.bin of the official archive belong in "
            f"{data_dir / data.FOLDER} (or see --data-dir)"
            + ("; no run needs them, as test images choose nothing" if given.split == "test" else "")
        ) from error
    if not len(val):
        raise RunError(f"{member.file} was trained on all images: none are left to validate on (see --split test)")
    return found.images[val], found.labels[val]


def score_clean(
    members: list[Trained], images: Tensor, size: int | None, views: str | None, machine: Engine
) -> tuple[dict[str, Any], Tensor]:
    """How the images were scored, and their logits (N, K): each member's own size and views where none are given."""
    sizes = [size or member.eval_size for member in members]
    kinds = [views or ("mirror" if member.recipe.mirror else "none") for member in members]
    scores = []
    with progress(len(images) * len(members), sizes[0]) as bar:
        for member, own_size, kind in zip(members, sizes, kinds, strict=True):
            parts = []
            for part in images.split(CHUNK):
                parts.append(scoring.view_logits(member.model, part, own_size, kind, precision=machine.precision))
                bar.update(len(part))
            scores.append(torch.cat(parts))
    how = {"size": report.shared(sizes), "views": report.shared(kinds)}
    return how, scoring.average(scores) if len(scores) > 1 else scores[0]


def score_original(
    member: Trained, images: Tensor, labels: Tensor, size: int | None, machine: Engine
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """How the views were made, their logits (n, K) and their labels (n,); size and batch as in the network's stage."""
    number, epoch = member.recipe.locate(member.epoch - 1)
    stage = member.recipe.stages[number]
    size = size or stage.size(epoch)
    try:
        with progress(len(images) * scoring.ORIGINAL_VIEWS, size) as bar:
            scores, index = scoring.original_logits(
                member.model, images, size, stage.batch, precision=machine.precision, tick=bar.update
            )
    except ValueError as error:
        raise RunError(f"{member.file} cannot be scored as the original was: {error}") from error
    return {"size": size, "views": "original", "batch": stage.batch}, scores, labels[index]


def progress(total: int, size: int) -> tqdm:
    return tqdm(total=total, desc=f"{size} px", unit="image", leave=False, disable=None)


if __name__ == "__main__":
    sys.exit(errors.report(main))
