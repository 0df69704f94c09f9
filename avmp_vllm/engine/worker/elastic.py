"""The memory of an elastic arena in a worker: a reserved range instead of one allocation.

vLLM allocates a cache in one function and views it in the same. For an elastic arena that function
runs without memory (on torch's meta device), and its views are laid over the range.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from avmp_vllm.backing.cuda_memory import CudaMemory
from avmp_vllm.backing.elastic_buffer import PASSED, ElasticBuffer, Fence
from avmp_vllm.backing.elastic_pages import ElasticPages
from avmp_vllm.backing.memory import VirtualMemory
from avmp_vllm.backing.posix import AnonymousMemory, huge_page_bytes
from avmp_vllm.backing.tensor import tensor_over
from avmp_vllm.core import ArenaTooSmall, Extents, Geometry, MovePlan
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.entry import last_line
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout.elastic import Elastic
from avmp_vllm.engine.layout.message import CALLS, WorkerMemory
from avmp_vllm.engine.worker.plans import ArenaBuffer, PlanApplier

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

    from avmp_vllm.backing.page_table import PageTable
    from avmp_vllm.engine.layout.arena import AVMPCacheConfig


def driver_of(device: torch.device, chunk_bytes: int) -> VirtualMemory:
    """The driver of a device.

    Raises:
        ConfigError: It cannot map chunks of that size.
    """
    memory: VirtualMemory
    if device.type == "cuda":
        memory = CudaMemory(torch.cuda.current_device() if device.index is None else device.index)
    else:
        memory = AnonymousMemory(huge=chunk_bytes % huge_page_bytes() == 0)
    if chunk_bytes % memory.granularity:
        nearest = ceil_div(chunk_bytes, memory.granularity) * memory.granularity
        raise ConfigError(
            f"option 'chunk_bytes' = {chunk_bytes}: {memory.name} maps memory in multiples of "
            f"{memory.granularity} bytes; choose {nearest}"
        )
    return memory


class ArenaRange:
    """The range of an elastic arena, and what is behind it.

    On CUDA all of the budget exists and is mapped from the start, for vLLM's warm-up writes to the
    lowest page ids; the scheduler's first word takes back what is too much. On the CPU nothing
    writes before the first step, so only the null bytes do.

    Args:
        geometry: Sizes of the arena.
        elastic: How much memory it may have.
        device: Where the arena is.

    Attributes:
        raw: uint8 ``[bytes of the range]``; what is not mapped faults.

    Raises:
        ArenaTooSmall: The system has no memory even for the null bytes.
        ConfigError: The driver cannot map chunks of that size.
    """

    def __init__(self, geometry: Geometry, elastic: Elastic, device: torch.device) -> None:
        with last_line.left_by(ConfigError, ArenaTooSmall):
            self._geometry = geometry
            self._chunk = elastic.chunk_bytes
            self._memory = driver_of(device, elastic.chunk_bytes)
            self._on_cuda = device.type == "cuda"
            self._buffer = ElasticBuffer(
                self._memory, geometry.arena_bytes, elastic.chunk_bytes, geometry.high_end
            )
            low = ceil_div(geometry.null_blocks * geometry.block_bytes, self._chunk)
            self._wanted = elastic.budget if self._on_cuda else low * self._chunk
            exists = self._buffer.set_budget(self._wanted)
            if exists < low * self._chunk:
                raise ArenaTooSmall(
                    f"there is no memory for the null bytes of an elastic arena, {low} chunk(s) of "
                    f"{self._chunk} bytes; free some, or lower 'chunk_bytes'"
                )
            top = ceil_div(geometry.high_end, self._chunk)
            high = max(top - (exists // self._chunk - low), low) * self._chunk
            self._extents = Extents(low * self._chunk, min(high, geometry.high_end))
            self._buffer.map(self._extents)
            self.raw = tensor_over(self._memory, self._buffer.address, self._buffer.size)
            self.raw[: geometry.null_bytes].zero_()

    def _record(self) -> Fence:
        """A fence behind everything launched so far: plans and kernels share one stream."""
        if not self._on_cuda:
            return PASSED
        event = torch.cuda.Event()
        event.record()
        return event

    def applier(self, page_table: PageTable, pages: ArenaBuffer) -> PlanApplier:
        """What carries plans out over this memory."""
        elastic = ElasticPages(self._buffer, pages, self._record)
        self._applier = _ElasticApplier(page_table, elastic, self)
        return self._applier

    def plan_applied(self, plan: MovePlan) -> None:
        """Note what is needed from here on."""
        if plan.after is not None:
            self._extents = plan.after

    def poll(self, wait: bool) -> None:
        """Give back what exceeds the budget, after waiting for fences if nothing else runs."""
        self._buffer.settle() if wait else self._buffer.poll()

    def resize(self, size: int | None, plan: MovePlan | None, wait: bool) -> WorkerMemory:
        """Create memory or give it back, between steps; see `ArenaWorker.resize_arena`."""
        if plan is not None:
            self._applier.apply(plan)
        if size is not None:
            self._wanted = size
            self._buffer.set_budget(size)
            self.poll(wait)
        return self.report()

    def report(self) -> WorkerMemory:
        """What exists, and what was asked of the driver."""
        buffer = self._buffer
        did = buffer.statistics
        return WorkerMemory(
            buffer.budget,
            self._wanted,
            buffer.mapped,
            did.given_back,
            did.fence_waits,
            tuple(did.calls[kind] for kind in CALLS),
        )

    def sleep(self) -> None:
        """Give all of it back; the bytes are lost."""
        self._buffer.retire(Extents(0, self._geometry.high_end), self._record())
        self._buffer.set_budget(0)
        self._buffer.settle()

    def wake_up(self) -> None:
        """Take back what there was before `sleep`, with any bytes in it.

        Raises:
            BudgetExceeded: The system has less now.
        """
        self._buffer.set_budget(self._wanted)
        self._buffer.map(self._extents)

    def close(self) -> None:
        """Give everything back. Views of the range fault afterwards."""
        self._buffer.close()
        self._memory.close()


class _ElasticApplier(PlanApplier):
    """Plans of an elastic arena."""

    def __init__(self, page_table: PageTable, pages: ElasticPages, memory: ArenaRange) -> None:
        super().__init__(page_table, pages)
        self._memory = memory

    def apply_from(self, scheduler_output: SchedulerOutput) -> None:
        """Apply a step's plan if it has one, and give back what is due by now."""
        super().apply_from(scheduler_output)
        self._memory.poll(wait=not scheduler_output.total_num_scheduled_tokens)

    def apply(self, plan: MovePlan) -> None:
        """Apply a plan."""
        super().apply(plan)
        self._memory.plan_applied(plan)


# -- the place of vLLM's allocation ----------------------------------------------------------------

_offered: ArenaRange | None = None


def memory_for(
    kv_cache_config: AVMPCacheConfig, device: torch.device, is_profiling: bool
) -> ArenaRange | None:
    """Memory of an elastic arena; None if the arena is fixed, or thrown away after profiling."""
    if kv_cache_config.elastic is None or is_profiling:
        return None
    assert kv_cache_config.geometry is not None
    return ArenaRange(kv_cache_config.geometry, kv_cache_config.elastic, device)


@contextlib.contextmanager
def allocated_from(memory: ArenaRange | None) -> Iterator[None]:
    """Have vLLM's cache allocated from memory while this lasts; None leaves it to vLLM."""
    global _offered
    _offered = memory
    try:
        yield
    finally:
        _offered = None


def allocate_kv_cache(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``allocate_kv_cache``: views of the offered memory, if there is some."""

    def wrapper(
        kv_cache_config: Any,
        device: torch.device,
        layout: Any,
        kernel_block_sizes: list[int] | None = None,
    ) -> dict[str, torch.Tensor]:
        if _offered is None:
            return stock(kv_cache_config, device, layout, kernel_block_sizes)
        views = stock(kv_cache_config, torch.device("meta"), layout, kernel_block_sizes)
        storage = _offered.raw.untyped_storage()
        return {
            name: torch.empty(0, dtype=view.dtype, device=_offered.raw.device).set_(
                storage, view.storage_offset(), view.size(), view.stride()
            )
            for name, view in views.items()
        }

    return wrapper
