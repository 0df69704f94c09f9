"""AVMP's counters: what they are, and how they leave the scheduler.

The scheduler's statistics cross processes in a message whose fields vLLM fixes. One of them is a
mapping for what a KV connector counts. AVMP's counters travel in it under a key of their own, which
the logger (``stat_logger.py``) takes out before vLLM's own loggers see the message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vllm.logger import init_logger

from avmp_vllm.core import Arena, Kind
from avmp_vllm.core.keeper import Origin
from avmp_vllm.core.transfers import NotingArena
from avmp_vllm.engine.layout.message import CALLS, WorkerMemory
from avmp_vllm.engine.scheduler.state_manager import COPY_CAUSES, StateManager
from avmp_vllm.predict.score import SHARES

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import SchedulerStats

    from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager
    from avmp_vllm.engine.scheduler.memory import ArenaMemory

logger = init_logger("vllm." + __name__)

CARRIER = "avmp"
#: Seconds between two messages with counters, while requests run.
PERIOD_S = 0.1
GIB = 1 << 30

#: Values of each label, in the order in which a metric's series are read; "" is no label.
SERIES: dict[str, tuple[str, ...]] = {
    "pool": tuple(kind.label for kind in Kind),
    "direction": tuple(f"{kind.other.label}_to_{kind.label}" for kind in Kind),
    "state": tuple(origin.value for origin in Origin),
    "cause": COPY_CAUSES,
    "call": CALLS,
    "share": tuple(f"{share:g}" for share in SHARES),
    "forecast": ("mixture", "general"),
    "": ("",),
}


class Metric(NamedTuple):
    """A metric.

    Attributes:
        name: In Prometheus, without its prefix and ending.
        text: What it is.
        label: What tells its series apart, a key of ``SERIES``.
        read: Values of its series.
        elastic: Whether only an elastic arena has it.
    """

    name: str
    text: str
    label: str
    read: Callable[[AVMPBlockSpaceManager], Sequence[float]]
    elastic: bool = False

    @property
    def series(self) -> tuple[str, ...]:
        """Values of its label."""
        return SERIES[self.label]


def _arena(
    name: str, text: str, read: Callable[[Arena, Kind], float], label: str = "pool"
) -> Metric:
    """A metric of the two pools; a direction is that of the pool that receives."""
    return Metric(name, text, label, lambda manager: [read(manager.arena, kind) for kind in Kind])


def _states(name: str, text: str, field: str) -> Metric:
    """A metric of the states that the prefix cache chooses, by a field of ``Counts``."""

    def read(manager: AVMPBlockSpaceManager) -> Sequence[float]:
        if manager.checkpoints is None:
            return [0] * len(Origin)
        counts = manager.checkpoints.keeper.counts
        return [getattr(counts[origin], field) for origin in Origin]

    return Metric(name, text, "state", read)


def _price(manager: AVMPBlockSpaceManager) -> Sequence[float]:
    checkpoints = manager.checkpoints
    return [0.0 if checkpoints is None else checkpoints.keeper.price * GIB]


def _copied(manager: AVMPBlockSpaceManager) -> list[int]:
    """Copies of states by cause."""
    managers = manager.coordinator.single_type_managers
    copied = [one.copied for one in managers if isinstance(one, StateManager)]
    return [sum(one[cause] for one in copied) for cause in COPY_CAUSES]


def _memory(name: str, text: str, read: Callable[[ArenaMemory], float]) -> Metric:
    """A metric of an elastic arena's memory."""

    def value(manager: AVMPBlockSpaceManager) -> Sequence[float]:
        assert manager.memory is not None
        return [read(manager.memory)]

    return Metric(name, text, "", value, elastic=True)


def _worker(
    name: str, text: str, read: Callable[[WorkerMemory], Sequence[float]], label: str = ""
) -> Metric:
    """A metric of the memory in the workers, of the rank that has the most of it."""

    def values(manager: AVMPBlockSpaceManager) -> Sequence[float]:
        assert manager.memory is not None
        return read(max(manager.memory.workers))

    return Metric(name, text, label, values, elastic=True)


GAUGES: tuple[Metric, ...] = (
    _arena("pages_used", "Pages that requests reference.", lambda a, k: a.used(k)),
    _arena("pages_cached", "Unreferenced pages kept for prefix hits.", lambda a, k: a.cached(k)),
    _arena("capacity_pages", "Pages in the pool's band.", lambda a, k: a.capacity(k)),
    _arena(
        "capacity_bytes",
        "Bytes in the pool's band.",
        lambda a, k: a.capacity(k) * a.geometry.unit(k),
    ),
    _arena(
        "peak_pages_used",
        "Most pages that were referenced at one time.",
        lambda a, k: a.statistics.peak_used[k],
    ),
    _states("states_kept", "States kept for prefix hits, by where they stand.", "kept"),
    Metric(
        "cold_states",
        "Kept states that are encoded, two in a block.",
        "",
        lambda manager: [0 if manager.cold is None else len(manager.cold)],
    ),
    Metric(
        "state_price",
        "Prompt tokens that a GiB of what was given up lately would have spared, a request.",
        "",
        _price,
    ),
    _memory("memory_budget_bytes", "Bytes that may have memory at most.", lambda m: m.budget),
    _memory("memory_backed_bytes", "Bytes that have memory.", lambda m: m.exists),
    _memory(
        "memory_handles",
        "Chunks of memory that exist.",
        lambda m: m.exists // m.elastic.chunk_bytes,
    ),
    Metric(
        "reserve_pages",
        "KV pages that the latest newcomer had to leave free for those that run.",
        "",
        lambda manager: [manager.admission.reserve],
    ),
)
COUNTERS: tuple[Metric, ...] = (
    _arena(
        "migrations",
        "Times that capacity moved between the pools.",
        lambda a, k: a.statistics.migrations[k],
        "direction",
    ),
    _arena(
        "migrated_bytes",
        "Capacity that moved between the pools.",
        lambda a, k: a.statistics.migrated_bytes[k],
        "direction",
    ),
    _arena(
        "relocations",
        "Pages that moved out of a migration's way.",
        lambda a, k: a.statistics.relocations[k],
    ),
    _arena(
        "relocated_bytes",
        "Bytes of the pages that moved out of a migration's way.",
        lambda a, k: a.statistics.relocated_bytes[k],
    ),
    _arena("evictions", "Cached pages given up.", lambda a, k: a.statistics.evictions[k]),
    _arena(
        "allocation_failures",
        "Allocations that the arena could not serve.",
        lambda a, k: a.statistics.failures[k],
    ),
    _states("states_made", "States that were made to be kept.", "made"),
    _states("states_refused", "States that were not made, since they would not pay.", "refused"),
    _states("states_given_up", "Kept states that were given up for room.", "given_up"),
    _states("state_hits", "Prompts that began at a kept state.", "used"),
    _states("state_misses", "Prompts that would have begun at a state that was gone.", "missed"),
    Metric(
        "state_copies", "States that were copied before a step overwrote them.", "cause", _copied
    ),
    Metric(
        "copied_bytes",
        "Bytes of the states that were copied.",
        "cause",
        lambda manager: [count * manager.geometry.block_bytes for count in _copied(manager)],
    ),
    Metric(
        "states_encoded",
        "Kept states that were encoded before they would have gone.",
        "",
        lambda manager: [0 if manager.cold is None else manager.cold.encoded],
    ),
    Metric(
        "states_decoded",
        "Encoded states that prompts began at.",
        "",
        lambda manager: [0 if manager.cold is None else manager.cold.decoded],
    ),
    _worker("driver_calls", "Calls of the memory driver.", lambda w: w.calls, "call"),
    _worker("memory_given_back_bytes", "Bytes given back.", lambda w: [w.given_back]),
    _worker("memory_fence_waits", "Steps that waited for memory.", lambda w: [w.fence_waits]),
    Metric(
        "transfer_waits",
        "Transfers to or from the host that a step had to wait for.",
        "",
        lambda manager: [manager.arena.waits if isinstance(manager.arena, NotingArena) else 0],
    ),
    Metric(
        "admission_refusals",
        "Times that a request had to go on waiting for room.",
        "",
        lambda manager: [manager.admission.refusals],
    ),
    Metric(
        "recomputed_tokens",
        "Tokens that were computed a second time, after preemptions.",
        "",
        lambda manager: [manager.recomputed],
    ),
    Metric(
        "forecasts",
        "Answers that ended by themselves, and whose lengths had been forecast.",
        "",
        lambda manager: [manager.admission.score.answers],
    ),
    Metric(
        "forecasts_within",
        "Of these, answers within the length that a share of them was forecast to stay within.",
        "share",
        lambda manager: list(manager.admission.score.within),
    ),
    Metric(
        "forecast_loss",
        "Log-loss of these forecasts in nats, over octaves of lengths.",
        "forecast",
        lambda manager: [manager.admission.score.loss, manager.admission.score.general_loss],
    ),
)
METRICS = GAUGES + COUNTERS
#: Of an arena that has all of its memory all the time.
OF_FIXED = tuple(metric for metric in METRICS if not metric.elastic)

#: What crosses processes: values of the series of each metric.
Values = dict[str, Sequence[float]]


class Pace:
    """When the counters go out: reading them all in every step would be a share of its time."""

    def __init__(self) -> None:
        self._next = 0.0

    def due(self, idle: bool) -> bool:
        """Whether they go out with this step.

        Args:
            idle: Whether no step may follow for a while.
        """
        now = time.monotonic()
        if now < self._next and not idle:
            return False
        self._next = now + PERIOD_S
        return True


def attach(stats: SchedulerStats, manager: AVMPBlockSpaceManager) -> None:
    """Put the counters into a statistics message."""
    metrics = OF_FIXED if manager.memory is None else METRICS
    stats.kv_connector_stats = {
        **(stats.kv_connector_stats or {}),
        CARRIER: {metric.name: metric.read(manager) for metric in metrics},
    }
