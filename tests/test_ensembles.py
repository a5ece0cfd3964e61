"""Several networks scored as one: on the same images, each at its own size, in the machine's precision."""

import pytest
import torch
from picture_folders import fill
from test_evaluate import by_hand, read, run

import recipes
from harness import checkpoint
from harness.images import fingerprint, load_images

pytestmark = pytest.mark.usefixtures("small_demo", "empty_plots")


def test_an_ensemble_of_other_splits_is_refused_where_the_labels_agree(tmp_path, capsys):
    """As they do of the user's own pictures, which are sorted by class."""
    pictures, vals = fill(tmp_path / "pictures", 10), []
    for seed in (0, 1):
        changes = {"planes": (2, 2, 2), "image_size": 32, "split_seed": seed}
        recipe = recipes.replace(recipes.RECIPES["demo"], changes)
        split = load_images(recipe, tmp_path, pictures)
        vals.append(split.val)
        payload = {"kind": "weights", "recipe": recipe.as_dict(), "classes": list(split.dataset.classes)}
        payload |= {"images": fingerprint(split), "eval_size": 32, "epoch": 16}
        model = recipes.build_network(recipe, 3).state_dict()
        checkpoint.save(tmp_path / f"{seed}.pt", payload | {"model": model})
    assert vals[0].tolist() != vals[1].tolist()
    assert torch.equal(*(split.dataset.labels[val] for val in vals))
    networks, out = [tmp_path / "0.pt", tmp_path / "1.pt"], ["--out", tmp_path / "out"]
    assert run(*networks, "--ensemble", "--images", pictures, *out) == 1
    assert "have not the same val images" in capsys.readouterr().err


def test_each_member_of_an_ensemble_is_scored_at_its_own_size(tiny_run, tmp_path):
    assert run(tiny_run / "last.pt", tiny_run / "stage1.pt", "--ensemble", "--out", tmp_path) == 0
    last, labels = by_hand(tiny_run / "last.pt", 40)
    first, _ = by_hand(tiny_run / "stage1.pt", 32)
    mean = (last.softmax(1) + first.softmax(1)) / 2
    (result,) = read(tmp_path)["networks"][0]["results"]
    assert result["size"] == [40, 32]
    assert result["loss"] == pytest.approx(-mean[range(40), labels].log().mean().item(), rel=1e-4)
