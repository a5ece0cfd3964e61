"""What `--images` chooses where nothing is given: recipe and views that suit the folder, stored with the run."""

import json

import numpy as np
import pytest
import torch
from picture_folders import COLOURS, TINY, draw, fill

import train
from data import DataSet, Split, balanced_indices, split_indices
from harness import checkpoint
from harness.cli import parse_train
from harness.errors import RunError
from harness.interrupt import STOPPED_BY_TIME
from harness.picture_defaults import LEAST_BATCH, LEAST_STEPS, MOST_PASSES, fit_batches, fit_to_folder, fit_views
from recipes import RECIPES, replace


@pytest.mark.parametrize(
    "name, images, views",
    [
        ("cpu", 4_000, 14),
        ("cpu", 5_000, 11),
        ("cpu", 1_000, 56),
        ("cpu", 800, 70),
        ("cpu", 400, MOST_PASSES // 4),
        ("cpu", 40, MOST_PASSES // 4),
        ("cpu", 4, MOST_PASSES // 4),
        ("cpu", 50_000, 1),
        ("cpu", 1_000_000, 1),
        ("original", 4_000, 20),
        ("original", 200, 20),  # whose epochs are 8,800 passes already
        ("original", 50_000, 2),
        ("demo", 4_000, 1),
        ("demo", 30, MOST_PASSES // 16),
    ],
)
def test_views_that_suit_a_number_of_images(name, images, views):
    recipe = fit_views(RECIPES[name], images)
    assert recipe.views_per_image == views
    changed = {key for key, value in recipe.as_dict().items() if value != RECIPES[name].as_dict()[key]}
    assert changed <= {"views_per_image"}


@pytest.mark.parametrize("name", RECIPES)
def test_an_epoch_is_as_long_as_on_stl10_unless_it_repeats_too_often(name):
    recipe = RECIPES[name]
    for images in (2, 30, 244, 999, 4_000, 4_001, 30_000, 80_000):
        fitted = fit_views(recipe, images)
        passes = fitted.views_per_image * recipe.epochs
        ratio = fitted.views_per_image * images / (recipe.views_per_image * 4_000)
        if fitted.views_per_image == 1 and images > 4_000:
            assert ratio >= 0.66
        elif ratio < 0.66:
            assert passes <= max(MOST_PASSES, recipe.views_per_image * recipe.epochs) < passes + recipe.epochs
        else:
            assert ratio < 1.5


@pytest.mark.parametrize(
    "name, images, batches",
    [
        ("cpu", 4_000, [128]),
        ("cpu", 160, [128]),  # 625 steps
        ("cpu", 150, [64]),
        ("cpu", 50, [32]),  # 781 steps
        ("cpu", 4, [32]),
        ("original", 4, [32, 32]),
        ("original", 200, [128, 64]),
        ("demo", 1_200, [64, 32]),
    ],
)
def test_batches_that_leave_enough_steps(name, images, batches):
    recipe = fit_views(RECIPES[name], images)
    fitted = fit_batches(recipe, images)
    assert [stage.batch for stage in fitted.stages] == batches
    for before, after in zip(recipe.stages, fitted.stages, strict=True):
        steps = [recipe.views_per_image * images * stage.epochs / stage.batch for stage in (before, after)]
        assert after.batch == before.batch or steps[0] < LEAST_STEPS
        assert steps[1] >= LEAST_STEPS or after.batch == LEAST_BATCH
        assert after.lr == pytest.approx(before.lr * (after.batch / before.batch) ** 0.5)
        assert (after.epochs, after.crop_size, after.eval_size) == (before.epochs, before.crop_size, before.eval_size)


def test_an_epoch_is_a_batch_at_least_and_stages_that_are_skipped_stay():
    many = replace(RECIPES["cpu"], {"epochs": [40]})
    recipe = fit_batches(fit_views(many, 2), 2)
    assert recipe.views_per_image * 2 >= recipe.stages[0].batch == LEAST_BATCH
    skipped = replace(RECIPES["original"], {"epochs": [0, 140]})
    assert fit_batches(skipped, 50_000) == skipped


@pytest.mark.parametrize("world, batch", [(1, 32), (8, 32), (64, 64), (128, 128)])
def test_fitted_batches_can_be_shared_equally(world, batch):
    assert fit_batches(fit_views(RECIPES["cpu"], 50), 50, world).stages[0].batch == batch


def test_of_very_many_pictures_fewer_epochs_are_the_way(capsys):
    """One view of each an epoch is the least."""
    images = torch.zeros(1, dtype=torch.uint8).expand(60_000, 3, 32, 32)
    dataset = DataSet(images, torch.arange(60_000) % 2, ("leaf", "sky"))
    train_indices, val = torch.arange(50_000), torch.arange(50_000, 60_000)
    recipe, runtime = parse_train(["--images", "x"])
    assert fit_to_folder(recipe, runtime, Split(dataset, train_indices, val)).views_per_image == 1
    assert (
        "1 view of each picture an epoch, 200,000 in all; --views sets more, --epochs fewer\n"
        in capsys.readouterr().out
    )


def test_recipe_views_and_batches_are_chosen_for_pictures_only_and_only_unless_given():
    assert parse_train([])[0].name == "original" and parse_train([])[1].by_default == ()
    recipe, runtime = parse_train(["--images", "x"])
    assert recipe == RECIPES["cpu"] and runtime.by_default == ("recipe", "views", "batch")
    recipe, runtime = parse_train(["--images", "x", "--recipe", "original", "--views", "3", "--lr", "0.1", "0.1"])
    assert (recipe.name, recipe.views_per_image, runtime.by_default) == ("original", 3, ())


def test_what_is_found_and_chosen_is_said_and_stored(tmp_path, empty_plots, capsys):
    images = fill(tmp_path / "set", 5)
    for number in range(5, 20):
        draw(images / "sky" / f"more{number}.png", COLOURS["sky"], number)
    views = TINY.index("--views")
    command = [*TINY[:views], *TINY[views + 2 :], "--images", str(images), "--image-size", "32"]
    command += ["--epochs", "10", "15", "--max-minutes", "0.0001", "--out", str(tmp_path / "run")]
    assert train.main(command) == 3
    said = capsys.readouterr().out.splitlines()
    assert said[:4] == [
        "3 classes; 24 train + 6 val pictures: apple 4 + 1, leaf 4 + 1, sky 16 + 4",
        f"{MOST_PASSES // 25} views of each picture an epoch, {MOST_PASSES * 24:,} in all; --views sets another number",
        "the classes are unequal: --balance draws each equally often",
        "always answering sky would be right on 66.7% of the validation pictures",
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"]["views_per_image"] == MOST_PASSES // 25 and config["runtime"]["by_default"] == ["views"]
    assert checkpoint.load_network(tmp_path / "run").recipe.views_per_image == MOST_PASSES // 25
    assert train.main(command) == 3  # goes on
    with pytest.raises(RunError, match=f"views_per_image was {MOST_PASSES // 25}, now 5"):
        train.main([*command, "--views", "5"])
    capsys.readouterr()
    assert train.main([*TINY, "--images", str(images), "--balance", "--out", str(tmp_path / "other")]) == 0
    assert "an epoch" not in (said := capsys.readouterr().out) and "unequal" not in said and "3 classes; 24" in said


def test_recipe_by_default_is_said(tmp_path, empty_plots, capsys):
    tiny = (
        "--epochs 1 --batch 8 --crop-size 32 --eval-size 32 --views 1 --layers 1 1 1 --planes 2 2 2 --threads 1".split()
    )
    images = fill(tmp_path / "set", 5)
    assert train.main([*tiny, "--images", str(images), "--out", str(tmp_path / "run")]) == 0
    assert "recipe cpu, as no --recipe is given\n" in capsys.readouterr().out


def test_batches_by_default_are_said_and_stored(tmp_path, empty_plots, capsys):
    images = fill(tmp_path / "set", 12)
    tiny = "--recipe demo --views 3 --epochs 1 2 --crop-size 32 32 --eval-size 32 32 --planes 2 2 2 --threads 1".split()
    command = [*tiny, "--images", str(images), "--image-size", "32", "--out", str(tmp_path / "run")]
    assert train.main(command) == 0
    said = capsys.readouterr().out.splitlines()
    chosen = "batches of 32 at rate 0.00566 and 32 at rate 0.00283"
    assert f"{chosen}, as the run has few steps; --batch and --lr set others" in said
    stages = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["stages"]
    assert [(stage["batch"], round(stage["lr"], 5)) for stage in stages] == [(32, 0.00566), (32, 0.00283)]
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert len(rows) == 3 and checkpoint.load_network(tmp_path / "run").recipe.stages[1].batch == 32
    with pytest.raises(RunError, match="batch of stage 1 was 32, now 16"):
        train.main([*command, "--batch", "16", "16"])


@pytest.mark.parametrize("counts", [(100, 10, 90), (1, 1, 50), (7, 7, 7)])
def test_balanced_draws_show_each_class_equally_often(counts):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    indices = torch.arange(len(labels) - 1)  # not all of the images
    drawn = balanced_indices(indices, labels, (0, 0, 0))
    assert drawn.dtype == torch.int64 and len(drawn) == len(indices)
    per_class = labels[drawn].bincount(minlength=3)
    assert per_class.max() - per_class.min() <= 1
    for label in range(3):
        members = indices[labels[indices] == label]
        times = drawn.bincount(minlength=len(labels))[members]
        assert times.max() - times.min() <= 1
    assert set(drawn.tolist()) <= set(indices.tolist())


def test_balanced_draws_are_of_the_seed_and_show_everything_in_time():
    labels = torch.tensor([0] * 40 + [1] * 4)
    epochs = [balanced_indices(torch.arange(44), labels, (3, 0, epoch)) for epoch in range(30)]
    assert torch.equal(epochs[4], balanced_indices(torch.arange(44), labels, (3, 0, 4)))
    assert not torch.equal(epochs[4].sort()[0], epochs[5].sort()[0])
    assert torch.cat(epochs).unique().tolist() == list(range(44))


def test_balanced_run_learns_from_balanced_draws(tmp_path, empty_plots, monkeypatch):
    """What reaches the views of each epoch, against the draws by hand; an interrupted run sees the same."""
    images = fill(tmp_path / "set", 4)
    for number in range(20):
        draw(images / "sky" / f"more{number}.png", COLOURS["sky"], number)
    seen: list[torch.Tensor] = []
    really = train.draw_epoch
    monkeypatch.setattr(train, "draw_epoch", lambda indices, *rest: seen.append(indices) or really(indices, *rest))
    command = [*TINY, "--images", str(images), "--image-size", "32", "--balance", "--seed", "4"]
    assert train.main([*command, "--out", str(tmp_path / "run")]) == 0
    trained = checkpoint.load_network(tmp_path / "run")
    assert trained.recipe.balance
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 24)
    indices, _ = split_indices(labels, 1337, 0.2)
    expected = [balanced_indices(indices, labels, (4, stage, 0)).tolist() for stage in (0, 1)]
    assert [drawn.tolist() for drawn in seen] == expected
    for status in (STOPPED_BY_TIME, 0):
        assert train.main([*command, "--out", str(tmp_path / "again"), "--max-minutes", "1e-9"]) == status
    assert [drawn.tolist() for drawn in seen[2:]] == expected


@pytest.mark.parametrize("flag, value", [("--val-fraction", "0.3"), ("--split-seed", "1")])
def test_settings_of_a_split_are_refused_where_the_folder_has_its_own(tmp_path, empty_plots, capsys, flag, value):
    for start, name in enumerate(("train", "val")):
        fill(tmp_path / "set" / name, 2, start=500 * start)
    command = [*TINY, "--images", str(tmp_path / "set"), "--image-size", "32", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train.main([*command, flag, value])
    assert (
        stop.value.code == 2 and f"{flag} has no effect: {tmp_path / 'set'} has its own val" in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_balanced_draws_written_out():
    """From a stream apart from that of the views; another would end every balanced run begun before."""
    rng = np.random.default_rng((7, 1, 2, 1))
    large = rng.permutation(4)[:3]
    small = [*rng.permutation(2), *rng.permutation(2)][:3]
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    drawn = balanced_indices(torch.arange(6), labels, (7, 1, 2))
    assert drawn.tolist() == [*large, *(4 + number for number in small)]
