"""How soon a kept state is used again, learned from what has been used.

States are sorted into classes (what kind of state, used how often, superseded or not, how long a
prefix), and classes into families, from which a class borrows what it has not seen itself: the
shape of its hazard by age, brought to the level that it has seen at all ages together. A class has
a hazard of reuse for each bin of age; age is counted in requests, so that equal traffic gives equal
decisions whatever a clock says. What was learned is forgotten slowly, and at once where what comes
contradicts it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from avmp_vllm.core.hazards import (
    EDGES,
    MOST_WEIGHT,
    ReuseCounts,
    bin_of,
    gittins_indices,
    posterior,
    unused_chances,
)
from avmp_vllm.core.recent import CHANGED, Family, RecentReuse

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


class Class(NamedTuple):
    """What states are told apart by.

    Attributes:
        family: Told apart first; classes of a family borrow from each other.
        detail: Told apart where enough was seen.
    """

    family: Family
    detail: tuple[int, ...]


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
        changes: Times that reuse had changed, and what was learned before was forgotten.
    """

    def __init__(self, now: int = 0) -> None:
        self.now = self._began = now
        self.epoch = 0
        self.changes = 0
        self._next_epoch = 0
        self._all = ReuseCounts()
        self._families: defaultdict[Family, ReuseCounts] = defaultdict(ReuseCounts)
        self._classes: defaultdict[Class, ReuseCounts] = defaultdict(ReuseCounts)
        self._prospects: dict[Class, _Prospects] = {}
        #: Hazards of all states and of families, as of the epoch below.
        self._general: list[float] = _FIRST_GUESSES
        self._borrowed: dict[Family, list[float]] = {}
        self._borrowed_in = -1
        self._recent = RecentReuse()
        # Old counts are not scaled down; new ones are scaled up.
        self._weight = 1.0
        self._growth = 2.0 ** (1 / HALF_LIFE)

    def tick(self) -> None:
        """A request has come."""
        self.now += 1
        self._recent.tick()
        changed = self._recent.evidence > CHANGED
        if changed:
            self._begin_anew()
        if changed or self.now >= self._next_epoch:
            self.epoch += 1
            seen = self.now - self._began
            self._next_epoch = self.now + min(max(seen // 8, _SOONEST), _LATEST)
        self._weight *= self._growth
        if self._weight > MOST_WEIGHT:
            for counts in (self._all, *self._families.values(), *self._classes.values()):
                counts.scale(1 / self._weight)
            self._weight = 1.0

    def waited(self, cls: Class, age_bin: int, ages: float) -> None:
        """A state of a class has waited in a bin for so many requests."""
        self._recent.waited(cls.family, age_bin, ages, self._of_family(cls.family))
        for counts in self._counts(cls):
            counts.waited[age_bin] += ages * self._weight

    def reused(self, cls: Class, age_bin: int) -> None:
        """A state of a class was used at an age."""
        self._recent.reused(cls.family, age_bin, self._of_family(cls.family))
        for counts in self._counts(cls):
            counts.reuses[age_bin] += self._weight

    def index(self, cls: Class, age_bin: int) -> float:
        """Best ratio of expected reuses to expected waiting from an age on, a request."""
        return self._fresh(cls).indices[age_bin]

    def chance(self, cls: Class, ages: int) -> float:
        """Chance that a new state of a class is used within so many requests."""
        return 1.0 - self._fresh(cls).unused[bin_of(max(ages, 0))]

    def _counts(self, cls: Class) -> tuple[ReuseCounts, ReuseCounts, ReuseCounts]:
        """Of everything, of a class's family and of the class itself."""
        return self._all, self._families[cls.family], self._classes[cls]

    def _fresh(self, cls: Class) -> _Prospects:
        prospects = self._prospects.get(cls)
        if prospects is None or prospects.epoch != self.epoch:
            hazards = self._hazards(cls)
            prospects = _Prospects(self.epoch, gittins_indices(hazards), unused_chances(hazards))
            self._prospects[cls] = prospects
        return prospects

    def _begin_anew(self) -> None:
        """Forget all but what was seen lately."""
        self.changes += 1
        self._all = ReuseCounts()
        self._families.clear()
        self._classes.clear()
        for family, counts in self._recent.take_over().items():
            self._families[family] = own = counts.scaled(self._weight)
            self._all.add(own)

    def _of_family(self, family: Family) -> list[float]:
        """Hazards of a family; what it has not seen is as in general. Reckoned once an epoch."""
        if self._borrowed_in != self.epoch:
            self._borrowed_in = self.epoch
            self._borrowed = {}
            self._general = posterior(_FIRST_GUESSES, self._all, _STRENGTHS[0] * self._weight)
            self._recent.foretell(self._general, _STRENGTHS[1])
        hazards = self._borrowed.get(family)
        if hazards is None:
            counts = self._families[family]
            hazards = posterior(self._general, counts, _STRENGTHS[1] * self._weight)
            self._borrowed[family] = hazards
        return hazards

    def _hazards(self, cls: Class) -> list[float]:
        """Of each bin; what a class has not seen is as in its family, or else in general."""
        borrowed, own = self._of_family(cls.family), self._classes[cls]
        return posterior(borrowed, own, _STRENGTHS[2] * self._weight)
