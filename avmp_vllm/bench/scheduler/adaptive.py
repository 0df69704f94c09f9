"""Admission by a constant that adapts itself: what a forecast must beat, not a constant alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_vllm.engine.scheduler.admission import GrowthAdmission

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from avmp_vllm.core.geometry import Geometry
    from avmp_vllm.engine.scheduler.admission import Held

#: Tokens of growth: at first, least and most.
FIRST, LEAST, MOST = 64, 1.0, 256.0
#: What a preemption makes of them, and an answer that ended.
RAISE, LOWER = 2.0, 63 / 64


class AdaptiveAdmission(GrowthAdmission):
    """Doubles ``growth_tokens`` at a preemption, and lowers it by a 64th with each answer.

    Args:
        geometry: Of the arena.
        held: As in ``GrowthAdmission``.
    """

    def __init__(self, geometry: Geometry, held: Held) -> None:
        super().__init__(geometry, FIRST, held)
        self._tokens = float(FIRST)

    def left(self, request: Request) -> None:
        """A request's blocks go: raise if it was preempted, lower if it has ended."""
        change = LOWER if request.is_finished() else RAISE
        self._tokens = min(max(self._tokens * change, LEAST), MOST)
        self._grow_by(round(self._tokens))
