"""Figures, parity and exit status from made-up records."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from avmp_vllm.demo import report as reports
from avmp_vllm.demo import run as demo
from avmp_vllm.demo.replay import Answer, Replay
from avmp_vllm.demo.server import Metrics
from avmp_vllm.demo.workload import CountTokens

STOCK_METRICS = """\
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 3.0
"""
AVMP_METRICS = """\
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} 1.0
# TYPE vllm:avmp_migrations counter
vllm:avmp_migrations_total{direction="kv_to_ssm",engine="0"} 4.0
vllm:avmp_migrations_total{direction="ssm_to_kv",engine="0"} 2.0
# TYPE vllm:avmp_relocated_bytes counter
vllm:avmp_relocated_bytes_total{pool="kv",engine="0"} 1024.0
vllm:avmp_relocated_bytes_total{pool="ssm",engine="0"} 2048.0
# TYPE vllm:avmp_peak_pages_used gauge
vllm:avmp_peak_pages_used{pool="kv",engine="0"} 70.0
vllm:avmp_peak_pages_used{pool="ssm",engine="0"} 9.0
"""


def answer(name: str, text: str = "same", **more: object) -> Answer:
    """An answer of four tokens, the first after 0.1 s, the others 0.01, 0.02 and 0.03 s apart."""
    fields = {
        "finish_reason": "length",
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "ttft_s": 0.1,
        "gaps_s": [0.01, 0.02, 0.03],
    }
    return Answer(name, text, **{**fields, **more})


def outcome(
    answers: list[Answer], metrics: str, seconds: float = 2.0, foreign_cpu: float = 0.0
) -> reports.Outcome:
    return reports.Outcome(Replay(answers, seconds), Metrics(metrics), 5.0, 30.0, foreign_cpu)


def report_of(ours: list[Answer], theirs: list[Answer]) -> dict:
    return reports.build_report(
        outcome(ours, AVMP_METRICS), outcome(theirs, STOCK_METRICS, seconds=4.0), {}
    )


def test_equal_answers_pass() -> None:
    answers = [answer("a"), answer("b")]
    report = report_of(answers, answers)
    assert reports.passed(report)
    assert report["requests"] == 2
    assert report["parity"] == 1.0
    assert report["migrations_kv_to_ssm"] == 4
    assert report["migrations_ssm_to_kv"] == 2
    assert report["relocated_bytes"] == 3072
    assert report["throughput_ratio"] == pytest.approx(2.0)
    assert report["avmp"]["tokens_per_s"] == pytest.approx(4.0)
    assert report["avmp"]["preemptions"] == 1
    assert report["stock"]["preemptions"] == 3
    assert report["stock"]["migrations_kv_to_ssm"] is None
    assert report["avmp"]["peak_pages_kv"] == 70
    json.dumps(report)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (answer("a"), answer("a", text="other")),
        (answer("a", error="HTTP 500"), answer("a")),
        (answer("a"), answer("a", error="HTTP 500")),
        (answer("a", error="HTTP 500"), answer("a", error="HTTP 500")),
    ],
)
def test_a_different_or_missing_answer_fails(ours: Answer, theirs: Answer) -> None:
    same = [answer("b"), answer("c"), answer("d")]
    report = report_of([ours, *same], [theirs, *same])
    assert not reports.passed(report)
    assert report["parity"] == 0.75
    assert [item["request"] for item in report["differences"]] == ["a"]
    assert any("request a" in line for line in reports.complaints(report))


def test_no_request_at_all_does_not_pass() -> None:
    assert not reports.passed(report_of([], []))


def test_sides_with_different_requests_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same requests"):
        report_of([answer("a")], [answer("b")])


def test_percentiles() -> None:
    values = [float(value) for value in range(101)]
    assert reports.percentile(values, 50) == 50
    assert reports.percentile(values, 99) == 99
    assert reports.percentile([], 50) is None
    numbers = reports.figures(outcome([answer("a"), answer("b", ttft_s=0.3)], STOCK_METRICS))
    assert numbers["ttft_p50_ms"] == pytest.approx(200)
    assert numbers["itl_p50_ms"] == pytest.approx(20)


def test_failed_requests_count_for_nothing_but_errors() -> None:
    numbers = reports.figures(outcome([answer("a"), answer("b", error="broken")], STOCK_METRICS))
    assert (numbers["requests"], numbers["answered"], numbers["errors"]) == (2, 1, 1)
    assert numbers["completion_tokens"] == 4


def test_the_table_shows_both_sides_and_the_ratio() -> None:
    answers = [answer("a")]
    console = Console(file=io.StringIO(), width=100)
    console.print(reports.table(report_of(answers, answers)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for line in ("answer tokens / s", "1 of 1", "relocated bytes", "3,072", "2.00"):
        assert line in text


def test_a_busy_machine_is_named() -> None:
    quiet = outcome([answer("a")], AVMP_METRICS)
    busy = outcome([answer("a")], STOCK_METRICS, foreign_cpu=0.5)
    report = reports.build_report(quiet, busy, {})
    assert report["stock"]["foreign_cpu_percent"] == 50
    assert any("do not trust the times" in line for line in reports.complaints(report))
    assert reports.complaints(reports.build_report(quiet, quiet, {})) == []


def test_many_differences_are_cut_short_in_the_terminal_only() -> None:
    ours = [answer(str(i)) for i in range(9)]
    theirs = [answer(str(i), text="other") for i in range(9)]
    report = report_of(ours, theirs)
    assert len(report["differences"]) == 9
    assert "and 4 more; all of them are in the report" in reports.complaints(report)


@pytest.mark.parametrize(("stock_text", "status"), [("same", demo.OK), ("other", demo.DIFFERENT)])
def test_the_exit_status_tells_parity(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stock_text: str,
    status: int,
) -> None:
    """The command around the two servers: their place is taken by records."""
    texts = {"AVMP": "same", "stock vLLM": stock_text}
    count: CountTokens = lambda messages: 10 * len(messages)  # noqa: E731
    monkeypatch.setattr(demo, "tiny_jamba", lambda path: path)
    monkeypatch.setattr(demo, "token_counter", lambda model: count)
    monkeypatch.setattr(
        demo,
        "_serve",
        lambda console, title, *rest: outcome([answer("a", text=texts[title])], AVMP_METRICS),
    )
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    (tmp_path / "out").mkdir()
    args = parser.parse_args(["--output", str(tmp_path / "out")])
    assert demo.run(args) == status
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["parity"] == (1.0 if status == demo.OK else 0.0)
    assert ("request a differs" in capsys.readouterr().out) == (status != demo.OK)
