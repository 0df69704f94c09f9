"""Move plans in a worker: applied in order, once each, to its page table and its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from avmp_vllm.core import InvariantViolation, Kind, MovePlan
from avmp_vllm.engine.layout.message import PLAN
from avmp_vllm.engine.layout.saves import ChunkSaves

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from avmp_vllm.backing.page_table import PageTable


class ArenaBuffer(Protocol):
    """The bytes of an arena."""

    def apply(self, plan: MovePlan) -> None:
        """Carry a plan out: relocations in order, then zeroing, then copy-on-write."""


class PlanApplier:
    """A worker's copy of the arena, kept in step with the scheduler's.

    Args:
        page_table: Handles to physical pages.
        buffer: The bytes.
        shift: By how much this worker's physical indices exceed those of the plans, by kind; not
            zero in later pipeline stages.

    Attributes:
        saves: What the layers are to save in the step's forward pass.
        connector: What reads and writes pages beside the model; None without a KV connector.
    """

    def __init__(
        self, page_table: PageTable, buffer: ArenaBuffer, shift: tuple[int, int] = (0, 0)
    ) -> None:
        self.page_table = page_table
        self.buffer = buffer
        self._shift = shift
        self.saves = ChunkSaves(page_table)
        self.connector: Any = None
        if has_kv_transfer_group():
            self.connector = get_kv_transfer_group()
            self.connector.bind_page_table(page_table)
        self._applied = 0

    def apply_from(self, scheduler_output: SchedulerOutput) -> None:
        """Apply a step's plan if it has one; call it before anything else, whatever the step is."""
        plan = getattr(scheduler_output, PLAN, None)
        if self.connector is not None and scheduler_output.kv_connector_metadata is not None:
            # Before the plan: what was to be stored is submitted from where it is, and what the
            # plan would disturb is waited for. vLLM asks once more, and finds nothing to do.
            self.connector.handle_preemptions(scheduler_output.kv_connector_metadata)
        self.saves.begin(plan.saves if plan is not None else ())
        if plan is not None:
            self.apply(plan)

    def apply(self, plan: MovePlan) -> None:
        """Apply a plan.

        Raises:
            InvariantViolation: A plan is missing, or under verification the page table differs
                from the scheduler's.
        """
        self._applied += 1
        if plan.number != self._applied:
            raise InvariantViolation(
                f"move plan {plan.number} arrived after {self._applied - 1} plans"
            )
        if any(self._shift):
            plan = plan.shifted(self._shift)
        self.page_table.apply(plan.relocations)
        self.buffer.apply(plan)
        if plan.digest is not None:
            known, expected = plan.digest
            if self.page_table.digest(dict(zip(Kind, known, strict=True))) != expected:
                raise InvariantViolation(
                    f"the worker's page table differs from the scheduler's at plan {plan.number}"
                )
