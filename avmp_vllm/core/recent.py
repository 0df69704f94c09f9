"""What was learned of reuse lately, and whether it contradicts what was learned before.

Traffic changes: a model gets another job, and states that were used for days are used no more. A
long memory is right while nothing changes, and wrong for as long as it is long after that. So a
short one is kept beside it, by family alone. Both foretell what comes, and where the short one
has foretold it better for a while, the long one is begun anew from it.
"""

from __future__ import annotations

import math
from collections import defaultdict

from avmp_vllm.core.hazards import MOST_WEIGHT, ReuseCounts, posterior

#: Requests after which what was seen lately counts half.
RECENT = 250
#: Nats by which the short memory must have been the better one. While nothing changes it is the
#: worse one, because it knows less.
CHANGED = 25.0
#: A family of classes: where a state stands, and whether its conversation has a newer one.
Family = tuple[str, bool]


class RecentReuse:
    """A short memory of reuse by family.

    Attributes:
        evidence: Nats by which it has foretold reuse better than the long memory, lately.
    """

    def __init__(self) -> None:
        self.evidence = 0.0
        self._families: defaultdict[Family, ReuseCounts] = defaultdict(ReuseCounts)
        self._hazards: dict[Family, list[float]] = {}
        # Old counts are not scaled down; new ones are scaled up.
        self._weight = 1.0
        self._growth = 2.0 ** (1 / RECENT)

    def tick(self) -> None:
        """A request has come."""
        self.evidence /= self._growth
        self._weight *= self._growth
        if self._weight > MOST_WEIGHT:
            for counts in self._families.values():
                counts.scale(1 / self._weight)
            self._weight = 1.0

    def foretell(self, general: list[float], strength: float) -> None:
        """Reckon hazards anew from what has been seen by now.

        Args:
            general: Of all states, by the long memory.
            strength: For how many reuses these count.
        """
        self._hazards = {
            family: posterior(general, counts, strength * self._weight)
            for family, counts in self._families.items()
        }

    def waited(self, family: Family, age_bin: int, ages: float, learned: list[float]) -> None:
        """A state has waited in a bin for so many requests; what was learned of its family."""
        hazards = self._hazards.get(family, learned)
        self.evidence += ages * (learned[age_bin] - hazards[age_bin])
        self._families[family].waited[age_bin] += ages * self._weight

    def reused(self, family: Family, age_bin: int, learned: list[float]) -> None:
        """A state was used at an age; what was learned of its family."""
        hazards = self._hazards.get(family, learned)
        self.evidence += math.log(hazards[age_bin] / learned[age_bin])
        self._families[family].reuses[age_bin] += self._weight

    def take_over(self) -> dict[Family, ReuseCounts]:
        """What to begin anew with, the last request counting once."""
        self.evidence = 0.0
        return {
            family: counts.scaled(1 / self._weight) for family, counts in self._families.items()
        }
