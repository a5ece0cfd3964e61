"""Command lines: where and how a run takes place (`Runtime`), and flags made from the fields of dataclasses."""

import argparse
import glob
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import recipes
from augment import ViewOptions
from harness import distributed, files
from harness.text import counted
from recipes import RECIPES, Recipe, Stage
from settings import check_limits, option


@dataclass(frozen=True)
class Runtime:
    """Where a run takes place, on what, and how it is shown: nothing that should decide its result."""

    data_dir: Path = option("folder with stl10_binary/; missing files are downloaded into it", Path("data"))
    images: Path | None = option(
        "train on the pictures in this folder instead: one folder per class, split by --val-fraction, "
        "or train/ and val/ that hold one folder per class each",
        None,
    )
    teacher: tuple[Path, ...] = option(
        "run folders or checkpoints of trained networks to learn from, see docs/DISTILLATION.md", ()
    )
    out: Path | None = option("run folder (default: runs/RECIPE-seedSEED, with the images' and fold's names)", None)
    device: str = option("cpu, cuda, cuda:1 …; auto uses CUDA if available", "auto")
    threads: int = option("CPU threads; 0: PyTorch's choice, but no more than a container may use", 0, low=0, high=1024)
    precision: str = option(
        "arithmetic of the network; auto: bf16 where the hardware has it, fp16 on older GPUs with tensor cores",
        "auto",
        choices=("auto", "bf16", "fp16", "fp32"),
    )
    compile: bool | None = option(
        "compile the training step, and capture it on CUDA (default: on CUDA, except for the demo)", None
    )
    deterministic: bool = option("bit-for-bit repeatable on CUDA, at some cost in speed (not needed on a CPU)", False)
    max_minutes: float = option(
        "stop at the last epoch end within this time, after at least one epoch; 0: no limit", 0.0, low=0.0, high=1e6
    )
    overwrite: bool = option("start over in a run folder that holds a run", False)
    tensorboard: bool = option("also write the numbers in metrics.csv for TensorBoard, in the run folder", False)
    by_default: tuple[str, ...] = ()  # which of recipe, views and batch were not given and are chosen to suit --images

    def __post_init__(self) -> None:
        check_limits(self)
        if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", self.device):
            why = ": a Mac's GPU is not supported" if self.device == "mps" else ""
            raise ValueError(f"device is cpu, cuda, cuda:1 … or auto, not {self.device!r}{why}")


MACHINE_FLAGS = ("device", "threads", "precision")
LARGEST_TOLD = 1024  # a larger upper limit only guards against typos, and --help does not show it


def train_parser() -> argparse.ArgumentParser:
    """The command line of `train.py`: one flag per field, grouped by the dataclass that holds it."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a small image classifier from scratch. Rerun the same command to continue where it stopped. "
        "Defaults below are those of recipe original; another --recipe, or --images, brings its own (recipes.py).",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        help="named settings to start from. original: the student project's, for a GPU; cpu: minutes on two CPU cores; "
        "cpu-long: one to two hours; cpu-night: two to ten; gpu: one GPU; demo: drawn shapes (default: original; with "
        "--images: cpu)",
    )
    parser.add_argument("--demo", action="store_true", help="the demo recipe, on pictures drawn by the program itself")
    add_flags(parser.add_argument_group("stages (one value per stage; each recipe has its own)"), Stage)
    add_flags(parser.add_argument_group("views"), ViewOptions)
    add_flags(parser.add_argument_group("recipe"), Recipe)
    add_flags(parser.add_argument_group("run"), Runtime)
    return parser


def usage_error(message: str) -> NoReturn:
    """End `train.py` as its parser does: usage, one sentence, status 2."""
    train_parser().error(message)


def add_best(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--best", action="store_true", help="take a run folder's best.pt (default: its last.pt)")


def refuse_idle_best(parser: argparse.ArgumentParser, best: bool, paths: Collection[Path]) -> None:
    """End the process with status 2 where --best is given, but no run folder that it could apply to."""
    if best and all(map(os.path.isfile, paths)):
        parser.error(f"--best takes the best epoch of a run folder, not of a file ({', '.join(map(str, paths))})")


def network_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The command line of a command that uses trained networks: with `--best` and the machine's flags."""
    parser = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False)
    add_best(parser)
    add_flags(parser.add_argument_group("machine"), Runtime, MACHINE_FLAGS, with_defaults=True)
    return parser


def add_flags(group: Any, settings: type, names: Collection[str] | None = None, with_defaults: bool = False) -> None:
    """Add a flag for each field of a dataclass that has a help text, or for those in `names`.

    A parsed namespace has their defaults only `with_defaults`; the help text shows them either way.
    """
    hints = typing.get_type_hints(settings)
    for item in fields(settings):
        if "help" not in item.metadata or (names is not None and item.name not in names):
            continue
        hint, options = hints[item.name], {"choices": item.metadata.get("choices"), "dest": item.name}
        if isinstance(hint, types.UnionType):
            hint = next(kind for kind in hint.__args__ if kind is not types.NoneType)
        if with_defaults:
            options["default"] = item.default
        per_stage = settings is Stage
        if hint is bool:
            del options["choices"]
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple and per_stage:
            options |= {"type": _sizes, "nargs": "+", "metavar": "N[,N…]"}
        elif typing.get_origin(hint) is tuple:
            kind, *others = hint.__args__
            options |= {
                "type": file_path if kind is Path else kind,
                "nargs": "+" if others == [...] else 1 + len(others),
                "metavar": _metavar(kind),
            }
        else:
            options |= {"type": file_path if hint is Path else hint, "nargs": "+" if per_stage else None}
            options["metavar"] = None if options["choices"] else _metavar(hint)
        flag = item.metadata.get("flag", item.name).replace("_", "-")
        group.add_argument(f"--{flag}", help=_help(item.metadata, item.default, per_stage), **options)


def _metavar(kind: type) -> str:
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "NAME")


def _help(setting: Mapping[str, Any], default: Any, per_stage: bool) -> str:
    """A setting's help text, its limits except those that only guard against typos, and its default."""
    text, notes = setting["help"].replace("%", "%%"), []
    if "high" in setting and setting["high"] <= LARGEST_TOLD:
        notes += [f"{setting['low']:g} to {setting['high']:g}" if "low" in setting else f"up to {setting['high']:g}"]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    notes += [] if per_stage or shown in (None, "") else [f"default: {shown}"]
    return text + (f" ({'; '.join(notes)})" if notes else "")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size or a comma-separated list of sizes") from None


def parse_train(argv: list[str] | None = None) -> tuple[Recipe, Runtime]:
    """A run's settings from a command line; anything wrong ends the process with a usage message and status 2."""
    parser = train_parser()
    args = vars(parser.parse_args(argv))
    demo, name = args.pop("demo", False), args.pop("recipe", None)
    if demo and name not in (None, "demo"):
        parser.error(f"--demo and --recipe {name} cannot be combined")
    recipe = RECIPES["demo" if demo else name or ("cpu" if "images" in args else "original")]
    if recipe.name == "demo" and "images" not in args:
        args.setdefault("compile", False)  # which would take longer than the run
    chosen = [] if name else ["recipe"]
    chosen += [] if "views_per_image" in args else ["views"]
    chosen += [] if args.keys() & {"batch", "lr"} else ["batch"]  # a batch and its rate are chosen together
    args["teacher"] = tuple(expanded(args.get("teacher", ())))
    try:
        args |= {"init": str(file_path(args["init"]))} if "init" in args else {}
    except argparse.ArgumentTypeError as error:
        parser.error(f"--init: {error}")
    try:
        recipe = recipes.replace(recipe, args)
        own = {name: value for name, value in args.items() if name in Runtime.__dataclass_fields__}
        runtime = Runtime(**own, by_default=tuple(chosen) if "images" in args else ())
    except ValueError as error:
        parser.error(_with_flag(str(error), args))
    if demo and runtime.images:
        parser.error("--demo draws its own pictures; with --images use --recipe demo")
    if recipe.fold is not None and (runtime.images or recipe.name == "demo"):
        parser.error("--fold is one of STL-10's official folds: other pictures have none")
    world = distributed.world_size()
    for stage in recipe.stages:
        if stage.epochs and stage.batch % world:
            parser.error(f"--batch {stage.batch} cannot be divided equally among {world} processes")
    idle = idle_settings(recipe)
    idle |= {} if runtime.teacher else dict.fromkeys(("teacher_temperature", "label_share"), "without --teacher")
    idle |= {} if runtime.images else {"image_size": "without --images: STL-10's are 96 px"}
    for name in idle.keys() & args.keys():
        parser.error(f"--{name.replace('_', '-')} has no effect {idle[name]}")
    out = default_run_folder(recipe, runtime)
    refuse_among_pictures(parser, out, runtime.images)
    for path in (*runtime.teacher, *([Path(recipe.init)] if recipe.init else [])):
        if runtime.overwrite and files.lies_in(path, out):
            parser.error(f"--overwrite starts over in {out}, but the run learns from {path}, which is there; see --out")
    return recipe, runtime


def idle_settings(recipe: Recipe) -> dict[str, str]:
    """A recipe's settings that have no effect given the others, and why."""
    idle, views = {}, recipe.augmentation
    if not views.mixes:
        idle["mix_probability"] = "without --mixup or --cutmix"
    if not views.erase:
        idle["erase_size"] = "without --erase"
    if recipe.schedule == "restarts":
        idle["warmup"] = "with --schedule restarts"
    else:
        idle |= dict.fromkeys(("cycle", "cycle_growth", "cycle_decay"), f"with --schedule {recipe.schedule}")
    if not recipe.average:
        idle["average_warmup"] = "without --average"
    if recipe.fold is not None or recipe.train_on == "all":
        why = "with --train-on all" if recipe.fold is None else "with --fold"
        idle |= dict.fromkeys(("split_seed", "val_fraction"), why)
    return idle


def epoch_warnings(recipe: Recipe) -> Iterator[str]:
    """A sentence for each stage with too few epochs for its crop sizes."""
    for number, stage in enumerate(recipe.stages, 1):
        if stage.unused_crop_sizes:
            sizes = ", ".join(map(str, stage.unused_crop_sizes))
            yield f"stage {number} has {counted(stage.epochs, 'epoch')}: too few for its crop size(s) {sizes} px"


def refuse_among_pictures(parser: argparse.ArgumentParser, out: Path, images: Path | None) -> None:
    """End the process with status 2 if a folder for output lies within the user's pictures."""
    if images and files.lies_in(out, images):
        parser.error(f"the folder {out} lies in the picture folder {images} and would be taken for a class; see --out")


def _with_flag(sentence: str, args: Collection[str]) -> str:
    """An error message whose leading field name is replaced by its flag, if that flag was given."""
    name = sentence.split(" ")[0].rstrip(":")
    if name not in args:
        return sentence
    holders = (kind for kind in (Stage, ViewOptions, Recipe, Runtime) if name in kind.__dataclass_fields__)
    flag = next(holders).__dataclass_fields__[name].metadata.get("flag", name)
    return sentence.replace(name, "--" + flag.replace("_", "-"), 1)


def default_run_folder(recipe: Recipe, runtime: Runtime) -> Path:
    """Where the run is kept: `--out`, or a name made of what distinguishes it from others."""
    images = f"{os.path.basename(os.path.realpath(runtime.images))}-" if runtime.images else ""
    fold = "" if recipe.fold is None else f"-fold{recipe.fold}"
    fold += "" if recipe.tune_fold is None else f"-tunefold{recipe.tune_fold}"
    taught = "-distilled" if runtime.teacher else ""
    return runtime.out or Path("runs") / f"{images}{recipe.name}{fold}{taught}-seed{recipe.seed}"


def machine_settings(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Runtime:
    """The machine's part of a parsed command line; a value out of range ends the process with status 2."""
    names = [name for name in (*MACHINE_FLAGS, "compile") if hasattr(args, name)]
    try:
        return Runtime(**{"compile": False} | {name: getattr(args, name) for name in names})
    except ValueError as error:
        parser.error(f"--{error}")


def expanded(paths: Iterable[Path]) -> list[Path]:
    """The paths, each pattern that the shell left unexpanded, as on Windows, replaced by the paths that it matches."""
    return [match for path in paths for match in _matches(path)]


def _matches(path: Path) -> list[Path]:
    if not glob.has_magic(str(path)) or os.path.lexists(path):
        return [path]
    if os.path.isdir(path.parent):  # its name, which may have brackets, is not a pattern
        return [path.parent / name for name in sorted(glob.glob(path.name, root_dir=path.parent))] or [path]
    return [Path(match) for match in sorted(glob.glob(str(path)))] or [path]


def file_path(text: str) -> Path:
    """An argument's type: a path; an empty one is refused, as it would mean the current folder.

    A ~ at its start is the home folder, even where no shell has expanded it, as in --out=~/run or on Windows.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path, not an empty string")
    if os.path.lexists(text):
        return Path(text)
    return Path(os.path.expanduser(text))


def png_path(text: str) -> Path:
    """An argument's type: the path of a picture to be written."""
    path = file_path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"pictures are written as PNG: {text} should end in .png")
    return path


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argument's type: a whole number from `low` to `high`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return convert
