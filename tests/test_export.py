"""What is exported gives the logits that the project scores, for any batch and size, and says what it takes."""

import dataclasses
import importlib.util
import io
import json
import math
import re
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from picture_folders import fill, save_untrained
from torch import Tensor

import augment
import export
import recipes
from harness import checkpoint, demo_shapes, download, scoring
from harness.errors import RunError
from harness.images import Source

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.ONNX_PACKAGES), reason="onnx is not installed"
)
FORMATS = [pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow]), "torch", "weights"]
CLASSES = ("apple", "leaf", "sky")


class Exported(NamedTuple):
    name: str
    path: Path
    told: str
    noise: str


WIDE = {"network": "wide", "cosine_stem": True, "last_pool": False, "planes": (6, 8, 10)}  # as cpu-long's


@pytest.fixture(scope="module", params=[{"planes": (3, 4, 5)}, WIDE], ids=["bottleneck", "wide"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small network for three classes whose weights and statistics are random."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipes.replace(recipes.RECIPES["demo"], request.param)
    torch.manual_seed(0)
    net = recipes.build_network(recipe, 3)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 2)
    images = {"train": 24, "val": 6, "digest": "of a folder that is not here"}
    payload = {"kind": "weights", "recipe": recipe.as_dict(), "classes": list(CLASSES), "images": images}
    checkpoint.save(folder / "last.pt", {**payload, "eval_size": 48, "epoch": 7, "model": net.state_dict()})
    return folder


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return demo_shapes.draw_shapes("test", 1)[0]


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The run's network in one of the formats, and what was printed and warned of meanwhile."""
    folder, form = tmp_path_factory.mktemp("exported"), export.FORMATS[request.param]
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(out), redirect_stderr(err):
        warnings.simplefilter("always")
        assert export.main([str(run), "--out", str(folder), "--format", request.param]) == 0
    assert [path.name for path in folder.iterdir()] == [form.file]
    return Exported(request.param, folder / form.file, out.getvalue(), err.getvalue() + "".join(map(str, caught)))


def test_each_format_agrees_with_what_the_project_scores(exported: Exported, run: Path, pictures: Tensor) -> None:
    form = export.FORMATS[exported.name]
    model = checkpoint.load_network(run).model
    classify = form.read(exported.path)
    for count, size in ((1, 32), (2, 96), (5, 56 if torch.__version__.startswith("2.11.") else 50), (10, 64)):
        batch = pictures[:count]
        expected = scoring.logits(model, batch, size)
        got = classify(scoring.resize(batch, size) * 255)
        torch.testing.assert_close(got, expected, rtol=0, atol=form.tolerance * expected.abs().max().item())
    oblong = pictures[:3, :, :40].float()
    with torch.no_grad():
        expected = model(augment.normalise(oblong / 255))
    torch.testing.assert_close(classify(oblong), expected, rtol=0, atol=form.tolerance * expected.abs().max().item())


def test_only_the_comparison_is_printed(exported: Exported) -> None:
    assert exported.noise == ""
    first, second = exported.told.splitlines()
    assert first == (
        "comparing on pictures drawn by the program, as the run's are missing, 1 and 8 at a time, at 48 and 80 px"
    )
    assert re.fullmatch(
        re.escape(str(exported.path)) + r", 0\.\d MB: largest difference \d\.\de-\d\d of logits up to \d+\.\d", second
    )


def test_files_say_what_they_take_and_give(exported: Exported) -> None:
    if exported.name == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
        (pixels,), (logits,) = session.get_inputs(), session.get_outputs()
        assert (pixels.name, pixels.type, pixels.shape) == ("pixels", "tensor(float)", ["batch", 3, "height", "width"])
        assert (logits.name, logits.shape) == ("logits", ["batch", 3])
        told = session.get_modelmeta().custom_metadata_map
        session.run(None, {"pixels": torch.zeros(1, 3, 33, 57).numpy()})
    elif exported.name == "torch":
        extra = {"metadata.json": ""}
        program = torch.export.load(exported.path, extra_files=extra).module()
        told = json.loads(extra["metadata.json"])
        with pytest.raises((AssertionError, RuntimeError)):
            program(torch.zeros(1, 3, 30, 30))
    else:
        trained = checkpoint.load_network(exported.path)
        told = export.metadata(trained)
        assert trained.images == {"train": 24, "val": 6, "digest": "of a folder that is not here"}
    assert json.loads(told["classes"]) == list(CLASSES) and told["eval_size"] == "48" and told["epoch"] == "7"
    assert "RGB pixels from 0 to 255, float32" in told["input"] and "logits" in told["output"]


def test_a_file_is_known_by_its_run(exported: Exported, run: Path) -> None:
    trained = checkpoint.load_network(run)
    export.require_replaceable(exported.path, dataclasses.replace(trained, epoch=8))
    other = dataclasses.replace(trained, recipe=dataclasses.replace(trained.recipe, seed=1))
    with pytest.raises(RunError, match="not known to be from this run; remove it, or name another folder with --out"):
        export.require_replaceable(exported.path, other)


def test_a_selected_networks_accuracy_comes_with_how_it_was_scored(run: Path) -> None:
    trained = checkpoint.load_network(run)
    assert "val_accuracy" not in export.metadata(dataclasses.replace(trained, val_accuracy=None))
    recipe = dataclasses.replace(recipes.RECIPES["demo"], tta="multi")  # of 16 epochs, the last of which alone has it
    for epoch, tta in ((15, "mirror"), (16, "multi")):
        told = export.metadata(dataclasses.replace(trained, recipe=recipe, epoch=epoch, val_accuracy=0.5))
        assert (told["val_accuracy"], told["val_accuracy_tta"]) == ("0.5", tta)


def test_half_precision_weights_are_a_checkpoint_of_half_the_size(tmp_path: Path) -> None:
    recipe = recipes.RECIPES["original"]
    torch.manual_seed(0)
    whole = tmp_path / "whole.pt"
    payload = {"kind": "weights", "recipe": recipe.as_dict(), "classes": list("0123456789"), "eval_size": 96}
    state = recipes.build_network(recipe, 10).state_dict()
    payload |= {"images": {"train": 4000, "val": 1000}, "epoch": 3, "val_accuracy": 0.75}
    checkpoint.save(whole, {**payload, "model": state})
    before = checkpoint.load_network(whole)
    half = tmp_path / "half.pt"
    export.FORMATS["weights"].write(before, half)
    assert half.stat().st_size < 5_000_000 < whole.stat().st_size
    after = checkpoint.load_network(half)
    for name in ("recipe", "classes", "images", "eval_size", "epoch", "val_accuracy", "selected"):
        assert getattr(after, name) == getattr(before, name)
    assert after.val_accuracy == 0.75
    for name, value in after.model.state_dict().items():
        expected = state[name].half().float() if state[name].ndim > 1 else state[name]
        assert value.dtype == state[name].dtype and torch.equal(value, expected), name


@pytest.mark.parametrize("factor", [1.02, math.nan])
def test_file_that_disagrees_is_not_written(factor: float, run: Path, tmp_path: Path, monkeypatch) -> None:
    assert export.main([str(run), "--out", str(tmp_path), "--format", "weights"]) == 0
    older = (tmp_path / "model.pt").read_bytes()
    form = export.FORMATS["weights"]

    def read_wrongly(path: Path) -> export.Classify:
        classify = form.read(path)
        return lambda pixels: classify(pixels) * (factor if len(pixels) > 1 else 1)

    monkeypatch.setitem(export.FORMATS, "weights", form._replace(read=read_wrongly))
    with pytest.raises(RunError, match="was not written, as it does not agree with the network: largest difference"):
        export.main([str(run), "--out", str(tmp_path), "--format", "weights"])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pt", older)]


def test_no_format_is_written_where_one_would_replace_a_foreign_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"of another project")
    with pytest.raises(RunError, match="model.pt exists and was not written by export.py"):
        export.main([str(run), "--out", str(tmp_path), "--format", "torch", "weights"])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.pt", b"of another project")]


def test_weights_that_no_export_wrote_are_not_replaced(run: Path, tmp_path: Path) -> None:
    """A kept copy of a run's weights, of full precision, has the name that an export would take."""
    kept = shutil.copy(run / "last.pt", tmp_path / "model.pt")
    before = kept.read_bytes()
    with pytest.raises(RunError, match="model.pt exists and was not written by export.py"):
        export.main([str(run), "--out", str(tmp_path), "--format", "weights"])
    assert kept.read_bytes() == before


def test_missing_packages_are_named_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name))
    with pytest.raises(RunError, match="^--format onnx needs onnx and onnxruntime and onnxscript: pip install onnx "):
        export.main([str(run), "--out", str(tmp_path), "--format", "torch", "onnx"])
    assert not list(tmp_path.iterdir())


def test_torch_is_the_format_and_the_last_epoch_the_network_by_default(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def write(trained: checkpoint.TrainedNetwork, path: Path) -> None:
        written.append(trained.file.name)
        path.write_text(json.dumps(export.metadata(trained)))

    form = export.FORMATS["torch"]._replace(
        write=write,
        read=lambda path: export.Classifier(checkpoint.load_network(tiny_run, best=len(written) > 1).model),
    )
    monkeypatch.setitem(export.FORMATS, "torch", form)
    for flags in ([], ["--best"]):
        assert export.main([str(tiny_run), "--out", str(tmp_path), *flags]) == 0
    assert written == ["last.pt", "best.pt"] and [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_images_of_the_run_are_compared_where_they_are(tmp_path: Path) -> None:
    pictures = fill(tmp_path / "pictures", 5)
    split = save_untrained(tmp_path / "best.pt", pictures, 64, image_size=40)
    trained = checkpoint.load_network(tmp_path / "best.pt")
    images, origin = export.sample(trained, Source(tmp_path, pictures), True)
    assert torch.equal(images, split.dataset.images[split.val]) and origin == "validation images of the run"
    assert export.sample(trained, Source(tmp_path, None), False)[0].shape == (8, 3, 96, 96)
    with pytest.raises(RunError, match="cannot read the folder"):
        export.sample(trained, Source(tmp_path, tmp_path / "absent"), True)


def test_nothing_is_fetched_to_compare_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "fetch", lambda *_: pytest.fail("fetched"))
    recipe = recipes.replace(recipes.RECIPES["demo"], {"planes": (2, 2, 2), "name": "original"})
    payload = {"kind": "weights", "recipe": recipe.as_dict(), "classes": list("0123456789"), "eval_size": 96}
    payload |= {"images": {"train": 4000, "val": 1000}, "epoch": 3}
    checkpoint.save(tmp_path / "a.pt", {**payload, "model": recipes.build_network(recipe, 10).state_dict()})
    trained = checkpoint.load_network(tmp_path / "a.pt")
    assert "drawn by the program" in export.sample(trained, Source(tmp_path / "data", None), False)[1]
    assert not (tmp_path / "data").exists()


def test_a_network_of_all_images_is_compared_on_those(tmp_path: Path) -> None:
    pictures = fill(tmp_path / "pictures", 5)
    split = save_untrained(tmp_path / "all.pt", pictures, 64, image_size=40, train_on="all")
    trained = checkpoint.load_network(tmp_path / "all.pt")
    images, origin = export.sample(trained, Source(tmp_path, pictures), True)
    assert torch.equal(images, split.dataset.images[:8]) and origin == "training images of the run"
