"""Ratios of AVMP to a baseline, with their intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from avmp_vllm.bench.serve.report import ROWS, TITLES
from avmp_vllm.bench.statistics import SEED, ratio_of_means
from avmp_vllm.plots import style

#: Ticks of the logarithmic axis; those within its range are used.
TICKS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50)
#: Those of a wide range.
COARSE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
#: Where the axis begins at the latest; a ratio may be 0.
LEAST = 0.04


class Ratio(NamedTuple):
    """A figure's ratio and what is good about it."""

    label: str
    point: float
    low: float
    high: float
    more: bool | None  # whether more is better; None: neither

    @property
    def favours(self) -> bool | None:
        """Whether it favours AVMP; None where the interval spans 1 or neither is better."""
        if self.more is None or self.low <= 1 <= self.high:
            return None
        return (self.point > 1) is self.more


#: What a ratio favours -> colour, marker, legend.
LOOKS = {
    True: (style.BLUE, "o", "AVMP is better"),
    False: (style.VERMILION, "D", "the baseline is better"),
    None: (style.GREY, "s", "the interval spans 1"),
}


def panels(groups: Mapping[str, Sequence[Ratio]], title: str) -> Figure:
    """A panel for each group of ratios, on one logarithmic axis.

    Args:
        groups: Title of a panel -> ratios.
        title: Of the whole.
    """
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    tallest = max(len(ratios) for ratios in groups.values())
    made, axes = style.figure(
        rows, columns, size=(5.0 * columns, rows * (0.9 + 0.3 * tallest) + 0.6)
    )
    everything = [ratio for ratios in groups.values() for ratio in ratios]
    low = max(min(0.9, *(ratio.low for ratio in everything)) / 1.05, LEAST)
    high = max(1.1, *(ratio.high for ratio in everything)) * 1.05
    for one in axes[len(groups) :]:
        one.axis("off")
    for one, (name, ratios) in zip(axes, groups.items(), strict=False):
        for place, ratio in enumerate(ratios):
            colour, marker, _ = LOOKS[ratio.favours]
            one.plot([ratio.low, ratio.high], [place, place], color=colour, linewidth=1.8)
            one.plot(ratio.point, place, marker=marker, color=colour, markersize=6)
            one.annotate(
                f"{ratio.point:.2f}",
                (ratio.high, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        one.axvline(1, color=style.BLACK, linewidth=0.8)
        one.set_xscale("log")
        one.set_xlim(low, high * (high / low) ** 0.12)  # room for the last number
        inside = [tick for tick in TICKS if low <= tick <= high]
        if high / low > 2:
            inside = [tick for tick in inside if tick in COARSE]
        one.xaxis.set_major_locator(FixedLocator(inside))
        one.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        one.xaxis.set_minor_locator(NullLocator())
        one.set_yticks(range(len(ratios)), [ratio.label for ratio in ratios])
        one.set_ylim(len(ratios) - 0.5, -0.5)
        one.set_title(name)
        style.light_grid(one, "x")
    shown = {ratio.favours for ratio in everything}
    made.legend(
        handles=[
            axes[0].plot([], [], color=colour, marker=marker, linewidth=1.8, label=label)[0]
            for favours, (colour, marker, label) in LOOKS.items()
            if favours in shown
        ],
        loc="outside lower center",
        ncols=3,
    )
    made.suptitle(textwrap.fill(title, 60 * columns), x=0.01, ha="left", fontsize=10)
    return made


def label(row_label: str, more: bool | None) -> str:
    """A figure's name without its unit, and which direction is good."""
    name = row_label.split(",")[0].removesuffix(" a round")
    return name if more is None else f"{name} ({'more' if more else 'less'} is better)"


def draw_serve(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``serve``: a panel a scenario."""
    groups = {}
    for name, scenario in result["timings"].items():
        workload, regime = name.split("/")
        groups[f"{TITLES[workload]}\n{TITLES[regime]}"] = [
            Ratio(label(row.label, row.more), *scenario["ratios"][row.key], row.more)
            for row in ROWS
            if row.key in scenario["ratios"]
        ]
    rounds = result["parameters"]["rounds"]
    title = f"AVMP / stock's best over HTTP, same cache bytes; 95% intervals, {rounds} rounds"
    return {"serve": panels(groups, title)}


def draw_scheduler(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``scheduler``: a panel for every variant that is compared with stock."""
    from avmp_vllm.bench.scheduler import command

    counts, timings = result["counts"], result["timings"]
    groups: dict[str, list[Ratio]] = {}
    for variant in counts:
        if variant in ("stock", "left_out"):
            continue
        for key, more in command.RATIOS.items():
            ours, theirs = (
                command._values(counts, timings, name, key) for name in (variant, "stock")
            )
            if all(theirs):
                found = ratio_of_means(ours, theirs, np.random.default_rng(SEED))
                name = label(key.replace("_", " "), more)
                groups.setdefault(f"{variant} / stock", []).append(Ratio(name, *found, more))
    parameters = result["parameters"]
    shape = result.get("shape", {}).get("name", Path(parameters["model"]).name)
    title = (
        f"{shape}, {Path(parameters['trace']).name}; vLLM's scheduler without a model; 95% "
        f"intervals over {parameters['seeds']} seeds"
    )
    return {"scheduler": panels(groups, title)}


def draw_engine(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``engine``: a panel for every workload and variant."""
    from avmp_vllm.bench.engine import report
    from avmp_vllm.bench.engine.workloads import workloads

    groups = {}
    for workload in workloads(result["parameters"]):
        ratios = result["timings"]["workloads"][workload.name]["ratios"]
        for variant, found in ratios.items():
            groups[f"{workload.name}: {variant} / stock"] = [
                Ratio(label(row.label, row.more), *found[row.key], row.more)
                for row in report.rows(workload)
                if row.key in found
            ]
    count = result["parameters"]["rounds"]
    title = f"whole engines stepped in turn, same cache bytes; 95% intervals, {count} rounds"
    return {"engine": panels({name: rows for name, rows in groups.items() if rows}, title)}
