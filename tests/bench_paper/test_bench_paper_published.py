"""The paper's grid replayed: equal to what was published, in every cell.

What the paper's text prints is asserted from numbers in this file. The per-cell tables are no part
of the project: with a copy of them in ``../shared/paper`` (or in ``AVMP_PUBLISHED_TABLES``) every
field of every row is asserted, without one that single test is skipped and says so.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest

from avmp_vllm.bench.paper import compare, report
from avmp_vllm.bench.paper.allocators import make_allocator
from avmp_vllm.bench.paper.bootstrap import Comparison
from avmp_vllm.bench.paper.models import MODELS
from avmp_vllm.bench.paper.published import DEFAULT_FOLDER
from avmp_vllm.bench.paper.replay import Outcome, events, replay
from avmp_vllm.bench.paper.sweeps import GIB, SWEEPS, Cell, replays
from avmp_vllm.bench.paper.workloads import (
    SHAREGPT_FILE,
    make_trace,
    read_sharegpt_counts,
)

PUBLISHED = Path(os.environ.get("AVMP_PUBLISHED_TABLES", DEFAULT_FOLDER))


def _replay(cell: Cell, sharegpt=None) -> Outcome:
    model, total = MODELS[cell.model], cell.gib * GIB
    trace = make_trace(cell.workload, cell.seed, sharegpt)
    return replay(trace, model, make_allocator(cell.variant, model, total), total)


def _counts(cells: list[Cell], sharegpt=None) -> dict[Cell, dict]:
    found = {}
    for cell in cells:
        outcome = _replay(cell, sharegpt)
        ratio = outcome.completed / outcome.submitted
        found[cell] = {**asdict(outcome), "oom": outcome.oom, "completion_ratio": ratio}
    return found


@pytest.fixture(scope="module")
def headline() -> dict[Cell, dict]:
    return _counts(replays(["throughput"]))


@pytest.mark.parametrize(
    ("workload", "seed", "prompts", "generated", "last_arrival", "growth"),
    [
        ("uniform_short", 1, 298933, 81358, 511, 5081),
        ("mixed_long", 2, 2698514, 83715, 255, 5239),
        ("agentic_burst", 5, 1950326, 40588, 26, 2552),
    ],
)
def test_traces_are_the_published_ones(workload, seed, prompts, generated, last_arrival, growth):
    trace = make_trace(workload, seed)
    assert sum(trace.prompts) == prompts
    assert sum(trace.generated) == generated
    assert trace.arrivals[-1] == last_arrival
    assert sum(kind == 1 for _, kind, _ in events(trace)) == growth


def test_oom_counts_printed_in_the_paper(headline):
    totals = {}
    for variant in SWEEPS["throughput"].variants:
        ooms = [counts["oom"] for cell, counts in headline.items() if cell.variant == variant]
        totals[variant] = round(sum(ooms) / 3, 1)
    assert totals == {
        "padded_unified": 1567.7,
        "fixed_dual_mr05": 552.0,
        "fixed_dual_mr09": 1221.3,
        "avmp_static_mr05": 552.0,
        "avmp_dynamic_b128": 510.0,
    }


def test_bootstrap_intervals_printed_in_the_paper(headline):
    found = compare.replayed_intervals(headline)

    def rounded(variant: str, workload: str) -> tuple[float, ...]:
        return tuple(round(n, 2) for n in found[Comparison(variant, "oom_count", workload)])

    assert rounded("avmp_dynamic_b128", "cross_workload") == (-3.5, -5.83, -1.39)
    assert rounded("avmp_dynamic_b128", "agentic_burst") == (-5.17, -9.25, -1.33)
    # Drawn behind the goodput rows, whose random numbers must have been used up.
    assert rounded("fixed_dual_mr09", "cross_workload") == (55.78, 29.17, 86.89)
    assert rounded("padded_unified", "cross_workload") == (84.64, 46.17, 127.58)


def test_most_completions_of_the_paper_lost_pages(headline):
    """The paper counts a request as completed although its pages were taken away."""
    cells = [c for cell, c in headline.items() if cell.variant == "avmp_dynamic_b128"]
    assert sum(c["completed"] for c in cells) == 11490
    assert sum(c["intact"] for c in cells) == 1284


def test_tables_in_the_report_say_the_same(headline):
    text = "\n".join(report.oom(headline))
    assert "510.0 ± 18.6" in text
    assert "1567.7 ± 62.7" in text


@pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"no published tables in {PUBLISHED} (AVMP_PUBLISHED_TABLES)"
)
def test_every_published_row_of_every_sweep():
    sharegpt = read_sharegpt_counts(PUBLISHED / SHAREGPT_FILE)
    counts = _counts(replays(SWEEPS), sharegpt)
    assert len(counts) == 636
    verdicts = compare.compare_all(PUBLISHED, counts)
    assert [verdict.mismatches for verdict in verdicts] == [[], [], [], []]
    # Seven rows are about goodput, which timed Python and was never reproducible.
    assert [(verdict.rows, verdict.skipped) for verdict in verdicts] == [
        (636, 0),
        (636, 0),
        (662, 0),
        (14, 7),
    ]


def test_a_wrong_number_is_noticed(headline, tmp_path):
    """The comparison can fail: one digit changed in a table is reported with its line."""
    cell, counts = next(iter(headline.items()))
    columns = "oom_count,completion_ratio,batch_p50,rebalance_count,bytes_migrated_total"
    (tmp_path / compare.published.CELLS_FILE).write_text(
        f"variant,workload,model,pool_gib,seed,{columns},final_kv_pool_bytes,final_ssm_pool_bytes\n"
        f"{cell.variant},{cell.workload},{cell.model},{cell.gib},{cell.seed},"
        f"{counts['oom'] + 1},{counts['completion_ratio']},{counts['batch_p50']},,,,\n"
    )
    rows = compare.published.read_cells(tmp_path)
    verdict = compare.compare_cells(rows, compare.published.CELL_FIELDS, headline)
    assert verdict.fields == 3
    assert len(verdict.mismatches) == 1
    assert verdict.mismatches[0].startswith("line 2, ")
    assert "oom_count" in verdict.mismatches[0]
