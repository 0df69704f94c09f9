"""Bytes backed over time, from ``avmp bench memory``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from avmp_vllm.plots import style

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
            series = cell["series"]
            seconds = series["seconds"]
            live = [value / MIB for value in series["live"]]
            panel.fill_between(
                seconds, live, color="#cccccc", linewidth=0, step="post", label=titles["live"]
            )
            for rule, (colour, line, width) in LOOKS.items():
                panel.step(
                    seconds,
                    [value / MIB for value in series[rule]],
                    where="post",
                    color=colour,
                    linestyle=line,
                    linewidth=width,
                    label=titles[rule],
                )
            ebb = cell["seconds"]["busy"]
            quiet = ebb + cell["seconds"]["ebb"]
            for edge in (ebb, quiet):
                panel.axvline(edge, color=style.BLACK, linewidth=0.6, linestyle=(0, (4, 3)))
            panel.set_yscale("log")
            panel.set_xlim(0, quiet + min(cell["seconds"]["quiet"], 2 * ebb))
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
