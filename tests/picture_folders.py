"""Small folders of drawn pictures, a folder a class, and the flags of a run that takes a moment on them."""

from pathlib import Path

import numpy as np
from PIL import Image

import recipes
from data import Split
from harness import checkpoint
from harness.images import fingerprint, load_images

COLOURS = {"apple": (200, 30, 30), "leaf": (30, 170, 40), "sky": (40, 80, 220)}
TINY = (
    "--recipe demo --views 1 --epochs 1 1 --batch 8 8 --planes 2 2 2 --crop-size 32 32 --eval-size 32 32 --threads 1"
).split()


def draw(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 36)) -> None:
    """A noisy picture in roughly one colour, of width and height `size`, in the format of the path's suffix."""
    noise = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def fill(target: Path, count: int, start: int = 0) -> Path:
    """`count` pictures a class, in several formats and sizes; no two alike."""
    for label, (name, colour) in enumerate(COLOURS.items()):
        for i in range(count):
            suffix = (".png", ".jpg", ".BMP", ".webp")[i % 4]
            draw(target / name / f"{name}{i}{suffix}", colour, start + 1000 * label + i, (33 + 5 * i, 50))
    return target


def save_untrained(path: Path, pictures: Path, eval_size: int, **changes: object) -> Split:
    """Write the weights of a small network that has learnt nothing, as a run on these pictures would; their split."""
    recipe = recipes.replace(recipes.RECIPES["demo"], {"planes": (2, 2, 2), **changes})
    split = load_images(recipe, path.parent, pictures)
    classes = split.dataset.classes
    payload = {"kind": "weights", "recipe": recipe.as_dict(), "classes": list(classes), "eval_size": eval_size}
    state = recipes.build_network(recipe, len(classes)).state_dict()
    checkpoint.save(path, payload | {"images": fingerprint(split), "epoch": 7, "model": state})
    return split
