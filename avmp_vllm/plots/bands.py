"""The bands of an arena over time, migrations and failures marked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from avmp_vllm.plots import style

MIB = 1 << 20
NULL = "#bbbbbb"


def draw(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``bands``: the arena's bytes at every step, and the requests that wait."""
    counts = result["counts"]
    names = counts["columns"]
    data = np.asarray(counts["steps"], dtype=np.int64)
    column = {name: data[:, i] for i, name in enumerate(names)}
    made, (arena, events) = style.figure(2, size=(10, 5.4), heights=(3, 1.1))
    _bands(arena, counts["geometry"], column)
    _events(events, column)
    for axes in (arena, events):
        axes.set_xlim(0, len(data) - 1)
        for phase in counts["phases"][1:]:
            axes.axvline(phase["begin"], color=style.BLACK, linewidth=0.8, linestyle=(0, (4, 3)))
    top = counts["geometry"]["arena_bytes"] / MIB
    for phase in counts["phases"]:
        arena.annotate(
            f"{phase['name']} ({phase['requests']})",
            (phase["begin"], top),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8.5,
        )
    arena.set_title("One arena, two bands, at every step of a live engine", pad=20)
    return {"bands": made}


def changes(*series: np.ndarray) -> np.ndarray:
    """Indices at which any series changes, with both ends; the others need not be drawn."""
    differ = np.any([np.diff(one) != 0 for one in series], axis=0)
    return np.flatnonzero(np.concatenate([[True], differ[:-1], [True]]))


def _bands(axes: Axes, geometry: Mapping[str, int], column: Mapping[str, np.ndarray]) -> None:
    steps = np.arange(len(column["kv_used"]))
    page, block = geometry["page_bytes"] / MIB, geometry["block_bytes"] / MIB
    null, top = geometry["null_bytes"] / MIB, geometry["arena_bytes"] / MIB

    def layer(low: np.ndarray, high: np.ndarray, **look: Any) -> None:
        kept = changes(low, high)
        axes.fill_between(steps[kept], low[kept], high[kept], step="post", linewidth=0, **look)

    base = np.full(len(steps), null)
    layer(np.zeros(len(steps)), base, facecolor=NULL)
    # SSM from the low end up, KV from the high end down; in a band by use, not by place.
    bottom = base
    for name, look in (
        ("ssm_used", {"facecolor": style.ORANGE, "hatch": "//", "edgecolor": "white"}),
        ("ssm_cached", {"facecolor": "#f7dfae", "hatch": "//", "edgecolor": "white"}),
    ):
        layer(bottom, bottom + column[name] * block, **look)
        bottom = bottom + column[name] * block
    ssm_end = base + column["ssm_capacity"] * block
    layer(bottom, ssm_end, facecolor=style.PALE)
    ceiling = np.full(len(steps), top)
    for name, look in (
        ("kv_used", {"facecolor": style.BLUE}),
        ("kv_cached", {"facecolor": "#a9cbe6"}),
    ):
        layer(ceiling - column[name] * page, ceiling, **look)
        ceiling = ceiling - column[name] * page
    kv_end = top - column["kv_capacity"] * page
    layer(kv_end, ceiling, facecolor=style.PALE)
    for edge in (ssm_end, kv_end):
        kept = changes(edge)
        axes.step(steps[kept], edge[kept], where="post", color=style.BLACK, linewidth=0.9)
    axes.set_ylim(0, top)
    axes.set_ylabel("MiB of the arena")
    axes.legend(
        handles=[
            Patch(facecolor=style.BLUE, label="KV, referenced"),
            Patch(facecolor="#a9cbe6", label="KV, evictable"),
            Patch(facecolor=style.PALE, edgecolor="#cccccc", label="free in its band"),
            Patch(facecolor="white", edgecolor=style.GREY, label="gap"),
            Patch(facecolor="#f7dfae", hatch="//", edgecolor="white", label="SSM, evictable"),
            Patch(facecolor=style.ORANGE, hatch="//", edgecolor="white", label="SSM, referenced"),
            Patch(facecolor=NULL, label="null"),
            Line2D([], [], color=style.BLACK, linewidth=0.9, label="end of a band"),
        ],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )


def _events(axes: Axes, column: Mapping[str, np.ndarray]) -> None:
    """Rows of marks: when capacity moved, and when a request found no room."""
    lanes = (
        ("migrations_to_kv", "capacity moves to KV", "^", style.BLUE),
        ("migrations_to_ssm", "capacity moves to SSM", "v", style.ORANGE),
        ("relocations", "live pages relocated", "s", style.GREEN),
        ("failures", "no room: requests wait", "x", style.VERMILION),
        ("preemptions", "a request is preempted", "P", style.BLACK),
    )
    for lane, (name, _, marker, colour) in enumerate(lanes):
        at = np.flatnonzero(np.diff(column[name], prepend=0))
        axes.plot(at, [lane] * len(at), linestyle="", marker=marker, markersize=4.5, color=colour)
    labels = [f"{label} ({column[name][-1]})" for name, label, _, _ in lanes]
    axes.set_yticks(range(len(lanes)), labels)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlabel("engine step")
    style.light_grid(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
