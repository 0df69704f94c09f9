"""``avmp bench serve`` without a server: parsing, pairing, targets, requests of a round."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from avmp_vllm.bench import results
from avmp_vllm.bench.serve import command, report
from avmp_vllm.bench.serve.load import Conversations, Load, SingleTurns
from avmp_vllm.bench.serve.rounds import Goal, Round, Timed
from avmp_vllm.bench.statistics import Interval
from avmp_vllm.demo.replay import Answer, Replay
from avmp_vllm.demo.workload import SAMPLE

#: What ``vllm bench serve --save-detailed --goodput ttft:200 tpot:30`` wrote for five requests to a
#: stock server with the tiny Jamba (without texts and dates).
RECORDED = json.loads((Path(__file__).parent / "data" / "vllm_bench_serve.json").read_text())
GOAL = Goal(ttft_ms=200, tpot_ms=30)


def test_figures_equal_those_of_vllm():
    """Ours, from the requests, and vLLM's own summary of the same run."""
    found = Round.from_vllm(RECORDED)
    counts, figures = found.counts(), found.figures(GOAL)
    assert counts == {
        "answered": RECORDED["completed"],
        "failed": RECORDED["failed"],
        "prompt_tokens": RECORDED["total_input_tokens"],
        "answer_tokens": RECORDED["total_output_tokens"],
    }
    assert counts["answered"] == 5
    ours = {
        "throughput": "output_throughput",
        "goodput": "request_goodput",
        "ttft_p50_ms": "median_ttft_ms",
        "ttft_p99_ms": "p99_ttft_ms",
        "itl_p50_ms": "median_itl_ms",
        "itl_p99_ms": "p99_itl_ms",
        "tpot_p50_ms": "median_tpot_ms",
    }
    for name, theirs in ours.items():
        assert figures[name] == pytest.approx(RECORDED[theirs]), name


def test_goodput_counts_requests_that_meet_both_goals():
    """On each side of both bounds."""
    request = Timed(10, 3, ttft_s=0.1, gaps_s=(0.02, 0.02), latency_s=0.14)
    found = Round(2.0, [request])
    assert found.figures(Goal(100.1, 20.1))["goodput"] == 0.5
    assert found.figures(Goal(99.9, 20.1))["goodput"] == 0
    assert found.figures(Goal(100.1, 19.9))["goodput"] == 0


def test_failed_requests_are_counted_with_their_reason():
    """In vLLM's form (the last line of a traceback) and in the client's."""
    broken = {**RECORDED, "errors": [*RECORDED["errors"][:-1], "Traceback ...\nOSError: gone\n"]}
    found = Round.from_vllm(broken)
    assert (found.counts()["answered"], found.failed, found.errors) == (4, 1, ["OSError: gone"])
    found = Round.from_replay(Replay([Answer("a", error="HTTP 500"), Answer("b")], 1.0))
    assert (found.failed, found.errors) == (2, ["HTTP 500", "no text"])
    assert found.figures(GOAL)["throughput"] == 0


@pytest.mark.parametrize("change", [{"ttfts": None}, {"itls": [[]]}])
def test_a_result_that_is_not_whole_is_refused(change):
    """A field is missing, or lists differ in length."""
    broken = {**RECORDED, **change}
    if change.get("ttfts", 0) is None:
        del broken["ttfts"]
    with pytest.raises(ValueError, match="vllm bench serve gave"):
        Round.from_vllm(broken)


def test_the_client_s_answers():
    """Latency is the sum of its parts."""
    answer = Answer("a", "xyz", "length", 7, 3, ttft_s=0.5, gaps_s=[0.1, 0.3])
    (timed,) = Round.from_replay(Replay([answer], 2.0)).answered
    assert timed == Timed(7, 3, 0.5, [0.1, 0.3], 0.9)
    assert timed.tpot_s == pytest.approx(0.2)


def _rounds(avmp, stock, key="throughput"):
    def side(value):
        counts = {"answered": 1, "failed": 0, "prompt_tokens": 1, "answer_tokens": 1}
        return {"counts": counts, "figures": {key: value}, "errors": [], "foreign_share": 0.25}

    return [{"avmp": side(a), "stock": side(s)} for a, s in zip(avmp, stock, strict=True)]


def test_pairs_keep_together():
    """A noise that meets both halves of a pair cancels; the same values unpaired leave a width."""
    noise = np.array([1.0, 5.0, 2.0, 9.0, 4.0])
    paired = report.ratios(_rounds(1.1 * noise, noise))["throughput"]
    assert paired == pytest.approx((1.1, 1.1, 1.1))
    apart = report.ratios(_rounds(1.1 * noise[::-1], noise))["throughput"]
    assert apart.low < 0.9
    assert apart.high > 1.3


def test_no_ratio_to_nothing():
    """Stock without preemptions, or without the counter: no ratio, and the table says so."""
    rounds = _rounds([1, 2], [0, 3], "preemptions")
    assert report.ratios(rounds) == {}
    for one in rounds:
        del one["stock"]["figures"]["preemptions"]
    line = next(
        row for row in report.scenario_table(rounds).splitlines() if row.startswith("preemptions")
    )
    assert line.split()[-3:] == ["-", "-", "-"]


@pytest.mark.parametrize(
    ("interval", "above", "below"),
    [
        (Interval(1.2, 1.1, 1.3), "reached", "missed"),
        (Interval(0.8, 0.7, 0.9), "missed", "reached"),
        (Interval(1.0, 0.9, 1.1), "open", "open"),
    ],
)
def test_targets_ask_for_the_whole_interval(interval, above, below):
    """Throughput above a bound, time below it."""
    assert report.Target("single", "tight", "throughput", 1.0, True).judge(interval) == above
    assert report.Target("turns", "tight", "ttft_p50_ms", 1.0, False).judge(interval) == below


def test_targets_of_the_scenarios_that_were_run():
    """Only those, each with its own verdict; a row says whom it favours."""
    scenarios = {
        "single/ample": _rounds([1.0, 1.0], [1.1, 1.1]),
        "turns/tight": _rounds([5.0, 6.0], [10.0, 12.0], "ttft_p50_ms"),
    }
    found = {(t.workload, t.regime, t.key): result for t, _, result in report.targets(scenarios)}
    assert found == {
        ("single", "ample", "throughput"): "missed",
        ("turns", "tight", "ttft_p50_ms"): "reached",
    }
    heads = dict.fromkeys(scenarios, "head")
    text = "\n".join(report.lines(scenarios, heads))
    assert "stock better" in text
    assert "AVMP better" in text


def test_failures_stand_in_the_report():
    """A server that answers nothing must not look fast."""
    rounds = _rounds([1.0], [1.0])
    rounds[0]["avmp"]["counts"]["failed"] = 3
    rounds[0]["avmp"]["errors"] = ["HTTP 500"]
    text = "\n".join(report.lines({"single/ample": rounds}, {"single/ample": "head"}))
    assert "FAILED requests: {'avmp': 3, 'stock': 0}" in text
    assert "HTTP 500" in text


LOAD = Load(SAMPLE, requests=12, concurrency=4, answer_tokens=8, max_model_len=400)


def _count(messages):
    return sum(len(message["content"]) for message in messages) // 3


def test_rounds_of_conversations():
    """Same seed, same requests; another seed, another opening; never more than asked, all fit."""
    load = Conversations(LOAD, _count)
    first, again, second = load.phase(1), load.phase(1), load.phase(2)
    assert first == again
    assert first != second
    for phase in (first, second):
        requests = list(phase.requests)
        assert len(requests) == 12
        assert all(request.prompt_tokens + 8 <= 400 for request in requests)
    openings = {r.messages[0]["content"] for p in (first, second) for r in p.requests}
    assert len(openings) == 2
    turns = next(chat for chat in first.chats if len(chat) > 1)
    assert turns[1].messages[: len(turns[0].messages)] == turns[0].messages


def test_command_line_of_vllm_bench_serve():
    """vLLM's own parser takes it."""
    pytest.importorskip("vllm")
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(SingleTurns(LOAD).arguments("http://127.0.0.1:1", "model", 7))
    assert (args.num_prompts, args.max_concurrency, args.seed) == (12, 4, 7)
    assert (args.dataset_name, args.sharegpt_output_len, args.ignore_eos) == ("sharegpt", 8, True)


def _arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_bad_input_is_one_error(tmp_path, capsys):
    """Before any server starts."""
    bad = tmp_path / "chats.json"
    bad.write_text('[{"conversations": [{"from": "human"}]}]')
    assert command.run(_arguments("--sharegpt", str(bad))) == 2
    assert "field 'value' is missing" in capsys.readouterr().err
    assert command.run(_arguments("--answer-tokens", "0")) == 2
    assert "--answer-tokens 0" in capsys.readouterr().err
    assert command.run(_arguments("--check", str(tmp_path / "none.json"))) == 2
    assert "none.json" in capsys.readouterr().err


def test_result_file_holds_everything(tmp_path):
    """Written, read and drawn again from the file alone."""
    parameters = command._parameters(_arguments("--workload", "single", "--regime", "tight"))
    assert parameters["arena_mib"] == {"tight": 4}
    rounds = {"single/tight": _rounds([2.0, 3.0], [1.0, 1.0])}
    result = command.result_of(parameters, rounds, {"single/tight": [100.0, 20.0]})
    path = tmp_path / "serve.json"
    results.write(path, result)
    read = results.read(path, command.BENCHMARK)
    assert read == json.loads(json.dumps(result))
    assert read["timings"]["single/tight"]["ratios"]["throughput"][0] == 2.5
    head = command.head(parameters, "single/tight", [100.0, 20.0], rounds["single/tight"])
    assert head.startswith("4 MiB, 8 rounds of 32 requests, 24 at a time")
    assert "25 to 25%" in head
