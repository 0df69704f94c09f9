"""Draw ``arena.svg``: the two bands of an arena before and after a migration.

The picture is not drawn by hand: a small arena is really run into the situation, and what it holds
is drawn. Run ``python docs/draw_arena.py`` from the repository.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.path import Path as Curve

from avmp_vllm.core import Arena, Geometry, Kind, Relocation, kind_of

# Okabe and Ito's colours, told apart by every reader; the hatch tells them apart in print.
COLOURS = {Kind.KV: "#0072B2", Kind.SSM: "#E69F00"}
FREE, NULL = "#f4f4f4", "#bbbbbb"
HEIGHT = 1.0
#: How far above the bar the arcs of the nearest and of the farthest relocation reach.
LOWEST, HIGHEST = 0.35, 1.1
ARROW = {"arrowstyle": "-", "linewidth": 0.8}


def situation() -> tuple[Arena, set[int]]:
    """An arena whose gap is used up, with holes in its KV band."""
    arena = Arena(Geometry(arena_bytes=64 * 16, page_bytes=16, block_bytes=88), migration_batch=1)
    pages = arena.allocate(pages=28)
    blocks = arena.allocate(blocks=4)
    more = arena.allocate(pages=arena.gap_bytes // 16)
    gone = pages[2::3] + more[1:3]
    arena.release(gone)
    return arena, set(pages + blocks + more) - set(gone)


def draw(axes: Axes, arena: Arena, held: set[int], title: str) -> None:
    """One bar: every page of the arena where it is."""
    geometry = arena.geometry
    null = geometry.null_blocks * geometry.block_bytes
    axes.add_patch(Rectangle((0, 0), null, HEIGHT, facecolor=NULL, edgecolor="white"))
    axes.text(null / 2, 0.5, "null", ha="center", va="center", fontsize=9)
    for kind in Kind:
        unit = geometry.unit(kind)
        band = arena._bands[kind]
        for position in range(1, band.capacity + 1):
            handle = band.handle_at(position)
            mapped = handle in held
            axes.add_patch(
                Rectangle(
                    (band.physical(handle) * unit, 0),
                    unit,
                    HEIGHT,
                    facecolor=COLOURS[kind] if mapped else FREE,
                    edgecolor="white" if mapped else "#999999",
                    hatch="///" if kind is Kind.SSM and mapped else None,
                    linewidth=0.8,
                )
            )
    begin = (geometry.null_blocks + arena.capacity(Kind.SSM)) * geometry.block_bytes
    if arena.gap_bytes:
        middle = begin + arena.gap_bytes / 2
        axes.annotate(
            "gap", (middle, 0.9), (middle, 1.25), ha="center", fontsize=9, arrowprops=ARROW
        )
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(-4, geometry.arena_bytes + 4)
    axes.axis("off")


def draw_moves(axes: Axes, moves: list[Relocation], unit: int) -> None:
    """An arc from where each page was to where it is now, higher the farther it moved."""
    farthest = max(abs(move.source - move.target) for move in moves)
    for move in moves:
        assert kind_of(move.handle) is Kind.KV
        start, end = ((index + 0.5) * unit for index in (move.source, move.target))
        share = abs(move.source - move.target) / farthest
        peak = HEIGHT + LOWEST + (HIGHEST - LOWEST) * share
        # A quadratic curve rises half as high as its middle point.
        points = [(start, HEIGHT), ((start + end) / 2, 2 * peak - HEIGHT), (end, HEIGHT)]
        axes.add_patch(
            FancyArrowPatch(
                path=Curve(points, [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3]),
                arrowstyle="-|>",
                mutation_scale=9,
                color="#333333",
                linewidth=0.9,
            )
        )


def picture() -> Figure:
    """Both bars, the arrows and the legend."""
    figure, (before, after) = plt.subplots(
        2, 1, figsize=(10, 4.1), gridspec_kw={"height_ratios": (1.65, 2.4)}
    )
    arena, held = situation()
    draw(before, arena, held, "A request needs a state, and no SSM block is free")
    held.update(arena.allocate(blocks=1))
    moves = arena.take_relocations()
    draw(
        after,
        arena,
        held,
        f"Capacity has migrated: {len(moves)} live pages moved into holes, their handles stay",
    )
    draw_moves(after, moves, arena.geometry.page_bytes)
    before.set_ylim(-0.1, 1.55)
    after.set_ylim(-0.1, HEIGHT + HIGHEST + 0.2)
    figure.legend(
        handles=[
            Patch(facecolor=COLOURS[Kind.SSM], hatch="///", edgecolor="white", label="SSM block"),
            Patch(facecolor=COLOURS[Kind.KV], label="KV page"),
            Patch(facecolor=FREE, edgecolor="#999999", label="free page"),
            Patch(facecolor=NULL, label="null"),
        ],
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def main() -> None:
    """Write ``arena.svg`` beside this file."""
    plt.rcParams["svg.hashsalt"] = "avmp"  # the same bytes at every run
    plt.rcParams["svg.fonttype"] = "none"
    path = Path(__file__).with_name("arena.svg")
    picture().savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main()
