"""Admission by a constant that adapts itself: what a forecast must beat, not a constant alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.scheduler.admission import GrowthAdmission, growing

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from avmp_vllm.core.geometry import Geometry
    from avmp_vllm.engine.scheduler.admission import Held

#: Tokens of growth, least and most.
LEAST, MOST = 1.0, 256.0
#: What a preemption makes of them, and an answer that ended.
RAISE, LOWER = 2.0, 63 / 64


class AdaptiveAdmission(GrowthAdmission):
    """Doubles ``growth_tokens`` at a preemption, and lowers it by a 64th with each answer.

    Args:
        geometry: Of the arena.
        held: As in ``GrowthAdmission``.
    """

    def __init__(self, geometry: Geometry, held: Held) -> None:
        self._pages = [group.page_tokens for group in growing(geometry)]
        self._tokens = 64.0
        super().__init__(geometry, 64, held)

    def left(self, request: Request) -> None:
        """A request's blocks go: raise if it was preempted, lower if it has ended."""
        change = LOWER if request.is_finished() else RAISE
        self._tokens = min(max(self._tokens * change, LEAST), MOST)
        self._each = sum(ceil_div(round(self._tokens), tokens) for tokens in self._pages)
