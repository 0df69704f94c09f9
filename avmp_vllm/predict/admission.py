"""How much to keep free when a request is admitted beside others; how long a refusal stands.

A request that is admitted too early may be preempted, which costs computing its tokens again; one
that waits leaves steps less full than they could be.
"""

from __future__ import annotations

from collections.abc import Hashable

from avmp_vllm.predict.reserve import RunningSet

#: Steps for which a refusal stands at most, while nothing ends or is preempted.
REFUSAL_STEPS = 16


class Admission:
    """Decides whether a waiting request may start.

    Args:
        running: The requests that run.
        risk: Standard deviations of their need to be safe by (``forecast_risk``).

    Attributes:
        refusals: Times that a request was refused, by a refusal that stood or by a new one.
        reckoned: Times that the reserve was computed.
    """

    def __init__(self, running: RunningSet, risk: float) -> None:
        if risk < 0:
            raise ValueError(f"risk {risk} is below 0")
        self._running = running
        self._risk = risk
        self._refused: Hashable | None = None
        self._left = 0
        self.refusals = 0
        self.reckoned = 0

    def reserve(self) -> int:
        """Pages to leave free for the others when a request starts."""
        self.reckoned += 1
        return self._running.reserve(self._risk)

    def stands(self, name: Hashable) -> bool:
        """Whether a request need not ask again yet, since it was refused and nothing came free."""
        if self._refused != name or self._left <= 0:
            return False
        self.refusals += 1
        return True

    def refused(self, name: Hashable) -> None:
        """A request did not fit beside the reserve; it need not ask again soon."""
        self._refused, self._left = name, REFUSAL_STEPS
        self.refusals += 1

    def step(self) -> None:
        """A step was scheduled."""
        self._left -= 1

    def freed(self) -> None:
        """A request ended or was preempted: pages have come free, and refusals are void."""
        self._refused = None
