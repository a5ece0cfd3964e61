"""What the tests of views share: random numbers, and a distance between two samples of a distribution."""

import numpy as np
import torch

from augment import COLUMNS, ViewOptions

ORIGINAL = ViewOptions()
DRAWS = 20_000  # of which a distribution is judged


def random_uniforms(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, COLUMNS, generator=torch.Generator().manual_seed(seed))


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov-Smirnov: the largest difference between two samples' distribution functions."""
    points = np.concatenate((a, b))
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())
