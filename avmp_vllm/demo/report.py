"""The figures of a comparison of two servers, as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from avmp_vllm.demo.replay import Answer, Replay
from avmp_vllm.demo.server import Metrics

AVMP, STOCK = "avmp", "stock"
_SHOWN_DIFFERENCES = 5
_POOLS = ("kv", "ssm")
_BUSY_PERCENT = 15  # above it, times say more about the neighbours than about the servers


@dataclass
class Outcome:
    """What one server did.

    Attributes:
        replay: Its answers.
        metrics: Its counters at the end.
        peak_running: Most requests that it computed at one time, sampled.
        start_s: Seconds until it was ready.
        foreign_cpu: Share of the machine's cores that other programs used meanwhile, 0 to 1.
    """

    replay: Replay
    metrics: Metrics
    peak_running: float | None
    start_s: float
    foreign_cpu: float


class Row(NamedTuple):
    """One line of the table: label, key of the figures, number format, unit."""

    label: str
    key: str
    form: str = ",.0f"
    unit: str = ""


ROWS: tuple[Row | None, ...] = (
    Row("requests answered", "answered"),
    Row("prompt tokens", "prompt_tokens"),
    Row("answer tokens", "completion_tokens"),
    Row("answer tokens / s", "tokens_per_s", ",.1f"),
    Row("requests running at once, peak", "peak_running"),
    Row("CPU taken by other programs", "foreign_cpu_percent", ",.0f", "%"),
    None,
    Row("time to first token, p50", "ttft_p50_ms", ",.0f", "ms"),
    Row("time to first token, p99", "ttft_p99_ms", ",.0f", "ms"),
    Row("between tokens, p50", "itl_p50_ms", ",.1f", "ms"),
    Row("between tokens, p99", "itl_p99_ms", ",.1f", "ms"),
    None,
    Row("preemptions", "preemptions"),
    Row("prompt tokens from the prefix cache", "prefix_hit_tokens"),
    Row("migrations KV to SSM", "migrations_kv_to_ssm"),
    Row("migrations SSM to KV", "migrations_ssm_to_kv"),
    Row("relocated bytes", "relocated_bytes"),
    Row("KV pages used, peak", "peak_pages_kv"),
    Row("SSM blocks used, peak", "peak_pages_ssm"),
)


def percentile(values: Sequence[float], share: float) -> float | None:
    """Percentile with linear interpolation; None of nothing."""
    return float(np.percentile(values, share)) if values else None


def figures(outcome: Outcome) -> dict[str, Any]:
    """Figures of one server. Those that it does not have are None."""
    answers, metrics = outcome.replay.answers, outcome.metrics
    good = [answer for answer in answers if answer.error is None]
    firsts = [1e3 * answer.ttft_s for answer in good if answer.ttft_s is not None]
    gaps = [1e3 * gap for answer in good for gap in answer.gaps_s]
    tokens = sum(answer.completion_tokens for answer in good)

    def counter(name: str, **labels: str) -> int | None:
        value = metrics.value(f"vllm:{name}", **labels)
        return None if value is None else int(value)

    result: dict[str, Any] = {
        "requests": len(answers),
        "answered": len(good),
        "errors": len(answers) - len(good),
        "seconds": outcome.replay.seconds,
        "start_s": outcome.start_s,
        "prompt_tokens": sum(answer.prompt_tokens for answer in good),
        "completion_tokens": tokens,
        "tokens_per_s": tokens / outcome.replay.seconds,
        "peak_running": outcome.peak_running,
        "foreign_cpu_percent": 100 * outcome.foreign_cpu,
        "ttft_p50_ms": percentile(firsts, 50),
        "ttft_p99_ms": percentile(firsts, 99),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "preemptions": counter("num_preemptions_total"),
        "prefix_hit_tokens": counter("prefix_cache_hits_total"),
        "migrations_kv_to_ssm": counter("avmp_migrations_total", direction="kv_to_ssm"),
        "migrations_ssm_to_kv": counter("avmp_migrations_total", direction="ssm_to_kv"),
        "relocated_bytes": counter("avmp_relocated_bytes_total"),
    }
    for pool in _POOLS:
        result[f"peak_pages_{pool}"] = counter("avmp_peak_pages_used", pool=pool)
        result[f"evictions_{pool}"] = counter("avmp_evictions_total", pool=pool)
        result[f"allocation_failures_{pool}"] = counter("avmp_allocation_failures_total", pool=pool)
    return result


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """AVMP's figure over stock's, where both exist and stock's is not 0."""
    return ours / theirs if ours is not None and theirs else None


def differences(avmp: Sequence[Answer], stock: Sequence[Answer]) -> list[dict[str, Any]]:
    """Requests without two equal answers: name, both texts, both errors.

    Raises:
        ValueError: The two sides did not get the same requests.
    """
    if [answer.name for answer in avmp] != [answer.name for answer in stock]:
        raise ValueError("the two servers did not get the same requests in the same order")
    return [
        {
            "request": ours.name,
            AVMP: ours.error or ours.text,
            STOCK: theirs.error or theirs.text,
            "error": ours.error is not None or theirs.error is not None,
        }
        for ours, theirs in zip(avmp, stock, strict=True)
        if ours.error is not None or theirs.error is not None or ours.text != theirs.text
    ]


def build_report(avmp: Outcome, stock: Outcome, setting: dict[str, Any]) -> dict[str, Any]:
    """The whole comparison; what ``report.json`` holds.

    Args:
        avmp, stock: What the two servers did with the same requests.
        setting: What was run, for the record.
    """
    ours, theirs = figures(avmp), figures(stock)
    differing = differences(avmp.replay.answers, stock.replay.answers)
    requests = len(avmp.replay.answers)
    return {
        "requests": requests,
        "parity": 1 - len(differing) / requests if requests else 0.0,
        "migrations_kv_to_ssm": ours["migrations_kv_to_ssm"],
        "migrations_ssm_to_kv": ours["migrations_ssm_to_kv"],
        "relocated_bytes": ours["relocated_bytes"],
        "throughput_ratio": ratio(ours["tokens_per_s"], theirs["tokens_per_s"]),
        AVMP: ours,
        STOCK: theirs,
        "differences": differing,
        "setting": setting,
    }


def passed(report: dict[str, Any]) -> bool:
    """Whether both servers answered every request, and with the same text."""
    return report["requests"] > 0 and not report["differences"]


def table(report: dict[str, Any]) -> Table:
    """The figures of both servers side by side."""
    result = Table(title="AVMP and stock vLLM, same requests, same cache bytes")
    result.add_column("")
    for column in ("AVMP", "stock", "AVMP / stock"):
        result.add_column(column, justify="right")
    for row in ROWS:
        if row is None:
            result.add_section()
            continue
        ours, theirs = report[AVMP][row.key], report[STOCK][row.key]
        share = None if row.unit == "%" else ratio(ours, theirs)
        result.add_row(
            row.label,
            _shown(ours, row),
            _shown(theirs, row),
            "" if share is None else f"{share:.2f}",
        )
    result.add_section()
    equal = report["requests"] - len(report["differences"])
    result.add_row(
        "answers equal to stock's (parity)",
        f"{equal} of {report['requests']}",
        "",
        f"{report['parity']:.3f}",
        style="bold green" if passed(report) else "bold red",
    )
    return result


def _shown(value: float | None, row: Row) -> str:
    return "-" if value is None else f"{value:{row.form}} {row.unit}".rstrip()


def complaints(report: dict[str, Any]) -> list[str]:
    """Lines about what differs, and about what the run did not show."""
    lines = []
    for item in report["differences"][:_SHOWN_DIFFERENCES]:
        lines.append(f"request {item['request']} {'failed' if item['error'] else 'differs'}:")
        lines += [f"  {side}: {item[side][:200]!r}" for side in (AVMP, STOCK)]
    more = len(report["differences"]) - _SHOWN_DIFFERENCES
    if more > 0:
        lines.append(f"and {more} more; all of them are in the report")
    if max(report[side]["foreign_cpu_percent"] for side in (AVMP, STOCK)) > _BUSY_PERCENT:
        lines.append("other programs used this machine meanwhile: do not trust the times")
    if not (report["migrations_kv_to_ssm"] and report["migrations_ssm_to_kv"]):
        lines.append(
            "capacity did not move both ways in this run: lower --arena-mib, or send more requests"
        )
    return lines
