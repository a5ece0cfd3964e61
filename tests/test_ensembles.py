"""Several networks scored as one: on the same images, each at its own size, in the machine's precision."""

import pytest
import torch
from picture_folders import fill, save_untrained
from test_evaluate import by_hand, read, run

pytestmark = pytest.mark.usefixtures("small_demo", "empty_plots")


def test_an_ensemble_of_other_splits_is_refused_where_the_labels_agree(tmp_path, capsys):
    """As they do of the user's own pictures, which are sorted by class."""
    pictures = fill(tmp_path / "pictures", 10)
    splits = [save_untrained(tmp_path / f"{seed}.pt", pictures, 32, image_size=32, split_seed=seed) for seed in (0, 1)]
    vals = [split.val for split in splits]
    assert vals[0].tolist() != vals[1].tolist()
    assert torch.equal(*(split.dataset.labels[split.val] for split in splits))
    networks, out = [tmp_path / "0.pt", tmp_path / "1.pt"], ["--out", tmp_path / "out"]
    assert run(*networks, "--ensemble", "--images", pictures, *out) == 1
    assert "do not have the same val images" in capsys.readouterr().err


def test_each_member_of_an_ensemble_is_scored_at_its_own_size(tiny_run, tmp_path):
    assert run(tiny_run / "last.pt", tiny_run / "stage1.pt", "--ensemble", "--out", tmp_path) == 0
    last, labels = by_hand(tiny_run / "last.pt", 40)
    first, _ = by_hand(tiny_run / "stage1.pt", 32)
    mean = (last.softmax(1) + first.softmax(1)) / 2
    (result,) = read(tmp_path)["networks"][0]["results"]
    assert result["size"] == [40, 32]
    assert result["loss"] == pytest.approx(-mean[range(40), labels].log().mean().item(), rel=1e-4)
