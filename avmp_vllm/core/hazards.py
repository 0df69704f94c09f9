"""Hazards of reuse by age: what was counted, what is thought of it, and what follows from it.

Ages are in requests, in bins that widen with them. A state of some age has an index: the best ratio
of expected reuses to expected waiting that can be had by keeping it from now on and giving it up at
the right moment (Gittins). It falls with age where reuse does, and rises where a state that was
idle for so long tends to come back.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right

#: Ages at which bins begin, two an octave.
EDGES = (0, 1, *(edge << octave >> 1 for octave in range(1, 22) for edge in (2, 3)))
BINS = len(EDGES)
WIDTHS = tuple(
    float(end - begin) for begin, end in zip(EDGES, (*EDGES[1:], 2 * EDGES[-1]), strict=True)
)
#: Weights are brought back before they are beyond what floats can add up.
MOST_WEIGHT = 1e12


def bin_of(age: int) -> int:
    """The bin that an age is in."""
    return bisect_right(EDGES, age) - 1


class ReuseCounts:
    """Reuses and waiting by age, weighted by how recent they are."""

    __slots__ = ("reuses", "waited")

    def __init__(self) -> None:
        self.reuses = [0.0] * BINS
        self.waited = [0.0] * BINS

    def scale(self, factor: float) -> None:
        """Multiply all counts."""
        self.reuses = [value * factor for value in self.reuses]
        self.waited = [value * factor for value in self.waited]

    def add(self, other: ReuseCounts) -> None:
        """Add another's counts."""
        self.reuses = list(map(operator.add, self.reuses, other.reuses))
        self.waited = list(map(operator.add, self.waited, other.waited))

    def scaled(self, factor: float) -> ReuseCounts:
        """Counts so many times as large."""
        found = ReuseCounts()
        found.add(self)
        found.scale(factor)
        return found


def posterior(hazards: list[float], counts: ReuseCounts, prior: float) -> list[float]:
    """What is thought of the hazards of each bin, once counts have been seen.

    A bin in which nothing was seen says nothing, but the others tell whether there are more reuses
    than was thought, or fewer.

    Args:
        hazards: What was thought before, of each bin.
        counts: What was seen.
        prior: For how many reuses the former counts, in the weight of the latter.
    """
    expected = sum(map(operator.mul, counts.waited, hazards))
    level = (sum(counts.reuses) + prior) / (expected + prior)
    return [
        (reuses + prior) / (waited + prior / (hazard * level))
        for reuses, waited, hazard in zip(counts.reuses, counts.waited, hazards, strict=True)
    ]


def gittins_indices(hazards: list[float]) -> list[float]:
    """Of each bin, the best ratio of expected reuses to expected waiting from its begin on."""
    found = [0.0] * BINS
    # Bins from the last to the first; a bin takes what follows it in as long as that is better
    # than itself. Each entry: expected reuses, expected waiting, chance to get past it.
    ahead: list[tuple[float, float, float]] = []
    for age_bin in range(BINS - 1, -1, -1):
        reuses = -math.expm1(-hazards[age_bin] * WIDTHS[age_bin])
        past, waiting = 1.0 - reuses, reuses / hazards[age_bin]
        while ahead and ahead[-1][0] * waiting > reuses * ahead[-1][1]:
            more_reuses, more_waiting, more_past = ahead.pop()
            reuses += past * more_reuses
            waiting += past * more_waiting
            past *= more_past
        ahead.append((reuses, waiting, past))
        found[age_bin] = reuses / waiting
    return found


def unused_chances(hazards: list[float]) -> list[float]:
    """Chance not to have been used by the end of each bin."""
    chances, chance = [], 1.0
    for hazard, width in zip(hazards, WIDTHS, strict=True):
        chance *= math.exp(-hazard * width)
        chances.append(chance)
    return chances
