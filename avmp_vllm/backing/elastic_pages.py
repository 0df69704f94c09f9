"""Move plans of an elastic arena: memory before, the plan, and memory back behind a fence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

from avmp_vllm.backing.elastic_buffer import PASSED, ElasticBuffer, Fence
from avmp_vllm.core.plan import MovePlan


class Pages(Protocol):
    """The bytes of an arena."""

    def apply(self, plan: MovePlan) -> None:
        """Relocate, clear and copy."""


def passed() -> Fence:
    """The fence of copies on the host, which are done when they return."""
    return PASSED


class ElasticPages:
    """An arena's bytes of which only the two ends have memory.

    Args:
        buffer: The range that the pages are views of.
        pages: Carries plans out on it.
        record: Makes a fence behind everything that was launched on the stream of the plans *and of
            the kernels that read the pages*; on CUDA an event recorded there.
    """

    def __init__(
        self, buffer: ElasticBuffer, pages: Pages, record: Callable[[], Fence] = passed
    ) -> None:
        self._buffer = buffer
        self._pages = pages
        self._record = record

    def apply(self, plan: MovePlan) -> None:
        """Carry a plan out.

        Raises:
            BudgetExceeded: The plan is not one of an arena that keeps to this buffer's budget.
        """
        buffer, stages = self._buffer, plan.stages
        buffer.poll()
        for this, following in pairwise(stages):
            buffer.map(this.extents)
            part = plan.relocations[this.first : following.first]
            self._pages.apply(replace(plan, relocations=part, zeros=[], copies=[]))
            buffer.retire(this.extents.common(following.extents), self._record())
        if stages:
            buffer.map(stages[-1].extents)
            plan_rest = replace(plan, relocations=plan.relocations[stages[-1].first :])
            self._pages.apply(plan_rest)
        else:
            self._pages.apply(plan)
        if plan.after is not None:
            # Also where nothing changes now: an earlier plan may have needed more than it left.
            buffer.retire(plan.after, self._record())
