"""The paper's experiment: migration batches, phase times, intact completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from avmp_vllm.bench.paper.honest import LIMIT, OURS, PHASES
from avmp_vllm.bench.paper.workloads import SYNTHETIC
from avmp_vllm.plots import style

BATCH_PREFIX = "avmp_dynamic_b"
REPLAY_PHASES = ("service", "retry", "migration", "idle")


def draw(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Every picture whose cells the result has."""
    counts, timings = result["counts"], result["timings"]
    made = {}
    replays = counts.get("replay", {})
    batches = sorted(
        {
            int(tail)
            for key in replays
            if (tail := key.partition("/")[0].removeprefix(BATCH_PREFIX)).isdigit()
        }
    )
    if len(batches) > 1:
        made["paper-batches"] = _batches(replays, batches)
    if replays:
        made["paper-phases"] = _phases(
            _shares(timings["replay"], REPLAY_PHASES), "Phase times, the paper's own rules"
        )
    for life in result["parameters"].get("lives", ()):
        if life in counts:
            made[f"paper-{life}"] = _completions(counts[life], timings[life], life)
    return made


def _mean(cells: Mapping[str, Any], variant: str, workload: str, key: str) -> float:
    """Mean over shapes, 1 and 4 GiB, and seeds: the cells that every variant of a sweep has."""
    found = [
        cell[key]
        for name, cell in cells.items()
        if name.startswith(f"{variant}/{workload}/") and name.split("/")[3] in ("1GiB", "4GiB")
    ]
    return float(np.mean(found))


def _batches(replays: Mapping[str, Any], batches: list[int]) -> Figure:
    """Refused allocations, and migrations, against the migration batch."""
    made, (refused, moved) = style.figure(1, 2, size=(9, 3.4))
    places = np.arange(len(batches))
    for axes, keys, title in (
        (refused, ("oom",), "Failed allocations a replay"),
        (moved, ("rebalance_count", "refused_migrations"), "Migrations a replay: done, refused"),
    ):
        for i, workload in enumerate(SYNTHETIC):
            for j, key in enumerate(keys):
                axes.plot(
                    places,
                    [_mean(replays, f"{BATCH_PREFIX}{batch}", workload, key) for batch in batches],
                    color=style.CYCLE[i],
                    marker=style.MARKERS[i],
                    linestyle=("-", ":")[j],
                    linewidth=1.5,
                    markersize=5,
                    label=workload.replace("_", " ") + (", refused" if j else ""),
                )
        axes.set_xticks(places, [str(batch) for batch in batches])
        axes.set_xlabel("migration batch, pages (the paper's AVMP)")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        style.light_grid(axes)
    moved.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return made


def _shares(timings: Mapping[str, Any], phases: tuple[str, ...]) -> dict[str, list[float]]:
    """Variant -> share of its time in each phase, over all its cells."""
    sums: dict[str, np.ndarray] = {}
    for key, cell in timings.items():
        variant = key.partition("/")[0]
        spent = np.array([cell[f"{phase}_ns"] for phase in phases], dtype=np.float64)
        sums[variant] = sums.get(variant, np.zeros(len(phases))) + spent
    return {variant: list(spent / spent.sum()) for variant, spent in sums.items()}


def _stack(axes: Axes, shares: Mapping[str, list[float]], phases: tuple[str, ...]) -> None:
    left = np.zeros(len(shares))
    looks = zip(phases, (style.BLUE, style.VERMILION, style.ORANGE, style.PALE), strict=True)
    for i, (phase, colour) in enumerate(looks):
        widths = np.array([share[i] for share in shares.values()])
        axes.barh(
            range(len(shares)),
            widths,
            left=left,
            color=colour,
            edgecolor=style.GREY if phase == "idle" else "white",
            hatch=style.HATCHES[i],
            linewidth=0.4,
            label=phase,
        )
        left += widths
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4)


def _batch_order(variant: str) -> tuple[str, int]:
    tail = variant.removeprefix(BATCH_PREFIX)
    return (BATCH_PREFIX, int(tail)) if tail.isdigit() else (variant, 0)


def _phases(shares: dict[str, list[float]], title: str) -> Figure:
    """Where each allocator's time goes."""
    ordered = {name: shares[name] for name in sorted(shares, key=_batch_order)}
    made, (axes,) = style.figure(size=(7.5, 1.2 + 0.27 * len(ordered)))
    _stack(axes, ordered, REPLAY_PHASES)
    axes.set_title(title)
    return made


def _completions(cells: Mapping[str, Any], timings: Mapping[str, Any], life: str) -> Figure:
    """Intact completions as a share of the limit's, and where the time goes."""
    variants = [name for name in next(iter(cells.values()))["variants"] if name != LIMIT]
    workloads = list(dict.fromkeys(key.split("/")[1] for key in cells))
    made, (done, spent) = style.figure(
        1, 2, size=(11, 1.4 + 0.2 * len(variants) * len(workloads) / 2.2)
    )
    height = 0.8 / len(workloads)
    for i, workload in enumerate(workloads):
        here = [cell for key, cell in cells.items() if key.split("/")[1] == workload]
        limit = sum(cell["variants"][LIMIT]["intact"] for cell in here)
        shares = [
            sum(cell["variants"][name]["intact"] for cell in here) / limit for name in variants
        ]
        done.barh(
            np.arange(len(variants)) + (i - (len(workloads) - 1) / 2) * height,
            shares,
            height,
            color=style.CYCLE[i],
            hatch=style.HATCHES[i],
            edgecolor="white",
            linewidth=0.3,
            label=workload.replace("_", " "),
        )
    done.axvline(1, color=style.BLACK, linewidth=0.8)
    done.set_yticks(range(len(variants)), variants)
    for tick, name in zip(done.get_yticklabels(), variants, strict=True):
        tick.set_fontweight("bold" if name == OURS else "normal")
    done.invert_yaxis()
    done.xaxis.set_major_formatter(PercentFormatter(1.0))
    done.set_title(f"Intact completions in % of the limit's ({life})")
    done.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    style.light_grid(done, "x")
    sums: dict[str, dict[str, Any]] = {}
    for cell in timings.values():
        for name in variants:
            into = sums.setdefault(f"{name}/", dict.fromkeys((f"{p}_ns" for p in PHASES), 0))
            for phase in into:
                into[phase] += cell[name][phase]
    _stack(spent, _shares(sums, PHASES), PHASES)
    spent.set_title("Where an allocator's time goes")
    return made
