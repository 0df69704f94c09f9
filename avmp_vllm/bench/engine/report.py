"""Ratios to stock with paired intervals, tokens, targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from avmp_vllm.bench import pairs
from avmp_vllm.bench.engine.workloads import AMPLE, DECODE, JOIN, PREFILL, PRESSURE, Workload
from avmp_vllm.bench.pairs import Rounds, Row
from avmp_vllm.bench.statistics import Interval
from avmp_vllm.bench.tables import table

STOCK, AVMP, RESOLVED, HANDLES = "stock", "avmp", "resolved", "handles"
ELASTIC, CONTROL = "elastic", "stock again"
#: Variant -> AVMP's options, or None for stock vLLM.
VARIANTS: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    AVMP: {},
    RESOLVED: {"kernels": "resolved"},
    HANDLES: {"kernels": "handles"},
    ELASTIC: {"memory": "elastic"},
    CONTROL: None,
}
#: Variants that run stock's kernels, whose tokens must be stock's where memory does not bind.
SAME_KERNELS = (AVMP, RESOLVED, ELASTIC, CONTROL)

#: Calls of the driver of virtual memory, in which an elastic arena's time would go.
_DRIVER_CALLS = Row("driver_calls", "driver calls a round", ",.1f", None)
DECODE_ROWS = (
    Row("step_mean_ms", "between tokens, mean ms", ",.3f", False),
    Row("step_p50_ms", "between tokens p50, ms", ",.3f", False),
    Row("step_p99_ms", "between tokens p99, ms", ",.3f", False),
    Row("cpu_ms", "processor ms a step", ",.3f", False),
    _DRIVER_CALLS,
)
PREFILL_ROWS = (Row("ttft_ms", "time to first token, ms", ",.2f", False),)
JOIN_ROWS = (
    Row("ttft_ms", "new prompt to its token, mean ms", ",.2f", False),
    Row("ttft_on_ms", "one that goes on from it, mean ms", ",.2f", False),
    Row("ttft_p50_ms", "either, p50, ms", ",.2f", False),
    Row("steps", "engine steps to a token", ",.2f", False),
    Row("hits", "prompt tokens hit a round", ",.0f", None),
)
PRESSURE_ROWS = (
    Row("throughput", "answer tokens / s", ",.1f", True),
    Row("cpu_ms_per_token", "processor ms a token", ",.3f", False),
    Row("at_once", "most requests at once", ",.1f", True),
    Row("preemptions", "preemptions a round", ",.1f", False),
    Row("migrations", "migrations a round", ",.1f", None),
    Row("relocated_bytes", "relocated bytes a round", ",.0f", None),
    _DRIVER_CALLS,
)
#: The most that the mean time between tokens, and its median, may be of stock's.
BOUND = 1.003
BOUNDED = ("step_mean_ms", "step_p50_ms")


def rows(workload: Workload) -> tuple[Row, ...]:
    """Figures of a workload."""
    return {DECODE: DECODE_ROWS, PREFILL: PREFILL_ROWS, JOIN: JOIN_ROWS, PRESSURE: PRESSURE_ROWS}[
        workload.kind
    ]


def ratios(workload: Workload, rounds: Rounds) -> dict[str, dict[str, Interval]]:
    """Variant / stock of a workload's figures, by variant."""
    others = [name for name in rounds[0] if name != STOCK]
    return {name: pairs.ratios(rounds, rows(workload), name, STOCK) for name in others}


def differing(workload: Workload, rounds: Rounds) -> list[str]:
    """Variants whose tokens differ from stock's although they must not."""
    if workload.regime != AMPLE or not workload.exact:
        return []
    return [
        name
        for name in rounds[0]
        if name in SAME_KERNELS
        and any(one[name]["counts"]["equal"] < one[name]["counts"]["requests"] for one in rounds)
    ]


def tokens_line(workload: Workload, rounds: Rounds) -> str:
    """What share of the answers equals stock's, and where the first difference is."""
    parts = []
    for name in rounds[0]:
        if name == STOCK:
            continue
        counts = [one[name]["counts"] for one in rounds]
        equal, all_of = (sum(one[key] for one in counts) for key in ("equal", "requests"))
        places = [one["first_difference"] for one in counts if one["equal"] < one["requests"]]
        part = f"{name} {equal} of {all_of}"
        if places:
            part += f" (first difference at token {min(places)})"
        parts.append(part)
    why = "" if workload.regime == AMPLE else "; preemption makes other batches, which may round"
    if not workload.exact:
        why = "; with a prefix cache each side cuts prompts at places of its own, which may round"
    return f"answers equal to stock's: {', '.join(parts)}{why}"


def lines(
    workloads: Sequence[Workload], rounds: Mapping[str, Rounds], heads: Mapping[str, str]
) -> Iterator[str]:
    """The whole report.

    Args:
        workloads: That were run.
        rounds: Of each, by name.
        heads: A line about each regime.
    """
    regime = ""
    for workload in workloads:
        if workload.regime != regime:
            regime = workload.regime
            yield heads[regime]
            yield ""
        found = rounds[workload.name]
        others = [name for name in found[0] if name != STOCK]
        yield (
            f"== {workload.name}: {workload.requests} request(s), prompts from {workload.prompt} "
            f"tokens, answers of {workload.answer} =="
        )
        names = {name: name for name in (*others, STOCK)}
        yield pairs.comparison(found, rows(workload), others, STOCK, names)
        yield tokens_line(workload, found)
        for name in differing(workload, found):
            yield f"DIFFERENT TOKENS: {name} runs stock's kernels and must give stock's tokens"
        yield ""
    judged = list(targets(workloads, rounds))
    if judged:
        yield f"Target: at most {BOUND} of stock's time between tokens (open: spans the bound)"
        yield table(["workload", "figure", "ratio, 95%", "verdict"], judged)
        if not any(CONTROL in found[0] for found in rounds.values()):
            yield (
                "No control: what one start of an engine has over another (its place in memory, "
                "its core) is in these ratios and not in their intervals."
            )
        if len(next(iter(rounds.values()))) < 5:
            yield "Few rounds: the intervals span what they show, and no more."


def targets(
    workloads: Sequence[Workload], rounds: Mapping[str, Rounds]
) -> Iterator[tuple[str, str, str, str]]:
    """Every decode's ratios against the bound.

    With a control, no verdict where the control's own interval excludes 1: what makes one stock
    engine differ from another makes AVMP's differ as well.
    """
    for workload in workloads:
        if workload.kind != DECODE:
            continue
        found = ratios(workload, rounds[workload.name])
        for name, several in found.items():
            for key in BOUNDED:
                ratio = several[key]
                result = pairs.judge(ratio, BOUND, above=False)
                control = found.get(CONTROL, {}).get(key)
                if name == CONTROL:
                    result = "control"
                elif control is not None and not control.low <= 1 <= control.high:
                    result = "open (two stock engines differ too)"
                spread = f"{ratio.point:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
                yield (f"{workload.name}, {name}", key.removesuffix("_ms"), spread, result)
