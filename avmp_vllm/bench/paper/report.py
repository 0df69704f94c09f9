"""What `avmp bench paper` prints, from the counts and timings of a result file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from avmp_vllm.bench.paper import honest
from avmp_vllm.bench.paper.allocators import BATCHES
from avmp_vllm.bench.paper.bootstrap import Comparison
from avmp_vllm.bench.paper.compare import Counts, Verdict
from avmp_vllm.bench.paper.models import MODELS
from avmp_vllm.bench.paper.sweeps import GIB, HEADLINE_VARIANTS, SWEEPS, Cell, Sweep
from avmp_vllm.bench.paper.variants import null_bytes
from avmp_vllm.bench.paper.workloads import SHAREGPT, SYNTHETIC
from avmp_vllm.bench.statistics import SEED, Interval, ratio_of_means
from avmp_vllm.bench.tables import table

#: Share of the limit's intact completions that every cell should reach.
GOAL = 0.99

#: Most cells that are listed by name.
LISTED = 16


# -- the reproduction ----------------------------------------------------------------------------


def verdicts(found: list[Verdict]) -> Iterator[str]:
    """Whether our replays equal the published tables."""
    yield "Published tables against our replays"
    yield table(
        ("table", "rows", "fields", "differ", "not replayed"),
        [(v.table, v.rows, v.fields, len(v.mismatches), v.skipped) for v in found],
    )
    for verdict in found:
        for mismatch in verdict.mismatches[:LISTED]:
            yield f"DIFFERS {verdict.table} {mismatch}"


def _grid(variant: str, workload: str) -> list[list[Cell]]:
    """The headline cells of a variant and workload, seeds together."""
    groups: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for cell in Sweep((variant,), (1, 4), (workload,)).cells():
        groups[cell.model, cell.gib].append(cell)
    return list(groups.values())


def _has(counts: Counts, variant: str, workloads: tuple[str, ...]) -> bool:
    cells = Sweep((variant,), (1, 4), workloads).cells()
    return all(cell.source in counts for cell in cells)


def oom(counts: Counts) -> Iterator[str]:
    """OOM counts as the paper sums them: means over seeds, summed over model and GiB."""
    rows = []
    for variant in HEADLINE_VARIANTS:
        if not _has(counts, variant, SYNTHETIC):
            continue
        total, variance, row = 0.0, 0.0, [variant]
        for workload in (*SYNTHETIC, SHAREGPT):
            if workload == SHAREGPT:
                row.append(f"{total:.1f} ± {variance**0.5:.1f}")
                if not _has(counts, variant, (SHAREGPT,)):
                    row.append("-")
                    continue
            values = [[counts[cell]["oom"] for cell in group] for group in _grid(variant, workload)]
            mean = sum(fmean(group) for group in values)
            spread = sum(pstdev(group) ** 2 for group in values)
            if workload != SHAREGPT:
                total += mean
                variance += spread
            row.append(f"{mean:.1f} ± {spread**0.5:.1f}")
        rows.append(row)
    if rows:
        yield "Failed calls (the paper's OOM), 3-seed means summed over 2 models and 1, 4 GiB"
        yield table(("variant", *SYNTHETIC, "all three", SHAREGPT), rows)


def batches(counts: Counts) -> Iterator[str]:
    """OOM and migrated bytes against the migration batch."""
    rows = []
    for batch in BATCHES:
        variant = f"avmp_dynamic_b{batch}"
        if not _has(counts, variant, SYNTHETIC):
            continue
        groups = [group for workload in SYNTHETIC for group in _grid(variant, workload)]
        total = sum(fmean(counts[cell]["oom"] for cell in group) for group in groups)
        moved = fmean(
            sorted(counts[cell]["migrated_bytes"] for cell in group)[1] for group in groups
        )
        tried = [counts[cell] for group in groups for cell in group]
        done = sum(outcome["rebalance_count"] for outcome in tried)
        refused = sum(outcome["refused_migrations"] for outcome in tried)
        rows.append((batch, f"{total:.1f}", f"{moved / 2**20:.1f}", done, refused))
    if len(rows) > 1:
        yield "Migration batch of the paper's AVMP"
        yield table(("batch", "OOM", "MiB migrated", "migrations", "refused: live tail"), rows)


def intervals(found: Mapping[Comparison, Interval]) -> Iterator[str]:
    """Bootstrap intervals of the differences."""
    if found:
        yield f"Paired bootstrap against fixed_dual_mr05 (10,000 resamples, seed {SEED})"
        yield table(
            ("variant", "field", "workload", "difference [95%]"),
            [(*row, interval) for row, interval in found.items()],
        )


def losses(counts: Counts) -> Iterator[str]:
    """How many of the paper's completions kept their pages."""
    rows = []
    for variant in HEADLINE_VARIANTS:
        if _has(counts, variant, SYNTHETIC):
            cells = [counts[cell] for cell in Sweep((variant,), (1, 4)).cells()]
            sums = [sum(c[name] for c in cells) for name in ("submitted", "completed", "intact")]
            rows.append((variant, *sums))
    if rows:
        yield "What the paper counts as completed, and who of them never lost a page (synthetic)"
        yield table(("variant", "submitted", "completed", "intact"), rows)


_PHASES = ("service", "retry", "migration", "idle")


def phases(counts: Counts, timings: Mapping[Cell, Mapping[str, float]]) -> Iterator[str]:
    """Share of each phase in the replay's wall time; migration is part of service."""
    rows = []
    for workload in (*SYNTHETIC, SHAREGPT):
        for variant in HEADLINE_VARIANTS:
            if _has(counts, variant, (workload,)):
                cells = [cell for group in _grid(variant, workload) for cell in group]
                spent = [sum(timings[c][f"{name}_ns"] for c in cells) for name in _PHASES]
                wall = spent[0] + spent[1] + spent[3]
                calls = sum(counts[cell]["calls"] for cell in cells)
                rows.append(
                    (
                        f"{workload} {variant}",
                        *(f"{100 * part / wall:.2f}" for part in spent),
                        calls,
                        f"{(spent[0] + spent[1]) / calls / 1000:.2f}",
                    )
                )
    if rows:
        yield "Phases in % of wall time (migration is part of service), 12 cells each"
        yield table(("", *_PHASES, "calls", "us a call"), rows)


# -- the corrected grid --------------------------------------------------------------------------

Corrected = Mapping[Cell, Mapping[str, Any]]

_RULES = {
    "served": (
        "Demand that fits: exactly the requests that the limit can guarantee are offered. What\n"
        "fails here fits in the bytes, so it is an avoidable failure. Requests fail when refused;\n"
        "nobody loses a page while running. Null pages come out of the same bytes. paper_avmp is\n"
        "granted twice the memory, as published."
    ),
    "tight": (
        "Demand that fills: exactly the requests that the limit completes when it admits whoever\n"
        "fits at the moment. At its peaks every byte is used, so rounding to pages costs requests."
    ),
    "overload": (
        "Overload: every request that fits the arena is offered. A variant that cannot hold long\n"
        "requests completes more short ones, so compare tokens too; a few requests either way are\n"
        "order effects. static_best picks its split for the count, knowing the future."
    ),
}


def _by_trace(cells: Corrected, variant: str) -> list[float]:
    """Intact requests of a variant summed over the cells of each trace."""
    sums: dict[tuple[str, int], float] = defaultdict(float)
    for cell, counts in cells.items():
        sums[cell.workload, cell.seed] += counts["variants"][variant]["intact"]
    return [sums[key] for key in sorted(sums)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def corrected(
    life: str, cells: Corrected, timings: Mapping[Cell, Mapping[str, Any]]
) -> Iterator[str]:
    """The corrected grid under one way of offering requests."""
    workloads = [w for w in (*SYNTHETIC, SHAREGPT) if any(c.workload == w for c in cells)]
    demand = {
        name: sum(counts["demand"][name] for counts in cells.values())
        for name in ("submitted", "too_large", "unavoidable", "offered", "tokens")
    }
    yield _RULES[life]
    yield (
        f"{len(cells)} cells, {demand['submitted']} requests: {demand['too_large']} larger than "
        f"the arena, {demand['unavoidable']} failed by the limit, {demand['offered']} offered"
    )
    rng = np.random.default_rng(SEED)
    ours = _by_trace(cells, honest.OURS)
    rows, times = [], []
    limit = {cell: counts["variants"][honest.LIMIT] for cell, counts in cells.items()}
    for variant in honest.VARIANTS:
        mine = {cell: counts["variants"][variant] for cell, counts in cells.items()}
        intact = [
            _share(
                sum(mine[c]["intact"] for c in cells if c.workload == workload),
                sum(limit[c]["intact"] for c in cells if c.workload == workload),
            )
            for workload in workloads
        ]
        worst = min(_share(mine[c]["intact"], limit[c]["intact"]) for c in cells)
        failed = sum(counts["missed"] for counts in mine.values())
        tokens = _share(
            sum(counts["tokens"] for counts in mine.values()),
            sum(counts["tokens"] for counts in limit.values()),
        )
        ratio = ""
        if variant != honest.OURS:
            interval = ratio_of_means(ours, _by_trace(cells, variant), rng)
            ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*interval)
        rows.append(
            (
                variant,
                *(f"{100 * share:.1f}" for share in intact),
                f"{100 * worst:.1f}",
                failed,
                f"{100 * tokens:.1f}",
                ratio,
            )
        )
        spent = [sum(timings[c][variant][f"{p}_ns"] for c in cells) for p in honest.PHASES]
        operations = sum(counts["operations"] for counts in mine.values())
        pages = sum(counts["pages"] for counts in mine.values())
        busy = sum(spent[:3])
        if variant != honest.LIMIT:
            times.append(
                (
                    variant,
                    operations,
                    f"{busy / operations / 1000:.2f}",
                    f"{busy / pages:.0f}",
                    sum(counts["migrations"] for counts in mine.values()),
                    f"{sum(counts['copied_bytes'] for counts in mine.values()) / GIB:.1f}",
                    *(f"{100 * part / sum(spent):.1f}" for part in spent),
                )
            )
    missed = "limit's missed" if life == "overload" else "avoidable"
    yield "Intact completions in % of the limit's, per workload, then in the worst cell"
    yield table(("variant", *workloads, "worst cell", missed, "% tokens", "avmp / it [95%]"), rows)
    yield ("The interval resamples traces, not cells: the cells of one trace are not independent.")
    yield "Operations (allocate and free, all layers at once) and where the time goes, in %"
    yield table(
        (
            "variant",
            "operations",
            "us each",
            "ns a page",
            "migrations",
            "GiB copied",
            *honest.PHASES,
        ),
        times,
    )


def _shortfall(cell: Cell, counts: Mapping[str, Any]) -> str:
    """One cell in which AVMP stays behind, with the reason as far as it can be measured."""
    variants = counts["variants"]
    ours, limit = variants[honest.OURS]["intact"], variants[honest.LIMIT]["intact"]
    outside = variants["avmp_null_outside"]["intact"]
    model = MODELS[cell.model]
    null = null_bytes(model)
    return (
        f"{cell.key.partition('/')[2]}: avmp {ours}, limit {limit}, stock_vllm "
        f"{variants['stock_vllm']['intact']}, with the null bytes outside {outside} (they are "
        f"{null / 2**20:.0f} MiB, {100 * null / (cell.gib * GIB):.1f}% of the arena)"
    )


def goals(life: str, cells: Corrected) -> Iterator[str]:
    """Where the goals are reached, where not, and by whom AVMP is beaten."""
    short = [
        (cell, counts)
        for cell, counts in cells.items()
        if _share(
            counts["variants"][honest.OURS]["intact"], counts["variants"][honest.LIMIT]["intact"]
        )
        < GOAL
    ]
    yield (
        f"Goal, {life}: at least {GOAL:.0%} of the limit's intact completions in every cell: "
        f"{'reached' if not short else f'missed in {len(short)} of {len(cells)} cells'}"
    )
    if life != "overload":
        yield from (f"  {_shortfall(cell, counts)}" for cell, counts in short[:LISTED])
    never = True
    for name in honest.VARIANTS:
        if name in (honest.OURS, honest.LIMIT, "avmp_null_outside"):
            continue
        lead = {
            cell: counts["variants"][name]["intact"] - counts["variants"][honest.OURS]["intact"]
            for cell, counts in cells.items()
        }
        ahead = {cell: number for cell, number in lead.items() if number > 0}
        if not ahead:
            continue
        never = False
        behind = [-number for number in lead.values() if number < 0]
        yield (
            f"  {name} completes more than avmp in {len(ahead)} cells (by {sum(ahead.values())} "
            f"requests, {max(ahead.values())} at most) and fewer in {len(behind)} (by "
            f"{sum(behind)})"
        )
        if len(ahead) <= LISTED:
            names = (f"{cell.key.partition('/')[2]} (+{more})" for cell, more in ahead.items())
            yield f"    ahead in {', '.join(names)}"
    if never:
        yield "  never below any other variant"


def sweep_names(names: list[str]) -> str:
    """Names of sweeps with the number of their cells."""
    return ", ".join(f"{name} ({sum(1 for _ in SWEEPS[name].cells())})" for name in names)
