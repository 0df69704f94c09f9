"""How much memory an elastic arena has: the scheduler's side.

::

    held <= exists <= budget <= addresses        (bytes; over a lowered budget: held > exists)

What *exists*, in the workers, follows what is *held* by requests and the prefix cache. It grows
before pages are given out that it has no room for, so that no step wants memory which is not there,
and it is given back when it exceeds what is held by more than the slack. Both leave room in the
other direction, so that steady traffic makes no call. The arena itself knows one number, the
reserve of its gap. All of it happens between steps, on all ranks alike: what the one with the
least could create is what there is.

No clock decides anything here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from vllm.logger import init_logger

from avmp_vllm.core import Arena, Kind, MovePlan
from avmp_vllm.core.extents import backed_bytes, budget_for
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout.elastic import Elastic
from avmp_vllm.engine.layout.message import CALLS, RESIZE, WorkerMemory

logger = init_logger("vllm." + __name__)


class Workers(Protocol):
    """What reaches all workers, vLLM's executor."""

    def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[Any]:
        """Call a method of each worker, between steps; their answers by rank."""


#: Steps after which the workers' counters are read again, if their memory has moved.
READ_EVERY = 256


class ArenaMemory:
    """Decides how much memory the workers have for an elastic arena.

    Args:
        arena: The allocator.
        elastic: Sizes.
        take_plan: Drains what the workers must do before the next step.

    Attributes:
        budget: Bytes that may exist at most.
        exists: Bytes that exist on every rank.
        headroom: KV pages that shall be free beside the next request.
        workers: What the workers said last, by rank.
    """

    def __init__(
        self,
        arena: Arena,
        elastic: Elastic,
        take_plan: Callable[[], MovePlan | None],
    ) -> None:
        self.arena = arena
        self.elastic = elastic
        self.budget = self.exists = elastic.budget
        self.headroom = 0
        self.workers: list[WorkerMemory] = []
        self._take_plan = take_plan
        self._executor: Workers | None = None
        self._refused = False  # in this step the system had no more
        self._moved = 0  # steps since the workers' memory may have moved
        self._level = 0  # bytes that the arena counts with
        self._usable = arena.geometry.usable_bytes()
        self._set_level(elastic.budget)

    def connect(self, executor: Workers) -> None:
        """The workers are there: take the least that one of them has for the budget, and rest."""
        self._executor = executor
        self._call(None)
        if any(worker.exists < worker.wanted for worker in self.workers):
            self._lower_to(min(worker.exists for worker in self.workers))
        self.rest()

    # -- sizes -------------------------------------------------------------------------------------

    def _packed_gap(self, pages: int = 0, blocks: int = 0) -> int:
        """Bytes of the gap beside what is held and so many more pages, with no free page left."""
        held, geometry = self.arena.held, self.arena.geometry
        return (
            self._usable
            - (held(Kind.KV) + pages) * geometry.page_bytes
            - (held(Kind.SSM) + blocks) * geometry.block_bytes
        )

    def _needed(self, pages: int = 0, blocks: int = 0) -> int:
        """Bytes that must exist for what is held and so many more pages, wherever they lie."""
        high_end = self.arena.geometry.high_end
        return budget_for(high_end, self._packed_gap(pages, blocks), self.elastic.chunk_bytes)

    @property
    def held_bytes(self) -> int:
        """Bytes of the null pages, of requests and of the prefix cache."""
        return self.arena.geometry.high_end - self._packed_gap()

    def _whole(self, size: float) -> int:
        """Whole chunks of so many bytes."""
        chunk = self.elastic.chunk_bytes
        return int(size) // chunk * chunk

    # -- steps -------------------------------------------------------------------------------------

    def begin_step(self, idle: bool) -> None:
        """Give back what is too much, before a step is scheduled.

        Args:
            idle: No request is left.
        """
        self._refused = False
        if self.arena.over_bytes:
            self.arena.trim()
        if idle:
            self.rest()
            return
        slack, chunk = self.elastic.slack_bytes, self.elastic.chunk_bytes
        if self.exists > self.held_bytes + slack + 2 * chunk:
            self.arena.trim()
            self._shrink(min(self._needed() + self._whole(slack / 2), self.budget))
        elif self._moved >= READ_EVERY:
            self._call(None)

    def note_plan(self, plan: MovePlan | None) -> None:
        """A step's plan leaves."""
        if self._moved or (plan is not None and plan.stages):
            self._moved += 1

    def make_room(self, pages: int, blocks: int, revived: tuple[int, int] = (0, 0)) -> None:
        """See to it that memory exists for so many more pages, as far as the budget goes.

        Args:
            pages: KV pages that will be referenced.
            blocks: SSM blocks that will be.
            revived: How many of both are cached now.
        """
        if not (pages or blocks):
            return
        arena = self.arena
        used = arena.used(Kind.KV), arena.used(Kind.SSM)
        if any(used):  # nobody is made to leave room for others alone
            pages += self.headroom
        more = pages - revived[0], blocks - revived[1]
        if self._level == self.exists and self._packed_gap(*more) >= arena.reserve_bytes:
            return
        needed = self._needed(*more)
        if needed > self.exists and not self._refused:
            # Only if the request then fits, at the prefix cache's cost if need be: one that waits
            # for others to end asks at every step, and memory would come and go each time.
            reserve = self.elastic.reserve(arena.geometry, self.budget)
            if arena.geometry.fits(used[0] + pages, used[1] + blocks, reserve):
                self._create(min(needed + self._whole(self.elastic.slack_bytes / 4), self.budget))
        if self._level != self.exists:
            self._set_level(self.exists)

    def available_pages(self) -> int:
        """KV pages that could be referenced now if all of the budget existed."""
        arena = self.arena
        reserve = self.elastic.reserve(arena.geometry, self.budget)
        most = arena.geometry.pages_beside(arena.used(Kind.SSM), reserve)
        return max(most - arena.used(Kind.KV), 0)

    def _create(self, target: int) -> None:
        """Have so many bytes, or as many as the system has."""
        if target <= self.exists:
            return
        self._call(target)
        # More exists where earlier steps still need what is to go.
        exists = min(target, *(worker.exists for worker in self.workers))
        if exists < target:
            self._refused = True
            self._lower_to(exists)
        self.exists = exists

    def rest(self) -> None:
        """Keep what is held and the rest of its chunks; wait until the device has let go of it."""
        self.arena.trim()
        geometry, chunk = self.arena.geometry, self.elastic.chunk_bytes
        backed = backed_bytes(self.arena.extents, geometry.high_end, chunk)
        if self.exists > backed:
            # The arena may place what comes next a little worse than what is there now.
            self._shrink(min(self._needed(), self.budget), backed)

    def _shrink(self, level: int, exist: int | None = None) -> None:
        """Give memory back.

        Args:
            level: Bytes that the arena counts with.
            exist: Fewer that shall exist, and a wait for them. Nothing is allocated before
                `make_room` is asked, which brings the two together.
        """
        self._set_level(level)
        self.exists = level if exist is None else exist
        self._call(self.exists, self._take_plan(), exist is not None)

    def _set_level(self, level: int) -> None:
        """Let the arena count with so many bytes, as far as the null bytes leave it."""
        geometry = self.arena.geometry
        reserve = min(self.elastic.reserve(geometry, level), self._usable)
        self.arena.set_reserve(reserve)
        self._level = level

    def _lower_to(self, exists: int) -> None:
        """A rank could not create more: that is the budget, unless no request could run in it."""
        if any(worker.exists > exists for worker in self.workers):
            self._call(exists)
        self.exists = exists
        budget = max(exists, self.elastic.least_budget)
        if budget < self.budget:
            logger.warning(
                "AVMP: the budget of the elastic arena is lowered from %d to %d bytes, because the "
                "system has no more memory; it can be raised again with `avmp memory`",
                self.budget,
                budget,
            )
            self.budget = budget

    def _call(self, size: int | None, plan: MovePlan | None = None, wait: bool = False) -> None:
        assert self._executor is not None, "the workers are not known yet"
        self.workers = self._executor.collective_rpc(RESIZE, args=(size, plan, wait))
        self._moved = 0

    # -- by hand -----------------------------------------------------------------------------------

    def set_budget(self, budget: int) -> None:
        """Change what may exist at most.

        Raised, memory follows when it is needed. Lowered, cached pages go first, then free ones;
        what requests hold beyond it goes when they end or are preempted, as the arena gives nobody
        any more until then.

        Raises:
            ConfigError: A budget that no request would fit into, or more than there are addresses.
        """
        chunk = self.elastic.chunk_bytes
        most = ceil_div(self.arena.geometry.arena_bytes, chunk) * chunk
        budget = self._whole(budget)
        least = self.elastic.least_budget
        if not least <= budget <= most:
            raise ConfigError(
                f"budget = {budget}: one request of max_model_len needs {least} bytes, "
                f"and there are addresses for {most}; choose one between"
            )
        self.budget = budget
        self._refused = False
        if self._level > budget:
            self._set_level(budget)
        if self.exists > budget:
            self.arena.trim()
            self.exists = budget
            self._call(budget, self._take_plan(), True)

    def report(self) -> dict[str, Any]:
        """What there is, in bytes; the workers' part is that of the rank that has most."""
        self._call(None)
        worker = max(self.workers)
        return {
            "memory": "elastic",
            "budget": self.budget,
            "least_budget": self.elastic.least_budget,
            "virtual_bytes": self.arena.geometry.arena_bytes,
            "chunk_bytes": self.elastic.chunk_bytes,
            "held": self.held_bytes,
            "backed": worker.exists,
            "mapped": worker.mapped,
            "over": self.arena.over_bytes,
            "given_back": worker.given_back,
            "fence_waits": worker.fence_waits,
            "calls": dict(zip(CALLS, worker.calls, strict=True)),
        }

    # -- checks ------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Name what does not add up, after a step was scheduled (empty: nothing)."""
        found = []
        geometry, chunk = self.arena.geometry, self.elastic.chunk_bytes
        backed = backed_bytes(self.arena.extents, geometry.high_end, chunk)
        if backed > self.exists and not self.arena.over_bytes:
            found.append(f"{backed} bytes must have memory, and {self.exists} exist")
        if self.exists > self.budget:
            found.append(f"{self.exists} bytes exist beyond the budget of {self.budget}")
        return found
