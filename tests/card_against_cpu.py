"""Steps on an emulated CUDA device against plain steps on the CPU: prints JSON. See test_emulated_card.py.

    card_against_cpu.py NETWORK PRECISION captured|compiled|failing

With `captured` steps the network itself is not compiled; with `compiled` ones it is, too (slow: Triton's interpreter);
with `failing` ones the compiler raises at the first step.
"""

import dataclasses
import json
import sys

import torch

from augment import draw_epoch
from harness.machine import PRECISIONS, Machine
from recipes import RECIPES, Recipe, Stage
from train import Trainer

STAGE = Stage(epochs=4, crop_size=(32,), eval_size=32, batch=4, lr=0.05)
IMAGES, EPOCHS = 24, 2
RECIPE = {
    "wide": dataclasses.replace(RECIPES["cpu-night"], layers=(1, 1, 1), planes=(8, 16, 16), average=0.9),
    "bottleneck": dataclasses.replace(RECIPES["original"], layers=(1, 1, 1), planes=(4, 4, 8), average=0.9),
}


def train(recipe: Recipe, machine: Machine) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of each step, and all that was learnt, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, 40, 40), dtype=torch.uint8, generator=generator).to(machine.device)
    labels = (torch.arange(IMAGES) % 10).to(machine.device)
    trainer, losses = Trainer(recipe, 10, machine), []
    trainer.begin_stage(STAGE, IMAGES)
    for epoch in range(EPOCHS):
        draws = draw_epoch(torch.arange(IMAGES), 1, STAGE.batch, recipe.augmentation, (0, 0, epoch))
        draws = dataclasses.replace(draws, colour_orders=draws.colour_orders[:1] * len(draws.colour_orders))
        result = trainer.train_epoch(images, labels, draws.to(machine.device), STAGE, 32, lambda: None)
        losses.append(result.losses)
    parts = [*trainer.net.state_dict().values(), *trainer.eval_model.state_dict().values()]
    return torch.cat(losses), torch.cat([part.flatten().float().cpu() for part in parts])


def main(name: str, precision: str, mode: str) -> dict:
    recipe, dtype = RECIPE[name], next(key for key, value in PRECISIONS.items() if value == precision)
    torch.set_num_threads(1)
    torch.cuda.set_device(0)
    if mode == "failing":
        torch.compile = lambda net, **_: _failing
    card = Machine(torch.device("cuda", 0), dtype, mode != "captured", graphs=mode != "failing")
    (losses, weights), (card_losses, card_weights) = (
        train(recipe, machine) for machine in (Machine(torch.device("cpu"), dtype, False), card)
    )
    return {
        "losses": (losses - card_losses).abs().max().item(),
        "weights": ((weights - card_weights).norm() / weights.norm()).item(),
        "finite": bool(losses.isfinite().all()),
        "notes": card.notes,
    }


def _failing(x: torch.Tensor) -> torch.Tensor:
    raise OSError("no compiler: Python.h is missing")


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
