"""How soon a kept state is used again, learned from what has been used.

States are sorted into classes (what kind of state, used how often, superseded or not, how long a
prefix), and classes into families, from which a class borrows what it has not seen itself: the
shape of its hazard by age, brought to the level that it has seen at all ages together. A class has
a hazard of reuse for each bin of age; age is counted in requests, so that equal traffic gives equal
decisions whatever a clock says. From the hazards follows the index of a state of some age: the best
ratio of expected reuses to expected waiting that can be had by keeping it from now on and giving it
up at the right moment (Gittins). It falls with age where reuse does, and rises where a state that
was idle for so long tends to come back.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from typing import NamedTuple

#: Ages at which bins begin, two an octave.
EDGES = (0, 1, *(edge << octave >> 1 for octave in range(1, 22) for edge in (2, 3)))
BINS = len(EDGES)
_WIDTHS = tuple(
    float(end - begin) for begin, end in zip(EDGES, (*EDGES[1:], 2 * EDGES[-1]), strict=True)
)
#: Before anything is known: the chance that a new state is used by the next request.
_FIRST_GUESS = 0.01
#: The same for a state that was not used for so long.
_FIRST_GUESSES = [_FIRST_GUESS / (1 + edge / 8) for edge in EDGES]
#: For how many reuses the first guess counts, what a family borrows from all states, and what a
#: class borrows from its family.
_STRENGTHS = (1.0, 2.0, 6.0)
#: Requests after which what was learned counts half.
HALF_LIFE = 4_000
#: Indices are computed again after an eighth of the requests so far, but not oftener nor later.
_SOONEST, _LATEST = 16, 256


def bin_of(age: int) -> int:
    """The bin that an age is in."""
    return bisect_right(EDGES, age) - 1


class Class(NamedTuple):
    """What states are told apart by.

    Attributes:
        family: Told apart first; classes of a family borrow from each other.
        detail: Told apart where enough was seen.
    """

    family: tuple[str, bool]
    detail: tuple[int, ...]


class _Counts:
    """Reuses and waiting by age, weighted by how recent they are."""

    __slots__ = ("reuses", "waited")

    def __init__(self) -> None:
        self.reuses = [0.0] * BINS
        self.waited = [0.0] * BINS

    def scale(self, factor: float) -> None:
        """Multiply all counts."""
        self.reuses = [value * factor for value in self.reuses]
        self.waited = [value * factor for value in self.waited]


class _Prospects(NamedTuple):
    """What follows from a class's hazards.

    Attributes:
        epoch: Of what was known when they were computed.
        indices: By age.
        unused: Chance not to have been used by the end of each bin.
    """

    epoch: int
    indices: list[float]
    unused: list[float]


class ReuseRates:
    """Hazards of reuse by class and age.

    Args:
        now: Requests that came before anything was learned.

    Attributes:
        now: Requests so far.
        epoch: Indices are as they were when it began.
    """

    def __init__(self, now: int = 0) -> None:
        self.now = self._began = now
        self.epoch = 0
        self._next_epoch = 0
        self._all = _Counts()
        self._families: dict[tuple[str, bool], _Counts] = {}
        self._classes: dict[Class, _Counts] = {}
        self._prospects: dict[Class, _Prospects] = {}
        #: Hazards of families, and under None of all states, as of the epoch below.
        self._borrowed: dict[tuple[str, bool] | None, list[float]] = {}
        self._borrowed_in = -1
        # Old counts are not scaled down; new ones are scaled up.
        self._weight = 1.0
        self._growth = 2.0 ** (1 / HALF_LIFE)

    def tick(self) -> None:
        """A request has come."""
        self.now += 1
        if self.now >= self._next_epoch:
            self.epoch += 1
            seen = self.now - self._began
            self._next_epoch = self.now + min(max(seen // 8, _SOONEST), _LATEST)
        self._weight *= self._growth
        if self._weight > 1e12:
            for counts in (self._all, *self._families.values(), *self._classes.values()):
                counts.scale(1 / self._weight)
            self._weight = 1.0

    def waited(self, cls: Class, age_bin: int, ages: float) -> None:
        """A state of a class has waited in a bin for so many requests."""
        for counts in self._counts(cls):
            counts.waited[age_bin] += ages * self._weight

    def reused(self, cls: Class, age_bin: int) -> None:
        """A state of a class was used at an age."""
        for counts in self._counts(cls):
            counts.reuses[age_bin] += self._weight

    def index(self, cls: Class, age_bin: int) -> float:
        """Best ratio of expected reuses to expected waiting from an age on, a request."""
        return self._fresh(cls).indices[age_bin]

    def chance(self, cls: Class, ages: int) -> float:
        """Chance that a new state of a class is used within so many requests."""
        return 1.0 - self._fresh(cls).unused[bin_of(max(ages, 0))]

    def _counts(self, cls: Class) -> tuple[_Counts, _Counts, _Counts]:
        """Of everything, of a class's family and of the class itself."""
        family = self._families.get(cls.family)
        if family is None:
            family = self._families[cls.family] = _Counts()
        own = self._classes.get(cls)
        if own is None:
            own = self._classes[cls] = _Counts()
        return self._all, family, own

    def _fresh(self, cls: Class) -> _Prospects:
        prospects = self._prospects.get(cls)
        if prospects is None or prospects.epoch != self.epoch:
            hazards = self._hazards(cls)
            prospects = _Prospects(self.epoch, _indices(hazards), _unused(hazards))
            self._prospects[cls] = prospects
        return prospects

    def _hazards(self, cls: Class) -> list[float]:
        """Of each bin; what a class has not seen is as in its family, or else in general.

        A bin in which nothing was seen says nothing, but the others tell whether there are more
        reuses than was thought, or fewer.
        """
        every, family, own = self._counts(cls)
        # What classes borrow is reckoned once an epoch.
        if self._borrowed_in != self.epoch:
            self._borrowed = {None: self._posterior(_FIRST_GUESSES, every, _STRENGTHS[0])}
            self._borrowed_in = self.epoch
        borrowed = self._borrowed.get(cls.family)
        if borrowed is None:
            borrowed = self._posterior(self._borrowed[None], family, _STRENGTHS[1])
            self._borrowed[cls.family] = borrowed
        return self._posterior(borrowed, own, _STRENGTHS[2])

    def _posterior(self, hazards: list[float], counts: _Counts, strength: float) -> list[float]:
        """What is thought of the hazards of each bin, once these counts have been seen."""
        prior = strength * self._weight
        expected = sum(map(operator.mul, counts.waited, hazards))
        level = (sum(counts.reuses) + prior) / (expected + prior)
        return [
            (reuses + prior) / (waited + prior / (hazard * level))
            for reuses, waited, hazard in zip(counts.reuses, counts.waited, hazards, strict=True)
        ]


def _indices(hazards: list[float]) -> list[float]:
    """Of each bin, the best ratio of expected reuses to expected waiting from its begin on."""
    indices = [0.0] * BINS
    # Bins from the last to the first; a bin takes what follows it in as long as that is better
    # than itself. Each entry: expected reuses, expected waiting, chance to get past it.
    ahead: list[tuple[float, float, float]] = []
    for age_bin in range(BINS - 1, -1, -1):
        reuses = -math.expm1(-hazards[age_bin] * _WIDTHS[age_bin])
        past, waiting = 1.0 - reuses, reuses / hazards[age_bin]
        while ahead and ahead[-1][0] * waiting > reuses * ahead[-1][1]:
            more_reuses, more_waiting, more_past = ahead.pop()
            reuses += past * more_reuses
            waiting += past * more_waiting
            past *= more_past
        ahead.append((reuses, waiting, past))
        indices[age_bin] = reuses / waiting
    return indices


def _unused(hazards: list[float]) -> list[float]:
    """Chance not to have been used by the end of each bin."""
    chances, chance = [], 1.0
    for hazard, width in zip(hazards, _WIDTHS, strict=True):
        chance *= math.exp(-hazard * width)
        chances.append(chance)
    return chances
