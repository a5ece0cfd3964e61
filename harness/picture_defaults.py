"""Fits a recipe made for STL-10 to a folder of the user's own pictures: its views and batches, unless given."""

import dataclasses
import math

from data import TRAIN_IMAGES, Split
from harness import distributed, picture_folder
from harness.cli import Runtime, usage_error
from harness.text import counted
from recipes import MOST_VIEWS, Recipe

# For small sets: the views of a picture over the whole run beyond which nothing is gained, the fewest steps that are
# enough, and the smallest batch (docs/EXPERIMENTS.md, "Folders of few pictures").
MOST_PASSES = 500
LEAST_STEPS = 600
LEAST_BATCH = 32
UNEQUAL = 3  # times as many pictures in the largest class as in the smallest


def fit_to_folder(recipe: Recipe, runtime: Runtime, split: Split) -> Recipe:
    """The recipe, fitted to the user's own folder where nothing is given; prints what was found and chosen."""
    dataset, train, val = split
    print(picture_folder.summary(dataset.classes, dataset.labels, train, val))
    for name in ("split_seed", "val_fraction"):
        if dataset.given_split is not None and getattr(recipe, name) != getattr(Recipe, name):
            usage_error(f"--{name.replace('_', '-')} has no effect: {runtime.images} has its own val")
    if "recipe" in runtime.by_default:
        print(f"recipe {recipe.name}, as no --recipe is given")
    if "views" in runtime.by_default:
        recipe = fit_views(recipe, len(train))
        views = recipe.views_per_image
        in_all = recipe.epochs * views * len(train)
        way = "--views sets more, --epochs fewer" if views == 1 else "--views sets another number"
        print(f"{counted(views, 'view')} of each picture an epoch, {in_all:,} in all; {way}")
    if "batch" in runtime.by_default:
        usual, recipe = recipe, fit_batches(recipe, len(train), distributed.world_size())
        if recipe != usual:
            batches = " and ".join(f"{stage.batch} at rate {stage.lr:.3g}" for stage in recipe.stages if stage.epochs)
            print(f"batches of {batches}, as the run has few steps; --batch and --lr set others")
    counts = dataset.labels[train].bincount(minlength=len(dataset.classes))
    if counts.max() >= UNEQUAL * counts.min() and not recipe.balance:
        print("the classes are unequal: --balance draws each equally often")
    if len(val):
        scored = dataset.labels[val].bincount(minlength=len(dataset.classes))
        if scored.max() >= UNEQUAL * scored.min():
            share, name = scored.max().item() / len(val), dataset.classes[int(scored.argmax())]
            print(f"always answering {name} would be right on {share:.1%} of the validation pictures")
    return recipe


def fit_views(recipe: Recipe, images: int) -> Recipe:
    """The recipe for `images` training images: an epoch has about as many samples as it has of STL-10's 4,000.

    Few images get no more than MOST_PASSES views each over all epochs, unless the recipe has more.
    """
    views = round(recipe.views_per_image * TRAIN_IMAGES / images)
    most = max(recipe.views_per_image, MOST_PASSES // recipe.epochs)
    least = math.ceil(LEAST_BATCH / images)  # an epoch is at least one batch
    return dataclasses.replace(recipe, views_per_image=max(least, min(views, most, MOST_VIEWS)))


def fit_batches(recipe: Recipe, images: int, world: int = 1) -> Recipe:
    """The recipe with batches that leave enough steps of `images` training images, whose views are fitted already.

    A stage's batch is halved, but not below LEAST_BATCH, until the stage has LEAST_STEPS steps; each time its rate is
    divided by √2. The batch stays divisible by `world`, the number of processes.
    """
    stages = list(recipe.stages)
    for index, stage in enumerate(stages):
        samples = stage.epochs * recipe.views_per_image * images
        batch, lr = stage.batch, stage.lr
        while 0 < samples < LEAST_STEPS * batch and batch >= 2 * LEAST_BATCH and batch % (2 * world) == 0:
            batch, lr = batch // 2, lr / math.sqrt(2)
        stages[index] = dataclasses.replace(stage, batch=batch, lr=lr)
    return dataclasses.replace(recipe, stages=tuple(stages))
