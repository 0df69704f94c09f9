"""The benchmark's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from avmp_vllm.bench.predict.judge import AFTER, COLD, GENERATED
from avmp_vllm.bench.predict.models import LONG, MIXED, SHORT
from avmp_vllm.bench.predict.published import PUBLISHED
from avmp_vllm.predict.features import DEPTH, LADDERS
from avmp_vllm.predict.forecaster import MEMORIES

#: What a forecast may lose against the better of those without features, in nats.
LOSS_GOAL = 0.005
COVERAGE_GOAL = (0.88, 0.94)
DRIFT_GOAL = 0.84
#: Microseconds.
COST_GOALS = {"arrival and learning": 100, "reserve, 40 running": 30, "reserve, 256 running": 70}
LADDER_NAMES = ("prompt length", "previous answer", "turn")


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def goal(reached: bool) -> str:
    """A goal's outcome in a word."""
    return "reached" if reached else "MISSED"


def by_ladder(weights: Sequence[float]) -> dict[str, float]:
    """Sums of the models' weights: all requests, and each feature."""
    general, features = weights[: len(MEMORIES)], weights[len(MEMORIES) :]
    found = {"all alike": sum(general)}
    for ladder, name in enumerate(LADDER_NAMES):
        found[name] = sum(features[depth * LADDERS + ladder] for depth in range(DEPTH))
    return found


def tables(counts: Mapping[str, Any], costs: Mapping[str, float]) -> list[Table]:
    """A trace's tables."""
    models = counts["models"]
    head = ["forecast", "loss", "cold", "P50", "P90", *(f"at {t}" for t in GENERATED), "rank"]
    rows = [
        [
            name,
            *(f"{row[key]:.3f}" for key in ("log_loss", "cold_log_loss", "p50", "p90")),
            *(f"{value:.0f}" for value in row["remaining_error"]),
            f"{row['spearman']:.2f}",
        ]
        for name, row in models.items()
    ]
    title = (
        f"Log-loss in nats, of all and of the first {COLD} requests; coverage;\n"
        "error of the median in tokens, with so much generated; rank correlation"
    )
    found = [_table(title, head, rows)]
    if len(models[MIXED]["parts"]) > 1:
        found.append(_drift(models))
    rows = [
        [
            name,
            f"{100 * row['fit']:.1f}" if row["in_buckets"] or name.startswith("pages") else "-",
            f"{100 * row['fill']:.1f}",
            f"{100 * row['in_buckets']:.1f}",
            f"{100 * row['right_of_ten']:.1f}",
        ]
        for name, row in counts["reservations"].items()
    ]
    found.append(
        _table(
            "Reserved at arrival, %",
            ["rule", "fit", "fill", "in buckets", "right of ten"],
            rows,
        )
    )
    rows = [
        [name, f"{value:.1f}", f"{COST_GOALS[name]}" if name in COST_GOALS else ""]
        for name, value in costs.items()
    ]
    found.append(_table("Microseconds, medians", ["cost", "seen", "goal"], rows))
    return found


def _drift(models: Mapping[str, Any]) -> Table:
    rows = []
    for number in range(len(models[MIXED]["parts"])):
        for name in (MIXED, SHORT, LONG):
            part = models[name]["parts"][number]
            cells = (part[key] for key in ("log_loss", "p90", "log_loss_after", "p90_after"))
            rows.append([f"{number + 1}", name, *(f"{cell:.3f}" for cell in cells)])
    head = ["part", "forecast", "loss", "P90", f"loss of {AFTER}", f"P90 of {AFTER}"]
    return _table(f"Drift: each part, and its first {AFTER} answers", head, rows)


def goals(counts: Mapping[str, Any]) -> list[str]:
    """What was to reach on any trace, and whether it was."""
    models = counts["models"]
    mixed = models[MIXED]
    base = min(models[SHORT]["log_loss"], models[LONG]["log_loss"])
    lost = mixed["log_loss"] - base
    low, high = COVERAGE_GOAL
    lines = [
        f"log-loss over the better global one: {lost:+.4f} (goal: at most {LOSS_GOAL:+}): "
        f"{goal(lost <= LOSS_GOAL)}",
        f"P90 covers {mixed['p90']:.3f} (goal: {low} to {high}): "
        f"{goal(low <= mixed['p90'] <= high)}",
    ]
    if len(mixed["parts"]) > 1:
        for key, of in (("p90", "each part"), ("p90_after", f"the first {AFTER} after a change")):
            least = min(part[key] for part in mixed["parts"][1:])
            lines.append(
                f"P90 covers at least {least:.3f} of {of} (goal: {DRIFT_GOAL}): "
                f"{goal(least >= DRIFT_GOAL)}"
            )
    return lines


def show(name: str, counts: Mapping[str, Any], costs: Mapping[str, float]) -> None:
    """Print what came of a trace."""
    console = Console()
    console.print(f"\n{name}: {counts['requests']:,} requests, fifths end at {counts['cuts']}")
    for table in tables(counts, costs):
        console.print(table)
    shares = ", ".join(f"{name} {w:.2f}" for name, w in by_ladder(counts["weights"]).items())
    console.print(f"Weights at the end: {shares}")
    for line in goals(counts):
        console.print(line)


def show_published() -> None:
    """Print what others published; nothing of it is measured here."""
    rows = [
        [f"{each.source}: {each.what}", f"{each.before or '-'}", f"{each.after}"]
        for each in PUBLISHED
    ]
    console = Console()
    console.print(_table("Published by others, %", ["figure", "before", "after"], rows))
    console.print("Their definitions were not found: do not compare them with fit or fill above.")
