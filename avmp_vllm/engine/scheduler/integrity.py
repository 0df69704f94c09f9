"""Whether vLLM's blocks agree with the arena."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager


def problems(manager: AVMPBlockSpaceManager) -> list[str]:
    """What does not add up between the pools, the prefix cache and the requests."""
    coordinator, arena = manager.coordinator, manager.arena
    # They hold states that the prefix cache does not know of.
    cold: Container[int] = () if manager.cold is None else manager.cold.blocks
    found: list[str] = []
    for kind, pool in coordinator.pools.items():
        for block in pool.blocks:
            if block.is_null or block.ref_cnt or block.block_id in cold:
                continue
            cached = arena.is_cached(block.block_id)
            if cached != (block.block_hash is not None):
                found.append(f"{kind.label}: block {block.block_id} cached {cached}, {block}")
    found += coordinator.states.misplaced()
    if manager.memory is not None:
        found += manager.memory.problems()
    if manager.checkpoints is not None:
        found += manager.checkpoints.problems()
    for tables in coordinator.single_type_managers:
        for request, blocks in tables.req_to_blocks.items():
            found += [
                f"request {request} holds block {block.block_id}, which nobody references"
                for block in blocks
                if not block.is_null and block.ref_cnt < 1
            ]
    return found
