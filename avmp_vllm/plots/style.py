"""How pictures look and how they are saved.

Okabe and Ito's colours are told apart by every reader; hatches and markers say the same in print.
The same result gives the same SVG, byte for byte: text stays text, ids are salted, no date.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"
VERMILION, PURPLE, YELLOW, BLACK = "#D55E00", "#CC79A7", "#F0E442", "#000000"
GREY, PALE = "#999999", "#f0f0f0"
#: In the order in which series of equal rank take them.
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK, GREY)
MARKERS = "osD^vPX*"
HATCHES = ("", "//", "\\\\", "x", "-", "+", ".", "o")

_RC = {
    "svg.hashsalt": "avmp",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
}
DPI = 150


def figure(
    rows: int = 1,
    columns: int = 1,
    *,
    size: tuple[float, float],
    heights: Sequence[float] | None = None,
) -> tuple[Figure, list[Axes]]:
    """A new figure with its axes as a flat list.

    Args:
        rows, columns: Of axes.
        size: Width and height in inches.
        heights: Of the rows, relative to one another.
    """
    plt.rcParams.update(_RC)
    made, axes = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    return made, list(axes.flat)


def light_grid(axes: Axes, axis: str = "y") -> None:
    """Lines behind the data that help to read values."""
    axes.grid(axis=axis, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def save(made: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg``; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    made.savefig(paths[0], dpi=DPI, metadata={"Software": None})
    made.savefig(paths[1], metadata={"Date": None, "Creator": None})
    plt.close(made)
    return paths
