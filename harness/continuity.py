"""Whether a run continues as it began: with the same settings, images and classes, and under the same conditions."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import files, provenance
from harness.cli import idle_settings
from harness.machine import PRECISIONS, Machine
from recipes import Recipe

CONDITIONS = {"precision": "in {}", "processes": "by {} process(es)", "device": "with {}", "code": "with revision {}"}


def changes(state: Mapping[str, Any], recipe: Recipe, images: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """What differs from a checkpoint's state and takes effect, in words; empty where the run may go on.

    `images` is a fingerprint (see `images.fingerprint`). Raises what `MISMATCH_ERRORS` lists if `state` is not a run's.
    """
    now = {**flat(recipe.as_dict()), "images": images, "classes": list(classes)}
    begun = Recipe.from_dict(state["recipe"]).as_dict()  # a setting that is newer than the state gets its default
    then = {**flat(begun), "images": state["images"], "classes": state["classes"]}
    if now["init"] and then["init"] and files.identity(Path(now["init"])) == files.identity(Path(then["init"])):
        then["init"] = now["init"]  # one file by two paths
    then["teachers"] = sorted(then["teachers"])  # older runs kept the order in which they were named
    idle = idle_settings(recipe)
    named = [name for name in now | then if now.get(name) != then.get(name) and name not in idle]
    for each in (then, now):
        each["images"] = _in_words(each["images"])
    return [f"{name} was {then.get(name)}, now {now.get(name)}" for name in named]


def conditions(machine: Machine) -> dict[str, Any]:
    """What may differ when a run is continued, though it may change the result."""
    return {
        "precision": PRECISIONS[machine.precision],
        "processes": machine.world,
        "device": machine.device.type,
        "code": provenance.revision(),
    }


def other_conditions(state: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each of the `conditions` that a checkpoint's state records and that differs now."""
    for name, words in CONDITIONS.items():
        then = state.get(name)
        if None not in (then, now[name]) and then != now[name]:
            yield f"the run has been trained {words.format(then)} so far, and goes on {words.format(now[name])}"


def flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values under one name each; tuples as lists, as they come back from JSON."""
    values = {k: v for k, v in recipe.items() if k not in ("stages", "augmentation")} | recipe["augmentation"]
    for index, stage in enumerate(recipe["stages"]):
        values |= {f"{k} of stage {index + 1}": v for k, v in stage.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _in_words(images: Mapping[str, Any]) -> str:
    """A fingerprint of images; the digest's first digits tell a user's changed pictures apart."""
    digest = f" (digest {images['digest'][:8]})" if "digest" in images else ""
    return f"{images['train']:,} train and {images['val']:,} val{digest}"
