"""Bytes backed over time, from ``avmp bench memory``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from avmp_vllm.plots import style
from avmp_vllm.plots.bands import changes

MIB = 1 << 20
#: Rule -> colour, line, width.
LOOKS = {
    "kvcached": (style.VERMILION, "-", 1.2),
    "expandable": (style.ORANGE, "--", 1.2),
    "avmp-held": (style.SKY, ":", 1.4),
    "avmp": (style.BLUE, "-", 1.8),
}
#: Models that are drawn.
MODELS = 3
#: Points of a line at most.
POINTS = 50
#: Seconds that are shown before the ebb and after it.
BEFORE, AFTER = 2.0, 11.0


def draw(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``memory``: a row a trace, a column a model; live bytes as an area below each rule's line."""
    counts, titles = result["counts"], result["titles"]
    traces = list(counts)
    models = list(counts[traces[0]])[:MODELS]
    made, axes = style.figure(
        len(traces), len(models), size=(3.6 * len(models), 2.5 * len(traces) + 0.8)
    )
    for row, trace in enumerate(traces):
        for column, model in enumerate(models):
            panel, cell = axes[row * len(models) + column], counts[trace][model]
            ebb = cell["seconds"]["busy"]
            quiet = ebb + cell["seconds"]["ebb"]
            begin, end = ebb - BEFORE, quiet + AFTER
            times = cell["series"]["seconds"]
            shown = [i for i, at in enumerate(times) if begin <= at <= end]
            shown = shown[:: -(-len(shown) // POINTS)]
            series = {name: [row[i] for i in shown] for name, row in cell["series"].items()}

            panel.fill_between(
                *_line(series, "live"),
                color="#cccccc",
                linewidth=0,
                step="post",
                label=titles["live"],
            )
            for rule, (colour, line, width) in LOOKS.items():
                panel.step(
                    *_line(series, rule),
                    where="post",
                    color=colour,
                    linestyle=line,
                    linewidth=width,
                    label=titles[rule],
                )
            for edge in (ebb, quiet):
                panel.axvline(edge, color=style.BLACK, linewidth=0.6, linestyle=(0, (4, 3)))
            panel.set_yscale("log")
            panel.set_xlim(begin, end)
            panel.set_title(f"{model}\n{Path(trace).stem}", fontsize=8.5)
            style.light_grid(panel)
            if not column:
                panel.set_ylabel("MiB")
            if row == len(traces) - 1:
                panel.set_xlabel("seconds")
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=5)
    load = result["parameters"]
    made.suptitle(
        f"Backed bytes: {load['busy']} requests run, then no new ones, then {load['quiet']}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return {"memory": made}


def _line(series: Mapping[str, list[float]], rule: str) -> tuple[Any, Any]:
    """Seconds and MiB where a rule's bytes change."""
    seconds, held = np.asarray(series["seconds"]), np.asarray(series[rule])
    kept = changes(held)
    return seconds[kept], held[kept] / MIB
