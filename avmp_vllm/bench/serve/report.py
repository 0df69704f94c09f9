"""Ratios of AVMP to stock with paired intervals, tables and targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from avmp_vllm.bench import pairs
from avmp_vllm.bench.pairs import Rounds, Row
from avmp_vllm.bench.serve.pair import AVMP, STOCK
from avmp_vllm.bench.statistics import Interval
from avmp_vllm.bench.tables import table

SINGLE, TURNS = "single", "turns"
AMPLE, TIGHT = "ample", "tight"
TITLES = {
    SINGLE: "single turns, vllm bench serve",
    TURNS: "conversations with history",
    AMPLE: "memory does not bind",
    TIGHT: "memory binds",
}

ROWS = (
    Row("throughput", "answer tokens / s", ",.1f", True),
    Row("goodput", "good requests / s", ",.2f", True),
    Row("ttft_p50_ms", "time to first token p50, ms", ",.0f", False),
    Row("ttft_p99_ms", "time to first token p99, ms", ",.0f", False),
    Row("itl_p50_ms", "between tokens p50, ms", ",.1f", False),
    Row("itl_p99_ms", "between tokens p99, ms", ",.1f", False),
    Row("cpu_ms_per_token", "server CPU ms a token", ",.2f", False),
    Row("preemptions", "preemptions a round", ",.1f", False),
    Row("prefix_hit_tokens", "prefix-hit tokens a round", ",.0f", True),
    Row("migrations", "migrations a round", ",.1f", None),
)


def ratios(rounds: Rounds) -> dict[str, Interval]:
    """AVMP / stock of every figure that both have and that is 0 in no round of stock's."""
    return pairs.ratios(rounds, ROWS, AVMP, STOCK)


def scenario_table(rounds: Rounds) -> str:
    """Means of both sides, ratio with its interval, and whom it favours."""
    return pairs.comparison(rounds, ROWS, [AVMP], STOCK, {AVMP: "AVMP", STOCK: "stock"})


class Target(NamedTuple):
    """A bound on a ratio that the whole interval must keep."""

    workload: str
    regime: str
    key: str
    bound: float
    above: bool

    def judge(self, ratio: Interval) -> str:
        """``reached``, ``missed``, or ``open`` where the interval spans the bound."""
        return pairs.judge(ratio, self.bound, self.above)


TARGETS = (
    *(Target(workload, AMPLE, "throughput", 0.99, True) for workload in (SINGLE, TURNS)),
    *(Target(workload, TIGHT, "throughput", 1.0, True) for workload in (SINGLE, TURNS)),
    *(Target(TURNS, regime, "ttft_p50_ms", 1.0, False) for regime in (AMPLE, TIGHT)),
)


def targets(scenarios: Mapping[str, Rounds]) -> Iterator[tuple[Target, Interval, str]]:
    """Every target whose scenario was run, with the ratio and the verdict."""
    for target in TARGETS:
        rounds = scenarios.get(f"{target.workload}/{target.regime}")
        ratio = ratios(rounds).get(target.key) if rounds else None
        if ratio is not None:
            yield target, ratio, target.judge(ratio)


def lines(scenarios: Mapping[str, Rounds], heads: Mapping[str, str]) -> Iterator[str]:
    """The whole report."""
    for name, rounds in scenarios.items():
        workload, regime = name.split("/")
        yield f"== {TITLES[workload]}; {TITLES[regime]} =="
        yield heads[name]
        yield scenario_table(rounds)
        failed = {
            side: sum(one[side]["counts"]["failed"] for one in rounds) for side in (AVMP, STOCK)
        }
        if any(failed.values()):
            errors = [error for one in rounds for s in (AVMP, STOCK) for error in one[s]["errors"]]
            yield f"FAILED requests: {failed}; for example {errors[0]}"
        yield ""
    yield "Targets (the whole 95% interval must keep the bound; open: it spans the bound)"
    yield table(
        ["target", "AVMP / stock", "verdict"],
        [
            [
                f"{t.workload}, {t.regime}: {t.key} {'>=' if t.above else '<='} {t.bound}",
                f"{ratio.point:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
                result,
            ]
            for t, ratio, result in targets(scenarios)
        ],
    )
