"""What a training step launches on an emulated CUDA device, by recipe: prints JSON. See test_emulated_card.py.

Run under the emulator without arithmetic (FAKE_CUDA_MATH=none): everything up to each launch is PyTorch's own. The
network is not compiled, which changes only what lies within the captured graphs.
"""

import ctypes
import dataclasses
import json
import sys

import torch

from augment import draw_epoch
from harness.cli import Runtime
from harness.machine import start_machine
from recipes import RECIPES
from train import Trainer

STEPS = 6
COUNTERS = ("launches", "replays", "syncs", "d2h")


def counts() -> dict[str, int]:
    library = ctypes.CDLL(None)
    return {name: ctypes.c_long.in_dll(library, f"fakecuda_{name}").value for name in COUNTERS}


def main(name: str) -> dict[str, float]:
    machine = dataclasses.replace(start_machine(Runtime(device="cuda", threads=1)), compile=False)
    recipe = RECIPES[name]
    stage = recipe.stages[0]
    images = torch.zeros(50, 3, 96, 96, dtype=torch.uint8, device=machine.device)
    labels = torch.arange(50, device=machine.device) % 10
    trainer = Trainer(recipe, 10, machine)
    trainer.begin_stage(stage, STEPS * stage.batch)
    seen: list[dict[str, int]] = []
    for epoch in range(2):
        draws = draw_epoch(torch.arange(50), -(-STEPS * stage.batch // 50), stage.batch, recipe.augmentation, (epoch,))
        rows = slice(0, STEPS * stage.batch)
        draws = dataclasses.replace(
            draws,
            order=draws.order[rows],
            uniforms=draws.uniforms[rows],
            own_share=draws.own_share[rows],
            colour_orders=[(0, 1, 2, 3)] * STEPS,
        ).to(machine.device)
        torch.cuda.set_sync_debug_mode("error" if epoch else "default")  # of the second epoch nothing may wait
        trainer.net.train()
        seen.clear()

        def after_step() -> None:
            seen.append(counts())
            if len(seen) == STEPS:
                torch.cuda.set_sync_debug_mode("default")

        trainer.train_epoch(images, labels, draws, stage, stage.crop_size[0], after_step)
    first, last = seen[0], seen[-1]
    return {key: (last[key] - first[key]) / (STEPS - 1) for key in COUNTERS} | {"notes": machine.notes}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
