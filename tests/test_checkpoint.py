"""Checkpoints that are damaged, foreign or hostile: refused with a reason, and never run."""

import hashlib
import os
import pickle
import random
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_RUN, error
from processes import ROOT
from run_contents import differences, flat, hashes

import train
from data import AUGMENTATIONS
from harness import checkpoint, errors
from harness.checkpoint import Damaged
from harness.errors import RunError

pytestmark = pytest.mark.usefixtures("empty_plots")


@pytest.fixture
def folder(tiny_run: Path, tmp_path: Path) -> Path:
    """A finished run that may be changed."""
    return Path(shutil.copytree(tiny_run, tmp_path / tiny_run.name))


def continued(folder: Path, tiny_run: Path, *flags: str) -> int:
    """The exit status of the command that `folder`'s run was made by."""
    argv = [*TINY_RUN, "--seed", "0", "--data-dir", str(tiny_run.parent / "data"), "--out", str(folder), *flags]
    return errors.report(partial(train.main, argv))


def rewrite(path: Path, **changes: Any) -> None:
    """Give a checkpoint other values, whole and with right checksums."""
    torch.save(torch.load(path, weights_only=True) | changes, path)


def refused(path: Path, reason: str, kind: type[RunError] = RunError) -> None:
    """By each of the readers, for that reason."""
    for reader in (checkpoint.load, checkpoint.load_network):
        with pytest.raises(kind, match=reason) as caught:
            reader(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


# damaged


@pytest.mark.parametrize("size", [0, 1, 100, 0.3, 0.6, 0.99, -100, -22, -1])
def test_truncated(size: float, folder: Path) -> None:
    path = folder / "last.pt"
    whole = path.stat().st_size
    os.truncate(path, round(size * whole) if 0 < size < 1 else size % whole)
    refused(path, "is damaged, or no checkpoint at all", Damaged)


def test_flipped_bits(folder: Path) -> None:
    """Each is noticed, or lies in a byte that means nothing: then all values are what they were."""
    path, chance = folder / "best.pt", random.Random(0)
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


def test_zeros_in_place_of_a_block(folder: Path) -> None:
    path = folder / "last.pt"
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


def test_damaged_last_state_gives_way_to_the_one_before(folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    os.truncate(folder / "last.pt", 5000)
    assert continued(folder, tiny_run) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: {folder / 'last.pt'} is damaged") and "previous.pt" in said.err
    assert "3 of 4 epochs done" in said.out
    assert differences(folder, tiny_run) == []


def test_both_states_damaged(folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    for name in ("last.pt", "previous.pt"):
        os.truncate(folder / name, 5000)
    before = hashes(folder)
    assert continued(folder, tiny_run) == 1
    said = error(capsys)
    assert "last.pt is damaged" in said and "previous.pt is damaged" in said and "--overwrite starts over" in said
    assert hashes(folder) == before
    assert continued(folder, tiny_run, "--overwrite") == 0
    assert differences(folder, tiny_run) == []


def test_damaged_with_none_before(folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    (folder / "previous.pt").unlink()
    os.truncate(folder / "last.pt", 0)
    assert continued(folder, tiny_run) == 1
    assert "--overwrite starts over" in error(capsys)


def test_only_the_state_before(folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    """As a kill between the two renames of a commit leaves it: nothing to warn of."""
    (folder / "last.pt").unlink()
    assert continued(folder, tiny_run) == 0
    assert capsys.readouterr().err == "" and differences(folder, tiny_run) == []


def test_between_two_renames_the_last_network_is_the_state_before(folder: Path) -> None:
    epoch = checkpoint.load_network(folder).epoch
    (folder / "last.pt").unlink()
    before = checkpoint.load_network(folder)
    assert (before.file.name, before.epoch, before.selected) == ("previous.pt", epoch - 1, False)
    (folder / "previous.pt").unlink()
    assert checkpoint.load_network(folder).file.name == "best.pt"


def test_best_weights_are_mended(folder: Path, tiny_run: Path, small_demo) -> None:
    """They follow from the last state where that is the best: a kill may have come before they were written."""
    rows = checkpoint.load(folder / "last.pt")["rows"]
    rewrite(folder / "last.pt", rows=[row | {"val_accuracy": row["epoch"] / 10} for row in rows])
    (folder / "best.pt").unlink()
    assert continued(folder, tiny_run) == 0
    best = checkpoint.load(folder / "best.pt", "weights")
    assert (best["epoch"], best["val_accuracy"]) == (4, 0.4)
    assert torch.equal(best["model"]["fc.weight"], checkpoint.load(folder / "last.pt")["model"]["fc.weight"])


def test_weights_at_the_end_of_each_stage_but_the_last(tiny_run: Path) -> None:
    """The state before the last epoch is that at the end of stage 1 here."""
    (end,) = [checkpoint.load(path, "weights") for path in sorted(tiny_run.glob("stage*.pt"))]
    state = checkpoint.load(tiny_run / "previous.pt", "run")
    assert end["epoch"] == state["epoch"] == 3 and end["eval_size"] == 32
    assert flat(end["model"], "") == flat(state["model"], "")
    assert not checkpoint.load_network(tiny_run / "stage1.pt").selected


def test_weights_at_a_stage_s_end_are_mended(folder: Path, tiny_run: Path, small_demo) -> None:
    """A kill may have come between the commit and their writing."""
    (folder / "previous.pt").rename(folder / "last.pt")
    (folder / "stage1.pt").unlink()
    assert continued(folder, tiny_run) == 0
    assert differences(folder, tiny_run) == []


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


def test_network_of_format_1(folder: Path, tiny_run: Path) -> None:
    make_format_1(folder / "best.pt")
    old, new = (checkpoint.load_network(path, best=True) for path in (folder, tiny_run))
    assert checkpoint.load(folder / "best.pt")["format"] == 1 < checkpoint.FORMAT
    assert old.recipe == new.recipe and (old.epoch, old.val_accuracy) == (new.epoch, new.val_accuracy)
    assert flat(old.model.state_dict(), "") == flat(new.model.state_dict(), "")


def test_run_of_format_1_continues_bit_for_bit(folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    (folder / "previous.pt").rename(folder / "last.pt")
    make_format_1(folder / "last.pt")
    assert continued(folder, tiny_run) == 0
    assert "3 of 4 epochs done" in capsys.readouterr().out
    assert checkpoint.load(folder / "previous.pt")["format"] == 1  # it was not rewritten
    shutil.copy(tiny_run / "previous.pt", folder)
    assert differences(folder, tiny_run) == []


def test_the_network_that_comes_with_the_project_is_of_format_1() -> None:
    (path,) = (ROOT / "weights").glob("cpu-long-seed0.pt")
    payload, recipe = checkpoint.load(path), checkpoint.load_network(path).recipe
    assert payload["format"] == 1 and recipe.views_per_image == payload["recipe"]["views"] == 20
    assert recipe.augmentation == AUGMENTATIONS["strong"] and payload["recipe"]["mirror"] and recipe.tta == "mirror"


# foreign


def test_other_kinds_of_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_text("accuracy,loss\n")
    refused(path, "no checkpoint at all")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    refused(path, "no checkpoint at all")
    for payload in (torch.zeros(3), {"model": {}}, {"format": 1}, [1], {"format": "1", "recipe": {}}):
        torch.save(payload, path)
        refused(path, "is not a checkpoint of this project")
    torch.save(torch.nn.Linear(2, 2).state_dict(), path, _use_new_zipfile_serialization=False)
    refused(path, "no checkpoint at all")


def test_newer_format(folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    for name in ("last.pt", "best.pt"):
        rewrite(folder / name, format=checkpoint.FORMAT + 1)
        refused(folder / name, "use a newer version")
    before = hashes(folder)
    assert continued(folder, tiny_run) == 1  # and does not take up previous.pt, which would lose an epoch
    assert "use a newer version" in error(capsys)
    assert hashes(folder) == before


def test_weights_are_no_state(folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    shutil.copy(folder / "best.pt", folder / "last.pt")
    assert continued(folder, tiny_run) == 1
    assert "holds 'weights', not 'run'" in error(capsys)


@pytest.mark.parametrize(
    "change", [{"layers": (1, 1, 2)}, {"planes": (4, 4, 16)}, {"planes": "many"}, {"optimizer": "sngd"}]
)
def test_other_architecture(change: dict, folder: Path) -> None:
    recipe = checkpoint.load(folder / "best.pt")["recipe"] | change
    rewrite(folder / "best.pt", recipe=recipe)
    with pytest.raises(RunError, match="does not fit this network: "):
        checkpoint.load_network(folder, best=True)


@pytest.mark.parametrize("missing", ["model", "classes", "eval_size", "epoch", "images"])
def test_missing_parts(missing: str, folder: Path) -> None:
    payload = checkpoint.load(folder / "best.pt")
    del payload[missing]
    torch.save(payload, folder / "best.pt")
    with pytest.raises(RunError, match="does not fit this network: "):
        checkpoint.load_network(folder, best=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {}}, "does not fit this network: "),
        ({"optimizer": {"state": {}, "param_groups": []}}, "does not fit this network: "),
        ({"optimizer": 5}, "does not fit this network: "),
        ({"schedule": None}, "does not fit this network: "),
        ({"rows": 5}, "is no state of a run"),
        ({"recipe": 5}, "is no state of a run"),
        ({"images": {"train": 9, "val": 9}}, "images was "),
        ({"classes": ["cat", "dog"]}, "classes was "),
    ],
)
def test_foreign_state(changes: dict, words: str, folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    shutil.copy(folder / "previous.pt", folder / "last.pt")  # the last epoch of the first stage …
    state = checkpoint.load(folder / "last.pt")
    shortened = {"rows": state["rows"][:2]}  # … as one after which the stage goes on
    rewrite(folder / "last.pt", **shortened | changes)
    before = hashes(folder, "*last.pt")
    assert continued(folder, tiny_run) == 1
    assert words in error(capsys)
    assert hashes(folder, "*last.pt") == before


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
def test_other_settings(flags: list[str], words: str, folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    before = hashes(folder)
    assert continued(folder, tiny_run, *flags) == 1
    said = error(capsys)
    assert "holds a run with other settings" in said and words in said and "--overwrite" in said
    assert hashes(folder) == before


@pytest.mark.parametrize(
    ("name", "words"), [("gone.pt", "No such file"), ("", "does not fit this network: "), ("text", "no checkpoint")]
)
def test_foreign_first_weights(name: str, words: str, folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    (folder / "text").write_text("text")
    assert continued(folder / "new", tiny_run, "--planes", "4", "4", "16", "--init", str(folder / name)) == 1
    assert words in error(capsys)
    assert not list((folder / "new").glob("*.pt"))


def test_the_second_stage_alone_from_the_weights_of_the_first(folder: Path, tiny_run: Path, small_demo) -> None:
    """It is what the whole run made of them, bit for bit."""
    assert continued(folder / "new", tiny_run, "--init", str(folder / "stage1.pt"), "--epochs", "0", "1") == 0
    ours, theirs = (checkpoint.load_network(path).model.state_dict() for path in (folder / "new", tiny_run))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_settings_of_another_version_are_named_and_nothing_is_lost(folder: Path, tiny_run: Path, small_demo, capsys):
    payload = checkpoint.load(folder / "last.pt")
    checkpoint.save(folder / "last.pt", payload | {"recipe": payload["recipe"] | {"mirrored": True}})
    before = hashes(folder)
    assert continued(folder, tiny_run) == 1
    words = "has settings that this version does not know (mirrored); use the version that wrote them"
    assert error(capsys) == f"error: {folder / 'last.pt'} {words}"
    with pytest.raises(RunError, match=r"does not know \(mirrored\)"):
        checkpoint.load_network(folder)
    assert hashes(folder) == before


def test_a_setting_that_is_gone_is_no_obstacle_where_it_changed_nothing(folder: Path, tiny_run: Path, small_demo):
    payload = checkpoint.load(folder / "last.pt")
    checkpoint.save(folder / "last.pt", payload | {"recipe": payload["recipe"] | {"mirrored": False}})
    assert checkpoint.load_network(folder).recipe == checkpoint.load_network(tiny_run).recipe
    assert continued(folder, tiny_run) == 0


def test_a_setting_without_effect_may_differ(folder: Path, tiny_run: Path, small_demo) -> None:
    """Older versions took flags that change nothing, which are refused by now."""
    payload = checkpoint.load(folder / "last.pt")
    checkpoint.save(folder / "last.pt", payload | {"recipe": payload["recipe"] | {"warmup": 0.3}})
    assert continued(folder, tiny_run) == 0


def test_a_network_is_known_by_the_bytes_it_was_read_from(folder: Path) -> None:
    digest = hashlib.sha256((folder / "last.pt").read_bytes()).hexdigest()
    trained = checkpoint.load_network(folder)
    shutil.copy(folder / "previous.pt", folder / "last.pt")
    assert trained.sha256 == digest != checkpoint.load_network(folder).sha256


# hostile


class Hostile:
    """Leaves a file where it is unpickled without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def hostile_files(folder: Path, trace: Path) -> dict[str, Path]:
    thing, recipe = Hostile(trace), checkpoint.load(folder / "best.pt")["recipe"]
    files = {name: folder / f"{name}.pt" for name in ("pickle", "zip", "inside", "old")}
    files["pickle"].write_bytes(pickle.dumps(thing))
    torch.save(thing, files["zip"])
    torch.save({"format": 1, "kind": "run", "recipe": recipe, "extra": thing}, files["inside"])
    torch.save({"format": 1, "kind": "run", "recipe": thing}, files["old"], _use_new_zipfile_serialization=False)
    return files


@pytest.mark.parametrize("name", ["pickle", "zip", "inside", "old"])
def test_hostile_checkpoint_is_not_run(name: str, folder: Path, tiny_run: Path, small_demo, capsys) -> None:
    trace = folder / "trace"
    path = hostile_files(folder, trace)[name]
    pickle.loads(path.read_bytes()) if name == "pickle" else torch.load(path, weights_only=False)
    assert trace.exists()  # the attack is a real one …
    trace.unlink()
    refused(path, "was not opened: it holds more than plain values|no checkpoint at all")
    shutil.copy(path, folder / "last.pt")
    (folder / "previous.pt").unlink()
    assert continued(folder, tiny_run) == 1
    error(capsys)
    assert continued(folder / "new", tiny_run, "--init", str(path)) == 1
    error(capsys)
    assert not trace.exists()  # … and fails


def test_nothing_else_unpickles() -> None:
    words = ("pickle.load", "weights_only=False", "allow_pickle=True", "joblib", "eval(", "exec(", "torch.jit.load")
    paths = [*ROOT.glob("*.py"), *ROOT.glob("harness/**/*.py")]
    assert {"train.py", "checkpoint.py"} <= {path.name for path in paths}
    for path in paths:
        text = path.read_text(encoding="utf-8").replace(".eval(", "").replace("_eval(", "")
        assert not [word for word in words if word in text], path.name
        assert text.count("torch.load(") == text.count("weights_only=True)"), path.name


def test_a_compressed_archive_is_not_unpacked(folder: Path) -> None:
    """A few kilobytes could hold gigabytes of zeros."""
    path = folder / "best.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    refused(path, "is compressed", Damaged)


def test_a_run_from_a_card_continues_without_one(folder: Path, tiny_run: Path, small_demo, monkeypatch) -> None:
    """Its tensors lie under the card's name in the file."""
    payload = checkpoint.load(folder / "previous.pt")
    (folder / "previous.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(payload, folder / "last.pt")
    assert continued(folder, tiny_run) == 0
    assert differences(folder, tiny_run) == []
