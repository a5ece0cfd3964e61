"""Checkpoints that are damaged, foreign or of another version: refused with a reason, and nothing is lost."""

import hashlib
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error
from processes import ROOT
from refusals import continued, refused
from run_contents import differences, flat, hashes

from data import AUGMENTATIONS
from harness import checkpoint
from harness.checkpoint import Damaged
from harness.errors import RunError
from harness.interrupt import STOPPED_BY_TIME

pytestmark = pytest.mark.usefixtures("empty_plots")


def rewrite(path: Path, **changes: Any) -> None:
    """Give a checkpoint other values, whole and with right checksums."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


# damaged


@pytest.mark.parametrize("size", [0, 1, 100, 0.3, 0.6, 0.99, -100, -22, -1])
def test_truncated(size: float, run: Path) -> None:
    path = run / "last.pt"
    whole = path.stat().st_size
    os.truncate(path, round(size * whole) if 0 < size < 1 else size % whole)
    refused(path, "is damaged, or not a checkpoint at all", Damaged)


def test_flipped_bits(run: Path) -> None:
    """Each is noticed, or lies in a byte that means nothing: then all values are what they were."""
    path, chance = run / "best.pt", random.Random(0)
    content, noticed = path.read_bytes(), 0
    whole = flat(checkpoint.load(path), "")
    ends = [*range(300), *range(len(content) - 700, len(content))]
    positions = chance.sample(range(len(content)), 300) + chance.sample(ends, 300)
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            assert flat(checkpoint.load(path), "") == whole, f"bit of byte {position}"
        except RunError:
            noticed += 1
    assert noticed > 400


def test_zeros_in_place_of_a_block(run: Path) -> None:
    path = run / "last.pt"
    content = bytearray(path.read_bytes())
    content[20_480:24_576] = bytes(4096)
    path.write_bytes(content)
    refused(path, "Bad CRC-32", Damaged)


def test_missing_and_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read .*gone\.pt: No such file"):
        checkpoint.load(tmp_path / "gone.pt")
    with pytest.raises(RunError, match="cannot read .*: Is a directory"):
        checkpoint.load(tmp_path)
    with pytest.raises(RunError, match=r"cannot read .*last\.pt: No such file"):
        checkpoint.load_network(tmp_path)


def test_damaged_last_state_gives_way_to_the_one_before(run: Path, tiny_run: Path, small_demo, capsys) -> None:
    os.truncate(run / "last.pt", 5000)
    assert continued(run, tiny_run) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: {run / 'last.pt'} is damaged") and "previous.pt" in said.err
    assert "3 of 4 epochs done" in said.out
    assert differences(run, tiny_run) == []


def test_both_states_damaged(run: Path, tiny_run: Path, small_demo, capsys) -> None:
    for name in ("last.pt", "previous.pt"):
        os.truncate(run / name, 5000)
    before = hashes(run)
    assert continued(run, tiny_run) == 1
    said = error(capsys)
    assert "last.pt is damaged" in said and "previous.pt is damaged" in said and "--overwrite starts over" in said
    assert hashes(run) == before
    assert continued(run, tiny_run, "--overwrite") == 0
    assert differences(run, tiny_run) == []


def test_damaged_with_none_before(run: Path, tiny_run: Path, small_demo, capsys) -> None:
    (run / "previous.pt").unlink()
    os.truncate(run / "last.pt", 0)
    assert continued(run, tiny_run) == 1
    assert "--overwrite starts over" in error(capsys)


def test_only_the_state_before(run: Path, tiny_run: Path, small_demo, capsys) -> None:
    """As a kill between the two renames of a commit leaves it: nothing to warn of."""
    (run / "last.pt").unlink()
    assert continued(run, tiny_run) == 0
    assert capsys.readouterr().err == "" and differences(run, tiny_run) == []


def test_between_two_renames_the_last_network_is_the_state_before(run: Path) -> None:
    epoch = checkpoint.load_network(run).epoch
    (run / "last.pt").unlink()
    before = checkpoint.load_network(run)
    assert (before.file.name, before.epoch, before.selected) == ("previous.pt", epoch - 1, False)
    (run / "previous.pt").unlink()
    assert checkpoint.load_network(run).file.name == "best.pt"


def test_best_weights_are_mended(run: Path, tiny_run: Path, small_demo) -> None:
    """They follow from the last state where that is the best: a kill may have come before they were written."""
    rows = checkpoint.load(run / "last.pt")["rows"]
    rewrite(run / "last.pt", rows=[row | {"val_accuracy": row["epoch"] / 10} for row in rows])
    (run / "best.pt").unlink()
    assert continued(run, tiny_run) == 0
    best = checkpoint.load(run / "best.pt", "weights")
    assert (best["epoch"], best["val_accuracy"]) == (4, 0.4)
    assert torch.equal(best["model"]["fc.weight"], checkpoint.load(run / "last.pt")["model"]["fc.weight"])


def test_weights_at_the_end_of_each_stage_but_the_last(tiny_run: Path) -> None:
    """The state before the last epoch is that at the end of stage 1 here."""
    (end,) = [checkpoint.load(path, "weights") for path in sorted(tiny_run.glob("stage*.pt"))]
    state = checkpoint.load(tiny_run / "previous.pt", "run")
    assert end["epoch"] == state["epoch"] == 3 and end["eval_size"] == 32
    assert flat(end["model"], "") == flat(state["model"], "")
    assert not checkpoint.load_network(tiny_run / "stage1.pt").selected


def test_weights_at_a_stage_s_end_are_mended(run: Path, tiny_run: Path, small_demo) -> None:
    """A kill may have come between the commit and their writing."""
    (run / "previous.pt").rename(run / "last.pt")
    (run / "stage1.pt").unlink()
    assert continued(run, tiny_run) == 0
    assert differences(run, tiny_run) == []


# older


def make_format_1(path: Path) -> None:
    """Rewrite a checkpoint as format 1 had it: older names, and a setting fewer."""
    payload = checkpoint.load(path)
    recipe = payload["recipe"]
    recipe |= {"view": recipe.pop("augmentation"), "views": recipe.pop("views_per_image")}
    recipe["mirror"] = recipe.pop("tta") == "mirror"
    del recipe["last_pool"]
    older = {"crossings": []} if payload["kind"] == "run" else {}
    torch.save(payload | older | {"format": 1}, path)


def test_network_of_format_1(run: Path, tiny_run: Path) -> None:
    make_format_1(run / "best.pt")
    old, new = (checkpoint.load_network(path, best=True) for path in (run, tiny_run))
    assert checkpoint.load(run / "best.pt")["format"] == 1 < checkpoint.FORMAT
    assert old.recipe == new.recipe and (old.epoch, old.val_accuracy) == (new.epoch, new.val_accuracy)
    assert flat(old.model.state_dict(), "") == flat(new.model.state_dict(), "")


def test_run_of_format_1_continues_bit_for_bit(run: Path, tiny_run: Path, small_demo, capsys) -> None:
    (run / "previous.pt").rename(run / "last.pt")
    make_format_1(run / "last.pt")
    assert continued(run, tiny_run) == 0
    assert "3 of 4 epochs done" in capsys.readouterr().out
    assert checkpoint.load(run / "previous.pt")["format"] == 1  # it was not rewritten
    shutil.copy(tiny_run / "previous.pt", run)
    assert differences(run, tiny_run) == []


def test_the_network_that_comes_with_the_project_is_of_format_1() -> None:
    (path,) = (ROOT / "weights").glob("cpu-long-seed0.pt")
    payload, recipe = checkpoint.load(path), checkpoint.load_network(path).recipe
    assert payload["format"] == 1 and recipe.views_per_image == payload["recipe"]["views"] == 20
    assert recipe.augmentation == AUGMENTATIONS["strong"] and payload["recipe"]["mirror"] and recipe.tta == "mirror"


# foreign


def test_other_kinds_of_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_text("accuracy,loss\n")
    refused(path, "not a checkpoint at all")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    refused(path, "not a checkpoint at all")
    for payload in (torch.zeros(3), {"model": {}}, {"format": 1}, [1], {"format": "1", "recipe": {}}):
        torch.save(payload, path)
        refused(path, "is not a checkpoint of this project")
    torch.save(torch.nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=False)
    refused(path, "not a checkpoint at all")


def test_newer_format(run: Path, tiny_run: Path, small_demo, capsys) -> None:
    for name in ("last.pt", "best.pt"):
        rewrite(run / name, format=checkpoint.FORMAT + 1)
        refused(run / name, "use a newer version")
    before = hashes(run)
    assert continued(run, tiny_run) == 1  # and does not take up previous.pt, which would lose an epoch
    assert "use a newer version" in error(capsys)
    assert hashes(run) == before


def test_weights_are_no_state(run: Path, tiny_run: Path, small_demo, capsys) -> None:
    shutil.copy(run / "best.pt", run / "last.pt")
    assert continued(run, tiny_run) == 1
    assert "holds 'weights', not 'run'" in error(capsys)


@pytest.mark.parametrize(
    "change", [{"layers": (1, 1, 2)}, {"planes": (4, 4, 16)}, {"planes": "many"}, {"optimizer": "sngd"}]
)
def test_other_architecture(change: dict, run: Path) -> None:
    recipe = checkpoint.load(run / "best.pt")["recipe"] | change
    rewrite(run / "best.pt", recipe=recipe)
    with pytest.raises(RunError, match="does not fit this network: "):
        checkpoint.load_network(run, best=True)


@pytest.mark.parametrize("missing", ["model", "classes", "eval_size", "epoch", "images"])
def test_missing_parts(missing: str, run: Path) -> None:
    payload = checkpoint.load(run / "best.pt")
    del payload[missing]
    torch.save(payload, run / "best.pt")
    with pytest.raises(RunError, match="does not fit this network: "):
        checkpoint.load_network(run, best=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {}}, "does not fit this network: "),
        ({"optimizer": {"state": {}, "param_groups": []}}, "does not fit this network: "),
        ({"optimizer": 5}, "does not fit this network: "),
        ({"schedule": None}, "does not fit this network: "),
        ({"rows": 5}, "is not a run's checkpoint"),
        ({"rows": []}, "is not a run's checkpoint"),
        ({"rows": [{"epoch": 1, "val_accuracy": 0.5}] * 9}, "is not a run's checkpoint"),
        ({"recipe": 5}, "is not a run's checkpoint"),
        ({"images": {"train": 9, "val": 9}}, "images was "),
        ({"classes": ["cat", "dog"]}, "classes was "),
    ],
)
def test_foreign_state(changes: dict, words: str, run: Path, tiny_run: Path, small_demo, capsys) -> None:
    shutil.copy(run / "previous.pt", run / "last.pt")  # the last epoch of the first stage …
    state = checkpoint.load(run / "last.pt")
    shortened = {"rows": state["rows"][:2]}  # … as one after which the stage goes on
    rewrite(run / "last.pt", **shortened | changes)
    before = hashes(run, "*last.pt")
    assert continued(run, tiny_run) == 1
    assert words in error(capsys)
    assert hashes(run, "*last.pt") == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--planes", "4", "4", "16"], "planes was [4, 4, 8], now [4, 4, 16]"),
        (["--seed", "7"], "seed was 0, now 7"),
        (["--lr", "0.02", "0.03"], "lr of stage 2 was 0.01, now 0.03"),
        (["--hue", "0.1"], "hue was 0.3, now 0.1"),
        (["--epochs", "3", "2"], "epochs of stage 2 was 1, now 2"),
        (["--train-on", "all"], "train_on was train, now all"),
    ],
)
def test_other_settings(flags: list[str], words: str, run: Path, tiny_run: Path, small_demo, capsys) -> None:
    before = hashes(run)
    assert continued(run, tiny_run, *flags) == 1
    said = error(capsys)
    assert "holds a run with other settings" in said and words in said and "--overwrite" in said
    os.truncate(run / "last.pt", 5000)  # a command that is refused mends nothing, either
    before = hashes(run)
    assert continued(run, tiny_run, *flags) == 1
    assert words in error(capsys) and hashes(run) == before
    assert hashes(run) == before


@pytest.mark.parametrize(
    ("name", "words"), [("gone.pt", "No such file"), ("", "does not fit this network: "), ("text", "not a checkpoint")]
)
def test_foreign_first_weights(name: str, words: str, run: Path, tiny_run: Path, small_demo, capsys) -> None:
    (run / "text").write_text("text")
    assert continued(run / "new", tiny_run, "--planes", "4", "4", "16", "--init", str(run / name)) == 1
    assert words in error(capsys)
    assert not list((run / "new").glob("*.pt"))


def test_the_second_stage_alone_from_the_weights_of_the_first(run: Path, tiny_run: Path, small_demo) -> None:
    """It is what the whole run made of them, bit for bit."""
    assert continued(run / "new", tiny_run, "--init", str(run / "stage1.pt"), "--epochs", "0", "1") == 0
    ours, theirs = (checkpoint.load_network(path).model.state_dict() for path in (run / "new", tiny_run))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_settings_of_another_version_are_named_and_nothing_is_lost(run: Path, tiny_run: Path, small_demo, capsys):
    payload = checkpoint.load(run / "last.pt")
    checkpoint.save(run / "last.pt", payload | {"recipe": payload["recipe"] | {"mirrored": True}})
    before = hashes(run)
    assert continued(run, tiny_run) == 1
    words = "has settings that this version does not know (mirrored); use the version that wrote them"
    assert error(capsys) == f"error: {run / 'last.pt'} {words}"
    with pytest.raises(RunError, match=r"does not know \(mirrored\)"):
        checkpoint.load_network(run)
    assert hashes(run) == before


def test_a_setting_that_is_gone_is_no_obstacle_where_it_changed_nothing(run: Path, tiny_run: Path, small_demo):
    payload = checkpoint.load(run / "last.pt")
    checkpoint.save(run / "last.pt", payload | {"recipe": payload["recipe"] | {"mirrored": False, "mix_until": 1.0}})
    assert checkpoint.load_network(run).recipe == checkpoint.load_network(tiny_run).recipe
    assert continued(run, tiny_run) == 0


def test_first_weights_are_one_file_by_any_path(run: Path, tiny_run: Path, small_demo, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run)
    shutil.copy("best.pt", "other.pt")
    flags = ["--epochs", "2", "0", "--max-minutes", "1e-9", "--init"]
    assert continued(run / "new", tiny_run, *flags, "best.pt") == STOPPED_BY_TIME
    assert continued(run / "new", tiny_run, *flags, "other.pt") == 1
    assert "init was best.pt, now other.pt" in error(capsys)
    assert continued(run / "new", tiny_run, *flags, str(run / "best.pt")) == 0


def test_a_setting_without_effect_may_differ(run: Path, tiny_run: Path, small_demo) -> None:
    """Older versions took flags that change nothing, which are refused by now."""
    payload = checkpoint.load(run / "last.pt")
    checkpoint.save(run / "last.pt", payload | {"recipe": payload["recipe"] | {"warmup": 0.3}})
    assert continued(run, tiny_run) == 0


def test_a_network_is_known_by_the_bytes_it_was_read_from(run: Path) -> None:
    digest = hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()
    trained = checkpoint.load_network(run)
    shutil.copy(run / "previous.pt", run / "last.pt")
    assert trained.sha256 == digest != checkpoint.load_network(run).sha256


def test_a_run_from_a_card_continues_without_one(run: Path, tiny_run: Path, small_demo, monkeypatch) -> None:
    """Its tensors lie under the card's name in the file."""
    payload = checkpoint.load(run / "previous.pt")
    (run / "previous.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(payload, run / "last.pt")
    assert continued(run, tiny_run) == 0
    assert differences(run, tiny_run) == []
