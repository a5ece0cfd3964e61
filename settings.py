"""The settings of a run: what decides its result (`Recipe`), and where and how it is made (`Runtime`).

Each field is at once a flag of `train.py`, an entry of `config.json` and, for the recipe, something that a
continued run must agree on. The named recipes stand at the end of this file's first half.
"""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from augment import Views
from model import NETWORKS, PARAMETER_BUDGET
from scheduler import restart_rate, warmup_cosine_rate

NO_LIMIT = 10**12  # parameters: a budget that holds nothing back


def option(help: str, default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A dataclass field with its help text and limits: `low`, `above` and `high` for numbers, `choices` for words."""
    return field(default=default, metadata={"help": help, **limits})


def check_limits(settings: Any) -> None:
    """Raise ValueError where a field of a dataclass lies outside the limits that its `option` states."""
    for item in dataclasses.fields(settings):
        value, limits = getattr(settings, item.name), item.metadata
        if "choices" in limits and value not in limits["choices"]:
            raise ValueError(f"{item.name} is one of {', '.join(limits['choices'])}, not {value!r}")
        low, above, high = (limits.get(name) for name in ("low", "above", "high"))
        if low is None and above is None:
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:
                continue
            if not (number >= low if above is None else number > above) or not number <= high:  # nan fails both
                bound = f"from {low}" if above is None else f"above {above}"
                raise ValueError(f"{item.name} is {bound} and up to {high}, not {number}")


@dataclass(frozen=True)
class Stage:
    """One part of a run, with an optimiser and a schedule of its own; the weights go on from the stage before."""

    epochs: int = option("epochs; 0 skips the stage", low=0, high=100_000)
    crop_size: tuple[int, ...] = option(
        "side of the training views in px; several sizes joined by commas share the stage's epochs", low=32, high=1024
    )
    eval_size: int = option("side in px at which validation images are scored", low=32, high=1024)
    batch: int = option("samples a step", low=1, high=65_536)
    lr: float = option("peak learning rate", above=0.0, high=100.0)

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.crop_size:
            raise ValueError("crop_size names at least one size")

    def size(self, epoch: int) -> int:
        """Side in px of the views of an epoch of this stage, counted from 0."""
        return self.crop_size[epoch * len(self.crop_size) // self.epochs]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result. The defaults are the original project's."""

    name: str
    stages: tuple[Stage, ...]
    view: Views = Views()
    views: int = option("views of each training image an epoch", 20, low=1, high=10_000)
    seed: int = option("seed of the weights and of all views", 0, low=0, high=2**63 - 1)
    split_seed: int = option("seed of the split into training and validation images", 1337, low=0, high=2**63 - 1)
    train_on: str = option("images to train on; all keeps none for validation", "train", choices=("train", "all"))
    val_fraction: float = option("share of each class's images that validate", 0.2, above=0.0, high=0.9)
    fold: int | None = option("train on this official fold's 1,000 images, validate on the others", None, low=0, high=9)
    image_size: int = option("side in px to which the pictures of --images are brought", 96, low=32, high=1024)
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
        "wide: the stem is a cosine transform that does not learn, and further convolutions start as identities", False
    )
    last_pool: bool = option("wide: halve the last group's maps too; without, they are finer and cost more", True)

    optimizer: str = option(
        "optimiser (sgd: Nesterov momentum 0.9; muon: the same, but convolutions by orthogonalised momentum)",
        "adam",
        choices=("adam", "adamw", "sgd", "muon"),
    )
    weight_decay: float = option("weight decay (L2 for adam and sgd, decoupled for adamw)", 1e-4, low=0.0, high=10.0)
    decay_norms: bool = option("apply weight decay to BatchNorm weights and biases too", True)
    schedule: str = option(
        "restarts: decaying cosine restarts, by epoch; cosine: warm-up and one cosine, by step",
        "restarts",
        choices=("restarts", "cosine"),
    )
    cycle: int = option("restarts: epochs of the first cycle", 10, low=1, high=100_000)
    cycle_growth: int = option("restarts: each cycle is this many times longer than the one before", 2, low=1, high=100)
    cycle_decay: float = option("restarts: each cycle's peak as a share of the one before", 0.6, above=0.0, high=1.0)
    warmup: float = option("cosine: share of the stage in which the rate rises", 0.1, low=0.0, high=0.9)
    label_smoothing: float = option("share of the target spread over the other classes", 0.0, low=0.0, high=0.9)
    average: float = option(
        "decay of the running average of weights that is scored and kept; 0 is off", 0.0, low=0.0, high=0.99999
    )
    mirror: bool = option("score each image together with its mirror image", False)

    def __post_init__(self) -> None:
        check_limits(self)
        if not any(stage.epochs for stage in self.stages):
            raise ValueError("epochs: every stage has 0 epochs, so there is nothing to train")
        if self.cosine_stem and self.network != "wide":
            raise ValueError(f"cosine_stem is a part of network wide: for {self.network} add --no-cosine-stem")
        if not self.last_pool and self.network != "wide":
            raise ValueError(f"last_pool is a part of network wide: for {self.network} add --last-pool")
        if self.fold is not None and self.train_on == "all":
            raise ValueError("fold and train_on all exclude each other: a fold says which images to train on")

    def locate(self, done: int) -> tuple[int, int]:
        """(stage, epoch within it), both from 0, of the epoch that follows `done` finished epochs."""
        for number, stage in enumerate(self.stages):
            if done < stage.epochs:
                return number, done
            done -= stage.epochs
        raise ValueError("the recipe has no further epoch")

    def size(self, done: int) -> int:
        """Side in px of the views of the epoch that follows `done` finished epochs."""
        number, epoch = self.locate(done)
        return self.stages[number].size(epoch)

    def start(self, number: int) -> int:
        """Epochs of the stages before stage `number`, counted from 0."""
        return sum(stage.epochs for stage in self.stages[:number])

    @property
    def epochs(self) -> int:
        """Epochs of all stages together."""
        return sum(stage.epochs for stage in self.stages)

    def rate(self, stage: Stage, epoch: float) -> float:
        """Learning rate at an epoch of a stage, counted from 0, fractions allowed: what the plot shows."""
        if self.schedule == "restarts":
            return restart_rate(epoch, stage.lr, self.cycle, self.cycle_growth, self.cycle_decay)
        return warmup_cosine_rate(min(epoch / stage.epochs, 1.0), stage.lr, self.warmup)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in `config.json` and in checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The inverse of `as_dict`, from JSON's lists too. Raises ValueError, TypeError or KeyError for others."""
        rest = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k not in ("stages", "view")}
        stages = tuple(Stage(**{**s, "crop_size": tuple(s["crop_size"])}) for s in values["stages"])
        view = Views(**{k: tuple(v) if isinstance(v, list) else v for k, v in values["view"].items()})
        return cls(**rest, stages=stages, view=view)


@dataclass(frozen=True)
class Runtime:
    """Where a run is made, on what, and how it is shown: nothing that should decide its result."""

    data_dir: Path = option("folder that holds stl10_binary, or gets it", Path("data"))
    images: Path | None = option(
        "train on the pictures in this folder instead: one folder a class, split by --val-fraction, "
        "or train/ and val/ that hold one folder a class each",
        None,
    )
    out: Path | None = option("run folder (default: runs/RECIPE-seedSEED, with the images' and fold's names)", None)
    device: str = option("cpu, cuda, cuda:1 …; auto takes CUDA where there is any", "auto")
    threads: int = option("CPU threads; 0 leaves the choice to PyTorch", 0, low=0, high=1024)
    precision: str = option(
        "arithmetic of the network; auto: bf16 where the hardware has it", "auto", choices=("auto", "bf16", "fp32")
    )
    compile: bool | None = option("compile the training step (default: on CUDA)", None)
    deterministic: bool = option("the same bits again on CUDA, at some cost in speed (a CPU needs no flag)", False)
    max_minutes: float = option("stop at the last epoch end within this time; 0 is no limit", 0.0, low=0.0, high=1e6)
    overwrite: bool = option("start anew in a run folder that holds a run", False)
    tensorboard: bool = option("write the numbers of metrics.csv for TensorBoard too, in the run folder", False)

    def __post_init__(self) -> None:
        check_limits(self)


MILD = Views(crop_scale=(0.25, 1.0), rotation=10.0, vflip=0.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)

# Milder views, small crops first, a network whose arithmetic keeps the cores busy and whose stem need not be learnt,
# and Muon, which learns from half the samples: half an hour on two CPU cores. Why each of them: docs/EXPERIMENTS.md.
CPU = Recipe(
    name="cpu",
    stages=(Stage(epochs=8, crop_size=(32, 48, 48, 64), eval_size=96, batch=64, lr=0.2),),
    view=MILD,
    views=15,
    network="wide",
    layers=(2, 2, 2),
    planes=(64, 160, 224),
    cosine_stem=True,
    optimizer="muon",
    weight_decay=5e-4,
    decay_norms=False,
    schedule="cosine",
    label_smoothing=0.1,
    average=0.998,
    mirror=True,
)
STRONG = dataclasses.replace(  # for runs that would fit their images otherwise
    MILD, crop_scale=(0.15, 1.0), brightness=0.6, contrast=0.6, saturation=0.8, cutmix=1.0, mix_probability=0.75
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The student project's: 35.2 million samples, hours on a GPU.
        Recipe(
            name="original",
            stages=(
                Stage(epochs=300, crop_size=(70,), eval_size=96, batch=128, lr=1e-3),
                Stage(epochs=140, crop_size=(120,), eval_size=144, batch=64, lr=5e-4),
            ),
        ),
        CPU,
        # The same for an hour of two cores with bf16, or some eight hours of others: finer maps, larger crops, stronger
        # views, CutMix, four times the samples.
        dataclasses.replace(
            CPU,
            name="cpu-long",
            stages=(Stage(epochs=24, crop_size=(48, 48, 64, 64, 80, 80, 80, 96), eval_size=128, batch=64, lr=0.2),),
            view=STRONG,
            views=20,
            last_pool=False,
            average=0.999,
        ),
        # That for one modern GPU, where samples are cheap: more of them, more of which are large. Not yet run.
        dataclasses.replace(
            CPU,
            name="gpu",
            stages=(Stage(epochs=64, crop_size=(48, 64, 80, 96), eval_size=128, batch=64, lr=0.2),),
            view=STRONG,
            views=20,
            last_pool=False,
            average=0.9998,
        ),
        # The whole path in under a minute on two CPU cores, on pictures drawn by the program.
        Recipe(
            name="demo",
            stages=(
                Stage(epochs=12, crop_size=(32,), eval_size=40, batch=64, lr=8e-3),
                Stage(epochs=4, crop_size=(48,), eval_size=56, batch=64, lr=4e-3),
            ),
            views=1,
            layers=(1, 1, 1),
            planes=(8, 16, 32),
            cycle=4,
        ),
    )
}


def build_parser() -> argparse.ArgumentParser:
    """The command line of `train.py`: one flag a field, grouped by the dataclass that holds it."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a small image classifier from scratch. The same command again continues where it stopped.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=RECIPES, help="named settings to start from (default: original)")
    parser.add_argument("--demo", action="store_true", help="the demo recipe, on pictures drawn by the program itself")
    for title, settings, shown in (
        ("stages (one value a stage)", Stage, {}),
        ("views", Views, vars(Views())),
        ("recipe", Recipe, vars(RECIPES["original"])),
        ("run", Runtime, vars(Runtime())),
    ):
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(settings)
        for item in dataclasses.fields(settings):
            if "help" in item.metadata:
                _add_flag(group, item, hints[item.name], settings is Stage, shown.get(item.name))
    return parser


def _add_flag(group: Any, item: dataclasses.Field, hint: Any, per_stage: bool, shown: Any) -> None:
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in hint.__args__ if kind is not types.NoneType)
    shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
    text = item.metadata["help"].replace("%", "%%") + (f" (default: {shown})" if shown not in (None, "") else "")
    flag = "--" + item.name.replace("_", "-")
    if hint is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        return
    nargs, metavar = ("+", None) if per_stage else (None, None)
    if typing.get_origin(hint) is tuple and per_stage:
        hint = _sizes
    elif typing.get_origin(hint) is tuple:
        hint, nargs = hint.__args__[0], len(hint.__args__)
    if "choices" not in item.metadata:
        metavar = {int: "N", float: "X", Path: "PATH", _sizes: "N[,N…]"}.get(hint, "NAME")
    group.add_argument(flag, type=hint, nargs=nargs, metavar=metavar, choices=item.metadata.get("choices"), help=text)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, nor sizes joined by commas") from None


def parse(argv: list[str] | None = None) -> tuple[Recipe, Runtime]:
    """Settings from a command line; anything wrong with them ends the process with a usage message and status 2."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    demo, name = given.pop("demo", False), given.pop("recipe", None)
    if demo and name not in (None, "demo"):
        parser.error(f"--demo and --recipe {name} exclude each other")
    recipe = RECIPES["demo" if demo else name or "original"]
    try:
        recipe = replace(recipe, given)
        runtime = Runtime(**{k: v for k, v in given.items() if k in Runtime.__dataclass_fields__})
    except ValueError as error:
        word = str(error).split(" ")[0].rstrip(":")
        parser.error(str(error).replace(word, "--" + word.replace("_", "-"), 1) if word in given else str(error))
    if demo and runtime.images:
        parser.error("--demo draws its own pictures; for those of --images give --recipe demo")
    if recipe.fold is not None and (runtime.images or recipe.name == "demo"):
        parser.error("--fold is one of STL-10's official folds: there are none of other pictures")
    if "image_size" in given and not runtime.images:
        parser.error("--image-size is the size of the pictures of --images; STL-10's are 96 px")
    return recipe, runtime


def run_folder(recipe: Recipe, runtime: Runtime) -> Path:
    """Where the run is kept: `--out`, or a name made of what tells it from others."""
    images = f"{runtime.images.resolve().name}-" if runtime.images else ""
    fold = "" if recipe.fold is None else f"-fold{recipe.fold}"
    return runtime.out or Path("runs") / f"{images}{recipe.name}{fold}-seed{recipe.seed}"


def replace(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """`recipe` with the given values in place of its own; values of a Stage's field are lists, one item a stage.

    Raises ValueError where a value is out of range or a list has not one item a stage. Other names are passed over.
    """
    stages = list(recipe.stages)
    for name in Stage.__dataclass_fields__.keys() & given.keys():
        if len(given[name]) != len(stages):
            raise ValueError(f"{name} takes {len(stages)} value(s) here, one a stage, not {len(given[name])}")
    for number, stage in enumerate(stages):
        own = {name: given[name][number] for name in Stage.__dataclass_fields__ if name in given}
        stages[number] = dataclasses.replace(stage, **own)
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    view = {k: v for k, v in as_tuples.items() if k in Views.__dataclass_fields__}
    rest = {k: v for k, v in as_tuples.items() if k in Recipe.__dataclass_fields__}
    return dataclasses.replace(recipe, stages=tuple(stages), view=dataclasses.replace(recipe.view, **view), **rest)
