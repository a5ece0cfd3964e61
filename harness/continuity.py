"""Whether a run goes on as it was begun: with the same settings, images and classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import files
from harness.cli import idle_settings
from recipes import Recipe


def changes(state: Mapping[str, Any], recipe: Recipe, images: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """What is other than in a checkpoint's state and takes effect, in words; empty where the run may go on.

    `images` is a fingerprint (see `images.fingerprint`). Raises what `MISMATCH_ERRORS` lists for a state of no run.
    """
    now = {**_flat(recipe.as_dict()), "images": images, "classes": list(classes)}
    begun = Recipe.from_dict(state["recipe"]).as_dict()  # a setting that is newer than the state has its default
    then = {**_flat(begun), "images": state["images"], "classes": state["classes"]}
    if now["init"] and then["init"] and files.identity(Path(now["init"])) == files.identity(Path(then["init"])):
        then["init"] = now["init"]  # one file by two paths
    then["teachers"] = sorted(then["teachers"])  # older runs kept the order in which they were named
    idle = idle_settings(recipe)
    named = [name for name in now | then if now.get(name) != then.get(name) and name not in idle]
    for each in (then, now):
        each["images"] = _in_words(each["images"])
    return [f"{name} was {then.get(name)}, now {now.get(name)}" for name in named]


def _flat(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values under one name each; tuples as lists, as they come back from JSON."""
    flat = {k: v for k, v in recipe.items() if k not in ("stages", "augmentation")} | recipe["augmentation"]
    for index, stage in enumerate(recipe["stages"]):
        flat |= {f"{k} of stage {index + 1}": v for k, v in stage.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}


def _in_words(images: Mapping[str, Any]) -> str:
    """A fingerprint of images; the digest's first digits tell a user's changed pictures apart."""
    digest = f" (digest {images['digest'][:8]})" if "digest" in images else ""
    return f"{images['train']:,} train and {images['val']:,} val{digest}"
