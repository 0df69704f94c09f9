"""The paper's five allocators: same outcomes, written for speed.

All share one failure path. A pool that is short drops *every* page that its least recently
successful request holds in it, be that request running or even the one that asks, and tries once
more; the eviction stands even if the second try fails. That is how the paper defines them, and what
`honest.py` puts right.

=================== ============================================================================
padded_unified      one pool of max(KV page, SSM block); ids are raw and reused, so that an evicted
                    request's departure frees pages that others hold by then
fixed_dual_mrXX     two pools, split once: SSM gets XX/10 of the bytes
avmp_static_mrXX    the same through handles; same outcomes
avmp_dynamic_bB     adds a migration of B donor pages after the failed second try, refused where a
                    live page stands among the last B
=================== ============================================================================

Where only counts decide (no migration, unique handles), no page ids are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter_ns
from typing import Protocol

import numpy as np

from avmp_vllm.bench.paper.models import Model
from avmp_vllm.core import Kind


@dataclass
class Counters:
    """What one replay counts.

    Attributes:
        failures: Failed allocation calls by pool; their sum is the paper's OOM count.
        evictions: Requests that lost all pages of a pool to another call.
        self_evictions: Those among them whose own call it was.
        robbed: Requests that ever lost a page while they ran.
        migrations: Migrations carried out (the paper's rebalance count).
        refused: Migrations refused because a live page stood in the way.
        migrated_bytes: Bytes of capacity moved.
        migration_ns: Time spent in them.
    """

    failures: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    evictions: int = 0
    self_evictions: int = 0
    robbed: set[int] = field(default_factory=set)
    migrations: int = 0
    refused: int = 0
    migrated_bytes: int = 0
    migration_ns: int = 0


class PaperAllocator(Protocol):
    """What the replay needs of an allocator."""

    counters: Counters

    def take(self, kind: Kind, request: int, count: int) -> bool:
        """Take pages without eviction: all, or none and False."""

    def rescue(self, kind: Kind, request: int, count: int) -> bool:
        """The failure path after a failed `take`; True if the second or third try succeeded."""

    def free(self, request: int) -> None:
        """Give back everything that a departing request holds."""

    def capacity_bytes(self, kind: Kind) -> int | None:
        """Bytes of a pool now; None where there is no such pool."""


class _Pool(ABC):
    """One pool with the paper's LRU over requests."""

    total: int

    @abstractmethod
    def take(self, request: int, count: int) -> bool: ...

    @abstractmethod
    def evict(self) -> int | None:
        """Drop the least recent request's pages; its number, or None if nobody holds any."""

    @abstractmethod
    def free(self, request: int) -> None: ...


class _CountedPool(_Pool):
    """A pool whose page ids never matter."""

    def __init__(self, total: int) -> None:
        self.total = self._available = total
        self._held: OrderedDict[int, int] = OrderedDict()

    def take(self, request: int, count: int) -> bool:
        if self._available < count:
            return False
        self._available -= count
        held = self._held
        held[request] = held.pop(request, 0) + count
        return True

    def evict(self) -> int | None:
        if not self._held:
            return None
        request, count = self._held.popitem(last=False)
        self._available += count
        return request

    def free(self, request: int) -> None:
        self._available += self._held.pop(request, 0)


class NumberedPool(_Pool):
    """A pool whose page ids decide whether its tail can be cut off.

    The free list is a stack. A failed call hands its partial pages back in the order in which it
    got them, which turns the whole stack upside down; later ids depend on it.

    Args:
        total: Pages now.
        limit: Pages that its slab holds.
    """

    def __init__(self, total: int, limit: int) -> None:
        self.total, self._limit = total, limit
        self._stack = np.empty(limit, dtype=np.int32)
        self._stack[:total] = np.arange(total - 1, -1, -1)
        self._free = total
        self._held: OrderedDict[int, list[np.ndarray]] = OrderedDict()

    def take(self, request: int, count: int) -> bool:
        free, stack = self._free, self._stack
        if free < count:
            stack[:free] = stack[:free][::-1].copy()
            return False
        self._free = free = free - count
        # In the order in which they are popped.
        ids = stack[free : free + count][::-1].copy()
        held = self._held
        mine = held.pop(request, None)
        if mine is None:
            held[request] = [ids]
        else:
            mine.append(ids)
            held[request] = mine
        return True

    def _give(self, runs: Iterable[np.ndarray]) -> None:
        stack, free = self._stack, self._free
        for ids in runs:
            stack[free : free + len(ids)] = ids
            free += len(ids)
        self._free = free

    def evict(self) -> int | None:
        if not self._held:
            return None
        request, runs = self._held.popitem(last=False)
        self._give(runs)
        return request

    def free(self, request: int) -> None:
        self._give(self._held.pop(request, ()))

    def cut(self, count: int) -> bool:
        """Give up the last ids if all of them are free."""
        total = self.total - count
        if total < 0:
            return False
        stack = self._stack[: self._free]
        stays = stack < total
        kept = int(np.count_nonzero(stays))
        if self._free - kept != count:
            return False
        self._stack[:kept] = stack[stays]
        self._free, self.total = kept, total
        return True

    def grow(self, count: int) -> bool:
        """Append ids, unless the slab ends before."""
        if self.total + count > self._limit:
            return False
        self._stack[self._free : self._free + count] = np.arange(self.total, self.total + count)
        self._free += count
        self.total += count
        return True


class DualPool:
    """Two pools with a split; with ``batch`` capacity migrates between them.

    Args:
        model: Page sizes.
        total_bytes: Bytes of both pools.
        ssm_share: Part of them that the SSM pool gets.
        batch: Donor pages that a migration moves; 0 for none.
    """

    def __init__(self, model: Model, total_bytes: int, ssm_share: float, batch: int = 0) -> None:
        self.counters = Counters()
        self._unit = (model.layer_page_bytes, model.layer_state_bytes)
        ssm_bytes = int(total_bytes * ssm_share)
        share = (total_bytes - ssm_bytes, ssm_bytes)
        self._batch = batch
        if batch:
            self._pools: tuple[_Pool, _Pool] = tuple(
                NumberedPool(share[kind] // self._unit[kind], total_bytes // self._unit[kind])
                for kind in Kind
            )
        else:
            self._pools = tuple(_CountedPool(share[kind] // self._unit[kind]) for kind in Kind)

    def take(self, kind: Kind, request: int, count: int) -> bool:
        return self._pools[kind].take(request, count)

    def rescue(self, kind: Kind, request: int, count: int) -> bool:
        pool = self._pools[kind]
        _evict(pool, request, self.counters)
        if pool.take(request, count):
            return True
        return bool(self._batch) and self._migrate(kind) and pool.take(request, count)

    def free(self, request: int) -> None:
        for pool in self._pools:
            pool.free(request)

    def capacity_bytes(self, kind: Kind) -> int | None:
        return self._pools[kind].total * self._unit[kind]

    def _migrate(self, kind: Kind) -> bool:
        """Move a batch of donor pages' bytes to a pool, if the donor's tail is free."""
        begin, counters = perf_counter_ns(), self.counters
        donor, pool = self._pools[kind.other], self._pools[kind]
        moved = self._batch * self._unit[kind.other]
        done = donor.cut(self._batch)
        if done and not pool.grow(moved // self._unit[kind]):
            donor.grow(self._batch)
            done = False
        if done:
            counters.migrations += 1
            counters.migrated_bytes += moved
        else:
            counters.refused += 1
        counters.migration_ns += perf_counter_ns() - begin
        return done


class PaddedUnified:
    """One pool whose page holds the larger of the two kinds.

    Args:
        model: Page sizes.
        total_bytes: Bytes of the pool.
    """

    def __init__(self, model: Model, total_bytes: int) -> None:
        self.counters = Counters()
        self._page = max(model.layer_page_bytes, model.layer_state_bytes)
        self._stack = list(range(total_bytes // self._page - 1, -1, -1))
        # Owner of each page now, each owner's pages in order of acquisition (also its place in the
        # LRU), and what each request believes it holds.
        self._owner: dict[int, int] = {}
        self._pages: OrderedDict[int, dict[int, None]] = OrderedDict()
        self._believed: dict[int, list[int]] = {}

    def take(self, kind: Kind, request: int, count: int) -> bool:
        stack = self._stack
        if len(stack) < count:
            return False
        ids = stack[: -count - 1 : -1]
        del stack[-count:]
        self._owner.update(dict.fromkeys(ids, request))
        pages = self._pages.setdefault(request, {})
        pages.update(dict.fromkeys(ids))
        self._pages.move_to_end(request)
        self._believed.setdefault(request, []).extend(ids)
        return True

    def rescue(self, kind: Kind, request: int, count: int) -> bool:
        _evict(self, request, self.counters)
        return self.take(kind, request, count)

    def evict(self) -> int | None:
        if not self._pages:
            return None
        request, pages = self._pages.popitem(last=False)
        for page in pages:
            del self._owner[page]
        self._stack += pages
        return request

    def free(self, request: int) -> None:
        for page in self._believed.pop(request, ()):
            owner = self._owner.pop(page, None)
            if owner is None:
                continue
            self._stack.append(page)
            pages = self._pages[owner]
            del pages[page]
            if owner != request:
                self.counters.robbed.add(owner)
            if not pages:
                del self._pages[owner]

    def capacity_bytes(self, kind: Kind) -> int | None:
        return None


def _evict(pool: _Pool | PaddedUnified, request: int, counters: Counters) -> None:
    """Drop the least recent request and book it."""
    victim = pool.evict()
    if victim is None:
        return
    counters.evictions += 1
    counters.self_evictions += victim == request
    counters.robbed.add(victim)


def make_allocator(variant: str, model: Model, total_bytes: int) -> PaperAllocator:
    """Build the allocator of a published variant's name.

    Raises:
        ValueError: The name is none of the paper's.
    """
    factory = VARIANTS.get(variant)
    if factory is None:
        raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}")
    return factory(model, total_bytes)


def _dual(ssm_share: float, batch: int = 0) -> Callable[[Model, int], PaperAllocator]:
    return lambda model, total_bytes: DualPool(model, total_bytes, ssm_share, batch)


#: Migration batches of the paper's first stage.
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: The paper's second stage: thresholds that label a statistic and decide nothing.
THRESHOLDS = ("th_low_002", "th_low_010", "th_high_010", "th_high_020")

VARIANTS: dict[str, Callable[[Model, int], PaperAllocator]] = {
    "padded_unified": PaddedUnified,
    "fixed_dual_mr05": _dual(0.5),
    "fixed_dual_mr09": _dual(0.9),
    "avmp_static_mr05": _dual(0.5),
    **{f"avmp_dynamic_b{batch}": _dual(0.5, batch) for batch in BATCHES},
}

#: Published names whose decisions are another variant's: one replay stands for both.
ALIASES: dict[str, str] = {
    "avmp_dynamic_mr05": "avmp_dynamic_b1",
    **{f"avmp_dynamic_b128_{name}": "avmp_dynamic_b128" for name in THRESHOLDS},
    # Clears each page in a kernel besides.
    "avmp_dynamic_b128_triton": "avmp_dynamic_b128",
}
