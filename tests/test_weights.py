"""The weights that come with the project are what their card says they are."""

import dataclasses
import re
from pathlib import Path

import pytest

from harness import checkpoint, scoring
from harness.cli import Runtime
from harness.images import load_images
from harness.machine import start_machine
from harness.metrics import hits_and_loss
from model import PARAMETER_BUDGET, count_parameters
from recipes import RECIPES

FOLDER = Path(__file__).parent.parent / "weights"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
FILES = sorted(FOLDER.glob("*.pt"))


@pytest.fixture(params=FILES, ids=lambda path: path.name)
def trained(request: pytest.FixtureRequest) -> checkpoint.TrainedNetwork:
    return checkpoint.load_network(request.param)


def test_each_file_has_its_card():
    assert FILES and re.findall(r"^## `(.*)`$", CARD, re.MULTILINE) == [path.name for path in FILES]


def test_they_are_within_the_budgets(trained):
    assert trained.file.stat().st_size < 5e6
    assert count_parameters(trained.model) <= PARAMETER_BUDGET
    assert not trained.selected


@pytest.mark.parametrize(
    "name, file",
    [("cpu-long", "cpu-long-v2-seed0.pt"), ("cpu-night", "cpu-night-seed0.pt"), ("gpu", "gpu-seed0.pt")],
)
def test_the_recipe_of_today_is_the_one_that_trained_the_newer_network(name: str, file: str):
    trained_by = checkpoint.load_network(FOLDER / file).recipe
    assert dataclasses.replace(trained_by, name=name) == RECIPES[name]  # two were run before they were named


@pytest.mark.slow
def test_they_score_what_their_card_says(trained, stl10_dir: Path):
    dataset, train, val = load_images(trained.recipe, stl10_dir, fetch=False)
    kind, images = ("1,000 validation", val) if len(val) else ("first 200 training", train[:200])
    how = {"tta": trained.recipe.tta, "precision": start_machine(Runtime(device="cpu")).precision}
    scores = scoring.tta_logits(trained.model, dataset.images[images], trained.eval_size, **how)
    hits, _ = hits_and_loss(scores, dataset.labels[images])
    card = CARD[CARD.index(f"## `{trained.file.name}`") :]
    said = re.search(rf"(\d+\.\d) % of the {kind} images", card)
    assert len(images) == (1_000 if len(val) else 200)
    assert 100 * hits.item() / len(images) == pytest.approx(float(said[1]), abs=0.2)  # other processors round otherwise
