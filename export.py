#!/usr/bin/env python3
"""Take a trained network elsewhere: ONNX, torch.export, or half-precision weights to pass on.

    python3 export.py runs/cpu-seed0                        # model.pt2 (torch.export), in the run folder
    python3 export.py runs/cpu-seed0 --format onnx          # model.onnx; needs onnx, onnxruntime and onnxscript
    python3 export.py last.pt --format weights              # model.pt, half the size, for this project's commands

Both exchange formats take RGB pixels from 0 to 255 as float32 (N, 3, H, W), any number of any size from 32 px, and
give logits (N, classes): the normalisation is inside, the resizing is not. (Exported by PyTorch 2.11 they take only
sizes that halve as the run's eval size does: multiples of eight for the recipes here.) Each file is loaded back and
compared with the network that it came from before it gets its name.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from harness import errors

if __name__ == "__main__":
    errors.before_imports()  # which take seconds

import torch
from torch import Tensor, nn

import augment
from harness import checkpoint, demo_shapes, files, scoring
from harness.checkpoint import TrainedNetwork
from harness.cli import add_best, file_path, refuse_among_pictures, refuse_idle_best
from harness.errors import RunError
from harness.images import Source, load_for_network, recorded_source
from model import SMALLEST_INPUT
from recipes import Recipe

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUT = f"RGB pixels from 0 to 255, float32 (N, 3, H, W), from {SMALLEST_INPUT} px"
SOURCE = "of run {}"  # by its `run_digest`
COUNTS = (1, 8)  # images in the batches that are compared

Classify = Callable[[Tensor], Tensor]  # float32 pixels (N, 3, H, W), 0 … 255, to logits (N, K)


class Classifier(nn.Module):
    """A network behind its own normalisation: float32 pixels (N, 3, H, W), 0 … 255, to logits (N, K)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", 255 * torch.tensor(augment.MEAN).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(augment.STD).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net((pixels - self.mean) / self.std)


class Format(NamedTuple):
    """A kind of file: how it is written and read back, and how far its logits may be off, as a share of the largest."""

    file: str
    write: Callable[[TrainedNetwork, Path], None]
    read: Callable[[Path], Classify]
    tolerance: float


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    refuse_idle_best(parser, args.best, [args.checkpoint])
    trained = checkpoint.load_network(args.checkpoint, args.best)
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in args.format and missing:
        raise RunError(f"--format onnx needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    out = args.out or (args.checkpoint if args.checkpoint.is_dir() else args.checkpoint.parent)
    source = recorded_source(trained.file, args.data_dir, args.images)
    refuse_among_pictures(parser, out, source.images)
    files.make_folder(out)
    for name in args.format:
        require_replaceable(out / FORMATS[name].file, trained)
    images, origin = sample(trained, source, args.data_dir or args.images)
    sizes = (trained.eval_size, trained.eval_size + 32)
    print(f"comparing on {origin}, {' and '.join(map(str, COUNTS))} at a time, at {sizes[0]} and {sizes[1]} px")
    for name in dict.fromkeys(args.format):
        export(trained, name, out, images, sizes)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line of `export.py`."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Write a trained network in formats for use elsewhere.", allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=file_path, metavar="RUN_OR_CHECKPOINT", help="run folder or checkpoint")
    add_best(parser)
    parser.add_argument(
        "--out", type=file_path, metavar="FOLDER", help="where to write (default: beside the checkpoint)"
    )
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["torch"], help="formats (default: torch)")
    words = "of the images to compare on (default: where the run had them)"
    parser.add_argument("--data-dir", type=file_path, metavar="FOLDER", help=f"folder {words}")
    parser.add_argument("--images", type=file_path, metavar="FOLDER", help=f"folder, as given to train.py, {words}")
    return parser


def require_replaceable(path: Path, trained: TrainedNetwork) -> None:
    """Raise RunError if a file exists that is not an export of the same run, or is the very checkpoint to export."""
    if not path.exists():
        return
    run = None if files.identity(path) == files.identity(trained.file) else _exported_run(path)
    if run != run_digest(trained.state()):
        what = "was not written by export.py" if run is None else "is not known to be from this run"
        raise RunError(f"{path} exists and {what}; remove it, or name another folder with --out")


def _exported_run(path: Path) -> str | None:
    """The `run_digest` of the run whose export a file is; "" if the file does not say, None if it is not an export."""
    try:
        content = path.read_bytes()
        if INPUT.encode() in content:
            found = re.search(SOURCE.format("([0-9a-f]{16})").encode(), content)
            return found[1].decode() if found else ""
        weights = checkpoint.load(path, "weights")
        matrices = (value for value in weights["model"].values() if value.ndim > 1)
        return run_digest(weights) if all(value.dtype == torch.float16 for value in matrices) else None
    except (OSError, RunError, *checkpoint.MISMATCH_ERRORS):  # a kept best.pt's are not in half precision
        return None


def run_digest(state: Mapping[str, Any]) -> str:
    """A digest that tells runs apart, from a checkpoint's values: 16 hex digits over recipe, classes and images."""
    values = [Recipe.from_dict(state["recipe"]).as_dict(), state["classes"], state["images"]]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def sample(trained: TrainedNetwork, source: Source, required: bool) -> tuple[Tensor, str]:
    """Images uint8 (N, 3, H, W) to compare on, and what they are: the run's, or drawn ones unless `required`."""
    try:
        dataset, train, val = load_for_network(trained, source, fetch=False)
    except RunError:
        if required:
            raise
        drawn, _ = demo_shapes.draw_shapes("test", 1)
        return drawn[: max(COUNTS)], "pictures drawn by the program, as the run's are missing"
    kind, indices = ("validation", val) if len(val) else ("training", train)
    return dataset.images[indices[: max(COUNTS)]], f"{kind} images of the run"


def export(trained: TrainedNetwork, name: str, out: Path, images: Tensor, sizes: tuple[int, ...]) -> None:
    """Write one format's file, unless its logits are off: then RunError is raised and an older file stays."""
    form = FORMATS[name]
    path = out / form.file
    with files.atomic_write(path) as temporary:
        with quiet():
            form.write(trained, temporary)
            difference, largest = compare(form.read(temporary), trained.model, images, sizes)
        result = f"largest difference {difference:.1e} of logits up to {largest:.1f}"
        if not difference <= form.tolerance * max(1.0, largest):  # nan is refused too
            raise RunError(f"{path} was not written, as it does not agree with the network: {result}")
        megabytes = temporary.stat().st_size / 1e6
    print(f"{path}, {megabytes:.1f} MB: {result}")


def compare(classify: Classify, model: nn.Module, images: Tensor, sizes: tuple[int, ...]) -> tuple[float, float]:
    """Largest difference between the logits of `classify` and those that the project scores, and the largest logit."""
    differences, logits = [], []
    for size in sizes:
        for count in COUNTS:
            logits.append(scoring.logits(model, images[:count], size))
            differences.append(classify(scoring.resize(images[:count], size) * 255) - logits[-1])
    return torch.cat(differences).abs().max().item(), torch.cat(logits).abs().max().item()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' own messages off the terminal; errors still raise."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def metadata(trained: TrainedNetwork) -> dict[str, str]:
    """What the user of a file needs to know, as text. `val_accuracy` is averaged over what `val_accuracy_tta` says."""
    tta = trained.recipe.at(trained.epoch - 1).tta
    return {
        "input": INPUT,
        "output": "logits, float32 (N, classes)",
        "classes": json.dumps(trained.classes),
        "eval_size": str(trained.eval_size),
        "recipe": trained.recipe.name,
        "epoch": str(trained.epoch),
        "source": SOURCE.format(run_digest(trained.state())),
    } | ({"val_accuracy": str(trained.val_accuracy), "val_accuracy_tta": tta} if trained.selected else {})


def _program(trained: TrainedNetwork) -> torch.export.ExportedProgram:
    """The network for any batch and size; in PyTorch 2.11 for sizes that halve as its eval size does."""
    classifier = Classifier(copy.deepcopy(trained.model)).to(memory_format=torch.contiguous_format).eval()
    example = torch.zeros(2, 3, trained.eval_size, trained.eval_size)
    side = torch.export.Dim.AUTO(min=SMALLEST_INPUT)
    shapes = {"pixels": {0: torch.export.Dim("batch"), 2: side, 3: side}}
    return torch.export.export(classifier.requires_grad_(False), (example,), dynamic_shapes=shapes)


def _write_torch(trained: TrainedNetwork, path: Path) -> None:
    with open(path, "wb") as file:
        torch.export.save(_program(trained), file, extra_files={"metadata.json": json.dumps(metadata(trained))})


def _read_torch(path: Path) -> Classify:
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def _write_onnx(trained: TrainedNetwork, path: Path) -> None:
    program = torch.onnx.export(
        _program(trained),
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes={"pixels": {0: "batch", 2: "height", 3: "width"}},  # names only: they are dynamic already
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props.update(metadata(trained))
    path.write_bytes(program.model_proto.SerializeToString())


def _read_onnx(path: Path) -> Classify:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])


def _write_weights(trained: TrainedNetwork, path: Path) -> None:
    """A checkpoint whose matrices are in half precision; vectors, which are small, keep theirs."""
    state = trained.state()
    state["model"] = {name: value.half() if value.ndim > 1 else value for name, value in state["model"].items()}
    checkpoint.save_weights(path, state, trained.val_accuracy)


def _read_weights(path: Path) -> Classify:
    return torch.no_grad()(Classifier(checkpoint.load_network(path).model))


FORMATS = {
    "onnx": Format("model.onnx", _write_onnx, _read_onnx, 1e-4),
    "torch": Format("model.pt2", _write_torch, _read_torch, 1e-4),
    "weights": Format("model.pt", _write_weights, _read_weights, 1e-2),
}


if __name__ == "__main__":
    errors.end_process(errors.report(main))
