"""What ``--kv-offloading-size`` asks for: pages and states in the host's memory.

vLLM's own host has entries of one size. A page and a state differ by up to some hundred times, so
entries for either would waste nearly all of the memory. ``core/host_cache.py`` keeps both in the
same rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadingSpec,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec, CPUOffloadingMetrics
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from avmp_vllm.core import Kind
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.core.host_cache import Entry, HostCache
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.offload.copies import make_worker
from avmp_vllm.engine.offload.view import geometry_of

if TYPE_CHECKING:
    from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker
    from vllm.v1.kv_offload.config import OffloadingConfig

    from avmp_vllm.engine.layout.arena import AVMPCacheConfig


class HostSpec(OffloadingSpec):
    """The host's memory, by both sides of the connector.

    Args:
        config: vLLM's.
        kv_cache_config: The arena's, by pages.
        kinds: Of each cache group.

    Attributes:
        slabs: Slabs of the host's memory for one rank.
        span: Rows of a slab.

    Raises:
        ConfigError: Not even one state fits.
    """

    def __init__(
        self, config: OffloadingConfig, kv_cache_config: AVMPCacheConfig, kinds: Sequence[Kind]
    ) -> None:
        super().__init__(config)
        geometry = geometry_of(kv_cache_config)
        self.span = ceil_div(geometry.block_bytes, geometry.page_bytes)
        slab_bytes = self.span * geometry.page_bytes
        nbytes = int(self.extra_config.get("cpu_bytes_to_use") or 0)
        ranks = config.parallel.world_size
        self.slabs = nbytes // ranks // slab_bytes
        if not self.slabs:
            raise ConfigError(
                f"--kv-offloading-size of {nbytes} bytes holds no state of {geometry.block_bytes} "
                f"bytes for each of {ranks} rank(s): give at least {slab_bytes * ranks} bytes, or "
                "leave the option out"
            )
        self._kinds = kinds

    def get_manager(self) -> OffloadingManager:
        """What is on the host, for the scheduler's side."""
        return HostManager(
            HostCache(self.slabs, self.span),
            self._kinds,
            enable_events=self.kv_events_config.enable_kv_cache_events,
        )

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """What copies, for a worker's side."""
        return make_worker(kv_caches, self.slabs, self.span)


class HostManager(OffloadingManager):
    """Tells vLLM's connector what is on the host.

    Args:
        cache: What is there.
        kinds: Of each cache group.
        enable_events: Whether to note what comes and goes.
    """

    def __init__(self, cache: HostCache, kinds: Sequence[Kind], enable_events: bool) -> None:
        self.cache = cache
        self._kinds = kinds
        self._events: list[OffloadingEvent] | None = [] if enable_events else None
        self._asked: list[int] = []

    def _kind(self, key: OffloadKey) -> Kind:
        return self._kinds[get_offload_group_idx(key)]

    def _where(self, entries: Iterable[Entry]) -> CPULoadStoreSpec:
        """Rows of pages, slabs of states: what their views on the host are indexed by."""
        span = self.cache.span
        return CPULoadStoreSpec(
            [entry.row // span if entry.kind is Kind.SSM else entry.row for entry in entries]
        )

    def _note(self, keys: Collection[Any], removed: bool) -> None:
        if keys and self._events is not None:
            self._events.append(OffloadingEvent(list(keys), Medium.CPU, removed))

    # -- requests ----------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """A request has come; it offloads what it computes."""
        req_context.set_state(Touched())
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        """A request has ended: what it used was of use, its first page most recently.

        So what goes for others is the end of a prefix, of which the rest is still good.
        """
        keys = _touched(req_context)
        positions = {key: req_context.get_offload_key_position(key) or 0 for key in keys}
        self.cache.use(sorted(keys, key=positions.__getitem__, reverse=True))
        keys.clear()

    # -- loads and stores --------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Whether a page or state is on the host."""
        entry = self.cache.get(key)
        if entry is None:
            return LookupResult.MISS
        return LookupResult.HIT if entry.ready else LookupResult.HIT_PENDING

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        """The host."""
        return CacheHitSource.HOST

    def prepare_load(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> CPULoadStoreSpec:
        """Where to read what `lookup` has found; it stays until `complete_load`."""
        _touched(req_context).update(dict.fromkeys(keys))
        return self._where(self.cache.begin_read(keys))

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """A load has ended."""
        self.cache.end_read(keys)

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """Where to write those that are not there yet; None if there is no room for all of them."""
        cache = self.cache
        _touched(req_context).update(dict.fromkeys(keys))
        new = [key for key in keys if cache.get(key) is None]
        gone: list[Any] = []
        if new:
            self._asked.append(len(new))
            kinds = {self._kind(key) for key in new}
            assert len(kinds) == 1, "vLLM stores pages and states by jobs of their own"
            room = cache.add(kinds.pop(), new, beside=set(keys))
            if room is None:
                return None
            gone = room
            self._note(gone, removed=True)
        entries = [entry for entry in map(cache.get, new) if entry is not None]
        return PrepareStoreOutput(new, self._where(entries), gone)

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """A store has ended; what has failed is not there."""
        ended = self.cache.end_write(keys, arrived=success)
        if success:
            self._note(ended, removed=False)

    def reset_cache(self) -> None:
        """Forget everything; vLLM's connector sees to the transfers that are under way."""
        self.cache.clear()

    # -- what is told about it ---------------------------------------------------------------------

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What has come and gone since the last call."""
        if self._events:
            events, self._events = self._events, []
            yield from events

    def get_stats(self) -> OffloadingConnectorStats:
        """The gauges of vLLM's own host."""
        cache, stats = self.cache, OffloadingConnectorStats()
        reading, writing = cache.reading_rows / cache.rows, cache.writing_rows / cache.rows
        stats.set_gauge(CPUOffloadingMetrics.CPU_CACHE_USAGE_PERC, reading + writing)
        stats.set_gauge(CPUOffloadingMetrics.CPU_CACHE_WRITE_USAGE_PERC, writing)
        stats.set_gauge(CPUOffloadingMetrics.CPU_CACHE_READ_USAGE_PERC, reading)
        for count in self._asked:
            stats.observe_histogram(CPUOffloadingMetrics.CPU_ALLOCATION_SIZE, count)
        self._asked.clear()
        return stats


class Touched(dict[OffloadKey, None]):
    """Keys that a request has used, in order."""


def _touched(req_context: ReqContext) -> Touched:
    found = req_context.get_state(Touched)
    assert found is not None, "vLLM announces a request first"
    return found
