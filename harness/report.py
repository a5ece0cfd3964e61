"""What an evaluation says: the entry of `report.json`, the table and notes on the terminal, and the pictures."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness import metrics, plots, scoring
from harness.checkpoint import TrainedNetwork
from harness.text import shortened, table
from model import PARAMETER_BUDGET, count_parameters

MISTAKES = 32  # on the sheet
CLASSES_LISTED = 20  # on the terminal
REPORT = "report.json"
PICTURES = ("confusion.png", "per_class.png", "mistakes.png", "reliability.png", "sizes.png")
Entry = dict[str, Any]


class Evaluation(NamedTuple):
    """What `entry` says of a network or an ensemble; for each size, which predictions are correct: bool (n,), CPU."""

    entry: Entry
    right: list[Tensor]


def name(members: Sequence[TrainedNetwork]) -> str:
    """The checkpoint file of a network, or those of an ensemble."""
    return " + ".join(str(member.file) for member in members)


def entry(members: Sequence[TrainedNetwork], split: str, results: list[Entry], shown: int, digest: str) -> Entry:
    """All figures and notes for a network or an ensemble.

    `shown` is the index of the result that the pictures show; `digest` is of the images and labels.
    """
    return {
        "name": name(members),
        "split": split,
        "parameters": sum(count_parameters(member.model) for member in members),
        "members": [about(member) for member in members],
        "notes": _notes(members, split, results),
        "results": results,
        "shown": shown,
        "images_sha256": digest,
    }


def about(member: TrainedNetwork) -> Entry:
    """Which network it is."""
    return {
        "checkpoint": str(member.file),
        "sha256": member.sha256,
        "recipe": member.recipe.name,
        "seed": member.recipe.seed,
        "split_seed": member.recipe.split_seed,
        "fold": member.recipe.fold,
        "tune_fold": member.recipe.tune_fold,
        "teachers": list(member.recipe.teachers),
        "epoch": member.epoch,
        "epochs": member.recipe.epochs,
        "selected_on_val": member.selected,
    }


def _notes(members: Sequence[TrainedNetwork], split: str, results: list[Entry]) -> list[str]:
    """What the reader of a figure needs to know, one sentence each."""
    notes = []
    if split == "test":
        notes.append("test images choose nothing: this figure is honest only as long as nothing is chosen by it")
    elif any(member.selected for member in members):
        notes.append(
            "the network of the best epoch was selected on these very images, which flatters it; "
            "without --best the last epoch's is scored, which was not"
        )
    else:
        notes.append("these images did not select the network")
    for member in members:
        if not member.selected and member.epoch < member.recipe.epochs:
            notes.append(f"{member.file} is from epoch {member.epoch} of {member.recipe.epochs}, not the last")
    if split == "val" and len(results) > 1:
        notes.append("the best of several sizes is selected on these images as well")
    if any(member.recipe.init for member in members):
        notes.append("the run began with another run's weights; what those were trained on is not known here")
    if len(members) > 1:
        total = sum(count_parameters(member.model) for member in members)
        notes.append(
            f"an ensemble of {len(members)} networks with {total:,} parameters together: "
            f"the budget of {PARAMETER_BUDGET:,} is for one"
        )
    if results[0]["tta"] == "original":
        notes.append(
            f"scored as the original project did: {scoring.ORIGINAL_VIEWS} random views of each image, "
            f"{results[0]['predictions']:,} in batches of {results[0]['batch']}, with the statistics of their batch; "
            "the interval counts images, not views"
        )
    return notes


def text(*sides: Sequence[Entry]) -> str:
    """Table and notes for the terminal: accuracy by class of one network, mean and spread of several.

    Entries come in one list, or in one before and one after --against.
    """
    entries = [entry for side in sides for entry in side]
    rows = [_row(entry, result) for entry in entries for result in entry["results"]]
    header = ("network", "size", "tta", "accuracy", "95% interval", "loss", "calibration error")
    lines = [table(header, rows)]
    if len(entries) == 1:
        result = entries[0]["results"][entries[0]["shown"]]
        classes = sorted((share, name) for name, share in result["per_class"].items() if share is not None)
        listed = ", ".join(f"{name} {share:.1%}" for share, name in classes[:CLASSES_LISTED])
        more = f" … ({len(classes)} in {REPORT})" if len(classes) > CLASSES_LISTED else ""
        lines.append(f"by class at {result['size']} px, worst first: {listed}{more}")
    for number, side in enumerate(sides):
        which = "" if len(sides) == 1 else (" before --against", " after it")[number]
        for row in over_networks(side) if len(side) > 1 else []:
            lines.append(
                f"accuracy {row['mean']:.1%} ± {row['standard_deviation']:.1%} at {row['size']} px "
                f"(mean and standard deviation of {row['networks']} networks{which})"
            )
    notes = dict.fromkeys(note for entry in entries for note in entry["notes"])
    return "\n".join(lines + [f"note: {note}" for note in notes])


def _row(entry: Entry, result: Entry) -> list[str]:
    low, high = result["interval_95"]
    return [
        entry["name"] if len(entry["members"]) == 1 else _short(entry),
        f"{result['size']}",
        f"{result['tta']}",
        f"{result['accuracy']:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{result['loss']:.3f}",
        f"{result['calibration_error']:.1%}",
    ]


def over_networks(entries: Sequence[Entry]) -> list[Entry]:
    """Mean and sample standard deviation of the accuracy of two networks or more, at each size."""
    together = []
    for results in zip(*(entry["results"] for entry in entries), strict=True):
        accuracies = [result["accuracy"] for result in results]
        together.append(
            {
                "size": shared([result["size"] for result in results]),
                "networks": len(accuracies),
                "mean": statistics.fmean(accuracies),
                "standard_deviation": statistics.stdev(accuracies),
            }
        )
    return together


def pairs(networks: Sequence[Evaluation], against: Sequence[Evaluation]) -> list[Entry]:
    """McNemar's test of networks against as many others, each pair scored on the same images, at each size."""
    rows = []
    for index in range(len(networks[0].right)):
        ours, theirs = (torch.cat([each.right[index] for each in side]) for side in (networks, against))
        sizes = []
        for each in (*networks, *against):
            size = each.entry["results"][index]["size"]
            sizes += size if isinstance(size, list) else [size]  # those of an ensemble's members
        ours_alone, theirs_alone = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        rows.append(
            {
                "networks": [each.entry["name"] for each in networks],
                "against": [each.entry["name"] for each in against],
                "size": shared(sizes),
                "images": len(ours),
                "networks_alone_right": ours_alone,
                "against_alone_right": theirs_alone,
                "p_value": metrics.mcnemar(ours_alone, theirs_alone),
                **_gain(networks, against, index),
            }
        )
    return rows


def _gain(networks: Sequence[Evaluation], against: Sequence[Evaluation], index: int) -> Entry:
    """How much more accurate networks are than those they are compared with: mean and standard deviation."""
    right = zip((each.right[index] for each in networks), (each.right[index] for each in against), strict=True)
    gains = [(ours.double().mean() - theirs.double().mean()).item() for ours, theirs in right]
    spread = {"standard_deviation": statistics.stdev(gains)} if len(gains) > 1 else {}
    return {"difference": statistics.fmean(gains), **spread}


def pairs_text(rows: Sequence[Entry]) -> str:
    """One line for each size of what `pairs` found, and what the reader needs to know."""
    lines = []
    for row in rows:
        count, (name, *_), (other, *_) = len(row["networks"]), row["networks"], row["against"]
        ours, theirs = f"{name} is", f"{other} is"
        if count > 1:
            ours, theirs = f"over {count} pairs the networks before --against are", "those after it are"
        lines.append(
            f"{ours} right on {row['networks_alone_right']} images where {theirs} wrong, the reverse "
            f"{row['against_alone_right']}, p = {row['p_value']:.2g} (McNemar's exact test at {row['size']} px)"
        )
        if count > 1:
            lines.append(
                f"over these pairs accuracy differs by {row['difference']:+.1%} ± {row['standard_deviation']:.1%} "
                "(mean and standard deviation)"
            )
    if count > 1:
        lines.append("note: pairs that share images are not independent of each other, which makes p too small")
    return "\n".join(lines)


def side(entries: list[Entry]) -> Entry:
    """Entries as they appear in the report, with a summary of all of them if there are several."""
    return {"networks": entries} | ({"over the networks": over_networks(entries)} if len(entries) > 1 else {})


def shared(values: Sequence[Any]) -> Any:
    """The one value that all have, or the list of them."""
    return values[0] if all(value == values[0] for value in values) else list(values)


def pictures(entry: Entry) -> list[str]:
    """Those of PICTURES that `draw` writes for an entry."""
    absent = {
        "sizes.png": len(entry["results"]) == 1,
        "mistakes.png": entry["results"][entry["shown"]]["accuracy"] == 1,
    }
    return [name for name in PICTURES if not absent.get(name)]


def draw(folder: Path, entry: Entry, classes: Sequence[str], images: Tensor, labels: Tensor, scores: Tensor) -> None:
    """The pictures of one evaluation, of images uint8 (N, 3, H, W) with labels (N,) and logits (N, K)."""
    images, labels, scores = (part.cpu() for part in (images, labels, scores))
    results, result = entry["results"], entry["results"][entry["shown"]]
    matrix = metrics.confusion(scores.argmax(1), labels, len(classes)).numpy()
    probabilities = scores.softmax(1)
    selected = any(member["selected_on_val"] for member in entry["members"]) and entry["split"] == "val"
    images_scored = f"{len(labels):,} {entry['split']} images{' (that selected it)' if selected else ''}"
    title = f"{shortened(_short(entry), plots.NAME_IN_TITLE)}: {images_scored}"
    sized = f"{title} at {result['size']} px"
    plots.confusion(folder / "confusion.png", matrix, classes, title=sized)
    plots.per_class(folder / "per_class.png", matrix, classes, title=sized)
    bins = [part.numpy() for part in metrics.reliability(probabilities, labels)]
    plots.reliability(folder / "reliability.png", *bins, title=sized, error=result["calibration_error"])
    if len(results) > 1:
        sizes, shares = zip(*((each["size"], each["accuracy"]) for each in results), strict=True)
        plots.accuracy_against_size(folder / "sizes.png", sizes, shares, title=title, images=len(labels))
    confidence, predictions = probabilities.max(1)
    wrong = (predictions != labels).nonzero()[:, 0]
    if len(wrong):
        worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES]
        plots.sample_sheet(
            folder / "mistakes.png",
            images[worst].numpy(),
            [
                plots.beside(classes[predictions[i]], f" {confidence[i]:.0%}")
                + "\n"
                + plots.beside(classes[labels[i]], ")", before="(is ")
                for i in worst.tolist()
            ],
            heading=f"{sized}\nthe {len(worst)} most confident of {len(wrong):,} mistakes",
        )


def _short(entry: Entry) -> str:
    """Run and file of a network; an ensemble by its size."""
    if len(entry["members"]) > 1:
        return f"ensemble of {len(entry['members'])}"
    return "/".join(Path(entry["members"][0]["checkpoint"]).absolute().parts[-2:])
