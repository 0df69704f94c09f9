"""Sizes of an elastic arena, from the options and what vLLM leaves for the cache."""

from __future__ import annotations

from dataclasses import dataclass

from avmp_vllm.core import Geometry
from avmp_vllm.core.extents import default_chunk_bytes, reserve_for
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError

#: Least slack, in chunks: one for each end of the gap, and as much again to breathe.
LEAST_SLACK = 4
#: Default slack, as a part of the budget.
SLACK_OF_BUDGET = 16


@dataclass(frozen=True)
class Elastic:
    """How much memory an elastic arena may have.

    Attributes:
        virtual_bytes: Addresses.
        budget: Bytes that may have memory at most, when the engine starts; whole chunks.
        chunk_bytes: Bytes that get memory at a time.
        slack_bytes: Bytes beyond what is held above which memory is given back.
        least_budget: The smallest budget, within which one request of the longest length runs;
            known with the geometry.
    """

    virtual_bytes: int
    budget: int
    chunk_bytes: int
    slack_bytes: int
    least_budget: int = 0

    def reserve(self, geometry: Geometry, budget: int | None = None) -> int:
        """Least bytes of the gap that keep the arena within a budget, the first one by default."""
        return reserve_for(
            geometry.high_end, self.budget if budget is None else budget, self.chunk_bytes
        )


def elastic_sizes(config: AVMPConfig, available: int) -> Elastic | None:
    """Sizes of an elastic arena; None if the arena is a fixed one.

    Args:
        config: AVMP's options.
        available: Bytes that vLLM leaves for the cache, on the rank that has the fewest.

    Raises:
        ConfigError: Sizes that do not fit one another, with numbers.
    """
    if config.memory == "fixed":
        return None
    budget = available if config.budget is None else config.budget
    chunk = config.chunk_bytes or default_chunk_bytes(budget)
    budget = budget // chunk * chunk
    virtual = config.virtual_bytes or available // chunk * chunk
    if budget < chunk:
        raise ConfigError(
            f"option 'chunk_bytes' = {chunk}: the budget of {config.budget or available} bytes is "
            "less than one chunk; give more, or smaller chunks"
        )
    if config.budget is not None and config.budget > available:
        raise ConfigError(
            f"option 'budget' = {config.budget}: vLLM leaves {available} bytes for the cache; "
            "lower it, or raise --kv-cache-memory-bytes or --gpu-memory-utilization"
        )
    if budget > ceil_div(virtual, chunk) * chunk:
        raise ConfigError(
            f"option 'virtual_bytes' = {virtual}: the budget is {budget}; raise it to that at "
            "least, or leave it out"
        )
    slack = config.slack_bytes
    if slack is None:
        slack = budget // SLACK_OF_BUDGET
    return Elastic(virtual, budget, chunk, max(slack, LEAST_SLACK * chunk))
