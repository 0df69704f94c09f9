"""How much to keep free when a request is admitted beside others.

A request that is admitted too early may be preempted, which costs computing its tokens again; one
that waits leaves steps less full than they could be. With ``n`` requests running, a step's fixed
cost (``ratio``, in prefill tokens) is spread over one more of them for each token that the newcomer
gets, and what it got must be computed again too, so admitting it pays if it goes on for ``t`` steps
with

    t * ratio / n > tokens + t        that is        t > tokens * n / (ratio - n)

Shortages beyond that horizon need no reserve. Where ``ratio <= n`` it never pays to be preempted,
and the horizon has no end.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from avmp_vllm.predict.reserve import RunningSet

#: Steps for which a refusal stands at most, while nothing ends or is preempted.
REFUSAL_STEPS = 16


def break_even(tokens: int, running: int, ratio: float) -> float:
    """Steps after which an admitted request has paid for being preempted.

    Args:
        tokens: That would be computed again.
        running: Requests that run beside it.
        ratio: Fixed cost of a step in prefill tokens.
    """
    if ratio <= running:
        return math.inf
    return tokens * running / (ratio - running)


class Admission:
    """Decides whether a waiting request may start.

    Args:
        running: The requests that run.
        risk: Standard deviations of their need to be safe by (``forecast_risk``).
        ratio: Fixed cost of a step in prefill tokens.

    Attributes:
        refusals: Times that a request was refused, by a refusal that stood or by a new one.
        reckoned: Times that the reserve was computed.
        pages: The reserve as it was computed last.
    """

    def __init__(self, running: RunningSet, risk: float, ratio: float) -> None:
        if risk < 0 or ratio <= 0:
            raise ValueError(f"risk {risk} below 0, or ratio {ratio} not above")
        self._running = running
        self._risk = risk
        self._ratio = ratio
        self._refused: Hashable | None = None
        self._left = 0
        self.refusals = 0
        self.reckoned = 0
        self.pages = 0

    def reserve(self, tokens: int) -> int:
        """Pages to leave free for the others when a request starts.

        Args:
            tokens: Of the request, that would have to be computed again after a preemption.
        """
        self.reckoned += 1
        horizon = break_even(tokens, len(self._running), self._ratio)
        self.pages = self._running.reserve(self._risk, horizon)
        return self.pages

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
