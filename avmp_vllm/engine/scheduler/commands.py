"""What a user may ask of a running engine about its memory.

``LLM.collective_rpc("avmp_memory")`` and its asynchronous twin reach the engine core, which answers
instead of the workers: it is the scheduler that decides about memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from avmp_vllm.engine.entry.config import MEMORY_METHOD, ConfigError, selected
from avmp_vllm.engine.entry.sizes import read_bytes

if TYPE_CHECKING:
    from vllm.v1.engine.core import EngineCore

    from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager


def collective_rpc(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineCore.collective_rpc``: one method is the engine core's own."""

    def wrapper(
        self: EngineCore,
        method: Any,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if method != MEMORY_METHOD or selected(self.vllm_config.additional_config) is None:
            return stock(self, method, timeout, args, kwargs)
        return [avmp_memory(self.scheduler, *args, **kwargs or {})]

    return wrapper


def avmp_memory(
    scheduler: Any, budget: int | str | None = None, errors: str = "raise"
) -> dict[str, Any]:
    """Show the arena's memory, after setting its budget if one is given.

    Args:
        scheduler: AVMP's, of the running engine.
        budget: Bytes, as for the option of that name.
        errors: ``return`` puts a refusal into the answer, under ``error``.

    Returns:
        Bytes by name; ``given_back_now`` are those that this call gave back, and ``over`` those
        that requests still hold beyond the budget.

    Raises:
        ConfigError: A budget that cannot be, or an arena that is not elastic.
    """
    try:
        return _memory(scheduler, budget)
    except ConfigError as error:
        if errors == "raise":
            raise
        return {"error": str(error)}


def _memory(scheduler: Any, budget: int | str | None) -> dict[str, Any]:
    manager: AVMPBlockSpaceManager = scheduler.kv_cache_manager
    memory = manager.memory
    if memory is None:
        if budget is not None:
            raise ConfigError(
                f"budget = {budget}: the whole arena has memory; start with memory: elastic"
            )
        size = manager.geometry.arena_bytes
        return {"memory": "fixed", "budget": size, "virtual_bytes": size, "backed": size}
    before = memory.report()["given_back"]
    if budget is not None:
        try:
            size = read_bytes(budget)
        except ValueError as error:
            raise ConfigError(f"budget = {budget!r}: {error}") from None
        memory.set_budget(size)
    if not scheduler.has_unfinished_requests():
        memory.rest()
    report = memory.report()
    return report | {"given_back_now": report["given_back"] - before}
