"""The paper's bootstrap intervals, with its random numbers in its order.

One generator serves the synthetic workloads and a fresh one ShareGPT; each is consumed row by row.
The goodput rows timed Python and cannot be had again, but their draws are made and thrown away so
that the rows behind them get theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from avmp_vllm.bench.paper.models import MODELS
from avmp_vllm.bench.paper.sweeps import Cell
from avmp_vllm.bench.paper.workloads import SHAREGPT, SYNTHETIC, seeds
from avmp_vllm.bench.statistics import SEED, Interval, mean_difference, resample

BASELINE = "fixed_dual_mr05"
ALL = "cross_workload"


class Comparison(NamedTuple):
    """One row: a variant against the baseline in one field."""

    variant: str
    field: str
    workload: str


_AVMP = "avmp_dynamic_b128"
SYNTHETIC_ROWS = (
    *(Comparison(_AVMP, "oom_count", workload) for workload in (*SYNTHETIC, ALL)),
    *(Comparison(_AVMP, "goodput", workload) for workload in SYNTHETIC),
    Comparison("avmp_static_mr05", "oom_count", ALL),
    Comparison("fixed_dual_mr09", "oom_count", ALL),
    Comparison("padded_unified", "oom_count", ALL),
    *(Comparison(_AVMP, "batch_p50", workload) for workload in SYNTHETIC),
)
SHAREGPT_ROWS = tuple(
    Comparison(variant, field, SHAREGPT)
    for variant in ("padded_unified", "fixed_dual_mr09", "avmp_static_mr05", _AVMP)
    for field in ("oom_count", "goodput")
)


def _pairs(variant: str, workload: str) -> list[Cell]:
    """Cells of a comparison in the paper's order."""
    names = SYNTHETIC if workload == ALL else (workload,)
    cells = (
        Cell(variant, name, model, gib, seed)
        for name in names
        for model in MODELS
        for gib in (1, 4)
        for seed in seeds(name)
    )
    return sorted(cells)


def intervals(
    values: Mapping[str, Mapping[Cell, float]], sharegpt: bool
) -> dict[Comparison, Interval]:
    """Compute the intervals of one generator's rows.

    Args:
        values: By field, ``oom_count`` and ``batch_p50``: the value of each cell.
        sharegpt: Which of the two generators.

    Returns:
        The rows whose cells all have a value.
    """
    rng = np.random.default_rng(SEED)
    found: dict[Comparison, Interval] = {}
    for row in SHAREGPT_ROWS if sharegpt else SYNTHETIC_ROWS:
        first, second = _pairs(row.variant, row.workload), _pairs(BASELINE, row.workload)
        field = values.get(row.field, {})
        if not all(cell in field for cell in (*first, *second)):
            resample(rng, len(first))
            continue
        found[row] = mean_difference(
            [field[cell] for cell in first], [field[cell] for cell in second], rng
        )
    return found
