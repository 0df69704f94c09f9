"""AVMP's counters in Prometheus and in the periodic log line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from avmp_vllm.core import Kind
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.scheduler.metrics import (
    CARRIER,
    COUNTERS,
    GAUGES,
    METRICS,
    OF_FIXED,
    Metric,
    Values,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

logger = init_logger("vllm." + __name__)

_BY_NAME = {metric.name: metric for metric in METRICS}


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
