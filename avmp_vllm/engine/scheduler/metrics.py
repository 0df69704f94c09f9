"""AVMP's counters in Prometheus and in the periodic log line.

The scheduler's statistics cross processes in a message whose fields vLLM fixes. One of them is a
mapping for what a KV connector counts. AVMP's counters travel in it under a key of their own, which
the logger takes out before vLLM's own loggers see the message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from avmp_vllm.core import Arena, Kind
from avmp_vllm.core.keeper import Origin
from avmp_vllm.core.transfers import NotingArena
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.layout.message import CALLS, WorkerMemory
from avmp_vllm.engine.scheduler.state_manager import COPY_CAUSES, StateManager
from avmp_vllm.predict.score import SHARES

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

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
_BY_NAME = {metric.name: metric for metric in METRICS}

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


class AVMPStatLogger(AggregateStatLoggerBase):
    """Exports the counters of every engine, and logs those that matter to a person.

    Args:
        vllm_config: For the model's name.
        engine_indexes: The engines whose statistics arrive here.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        model = vllm_config.model_config.served_model_name
        self._model = model[0] if isinstance(model, list) else model
        self._latest: dict[int, Values] = {i: {} for i in engine_indexes}
        self._logged: dict[int, Values] = {i: {} for i in engine_indexes}
        self._metrics: dict[str, Any] = {}
        config = selected(vllm_config.additional_config)
        known = METRICS if config is not None and config.memory == "elastic" else OF_FIXED
        self._gauges = [metric for metric in known if metric in GAUGES]
        self._counters = [metric for metric in known if metric in COUNTERS]
        for metrics, make in (
            (self._gauges, partial(Gauge, multiprocess_mode="mostrecent")),
            (self._counters, Counter),
        ):
            for metric in metrics:
                labels = ["model_name", "engine", *filter(None, [metric.label])]
                self._metrics[metric.name] = make(
                    f"vllm:avmp_{metric.name}", f"AVMP: {metric.text}", labels
                )
        for index in engine_indexes:  # so that every series exists from the start
            self._export(index, {metric.name: [0] * len(metric.series) for metric in known})

    def _child(self, metric: Metric, engine: int, series: str) -> Any:
        values = [self._model, str(engine), *filter(None, [series])]
        return self._metrics[metric.name].labels(*values)

    def _export(self, engine: int, values: Values) -> None:
        # Most values stand still from one step to the next, and a metric is slow to reach.
        before = self._latest[engine]
        for metric in self._gauges:
            now, last = values[metric.name], before.get(metric.name)
            for index, series in enumerate(metric.series):
                if last is None or now[index] != last[index]:
                    self._child(metric, engine, series).set(now[index])
        for metric in self._counters:
            now, last = values[metric.name], before.get(metric.name)
            for index, series in enumerate(metric.series):
                grown = now[index] - (0 if last is None else last[index])
                if last is None or grown > 0:
                    self._child(metric, engine, series).inc(max(grown, 0))
        self._latest[engine] = values

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        """Take the counters out of a message and export them."""
        carried = scheduler_stats.kv_connector_stats if scheduler_stats is not None else None
        if scheduler_stats is None or carried is None or CARRIER not in carried:
            return
        own = carried.pop(CARRIER)
        scheduler_stats.kv_connector_stats = carried or None
        self._export(engine_idx, own)

    def log(self) -> None:
        """Log one line for each engine whose counters changed since the last one."""
        for engine, now in self._latest.items():
            if now != self._logged[engine]:
                logger.info("Engine %03d: AVMP %s", engine, summary(now))
                self._logged[engine] = now

    def log_engine_initialized(self) -> None:
        """Nothing to say; the capacity block is logged by the engine core."""


def summary(values: Values) -> str:
    """The counters as one line of text."""
    parts = [
        f"{kind.label}: {values['pages_used'][kind]:.0f} used + "
        f"{values['pages_cached'][kind]:.0f} cached of {values['capacity_pages'][kind]:.0f} pages"
        for kind in Kind
    ]
    parts.append(f"migrations: {_by_series(values, 'migrations')}")
    parts.append(f"relocated: {sum(values['relocated_bytes']) / 2**20:.1f} MiB")
    for name in ("evictions", "allocation_failures"):
        parts.append(f"{name.replace('_', ' ')}: {_by_series(values, name)}")
    for name in ("states_kept", "state_hits"):
        if any(values[name]):
            parts.append(f"{name.replace('_', ' ')}: {_by_series(values, name, zeros=False)}")
    if "memory_backed_bytes" in values:
        backed, budget = (values[f"memory_{name}_bytes"][0] for name in ("backed", "budget"))
        parts.append(f"memory: {backed / 2**20:.1f} of {budget / 2**20:.1f} MiB")
    return "; ".join(parts)


def _by_series(values: Values, name: str, zeros: bool = True) -> str:
    """A metric's values with what tells them apart."""
    pairs = zip(_BY_NAME[name].series, values[name], strict=True)
    return ", ".join(f"{series} {value:.0f}" for series, value in pairs if zeros or value)


def stat_logger_manager_init(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``StatLoggerManager.__init__``: AVMP's logger goes first."""

    def wrapper(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        if selected(vllm_config.additional_config) is not None:
            self.stat_loggers.insert(0, AVMPStatLogger(vllm_config, self.engine_indexes))

    return wrapper
