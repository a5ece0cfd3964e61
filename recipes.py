"""Everything that decides a result: a `Recipe`, its stages, the named recipes, and the network that a recipe describes.

Each setting is a flag of `train.py` and an entry of `config.json`. A continued run must agree on all that take effect.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from augment import ViewOptions
from data import AUGMENTATIONS, TUNE_FOLDS
from model import NETWORKS, PARAMETER_BUDGET, SMALLER_NETWORK, ResNet, WideNet, build_model
from scheduler import restart_rate, warmup_cosine_rate
from settings import check_limits, option

TTA = {  # test-time augmentation: the forms of each image whose predictions are averaged
    "none": "the image alone",
    "mirror": "the image and its mirror image",
    "multi": "the image and five crops of 7/8 of its side (corners and centre), each with its mirror image",
}
TTA_HELP = "test-time augmentation; predictions are averaged over: " + "; ".join(f"{k}: {v}" for k, v in TTA.items())
NO_LIMIT = 10**12  # parameters: a budget that holds nothing back
MOST_VIEWS = 10_000
OLD_NAMES = {"view": "augmentation", "views": "views_per_image"}  # of checkpoints of format 1
# settings that were removed, each with the value that matches today's behaviour
RETIRED = {"mirrored": False, "mix_until": 1.0}


class UnknownSettings(ValueError):
    """A recipe's stored values have names that this version does not know, so another version wrote them."""


@dataclass(frozen=True)
class Stage:
    """One part of a run, with its own optimiser and schedule; the weights carry over from the previous stage."""

    epochs: int = option("epochs; 0 skips the stage", low=0, high=100_000)
    crop_size: tuple[int, ...] = option(
        "side of the training views in px; several sizes joined by commas share the stage's epochs", low=32, high=1024
    )
    eval_size: int = option("side in px at which validation images are scored", low=32, high=1024)
    batch: int = option("samples per step", low=1, high=65_536)
    lr: float = option("peak learning rate", above=0.0, high=100.0)

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.crop_size:
            raise ValueError("crop_size must name at least one size")

    def crop_size_in(self, epoch: int) -> int:
        """Side in px of the views of an epoch of this stage, counted from 0."""
        return self.crop_size[epoch * len(self.crop_size) // self.epochs]

    @property
    def unused_crop_sizes(self) -> tuple[int, ...]:
        """The crop sizes that no epoch uses, because there are fewer epochs than sizes."""
        used = {self.crop_size_in(epoch) for epoch in range(self.epochs)}
        return tuple(size for size in dict.fromkeys(self.crop_size) if size not in used) if self.epochs else ()


class Epoch(NamedTuple):
    """What a recipe says about one epoch of a run."""

    stage_index: int  # from 0
    stage: Stage
    number: int  # within the stage, from 0
    crop_size: int  # side of the training views in px
    tta: str  # forms over which the validation images are scored after it


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result. The defaults are the original project's."""

    name: str
    stages: tuple[Stage, ...]
    augmentation: ViewOptions = ViewOptions()
    views_per_image: int = option(
        "views of each training image per epoch; with --images, chosen to suit the number of pictures",
        20,
        low=1,
        high=MOST_VIEWS,
        flag="views",
    )
    balance: bool = option("draw each class equally often, however unequal the classes are", False)
    seed: int = option("seed of the weights and of all views", 0, low=0, high=2**63 - 1)
    split_seed: int = option("seed of the split into training and validation images", 1337, low=0, high=2**63 - 1)
    train_on: str = option("images to train on; all keeps none for validation", "train", choices=("train", "all"))
    val_fraction: float = option("share of each class's images used for validation", 0.2, above=0.0, high=0.9)
    fold: int | None = option("train on this official fold's 1,000 images, validate on the others", None, low=0, high=9)
    tune_fold: int | None = option(
        "for choosing settings: validate on this fifth of the training images, and leave the validation images alone",
        None,
        low=0,
        high=TUNE_FOLDS - 1,
    )
    image_size: int = option("side in px to which pictures of --images are cropped and resized", 96, low=32, high=1024)
    init: str = option("checkpoint whose weights to start from", "")

    network: str = option(
        "bottleneck: the original's; wide: fewer layers of wide 3×3 convolutions", "bottleneck", choices=NETWORKS
    )
    layers: tuple[int, int, int] = option(
        "blocks in each of the network's groups; wide: its convolutions after the first", (4, 9, 8), low=1, high=100
    )
    planes: tuple[int, int, int] = option(
        "inner width of each group's blocks; wide: its channels", (30, 60, 96), low=1, high=4096
    )
    budget: int = option("most parameters that the network may have", PARAMETER_BUDGET, low=1, high=NO_LIMIT)
    zero_init_residual: bool = option("start each residual block as the identity", False)
    cosine_stem: bool = option(
        "wide: the stem is a cosine transform that does not learn, and later convolutions start as identities", False
    )
    last_pool: bool = option("wide: halve the last group's maps too; without it, they are finer and cost more", True)

    optimizer: str = option(
        "optimiser (sgd: Nesterov momentum 0.9; muon: the same, but filters after the stem by orthogonalised momentum)",
        "adam",
        choices=("adam", "adamw", "sgd", "muon"),
    )
    weight_decay: float = option(
        "weight decay (L2, decoupled for adamw; muon: not on filters after the stem)", 1e-4, low=0.0, high=10.0
    )
    decay_norms: bool = option("apply weight decay to BatchNorm weights and biases too", True)
    schedule: str = option(
        "restarts: decaying cosine restarts, by epoch; cosine: warm-up and one cosine, by step",
        "restarts",
        choices=("restarts", "cosine"),
    )
    cycle: int = option("restarts: epochs of the first cycle", 10, low=1, high=100_000)
    cycle_growth: int = option("restarts: each cycle is this many times longer than the one before", 2, low=1, high=100)
    cycle_decay: float = option("restarts: each cycle's peak as a share of the one before", 0.6, above=0.0, high=1.0)
    warmup: float = option(
        "cosine: share of the stage in which the rate rises, from 0 in its first step", 0.1, low=0.0, high=0.9
    )
    label_smoothing: float = option("share of the target spread over the other classes", 0.0, low=0.0, high=0.9)
    average: float = option(
        "decay of the running average of weights that is scored and kept; 0: off", 0.0, low=0.0, high=0.99999
    )
    average_warmup: bool = option("let the average's decay rise with the steps, so that it fits short runs too", True)
    teacher_temperature: float = option(
        "temperature that softens the probabilities of --teacher", 2.0, above=0.0, high=100.0
    )
    label_share: float = option("with --teacher: weight of the labels in the loss", 0.5, low=0.0, high=1.0)
    teachers: tuple[str, ...] = ()  # by content: digests of the networks that --teacher names
    tta: str = option(TTA_HELP, "none", choices=TTA)

    def __post_init__(self) -> None:
        check_limits(self)
        if not any(stage.epochs for stage in self.stages):
            raise ValueError("epochs: every stage has 0 epochs, so there is nothing to train")
        if self.cosine_stem and self.network != "wide":
            raise ValueError(f"cosine_stem is part of network wide: for {self.network} add --no-cosine-stem")
        if not self.last_pool and self.network != "wide":
            raise ValueError(f"last_pool is part of network wide: for {self.network} add --last-pool")
        if self.fold is not None and self.train_on == "all":
            raise ValueError("fold and train_on all cannot be combined: a fold says which images to train on")
        if self.tune_fold is not None and (self.fold is not None or self.train_on == "all"):
            other = "train_on all" if self.fold is None else "fold"
            raise ValueError(f"tune_fold and {other} cannot be combined: each says which images to train on")

    @property
    def epochs(self) -> int:
        """Epochs of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    def at(self, epochs_done: int) -> Epoch:
        """The run's next epoch, after `epochs_done` finished ones. Raises ValueError at the end.

        Before the last epoch, whose figure counts, TTA "mirror" replaces "multi", at a fifth of the cost.
        """
        tta = "mirror" if self.tta == "multi" and epochs_done + 1 < self.epochs else self.tta
        number = epochs_done
        for index, stage in enumerate(self.stages):
            if number < stage.epochs:
                return Epoch(index, stage, number, stage.crop_size_in(number), tta)
            number -= stage.epochs
        raise ValueError("the recipe has no more epochs")

    @property
    def rate_by_step(self) -> bool:
        """Whether the learning rate changes with each step; else with each epoch."""
        return self.schedule == "cosine"

    def steps_per_epoch(self, stage: Stage, images: int) -> int:
        """Steps of an epoch of a stage over `images` training images; an incomplete last batch is left out."""
        return images * self.views_per_image // stage.batch

    def samples(self, images: int, epochs_done: int) -> int:
        """Samples of the first `epochs_done` epochs over `images` training images: whole batches only."""
        stages = [self.at(done).stage for done in range(epochs_done)]
        return sum(self.steps_per_epoch(stage, images) * stage.batch for stage in stages)

    def learning_rate(self, stage: Stage, epoch: float) -> float:
        """Learning rate at an epoch of a stage, counted from 0, fractions allowed."""
        if self.schedule == "restarts":
            return restart_rate(epoch, stage.lr, self.cycle, self.cycle_growth, self.cycle_decay)
        return warmup_cosine_rate(min(epoch / stage.epochs, 1.0), stage.lr, self.warmup)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they appear in `config.json` and in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `as_dict`; lists become tuples, and the names and rules of older versions are understood.

        Raises UnknownSettings for other names, ValueError, TypeError or KeyError for anything else.
        """
        values = {OLD_NAMES.get(name, name): value for name, value in values.items()}
        if "mirror" in values:  # of format 1
            values["tta"] = "mirror" if values.pop("mirror") else "none"
        values = old_rules(values) | values
        stages = tuple(Stage(**_known(Stage, stage)) for stage in values["stages"])
        augmentation = ViewOptions(**_known(ViewOptions, values["augmentation"]))
        return cls(**_known(cls, values) | {"stages": stages, "augmentation": augmentation})


def old_rules(values: dict[str, Any]) -> dict[str, Any]:
    """What a recipe's plain values imply for settings that did not exist when they were written."""
    return {"average_warmup": False} if "average_warmup" not in values and values.get("average") else {}


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values for the fields of a dataclass, lists as tuples. Raises UnknownSettings for names that it lacks."""
    values = {name: value for name, value in values.items() if (name, value) not in RETIRED.items()}
    unknown = sorted(values.keys() - kind.__dataclass_fields__.keys())
    if unknown:
        names = ", ".join(map(str, unknown))
        raise UnknownSettings(f"settings that this version does not know ({names}); use the version that wrote them")
    return _tuples(values)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def replace(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """`recipe` with other values of its fields, its augmentation's or its stages' (lists, one item per stage).

    Raises ValueError if a value is out of range or a list has the wrong length. Other names are ignored.
    """
    count, per_stage = len(recipe.stages), [name for name in Stage.__dataclass_fields__ if name in changes]
    for name in per_stage:
        if len(changes[name]) != count:
            raise ValueError(f"{name} takes {count} value(s) here, one per stage, not {len(changes[name])}")
    stages = tuple(
        dataclasses.replace(stage, **{name: changes[name][index] for name in per_stage})
        for index, stage in enumerate(recipe.stages)
    )
    rest = _tuples(changes)
    augmentation = {name: rest[name] for name in ViewOptions.__dataclass_fields__ if name in rest}
    return dataclasses.replace(
        recipe,
        stages=stages,
        augmentation=dataclasses.replace(recipe.augmentation, **augmentation),
        **{name: rest[name] for name in Recipe.__dataclass_fields__ if name in rest},
    )


def build_network(recipe: Recipe, classes: int) -> ResNet | WideNet:
    """The network that a recipe describes. Raises ValueError where it is over the budget or cannot be built."""
    least = sum(9 * blocks * width**2 for blocks, width in zip(recipe.layers, recipe.planes, strict=True))
    if least > recipe.budget:  # in the 3×3 convolutions alone; checked before any memory is allocated
        raise ValueError(
            f"the network has over {least:,} parameters, more than the budget of {recipe.budget:,}: {SMALLER_NETWORK}"
        )
    only_wide = {"cosine_stem": recipe.cosine_stem, "last_pool": recipe.last_pool} if recipe.network == "wide" else {}
    return build_model(
        recipe.layers,
        kind=recipe.network,
        budget=recipe.budget,
        planes=recipe.planes,
        num_classes=classes,
        zero_init_residual=recipe.zero_init_residual,
        **only_wide,
    )


# The student project's. `train.py`: 35.2 million samples; meant for a GPU, not yet run to the end.
ORIGINAL = Recipe(
    name="original",
    augmentation=AUGMENTATIONS["original"],
    stages=(
        Stage(epochs=300, crop_size=(70,), eval_size=96, batch=128, lr=1e-3),
        Stage(epochs=140, crop_size=(120,), eval_size=144, batch=64, lr=5e-4),
    ),
)
# Milder views, small crops first, a network whose arithmetic keeps the cores busy and whose stem need not be learnt,
# and Muon, over eight points ahead of SGD after 15 passes. `train.py --recipe cpu`: 0.22 million samples, about six
# minutes on two CPU cores with bf16; 84.4 % on average over ten seeds. The reasons: docs/EXPERIMENTS.md.
CPU = Recipe(
    name="cpu",
    stages=(Stage(epochs=4, crop_size=(32, 48, 48, 64), eval_size=80, batch=128, lr=0.5),),
    augmentation=AUGMENTATIONS["mild"],
    views_per_image=14,
    network="wide",
    layers=(2, 2, 2),
    planes=(64, 160, 224),
    cosine_stem=True,
    optimizer="muon",
    weight_decay=5e-4,
    decay_norms=False,
    schedule="cosine",
    label_smoothing=0.1,
    average=0.995,
    tta="multi",
)
# Finer maps, larger crops, stronger views, CutMix. `train.py --recipe cpu-long`: 1.9 million samples, an hour on two
# Zen 5 cores with bf16, two on Zen 4; 89.7 % on average over three seeds.
CPU_LONG = dataclasses.replace(
    CPU,
    name="cpu-long",
    stages=(Stage(epochs=24, crop_size=(48, 64, 80, 80), eval_size=112, batch=128, lr=0.5),),
    augmentation=AUGMENTATIONS["strong"],
    views_per_image=20,
    last_pool=False,
    average=0.998,
)
# Twice the passes, and one more random operation on each view, which gained nothing in cpu-long. `train.py --recipe
# cpu-night`: 3.8 million samples, two hours on two Zen 5 cores with bf16; 90.7 %, one seed.
CPU_NIGHT = dataclasses.replace(
    CPU_LONG,
    name="cpu-night",
    augmentation=dataclasses.replace(AUGMENTATIONS["strong"], trivial_augment=True),
    views_per_image=40,
    average=0.999,
)
# cpu-night with larger crops, for one modern GPU. `train.py --recipe gpu`: 3.8 million samples, five minutes on an H200
# shared with another run; 91.2 %, one seed. Two Zen 5 cores would take 3.5 hours (a forecast).
GPU = dataclasses.replace(
    CPU_NIGHT,
    name="gpu",
    stages=(Stage(epochs=24, crop_size=(64, 80, 112, 112), eval_size=144, batch=128, lr=0.5),),
)
# The whole path on drawn shapes. `train.py --demo`: 18 thousand samples, about a minute on two CPU cores; 77 to 84 %,
# depending on the number of threads, which changes the order of summation.
DEMO = Recipe(
    name="demo",
    stages=(
        Stage(epochs=12, crop_size=(32,), eval_size=40, batch=64, lr=8e-3),
        Stage(epochs=4, crop_size=(48,), eval_size=56, batch=64, lr=4e-3),
    ),
    views_per_image=1,
    layers=(1, 1, 1),
    planes=(8, 16, 32),
    cycle=4,
)
RECIPES = {recipe.name: recipe for recipe in (ORIGINAL, CPU, CPU_LONG, CPU_NIGHT, GPU, DEMO)}
