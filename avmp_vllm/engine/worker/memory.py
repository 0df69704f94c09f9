"""What the engine core asks of a worker about the arena's memory, outside of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.gpu_worker import Worker

from avmp_vllm.backing.torch_buffer import bytes_behind
from avmp_vllm.core import MovePlan
from avmp_vllm.engine.layout.message import WorkerMemory

if TYPE_CHECKING:
    from avmp_vllm.engine.worker.elastic import ArenaRange


class ArenaWorker(Worker):
    """What AVMP adds to either of vLLM's workers; that for the CPU is derived from this one."""

    model_runner: Any

    @property
    def _memory(self) -> ArenaRange | None:
        memory: ArenaRange | None = self.model_runner.arena_memory
        return memory

    def resize_arena(
        self, size: int | None = None, plan: MovePlan | None = None, wait: bool = False
    ) -> WorkerMemory:
        """Create memory of an elastic arena or give it back, between steps.

        Args:
            size: Bytes that shall exist; None leaves it.
            plan: What to move first, numbered as those of steps are.
            wait: Whether to wait for the device, so that all of it is given back on return.

        Returns:
            What there is now. Less than asked for if the system has no more, more if steps that
            were launched before still need it.
        """
        memory = self._memory
        assert memory is not None, "a fixed arena is never resized"
        return memory.resize(size, plan, wait)

    # -- sleep mode; the prefix cache is empty by then ---------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Go to sleep as vLLM does; an elastic arena's memory goes at both levels."""
        super().sleep(level)
        if self._memory is not None:
            self._memory.sleep()

    def discard(self, tags: tuple[str, ...]) -> None:
        """Free some of what vLLM allocated, and with its cache the memory of an elastic arena."""
        super().discard(tags)
        if "kv_cache" in tags and self._memory is not None:
            self._memory.sleep()

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Wake up as vLLM does. The arena comes back with any bytes: the null pages are cleared."""
        super().wake_up(tags)
        if tags is not None and "kv_cache" not in tags:
            return
        if self._memory is not None:
            self._memory.wake_up()
        runner = self.model_runner
        null_bytes = runner.kv_cache_config.own.null_bytes
        bytes_behind(runner.kv_caches[0])[:null_bytes].zero_()
