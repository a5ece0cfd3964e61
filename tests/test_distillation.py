"""Learning from teachers: losses against closed forms, a step written plainly, whom a run refuses, and continuing."""

import copy
import dataclasses
import hashlib
import math
import re
import shutil
from pathlib import Path

import conftest
import picture_folders
import pytest
import torch
import torch.nn.functional as F

import train
from augment import Batch
from harness import checkpoint, errors
from harness.cli import default_run_folder, parse_train
from harness.interrupt import STOPPED_BY_TIME
from harness.machine import Machine
from harness.teachers import Teachers, digest
from losses import distillation_loss, softened_mean
from recipes import RECIPES, Stage, build_network
from scheduler import warmup_cosine_rate

PLAIN = Machine(torch.device("cpu"), torch.float32, compile=False)
RECIPE = dataclasses.replace(
    RECIPES["demo"], layers=(1, 1, 1), planes=(4, 8, 8), optimizer="sgd", schedule="cosine", label_smoothing=0.1,
    teacher_temperature=3.0, label_share=0.3,
)  # fmt: skip
STAGE = Stage(epochs=2, crop_size=(32,), eval_size=32, batch=8, lr=0.1)
pytestmark = pytest.mark.usefixtures("empty_plots")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# losses


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_written_out(temperature: float) -> None:
    """Σ q · (log q - log p) · T² for p and q proportional to exp(z / T), and its gradient, T · (p - q)."""
    student, first, second = noise(3, 4), noise(3, 4, seed=1), noise(3, 4, seed=2)
    probabilities = softened_mean([first, second], temperature)
    student.requires_grad_(True)
    losses = distillation_loss(student, probabilities, temperature)
    losses.sum().backward()
    for row in range(3):

        def shares(logits: torch.Tensor, row: int = row) -> list[float]:
            powers = [math.exp(value / temperature) for value in logits[row].tolist()]
            return [power / sum(powers) for power in powers]

        p = shares(student)
        q = [(one + other) / 2 for one, other in zip(shares(first), shares(second), strict=True)]
        expected = sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True)) * temperature**2
        assert losses[row].item() == pytest.approx(expected, rel=1e-4)
        slope = [temperature * (a - b) for a, b in zip(p, q, strict=True)]
        assert student.grad[row].tolist() == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_nothing_is_left_to_learn_from_an_equal_answer() -> None:
    logits = noise(5, 10)
    assert distillation_loss(logits, softened_mean([logits], 2.0), 2.0).abs().max() < 1e-6


def test_a_teacher_without_doubt_is_a_label() -> None:
    """One class has all of the answer: at temperature 1 what is left is the cross-entropy."""
    labels = torch.tensor([3, 0, 9])
    certain = F.one_hot(labels, 10) * 1000.0
    expected = F.cross_entropy(noise(3, 10), labels, reduction="none")
    torch.testing.assert_close(distillation_loss(noise(3, 10), softened_mean([certain], 1.0), 1.0), expected)


# the step


def networks(count: int) -> list[torch.nn.Module]:
    """Networks with running statistics of their own."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed + 10)
        net = build_network(dataclasses.replace(RECIPE, planes=(4, 8, 8 + 4 * seed)), 10)
        for step in range(3):
            net(noise(8, 3, 32, 32, seed=step))
        made.append(net)
    return made


def mixed_batch(step: int) -> Batch:
    share = torch.linspace(0.2, 1, 8)
    return Batch(noise(8, 3, 32, 32, seed=20 + step), torch.arange(8), torch.arange(8).roll(1), share)


def test_teachers_answer_in_eval_mode_and_stay_as_they_are() -> None:
    made = networks(2)
    states = copy.deepcopy([net.state_dict() for net in made])
    x = noise(8, 3, 32, 32)
    probabilities = Teachers([net.train() for net in made], 3.0, PLAIN)(x)
    expected = sum((net.eval()(x) / 3).softmax(1) for net in made) / 2
    torch.testing.assert_close(probabilities, expected.detach())
    assert not probabilities.requires_grad and probabilities.dtype == torch.float32
    for net, state in zip(made, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_teachers_calculate_in_the_runs_precision() -> None:
    seen = []
    (net,) = networks(1)
    net.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for precision in (torch.float32, torch.bfloat16):
        probabilities = Teachers([net], 1.0, dataclasses.replace(PLAIN, precision=precision))(noise(2, 3, 32, 32))
        assert probabilities.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


def begun(recipe=RECIPE, teachers=()) -> train.Trainer:
    trainer = train.Trainer(recipe, 10, PLAIN, teachers)
    trainer.begin_stage(STAGE, 40)
    trainer.net.train()
    return trainer


def test_a_step_is_the_plainly_written_one() -> None:
    """Three steps on mixed views: labels by share, the teachers' mean on the very same views, Nesterov's momentum."""
    recipe = dataclasses.replace(RECIPE, augmentation=dataclasses.replace(RECIPE.augmentation, mixup=1.0))
    made = networks(2)
    trainer = begun(recipe, copy.deepcopy(made))
    torch.manual_seed(recipe.seed)
    net = build_network(recipe, 10).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    steps = STAGE.epochs * (40 * recipe.views_per_image // 8)
    rates = (warmup_cosine_rate(step / steps, STAGE.lr, recipe.warmup) for step in range(3))
    for step, rate in enumerate(rates):
        batch = mixed_batch(step)
        logits = net(batch.x)
        smooth = [F.cross_entropy(logits, y, label_smoothing=0.1 * 10 / 9, reduction="none") for y in batch[1:3]]
        of_labels = batch.own_share * smooth[0] + (1 - batch.own_share) * smooth[1]
        with torch.no_grad():
            probabilities = torch.stack([(teacher.eval()(batch.x) / 3).softmax(1) for teacher in made]).mean(0)
        divergence = (probabilities * (probabilities.log() - (logits / 3).log_softmax(1))).sum(1)
        loss = (0.3 * of_labels + 0.7 * divergence * 9).mean()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found, _ = trainer.step(batch)
        torch.testing.assert_close(found, loss.detach(), atol=1e-5, rtol=1e-5)
    for own, expected in zip(trainer.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_with_the_labels_alone_teachers_change_nothing() -> None:
    alone, taught = begun(), begun(dataclasses.replace(RECIPE, label_share=1.0), networks(1))
    for step in range(2):
        assert torch.equal(alone.step(mixed_batch(step))[0], taught.step(mixed_batch(step))[0])
    assert all(map(torch.equal, alone.net.state_dict().values(), taught.net.state_dict().values()))


# whole runs


def run(folder: Path, *flags: object) -> int:
    """A run on the small demo, with the tiny runs' images and split."""
    words = [*conftest.TINY_RUN, "--data-dir", folder.parent / "data", "--out", folder, *flags]
    return errors.report(lambda: train.main([str(word) for word in words]))


def contents(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "last.pt")
    return state["model"] | {f"average {name}": value for name, value in (state["average"] or {}).items()}


def altered(source: Path, folder: Path, images: dict[str, object] | None = None, **recipe: object) -> Path:
    """The same weights in a folder that says something else about their recipe and images."""
    folder.mkdir()
    payload = checkpoint.load(source / "last.pt")
    payload["recipe"] |= recipe
    payload["images"] |= images or {}
    checkpoint.save(folder / "last.pt", payload)
    return folder


@pytest.fixture
def refused(tmp_path: Path, small_demo, capsys):
    """The one line with which a run ends before it has begun; its run folder is not there."""

    def refuse(*flags: object) -> str:
        assert run(tmp_path / "student", *flags) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert not (tmp_path / "student").exists()
        return said

    return refuse


def test_a_distilled_run_continues_exactly(tiny_runs, tmp_path: Path, small_demo, capsys) -> None:
    flags = ["--teacher", *tiny_runs, "--average", "0.9", "--cutmix", "1", "--seed", "5"]
    assert run(tmp_path / "whole", *flags) == 0
    said = capsys.readouterr().out
    for folder in tiny_runs:
        assert f"teacher: {folder / 'last.pt'} (demo, epoch 4 of 4, 7,338 parameters)" in said
    statuses = [run(tmp_path / "pieces", *flags, "--max-minutes", "1e-9") for _ in range(4)]
    assert statuses == [STOPPED_BY_TIME] * 3 + [0]
    whole, pieces = contents(tmp_path / "whole"), contents(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert run(tmp_path / "alone", *flags[3:]) == 0
    assert not torch.equal(contents(tmp_path / "alone")["fc.weight"], whole["fc.weight"])
    recipe = checkpoint.load_network(tmp_path / "whole").recipe
    assert recipe.teachers == tuple(sorted(digest(checkpoint.load_network(folder).model) for folder in tiny_runs))


def test_another_teacher_is_noticed(tiny_runs, tmp_path: Path, small_demo, capsys) -> None:
    first, second = tiny_runs
    assert run(tmp_path / "student", "--teacher", first, "--max-minutes", "1e-9") == STOPPED_BY_TIME
    before = contents(tmp_path / "student")
    moved = shutil.copy(first / "last.pt", tmp_path / "moved.pt")
    for flags in (["--teacher", second], ["--teacher", first, second], []):
        capsys.readouterr()
        assert run(tmp_path / "student", *flags) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert "teachers was ['" in said and "other settings" in said
    assert all(torch.equal(value, before[name]) for name, value in contents(tmp_path / "student").items())
    assert run(tmp_path / "student", "--teacher", moved, "--max-minutes", "1e-9") == STOPPED_BY_TIME


def test_the_order_of_teachers_does_not_matter(tiny_runs, tmp_path: Path, small_demo) -> None:
    flags = [["--teacher", *order, "--epochs", "2", "0"] for order in (tiny_runs, tiny_runs[::-1])]
    assert run(tmp_path / "whole", *flags[0]) == 0
    assert run(tmp_path / "pieces", *flags[0], "--max-minutes", "1e-9") == STOPPED_BY_TIME
    state = checkpoint.load(tmp_path / "pieces" / "last.pt")
    state["recipe"]["teachers"] = state["recipe"]["teachers"][::-1]  # as older versions kept them
    checkpoint.save(tmp_path / "pieces" / "last.pt", state)
    assert run(tmp_path / "pieces", *flags[1]) == 0
    whole, pieces = contents(tmp_path / "whole"), contents(tmp_path / "pieces")
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_teacher_that_may_yet_change_is_said(tmp_path: Path, small_demo, capsys) -> None:
    teacher = tmp_path / "teacher"
    assert run(teacher, "--max-minutes", "1e-9") == STOPPED_BY_TIME
    copy = shutil.copy(teacher / "last.pt", tmp_path / "copy.pt")
    for path, said in ((teacher, True), (teacher / "last.pt", True), (copy, False)):
        capsys.readouterr()
        assert run(tmp_path / "student", "--teacher", path, "--overwrite", "--epochs", "1", "0") == 0
        assert ("is not finished; if it continues" in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"split_seed": 1}, r"it has learnt \d+ of this run's 40 validation images"),
        ({"train_on": "all", "images": {"train": 200, "val": 0}}, "learnt 40 of this run's 40 validation images"),
        ({"val_fraction": 0.4, "images": {"train": 120, "val": 80}}, None),
        ({"tune_fold": 0, "images": {"train": 120, "val": 40}}, None),
        ({"init": "elsewhere.pt"}, "began with the weights of elsewhere.pt, which may have learnt 40 of this run's 40"),
        ({"teachers": ["0" * 16]}, None),
        ({"teachers": ["0" * 16], "split_seed": 1}, "its own teachers may have"),
        ({"teachers": ["0" * 16], "tune_fold": 0, "images": {"train": 120, "val": 40}}, "its own teachers may have"),
        ({"images": {"digest": "0" * 64}}, "it was trained with other images"),
        ({"images": {"train": 161}}, "it was trained with other images"),
    ],
)
def test_who_may_teach(changes, sentence, tiny_run, tmp_path: Path, refused, capsys) -> None:
    teacher = altered(tiny_run, tmp_path / "teacher", **changes)
    if sentence is None:
        flags = ["--teacher", teacher, "--max-minutes", "1e-9", "--epochs", "1", "0"]
        assert run(tmp_path / "student", *flags) == 0
        return
    said = refused("--teacher", teacher)
    assert said.startswith(f"error: {teacher / 'last.pt'} cannot teach this run: ")
    assert re.search(sentence, said), said


def test_a_fold_of_the_training_images_needs_teachers_of_its_own(tiny_run, tmp_path: Path, refused) -> None:
    assert "it has learnt 40 of this run's 40 validation images" in refused("--teacher", tiny_run, "--tune-fold", "0")
    student = tmp_path / "all"  # no image validates: whoever has seen the data set may teach
    teacher = altered(tiny_run, tmp_path / "teacher", train_on="all", images={"train": 200, "val": 0})
    assert run(student, "--teacher", teacher, "--train-on", "all", "--epochs", "1", "0") == 0


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({}, ""),
        ({"split_seed": 1}, r"it has learnt \d+ of this run's 40 validation images, so accuracy on them is flattering"),
        ({"init": "elsewhere.pt"}, "began with the weights of elsewhere.pt, which may have learnt 40 of this run's 40"),
        ({"images": {"digest": "0" * 64}}, "learnt validation images of this run, as it was trained with others"),
        ({"fold": 3}, "may have learnt validation images of this run, as it was trained with others"),
    ],
)
def test_what_first_weights_may_have_learnt_is_said(changes, sentence, tiny_run, tmp_path: Path, small_demo, capsys):
    first = altered(tiny_run, tmp_path / "first", **changes)
    flags = ["--init", first, "--max-minutes", "1e-9", "--epochs", "1", "0"]
    assert run(tmp_path / "run", *flags) == 0
    said, notes = capsys.readouterr(), checkpoint.load(tmp_path / "run" / "last.pt")["notes"]
    assert [bool(re.search(sentence, note)) for note in notes] == ([True] if sentence else [])
    assert all(note in said.out + said.err for note in notes)


def test_first_weights_of_a_network_that_pools_and_of_other_classes(tmp_path: Path, small_demo, capsys) -> None:
    once = ["--epochs", "1", "0"]
    assert run(tmp_path / "pools", "--network", "wide", *once) == 0
    assert run(tmp_path / "next", "--network", "wide", "--no-last-pool", "--init", tmp_path / "pools", *once) == 0
    assert "it was trained with --last-pool, unlike this run" in capsys.readouterr().out
    pictures = picture_folders.fill(tmp_path / "pictures", 6)
    flags = [*picture_folders.TINY, "--image-size", "32", "--images", pictures, "--data-dir", tmp_path]

    def notes(folder: str, *more: object) -> list[str]:
        words = [str(word) for word in (*flags, "--out", tmp_path / folder, *more)]
        assert errors.report(lambda: train.main(words)) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --init")]

    assert notes("first") == []
    (pictures / "sky").rename(pictures / "sea")
    classes, learnt = notes("renamed", "--init", tmp_path / "first")
    assert "its classes are others (apple, leaf and sky), so the last layer has to be learnt from scratch" in classes
    assert "may have learnt validation images of this run" in learnt
    (pictures / "apple").rename(pictures / "pear")
    (pictures / "leaf").rename(pictures / "tree")
    assert ["its classes are others" in note for note in notes("all-renamed", "--init", tmp_path / "first")] == [True]


def test_teachers_of_other_classes_and_of_other_pictures(tiny_run, tmp_path: Path, refused, capsys) -> None:
    """Of the user's own pictures a teacher teaches on the very same ones, whatever their folder is called."""
    pictures = picture_folders.fill(tmp_path / "pictures", 6)
    flags = [*picture_folders.TINY, "--image-size", "32"]

    def own(folder: Path, *more: object) -> int:
        words = [*flags, "--out", folder, "--data-dir", tmp_path, *more]
        return errors.report(lambda: train.main([str(word) for word in words]))

    assert own(tmp_path / "teacher", "--images", pictures) == 0
    assert "it has other classes (not in both: apple, " in refused("--teacher", tmp_path / "teacher")
    pictures = pictures.rename(tmp_path / "renamed")
    student = ["--images", pictures, "--teacher", tmp_path / "teacher", "--seed", "1"]
    assert own(tmp_path / "student-of-own", *student) == 0
    picture_folders.draw(pictures / "sky" / "more.png", (40, 80, 220), 99)
    capsys.readouterr()
    assert own(tmp_path / "other", *student) == 1
    assert "it was trained with other images" in capsys.readouterr().err


def test_a_teacher_is_named_once(tiny_run, tmp_path: Path, refused) -> None:
    copied = shutil.copy(tiny_run / "last.pt", tmp_path / "copy.pt")
    assert f"{tiny_run / 'last.pt'} and {copied} are the same network" in refused("--teacher", tiny_run, copied)
    assert str(tmp_path / "nothing") in refused("--teacher", tmp_path / "nothing")


def test_flags(tmp_path: Path, capsys) -> None:
    recipe, runtime = parse_train("--recipe cpu --teacher a b --teacher-temperature 4 --label-share 0.1".split())
    assert (recipe.teacher_temperature, recipe.label_share) == (4, 0.1)
    assert runtime.teacher == (Path("a"), Path("b"))
    for name in ("run0", "run1"):
        (tmp_path / name).touch()
    _, expanded = parse_train(["--teacher", str(tmp_path / "run*")])  # as Windows leaves it
    assert expanded.teacher == (tmp_path / "run0", tmp_path / "run1")
    assert default_run_folder(recipe, runtime).name == "cpu-distilled-seed0"
    for flag in ("--teacher-temperature", "--label-share"):
        with pytest.raises(SystemExit) as stop:
            parse_train([flag, "1"])
        assert stop.value.code == 2 and f"{flag} has no effect without --teacher" in capsys.readouterr().err


def test_a_teachers_digest_written_out(tiny_run: Path) -> None:
    """By another, each distilled run begun before would be refused."""
    network, content = checkpoint.load_network(tiny_run), b""
    for name, value in network.model.state_dict().items():
        content += f"{name} {tuple(value.shape)} ".encode() + value.contiguous().numpy().tobytes()
    assert digest(network.model) == hashlib.sha256(content).hexdigest()[:16]
