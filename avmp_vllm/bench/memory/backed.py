"""Bytes backed over time by each rule, for one model on one trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from avmp_vllm.bench.memory.rules import (
    Avmp,
    AvmpHeld,
    ExpandablePool,
    KvcachedPool,
    Live,
    TwoPools,
)
from avmp_vllm.bench.memory.traffic import PAGE_TOKENS, PARTS, Load, steps
from avmp_vllm.bench.scheduler.traces import TraceRequest
from avmp_vllm.core import Geometry, Kind, caches
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.models.shapes import ModelShape

#: Points of a series.
POINTS = 1500
#: Part of the arena's range that the busiest moment takes.
HEADROOM = 1.3


def sizes_of(shape: ModelShape, kv_dtype: str) -> tuple[int, int]:
    """Bytes of a KV page and of an SSM block."""
    shape.require_plain()
    bounds = caches.Load(PAGE_TOKENS, shape.max_model_len)  # of windows, which there are none of
    geometry = shape.caches(kv_dtype).geometry(1 << 60, PAGE_TOKENS, bounds)
    return geometry.page_bytes, geometry.block_bytes


def replay(
    page: int,
    block: int,
    requests: Sequence[TraceRequest],
    load: Load,
    chunk: int,
    every: int,
    hold: float,
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """Follow one run with every rule.

    Args:
        page, block: Bytes of a KV page and of an SSM block.
        requests: In order of arrival.
        load: How many run.
        chunk: Bytes that are backed at a time.
        every: Steps between two of AVMP's trims.
        hold: Seconds for which AVMP's buffer keeps what is not needed.
        progress: Told of requests that have ended.

    Returns:
        Means of each part by rule, weighted by time, peaks, what relocation cost, and the series.
    """
    run = list(steps(requests, load))
    live = Live(page, block)
    peak = max(live.step(step) for step in run)
    null = ceil_div(max(page, block), block) * block
    geometry = Geometry(int(peak * HEADROOM) + null + 64 * chunk, page, block, PAGE_TOKENS)
    avmp = Avmp(geometry, chunk, every)
    held = AvmpHeld(avmp, chunk, hold)
    rules = {
        "live": Live(page, block),
        "avmp": avmp,
        "avmp-held": held,
        "expandable": TwoPools(ExpandablePool, page, block, chunk),
        "kvcached": TwoPools(KvcachedPool, page, block, chunk),
    }
    parts = {part: dict.fromkeys(rules, 0.0) for part in PARTS}
    seconds = dict.fromkeys(PARTS, 0.0)
    peaks = dict.fromkeys(rules, 0)
    after: dict[str, int] = {}
    end = run[-1].begin + run[-1].lasts
    series: dict[str, list[float]] = {"seconds": [], **{name: [] for name in rules}}
    for step in run:
        after = {name: rule.step(step) for name, rule in rules.items()}
        seconds[step.part] += step.lasts
        for name, held_bytes in after.items():
            parts[step.part][name] += held_bytes * step.lasts
            peaks[name] = max(peaks[name], held_bytes)
        if step.begin >= len(series["seconds"]) * end / POINTS:
            series["seconds"].append(round(step.begin, 3))
            for name, held_bytes in after.items():
                series[name].append(held_bytes)
        progress(len(step.dropped))
    statistics = avmp.arena.statistics
    taken = sum(p * page + b * block for step in run for _, p, b in step.taken)
    return {
        "page_bytes": page,
        "block_bytes": block,
        "requests": len(requests),
        "steps": len(run),
        "seconds": {part: round(value, 3) for part, value in seconds.items()},
        "null_bytes": geometry.null_blocks * block,
        "mean": {
            part: {name: round(total / max(seconds[part], 1e-9)) for name, total in row.items()}
            for part, row in parts.items()
        },
        "peak": peaks,
        "at_the_end": after,
        "taken_bytes": taken,
        "relocated_bytes": sum(statistics.relocated_bytes[kind] for kind in Kind),
        "calls": dict(held.buffer.statistics.calls),
        "steps_without_a_call": held.quiet_steps,
        "series": series,
    }
