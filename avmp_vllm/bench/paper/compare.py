"""Our replays against the published tables, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, NamedTuple

from avmp_vllm.bench.paper import bootstrap, published
from avmp_vllm.bench.paper.sweeps import Cell
from avmp_vllm.bench.paper.workloads import seeds
from avmp_vllm.bench.statistics import Interval


class Verdict(NamedTuple):
    """What a comparison with one table gave.

    Attributes:
        table: File name.
        rows: Rows compared.
        fields: Fields compared.
        skipped: Rows of cells that were not replayed.
        mismatches: Every field that differs, in words, with its line.
    """

    table: str
    rows: int
    fields: int
    skipped: int
    mismatches: list[str]


Counts = Mapping[Cell, Mapping[str, Any]]

_OVER_SEEDS = {"mean": fmean, "std": pstdev, "median": median}


def _close(found: float, wanted: float) -> bool:
    """Equal but for the last digits of a mean."""
    return abs(found - wanted) <= 1e-9 * max(1.0, abs(wanted))


def compare_cells(rows: list[published.Row], fields: dict[str, str], counts: Counts) -> Verdict:
    """Compare per-seed rows."""
    compared = checked = skipped = 0
    wrong: list[str] = []
    for row in rows:
        outcome = counts.get(row.cell.source)
        if outcome is None:
            skipped += 1
            continue
        compared += 1
        for column, wanted in row.values.items():
            found = outcome[fields[column]]
            checked += 1
            if found is None or float(found) != wanted:
                wrong.append(
                    f"line {row.line}, {row.cell.key}: {column} is {found}, published {wanted}"
                )
    return Verdict("", compared, checked, skipped, wrong)


def compare_aggregates(rows: list[published.Row], counts: Counts) -> Verdict:
    """Compare rows over the three seeds."""
    compared = checked = skipped = 0
    wrong: list[str] = []
    for row in rows:
        cells = [row.cell._replace(seed=seed).source for seed in seeds(row.cell.workload)]
        if any(cell not in counts for cell in cells):
            skipped += 1
            continue
        compared += 1
        for column, wanted in row.values.items():
            field, statistic = published.AGGREGATE_FIELDS[column]
            values = [counts[cell][field] for cell in cells]
            if values[0] is None:
                found = None
            else:
                found = _OVER_SEEDS[statistic](values)
            checked += 1
            if found is None or not _close(found, wanted):
                wrong.append(
                    f"line {row.line}, {row.sweep} {row.cell.key}: {column} is {found}, "
                    f"published {wanted}"
                )
    return Verdict("", compared, checked, skipped, wrong)


def _as_printed(number: float) -> float:
    """Round as the paper prints: three digits, two decimals at most."""
    return float(f"{round(number, 2):.3g}")


def compare_intervals(
    rows: list[published.PublishedInterval],
    found: Mapping[bootstrap.Comparison, Interval],
) -> Verdict:
    """Compare bootstrap intervals to the published digits, and to four decimals of the replay."""
    compared = checked = skipped = 0
    wrong: list[str] = []
    for row in rows:
        ours = found.get(bootstrap.Comparison(row.first, row.field, row.workload))
        if ours is None:
            skipped += 1
            continue
        compared += 1
        for name, number, wanted, exact in zip(
            Interval._fields, ours, row.published, row.replayed, strict=True
        ):
            for value, digits in ((wanted, _as_printed(number)), (exact, round(number, 4))):
                if value is None:
                    continue
                checked += 1
                if value != digits:
                    wrong.append(
                        f"line {row.line}, {row.first} {row.field} {row.workload}: {name} is "
                        f"{digits}, published {value}"
                    )
    return Verdict("", compared, checked, skipped, wrong)


def replayed_intervals(counts: Counts) -> dict[bootstrap.Comparison, Interval]:
    """Bootstrap what the replayed cells allow."""
    values = {
        "oom_count": {cell: outcome["oom"] for cell, outcome in counts.items()},
        "batch_p50": {cell: outcome["batch_p50"] for cell, outcome in counts.items()},
    }
    return bootstrap.intervals(values, sharegpt=False) | bootstrap.intervals(values, sharegpt=True)


def compare_all(folder: Path, counts: Counts) -> list[Verdict]:
    """Compare everything that was replayed with the four published tables."""
    cells = compare_cells(published.read_cells(folder), published.CELL_FIELDS, counts)
    loss = compare_cells(published.read_state_loss(folder), published.STATE_LOSS_FIELDS, counts)
    aggregates = compare_aggregates(published.read_aggregates(folder), counts)
    intervals = compare_intervals(published.read_bootstrap(folder), replayed_intervals(counts))
    return [
        cells._replace(table=published.CELLS_FILE),
        loss._replace(table=published.STATE_LOSS_FILE),
        aggregates._replace(table=published.AGGREGATES_FILE),
        intervals._replace(table=published.BOOTSTRAP_FILE),
    ]
