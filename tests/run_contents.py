"""What runs leave in their folders, to compare one with another."""

import csv
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from harness import checkpoint

CLOCK = ("seconds", "samples_per_second")


def differences(folder: Path, reference: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    ours, theirs = contents(folder), contents(reference)
    return sorted(name for name in ours | theirs if ours.get(name) != theirs.get(name))


def contents(folder: Path) -> dict[str, Any]:
    """All that must be the same in two runs: weights, optimiser state, rows, pictures … but no times."""
    found = {}
    for path in folder.glob("*.pt"):
        found |= flat(checkpoint.load(path), path.name)
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        found |= flat(list(csv.DictReader(file)), "metrics.csv")
    found |= flat(json.loads((folder / "summary.json").read_text(encoding="utf-8")), "summary.json")
    found |= {path.name: path.read_bytes() for path in folder.glob("*.png")}
    return found | {"files": sorted(path.name for path in folder.iterdir())}


def flat(value: Any, name: str) -> dict[str, Any]:
    """Nested dicts and lists as one dict, under names with slashes; tensors as their bytes; no times."""
    if isinstance(value, torch.Tensor):
        return {name: (value.dtype, value.shape, value.contiguous().flatten().view(torch.uint8).numpy().tobytes())}
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flat(part, f"{name}/{key}") for key, part in items if key not in CLOCK]
        return functools.reduce(dict.__or__, parts, {f"{name}/": len(value)})
    return {name: value}


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [tensor for part in parts for tensor in tensors(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    """MD5 of each file in a folder, to see that none has changed."""
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.glob(pattern) if path.is_file()}


def floats(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """All floating-point numbers of a state, one after the other."""
    return torch.cat([value.flatten() for value in state.values() if value.is_floating_point()])
