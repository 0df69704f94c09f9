"""Ratios of AVMP to stock's best setting with paired intervals, tables and targets.

Which setting of stock is the best is decided figure by figure, by the mean over the rounds: so
stock has whatever luck the rounds held. The control, a second server of one setting, shows what a
ratio is worth that stands for no difference at all: where its interval excludes 1, nothing is
judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from avmp_vllm.bench import pairs
from avmp_vllm.bench.pairs import Rounds, Row
from avmp_vllm.bench.serve.sides import AGAIN, AVMP
from avmp_vllm.bench.statistics import Interval
from avmp_vllm.bench.tables import table

SINGLE, TURNS = "single", "turns"
AMPLE, TIGHT = "ample", "tight"
TITLES = {
    SINGLE: "single turns, vllm bench serve",
    TURNS: "conversations that go on",
    AMPLE: "memory does not bind",
    TIGHT: "memory binds",
}

ROWS = (
    Row("throughput", "answer tokens / s", ",.1f", True),
    Row("goodput", "good requests / s", ",.2f", True),
    Row("ttft_p50_ms", "time to first token p50, ms", ",.0f", False),
    Row("ttft_p90_ms", "time to first token p90, ms", ",.0f", False),
    Row("ttft_p99_ms", "time to first token p99, ms", ",.0f", False),
    Row("queue_ms", "in the queue, mean ms", ",.1f", False),
    Row("prefill_ms", "from there to the first token, mean ms", ",.1f", False),
    Row("steps", "steps a round", ",.0f", None),
    Row("itl_p50_ms", "between tokens p50, ms", ",.1f", False),
    Row("itl_p99_ms", "between tokens p99, ms", ",.1f", False),
    Row("cpu_ms_per_token", "server CPU ms a token", ",.2f", False),
    Row("preemptions", "preemptions a round", ",.1f", False),
    Row("hit_rate", "prompt tokens hit", ".1%", True),
    Row("state_hits", "prompts that began at a state", ",.1f", None),
    Row("answer_hits", "of these inside of an answer", ",.1f", None),
    Row("migrations", "migrations a round", ",.1f", None),
)


def stock_sides(rounds: Rounds) -> list[str]:
    """Stock's settings in these rounds, without the control."""
    return [side for side in rounds[0] if side != AVMP and not side.endswith(AGAIN)]


def control_side(rounds: Rounds) -> str | None:
    """The second server of one of stock's settings."""
    return next((side for side in rounds[0] if side.endswith(AGAIN)), None)


def best(rounds: Rounds, row: Row) -> str:
    """Stock's best setting by a figure; where more is neither better nor worse, the first."""
    settings = stock_sides(rounds)
    means = {
        side: float(np.mean(found))
        for side in settings
        if (found := pairs.values(rounds, side, row.key)) is not None
    }
    if row.more is None or not means:
        return settings[0]
    return (max if row.more else min)(means, key=means.__getitem__)


def baselines(rounds: Rounds) -> dict[str, str]:
    """Figure -> stock's best setting by it."""
    return {row.key: best(rounds, row) for row in ROWS}


def noisy(control: Interval | None) -> bool:
    """Whether two servers of one setting differ, which is the machine's doing."""
    return control is not None and not control.low <= 1 <= control.high


def _ratio(rounds: Rounds, row: Row, side: str, base: str) -> Interval | None:
    return pairs.ratios(rounds, [row], side, base).get(row.key)


def ratios(rounds: Rounds) -> dict[str, Interval]:
    """AVMP / stock's best of every figure that both have and that is 0 in no round of stock's."""
    found = {row.key: _ratio(rounds, row, AVMP, best(rounds, row)) for row in ROWS}
    return {key: ratio for key, ratio in found.items() if ratio is not None}


def control_ratios(rounds: Rounds) -> dict[str, Interval]:
    """The control / the server of the same setting; empty without a control."""
    side = control_side(rounds)
    return {} if side is None else pairs.ratios(rounds, ROWS, side, side.removesuffix(AGAIN))


def scenario_table(rounds: Rounds) -> str:
    """Means of all sides, AVMP's ratio to stock's best, whom it favours, the control's ratio."""
    shown = list(rounds[0])
    ours, noise = ratios(rounds), control_ratios(rounds)
    names = {AVMP: "AVMP"}
    head = ["mean over rounds", *(names.get(side, side) for side in shown)]
    head += ["AVMP / stock's best", "which", "favours", "control"]
    lines = []
    for row in ROWS:
        measured = [pairs.values(rounds, side, row.key) for side in shown]
        if not any(measured):
            continue
        line = [row.label]
        line += ["-" if one is None else f"{np.mean(one):{row.form}}" for one in measured]
        if row.key in ours:
            base = best(rounds, row)
            line += [_shown(ours[row.key]), base]
            said = pairs.verdict(row, ours[row.key], "AVMP", "stock")
            line.append("the control differs" if noisy(noise.get(row.key)) else said)
        else:
            line += ["-", "-", ""]
        lines.append([*line, _shown(noise[row.key]) if row.key in noise else "-"])
    return table(head, lines)


def _shown(ratio: Interval) -> str:
    return f"{ratio.point:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


class Target(NamedTuple):
    """A bound on a ratio that the whole interval must keep.

    Attributes:
        workload, regime, key: Which ratio.
        bound: None: no worse than the control's interval reaches.
        above: Whether the ratio must be above the bound; else below.
    """

    workload: str
    regime: str
    key: str
    bound: float | None
    above: bool

    def bound_by(self, control: Interval | None) -> float:
        """The bound, for a control's interval of the same figure."""
        if self.bound is not None:
            return self.bound
        if control is None:
            return 1.0
        return min(1.0, control.low) if self.above else max(1.0, control.high)

    def judge(self, ratio: Interval, control: Interval | None = None) -> str:
        """``reached``, ``missed``, or ``open`` where the interval spans the bound.

        ``not judged`` where the control differs from its own setting.
        """
        if noisy(control):
            return "not judged"
        return pairs.judge(ratio, self.bound_by(control), self.above)


TARGETS = (
    *(Target(workload, AMPLE, "throughput", 0.99, True) for workload in (SINGLE, TURNS)),
    *(Target(workload, TIGHT, "throughput", 1.0, True) for workload in (SINGLE, TURNS)),
    Target(TURNS, AMPLE, "ttft_p50_ms", None, False),
    Target(TURNS, TIGHT, "ttft_p50_ms", 1 / 1.3, False),
)


class Judged(NamedTuple):
    """A target, AVMP's ratio, the bound that held, the verdict."""

    target: Target
    ratio: Interval
    bound: float
    verdict: str


def targets(scenarios: Mapping[str, Rounds]) -> Iterator[Judged]:
    """Every target whose scenario was run."""
    for target in TARGETS:
        rounds = scenarios.get(f"{target.workload}/{target.regime}")
        if not rounds:
            continue
        ratio, noise = ratios(rounds).get(target.key), control_ratios(rounds).get(target.key)
        if ratio is not None:
            yield Judged(target, ratio, target.bound_by(noise), target.judge(ratio, noise))


def parity(rounds: Rounds) -> dict[str, tuple[int, int]]:
    """Side -> answers that equal those of stock's first setting, and requests; known ones only."""
    found = {}
    for side in rounds[0]:
        equal = [one[side].get("equal") for one in rounds]
        if None not in equal:
            counts = [one[side]["counts"] for one in rounds]
            found[side] = (sum(equal), sum(one["answered"] + one["failed"] for one in counts))
    return found


def lines(scenarios: Mapping[str, Rounds], heads: Mapping[str, str]) -> Iterator[str]:
    """The whole report."""
    for name, rounds in scenarios.items():
        workload, regime = name.split("/")
        yield f"== {TITLES[workload]}; {TITLES[regime]} =="
        yield heads[name]
        yield scenario_table(rounds)
        if found := parity(rounds):
            stock = stock_sides(rounds)[0]
            said = (f"{side} {n} of {of}" for side, (n, of) in found.items() if side != stock)
            yield f"Answers equal to those of {stock}: {', '.join(said)}"
        failed = {side: sum(one[side]["counts"]["failed"] for one in rounds) for side in rounds[0]}
        if any(failed.values()):
            errors = [error for one in rounds for side in one.values() for error in side["errors"]]
            yield f"FAILED requests: {failed}; for example {errors[0]}"
        yield ""
    yield (
        "Targets (the whole 95% interval must keep the bound; open: it spans the bound; not "
        "judged: the control differs from its own setting)"
    )
    yield table(
        ["target", "AVMP / stock's best", "verdict"],
        [
            [
                f"{t.workload}, {t.regime}: {t.key} {'>=' if t.above else '<='} {bound:.3g}"
                + (" (the control's)" if t.bound is None else ""),
                _shown(ratio),
                result,
            ]
            for t, ratio, bound, result in targets(scenarios)
        ],
    )
