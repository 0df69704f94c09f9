"""Cost of pages, of whole requests and of migration, beside vLLM's own classes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import RequestStatus

from avmp_vllm.backing.torch_buffer import TorchBuffer
from avmp_vllm.bench.jamba_3b import MAX_MODEL_LEN, Side, managers
from avmp_vllm.bench.timing import Subject, alternate
from avmp_vllm.core import Arena, Geometry, Kind, MovePlan, Relocation
from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool

#: Requests of one timed round, and those that fill the cache before (4096 tokens each).
REQUESTS, SETTLING = 8, 100
#: Decode steps of one timed round, for each of so many requests.
STEPS = 64


def pages(geometry: Geometry, batch: int, rounds: int) -> dict[str, float]:
    """Seconds to allocate and free a KV page, ``batch`` at a time, on a half-full arena.

    Returns:
        ``stock``: ``BlockPool``; ``avmp``: ``AVMPBlockPool``; ``core``: the arena alone.
    """
    total = geometry.page_limit
    arena, bare = Arena(geometry), Arena(geometry)
    stock = BlockPool(total + 1, enable_caching=False, hash_block_size=geometry.page_tokens)
    avmp = AVMPBlockPool(arena, Kind.KV, False, geometry.page_tokens)
    for pool in (stock, avmp):
        pool.get_new_blocks(total // 2)
    bare.allocate(pages=total // 2)
    times = max(1, 16_384 // batch)

    def through(pool: BlockPool) -> Callable[[None], None]:
        def work(_: None) -> None:
            for _ in range(times):
                pool.free_blocks(reversed(pool.get_new_blocks(batch)))

        return work

    def core(_: None) -> None:
        for _ in range(times):
            bare.release(bare.allocate(batch)[::-1])

    units = times * batch
    return alternate(
        {
            "stock": Subject(through(stock), units),
            "avmp": Subject(through(avmp), units),
            "core": Subject(core, units),
        },
        rounds,
    )


class _Traffic:
    """Requests of one length on one side, with fresh random prompts."""

    def __init__(self, side: Side, tokens: int, name: str = "") -> None:
        self.side = side
        self.tokens = tokens
        self.name = f"{name}{tokens}"
        self.rng = random.Random(self.name)
        self.made = 0
        self.running: list[Any] = []

    def requests(self) -> list[Any]:
        """Make a round's requests."""
        return [self.request(self.tokens) for _ in range(REQUESTS)]

    def request(self, tokens: int) -> Any:
        """Make one request with a random prompt."""
        self.made += 1
        prompt = self.rng.choices(range(65_536), k=tokens)
        return self.side.request(f"{self.name}-{self.made}", prompt)

    def start(self, request: Any) -> None:
        """Prefill in one chunk."""
        manager = self.side.manager
        manager.new_step_starts()
        if manager.allocate_slots(request, self.tokens) is None:
            raise RuntimeError("the benchmark's arena is too small for its requests")
        self.end_step()
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = self.tokens

    def end_step(self) -> None:
        """Drain what a scheduler hands to the workers, and let go of what was copied."""
        manager = self.side.manager
        manager.take_new_block_ids()
        _, retained = manager.take_kv_cache_block_copies()
        manager.block_pool.free_blocks(retained)
        manager.take_boundary_state_offloads()

    def whole(self, requests: list[Any]) -> None:
        """Allocate and free, as the scheduler does with a request that ends."""
        for request in requests:
            self.start(request)
            request.status = RequestStatus.FINISHED_STOPPED
            self.side.manager.free(request)

    def settle(self) -> None:
        """Fill the cache until both sides evict, as a server that has run for a while does."""
        if self.side.manager.enable_caching:
            # Not the measured prompts: those would be cached, and no engine computes them again.
            longest = _Traffic(self.side, 4096, name="settling-")
            longest.whole([longest.request(4096) for _ in range(SETTLING)])

    def running_requests(self) -> list[Any]:
        """Free the last round's requests and start new ones."""
        for request in self.running:
            self.side.manager.free(request)
        self.running = self.requests()
        for request in self.running:
            self.start(request)
        return self.running

    def steps(self, requests: list[Any]) -> None:
        """One token a step for every request, each known before the next."""
        manager = self.side.manager
        for _ in range(STEPS):
            manager.new_step_starts()
            for request in requests:
                request.append_output_token_ids(0)
                if manager.allocate_slots(request, 1) is None:
                    raise RuntimeError("the benchmark's arena is too small for its requests")
                request.num_computed_tokens += 1
            self.end_step()

    def stop(self) -> None:
        """Free what runs."""
        for request in self.running:
            self.side.manager.free(request)
        self.running = []


def requests(
    arena_bytes: int, prefix_caching: bool, lengths: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Seconds of ``allocate_slots`` and ``free`` of a request, and of a decode step's part for one.

    Returns:
        ``groups``: block tables of each side; ``block``: tokens of stock's block; ``request`` and
        ``step``: by length, by side.
    """
    assert max(lengths) + STEPS <= MAX_MODEL_LEN
    sides = managers(arena_bytes, prefix_caching)
    found: dict[str, Any] = {
        "groups": {name: len(side.config.kv_cache_groups) for name, side in sides.items()},
        "block": min(
            group.kv_cache_spec.block_size for group in sides["stock"].config.kv_cache_groups
        ),
        "request": {},
        "step": {},
    }
    for tokens in lengths:
        traffic = {name: _Traffic(side, tokens) for name, side in sides.items()}
        for one in traffic.values():
            one.settle()
        found["request"][tokens] = alternate(
            {name: Subject(one.whole, REQUESTS, one.requests) for name, one in traffic.items()},
            rounds,
        )
        found["step"][tokens] = alternate(
            {
                name: Subject(one.steps, REQUESTS * STEPS, one.running_requests)
                for name, one in traffic.items()
            },
            rounds,
        )
        for one in traffic.values():
            one.stop()
    return found


def migrations(geometry: Geometry, rounds: int) -> dict[str, float]:
    """Seconds of the scheduler for one migration of an SSM block's worth of pages.

    Returns:
        ``event``: nothing stands in the way; ``event_live``: every page of the inner end is live
        and moves; ``pages``: how many those are.
    """
    arena = Arena(geometry, migration_batch=1)
    events = min(8, geometry.block_limit // 4)
    relocated = arena.statistics.relocations
    held: list[int] = []
    taken: list[int] = []

    def half_full(free_inner: bool) -> None:
        """Fill the arena with pages, then free half of them: the inner or the outer ones."""
        arena.release(held)
        arena.release(taken)
        taken.clear()
        handles = arena.allocate(pages=geometry.page_limit)
        handles.sort(key=arena.physical, reverse=not free_inner)
        half = len(handles) // 2
        arena.release(handles[:half])
        held[:] = handles[half:]
        arena.take_relocations()

    def work(_: None) -> None:
        for _ in range(events):
            taken.extend(arena.allocate(blocks=1))

    found = alternate(
        {
            "event": Subject(work, events, lambda: half_full(free_inner=True)),
            "event_live": Subject(work, events, lambda: half_full(free_inner=False)),
        },
        rounds,
    )
    if not relocated[Kind.KV]:
        raise AssertionError("no page was relocated")
    # The rounds of both kinds ran equally often; only one kind relocates.
    found["pages"] = relocated[Kind.KV] / ((rounds + 1) * events)
    return found


def copies(geometry: Geometry, rounds: int) -> dict[str, float]:
    """Seconds a byte that a worker copies for relocations, through ``TorchBuffer``, by kind."""
    total = 256 << 20
    small = Geometry(total, geometry.page_bytes, geometry.block_bytes)
    buffer = TorchBuffer(torch.zeros(total // 8, dtype=torch.int64), small)
    subjects = {}
    for kind in Kind:
        unit = small.unit(kind)
        count = min(512, total // unit // 2)
        moves = [
            Relocation(kind, 0, 0, number, total // unit - 1 - number) for number in range(count)
        ]
        plan = MovePlan(1, relocations=moves)
        subjects[kind.label] = Subject(lambda _, plan=plan: buffer.apply(plan), count * unit)
    return alternate(subjects, rounds)
