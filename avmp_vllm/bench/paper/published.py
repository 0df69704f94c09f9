"""The published tables, as files that the user names; none of them is part of this project."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from avmp_vllm.bench.inputs import InputError, read_table
from avmp_vllm.bench.paper.sweeps import Cell

CELLS_FILE = "paper_cells.csv"
AGGREGATES_FILE = "paper_aggregates.csv"
BOOTSTRAP_FILE = "paper_bootstrap.csv"
STATE_LOSS_FILE = "replay_state_loss.csv"

#: Where the tables are looked for if no option says otherwise.
DEFAULT_FOLDER = Path("../shared/paper")

#: Columns of the cell tables and the field of `replay.Outcome` that must equal each.
CELL_FIELDS = {
    "oom_count": "oom",
    "completion_ratio": "completion_ratio",
    "batch_p50": "batch_p50",
    "rebalance_count": "rebalance_count",
    "bytes_migrated_total": "migrated_bytes",
    "final_kv_pool_bytes": "kv_bytes",
    "final_ssm_pool_bytes": "ssm_bytes",
}
STATE_LOSS_FIELDS = {
    "oom_count": "oom",
    "oom_kv": "oom_kv",
    "oom_ssm": "oom_ssm",
    "submitted": "submitted",
    "completed": "completed",
    "intact_completed": "intact",
    "evictions": "evictions",
    "self_evictions": "self_evictions",
    "requests_losing_state": "requests_losing_state",
    "infeasible_requests": "infeasible",
    "n_alloc_calls": "calls",
}
#: Columns of the aggregates: field, and what is taken over the seeds.
AGGREGATE_FIELDS = {
    "oom_count_mean": ("oom", "mean"),
    "oom_count_std": ("oom", "std"),
    "completion_ratio_median": ("completion_ratio", "median"),
    "effective_batch_size_mean_median": ("batch_mean", "median"),
    "effective_batch_size_p50_median": ("batch_p50", "median"),
    "effective_batch_size_p95_median": ("batch_p95", "median"),
    "effective_batch_size_p99_median": ("batch_p99", "median"),
    "median_rebalance_count": ("rebalance_count", "median"),
    "median_bytes_migrated_total": ("migrated_bytes", "median"),
    "median_current_kv_pool_bytes": ("kv_bytes", "median"),
    "median_current_ssm_pool_bytes": ("ssm_bytes", "median"),
}


class Row(NamedTuple):
    """One published row.

    Attributes:
        line: In its file, from 1.
        cell: Which replay; its seed is 0 in a row over all seeds.
        sweep: Label, for aggregates.
        values: Numbers by column; empty fields are left out.
    """

    line: int
    cell: Cell
    sweep: str
    values: dict[str, float]


def _number(path: Path, line: int, column: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise InputError(path, line, f"column {column}: {text!r} is not a number") from None


def _read_rows(path: Path, key: Sequence[str], columns: Sequence[str]) -> list[Row]:
    rows = []
    for line, row in read_table(path, (*key, *columns)):
        cell = Cell(
            row["variant"],
            row["workload"],
            row["model"],
            _number(path, line, "pool_gib", row["pool_gib"], int),
            _number(path, line, "seed", row["seed"], int) if "seed" in key else 0,
        )
        values = {
            name: _number(path, line, name, row[name], float) for name in columns if row[name]
        }
        rows.append(Row(line, cell, row.get("sweep", ""), values))
    if not rows:
        raise InputError(path, 1, "holds no rows")
    return rows


_CELL_KEY = ("variant", "workload", "model", "pool_gib", "seed")


def read_cells(folder: Path) -> list[Row]:
    """Per-seed counters of the paper's runs."""
    return _read_rows(folder / CELLS_FILE, _CELL_KEY, tuple(CELL_FIELDS))


def read_state_loss(folder: Path) -> list[Row]:
    """Per-seed counters of an independent replay, with what evictions destroyed."""
    return _read_rows(folder / STATE_LOSS_FILE, _CELL_KEY, tuple(STATE_LOSS_FIELDS))


def read_aggregates(folder: Path) -> list[Row]:
    """Published rows over the three seeds."""
    key = ("sweep", "variant", "workload", "model", "pool_gib")
    return _read_rows(folder / AGGREGATES_FILE, key, tuple(AGGREGATE_FIELDS))


class PublishedInterval(NamedTuple):
    """One published bootstrap interval; None where nothing was published."""

    line: int
    first: str
    second: str
    field: str
    statistic: str
    workload: str
    pairs: int
    published: tuple[float | None, float | None, float | None]
    replayed: tuple[float | None, float | None, float | None]


def read_bootstrap(folder: Path) -> list[PublishedInterval]:
    """Published intervals, in the order in which they drew their random numbers."""
    path = folder / BOOTSTRAP_FILE
    key = ("variant_a", "variant_b", "field", "statistic", "workload", "n_pairs")
    sources = ("published", "replayed")
    columns = [f"{source}_{end}" for source in sources for end in ("point", "lo", "hi")]
    found = []
    for line, row in read_table(path, (*key, *columns)):
        numbers = [
            _number(path, line, name, row[name], float) if row[name] else None for name in columns
        ]
        found.append(
            PublishedInterval(
                line,
                row["variant_a"],
                row["variant_b"],
                row["field"],
                row["statistic"],
                row["workload"],
                _number(path, line, "n_pairs", row["n_pairs"], int),
                (numbers[0], numbers[1], numbers[2]),
                (numbers[3], numbers[4], numbers[5]),
            )
        )
    if not found:
        raise InputError(path, 1, "holds no rows")
    return found
