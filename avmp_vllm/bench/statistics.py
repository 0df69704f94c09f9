"""Bootstrap intervals of paired differences and ratios.

Pairs are resampled with replacement; both members of a pair go together. The statistic of a ratio
is the ratio of the means, not the mean of the ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: Resamples, and the seed of the published intervals.
RESAMPLES = 10_000
SEED = 20260520


class Interval(NamedTuple):
    """A statistic with its 95% percentile interval."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.point:.3g} [{self.low:.3g}, {self.high:.3g}]"


def resample(rng: np.random.Generator, pairs: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Draw indices of pairs, shape [resamples, pairs]."""
    return rng.integers(0, pairs, (resamples, pairs))


def _interval(point: float, values: np.ndarray) -> Interval:
    low, high = np.percentile(values, (2.5, 97.5))
    return Interval(float(point), float(low), float(high))


def mean_difference(
    first: Sequence[float],
    second: Sequence[float],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of the mean of ``first - second`` over pairs; no effect is 0."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    drawn = resample(rng, len(differences), resamples)
    return _interval(differences.mean(), differences[drawn].mean(axis=1))


def ratio_of_means(
    first: Sequence[float],
    second: Sequence[float],
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> Interval:
    """Interval of ``mean(first) / mean(second)`` over pairs; no effect is 1."""
    above, below = (np.asarray(side, dtype=np.float64) for side in (first, second))
    if len(above) != len(below):
        raise ValueError(f"pairs are needed: {len(above)} values against {len(below)}")
    drawn = resample(rng, len(above), resamples)
    return _interval(
        above.mean() / below.mean(), above[drawn].mean(axis=1) / below[drawn].mean(axis=1)
    )
