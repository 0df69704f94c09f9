"""The arena's counters in Prometheus and in the periodic log line.

The scheduler's statistics cross processes in a message whose fields vLLM fixes. One of them is a
free mapping for KV connectors, which AVMP refuses, so it is free to carry the arena's counters; the
logger takes them out before vLLM's own loggers see the message.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from avmp_vllm.core import Arena, Kind
from avmp_vllm.engine.config import selected

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

logger = init_logger("vllm." + __name__)

CARRIER = "avmp"


def direction(kind: Kind) -> str:
    """Label of migrations by the pool that receives."""
    return f"{kind.other.label}_to_{kind.label}"


#: Prometheus name, label, what it is, and how to read it from an arena for a pool.
GAUGES: tuple[tuple[str, str, Callable[[Arena, Kind], float]], ...] = (
    ("pages_used", "Pages that requests reference.", lambda a, k: a.used(k)),
    ("pages_cached", "Unreferenced pages kept for prefix hits.", lambda a, k: a.cached(k)),
    ("capacity_pages", "Pages in the pool's band.", lambda a, k: a.capacity(k)),
    (
        "capacity_bytes",
        "Bytes in the pool's band.",
        lambda a, k: a.capacity(k) * a.geometry.unit(k),
    ),
    (
        "peak_pages_used",
        "Most pages that were referenced at one time.",
        lambda a, k: a.statistics.peak_used[k],
    ),
)
COUNTERS: tuple[tuple[str, str, Callable[[Arena, Kind], float]], ...] = (
    (
        "migrations",
        "Times that capacity moved between the pools.",
        lambda a, k: a.statistics.migrations[k],
    ),
    (
        "migrated_bytes",
        "Capacity that moved between the pools.",
        lambda a, k: a.statistics.migrated_bytes[k],
    ),
    (
        "relocations",
        "Pages that moved out of a migration's way.",
        lambda a, k: a.statistics.relocations[k],
    ),
    (
        "relocated_bytes",
        "Bytes of the pages that moved out of a migration's way.",
        lambda a, k: a.statistics.relocated_bytes[k],
    ),
    ("evictions", "Cached pages given up.", lambda a, k: a.statistics.evictions[k]),
    (
        "allocation_failures",
        "Allocations that the arena could not serve.",
        lambda a, k: a.statistics.failures[k],
    ),
)
BY_DIRECTION = ("migrations", "migrated_bytes")


def attach(stats: SchedulerStats, arena: Arena) -> None:
    """Put the counters into a statistics message."""
    values = {name: [read(arena, kind) for kind in Kind] for name, _, read in (*GAUGES, *COUNTERS)}
    stats.kv_connector_stats = {CARRIER: values}


class AVMPStatLogger(AggregateStatLoggerBase):
    """Exports the counters of every engine, and logs those that matter to a person.

    Args:
        vllm_config: For the model's name.
        engine_indexes: The engines whose statistics arrive here.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._model = vllm_config.model_config.served_model_name
        if isinstance(self._model, list):
            self._model = self._model[0]
        self._latest: dict[int, dict[str, list[float]]] = {i: {} for i in engine_indexes}
        self._logged: dict[int, dict[str, list[float]]] = {i: {} for i in engine_indexes}
        self._metrics: dict[str, Any] = {}
        for name, help_text, _ in GAUGES:
            self._metrics[name] = Gauge(
                f"vllm:avmp_{name}",
                f"AVMP: {help_text}",
                ["model_name", "engine", "pool"],
                multiprocess_mode="mostrecent",
            )
        for name, help_text, _ in COUNTERS:
            label = "direction" if name in BY_DIRECTION else "pool"
            self._metrics[name] = Counter(
                f"vllm:avmp_{name}", f"AVMP: {help_text}", ["model_name", "engine", label]
            )
        for index in engine_indexes:  # so that every series exists from the start
            self._export(index, {name: [0, 0] for name in self._metrics})

    def _child(self, name: str, engine: int, kind: Kind) -> Any:
        label = direction(kind) if name in BY_DIRECTION else kind.label
        return self._metrics[name].labels(self._model, str(engine), label)

    def _export(self, engine: int, values: dict[str, list[float]]) -> None:
        # Most values stand still from one step to the next, and a metric is slow to reach.
        before = self._latest[engine]
        for name, _, _ in GAUGES:
            for kind in Kind:
                if name not in before or values[name][kind] != before[name][kind]:
                    self._child(name, engine, kind).set(values[name][kind])
        for name, _, _ in COUNTERS:
            for kind in Kind:
                grown = values[name][kind] - before.get(name, (0, 0))[kind]
                if name not in before or grown > 0:
                    self._child(name, engine, kind).inc(max(grown, 0))
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
        scheduler_stats.kv_connector_stats = None
        self._export(engine_idx, carried[CARRIER])

    def log(self) -> None:
        """Log one line for each engine whose counters changed since the last one."""
        for engine, now in self._latest.items():
            if now != self._logged[engine]:
                logger.info("Engine %03d: AVMP %s", engine, summary(now))
                self._logged[engine] = now

    def log_engine_initialized(self) -> None:
        """Nothing to say; the capacity block is logged by the engine core."""


def summary(values: dict[str, list[float]]) -> str:
    """The counters as one line of text."""
    parts = [
        f"{kind.label}: {values['pages_used'][kind]:.0f} used + "
        f"{values['pages_cached'][kind]:.0f} cached of {values['capacity_pages'][kind]:.0f} pages"
        for kind in Kind
    ]
    moved = ", ".join(f"{direction(k)} {values['migrations'][k]:.0f}" for k in Kind)
    parts.append(f"migrations: {moved}")
    parts.append(f"relocated: {sum(values['relocated_bytes']) / 2**20:.1f} MiB")
    for name in ("evictions", "allocation_failures"):
        counts = ", ".join(f"{k.label} {values[name][k]:.0f}" for k in Kind)
        parts.append(f"{name.replace('_', ' ')}: {counts}")
    return "; ".join(parts)


def stat_logger_manager_init(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``StatLoggerManager.__init__``: AVMP's logger goes first."""

    def wrapper(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        if selected(vllm_config.additional_config) is not None:
            self.stat_loggers.insert(0, AVMPStatLogger(vllm_config, self.engine_indexes))

    return wrapper
