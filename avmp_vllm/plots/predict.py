"""Log-loss by trace, and fit against fill of reservations, from ``avmp bench predict``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from avmp_vllm.bench.predict.models import COUNTED, LONG, MIXED, SHORT
from avmp_vllm.plots import style

#: Model -> colour, marker.
LOOKS = {
    MIXED: (style.BLUE, "o"),
    SHORT: (style.ORANGE, "s"),
    LONG: (style.VERMILION, "D"),
    COUNTED: (style.GREY, "v"),
}
#: Beginning of a rule's name -> colour; rules of one family differ by marker.
RULES = {
    "constant": style.GREY,
    "mean": style.PURPLE,
    "S3": style.ORANGE,
    "eight adaptive, global": style.VERMILION,
    "eight adaptive, P": style.BLUE,
}
LETTERS = 12


def short(trace: str) -> str:
    """A trace's name for an axis: files without folder and ending, parts joined by arrows."""
    parts = []
    for part in trace.split("+"):
        name, _, limit = part.partition("[")
        file, _, column = name.partition("@")
        shown = Path(file).stem.split("_")[0][:LETTERS]
        parts.append(f"{shown} {column}".strip() + ("" if not limit else f" {limit[1:-1]}"))
    if len(parts) > 1:
        return " > ".join(part.partition(" ")[0] for part in parts)
    return parts[0]


def draw(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``predict``: every model on every trace; the first trace's reservations."""
    traces = list(dict.fromkeys(result["parameters"]["trace"]))
    counts = {name: result["counts"][name] for name in traces}
    made, (losses, fits) = style.figure(1, 2, size=(12, 2.2 + 0.3 * len(counts)))
    _losses(losses, counts)
    name = traces[0]
    _reservations(fits, counts[name]["reservations"])
    fits.set_title(f"Contiguous reservations, {short(name)}")
    return {"predict": made}


def _losses(axes: Axes, counts: Mapping[str, Any]) -> None:
    places = np.arange(len(counts))
    for model, (colour, marker) in LOOKS.items():
        values = [row["models"][model]["log_loss"] for row in counts.values()]
        axes.plot(
            values,
            places,
            color=colour,
            marker=marker,
            linestyle="",
            markersize=7 if model == MIXED else 5,
            zorder=3 if model == MIXED else 2,
            label=model,
        )
    known = np.log(5)
    axes.axvline(known, color=style.BLACK, linewidth=1, linestyle=":", label="the cuts alone")
    axes.set_yticks(places, [short(name) for name in counts])
    axes.invert_yaxis()
    axes.set_xlabel("nats")
    axes.set_title("Log-loss over fifths of the trace; less is better")
    style.light_grid(axes, "x")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _reservations(axes: Axes, rules: Mapping[str, Any]) -> None:
    """Each rule's point; those to the upper right keep their promise and waste little."""
    for begin, colour in RULES.items():
        family = [name for name in rules if name.startswith(begin)]
        # By size, as the names of constants do not sort.
        family.sort(key=lambda name: rules[name]["fill"])
        for marker, name in zip(style.MARKERS, family, strict=False):
            axes.plot(
                rules[name]["fill"],
                rules[name]["fit"],
                color=colour,
                marker=marker,
                markersize=6,
                linestyle="",
                label=name,
            )
    axes.set_xlim(0, 1)
    axes.set_ylim(top=1.02)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("fill: tokens used of those reserved")
    axes.set_ylabel("fit: answers within their bucket")
    style.light_grid(axes, "both")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
