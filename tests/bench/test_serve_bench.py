"""``avmp bench serve`` without vLLM: parsing, pairing, targets, chats against a small server."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from aiohttp import web

from avmp_vllm.bench import results
from avmp_vllm.bench.serve import command, report, sides
from avmp_vllm.bench.serve.chats import Chat, converse, make_chat
from avmp_vllm.bench.serve.load import Conversations, Load, SingleTurns
from avmp_vllm.bench.serve.models import JAMBA, SHAPES
from avmp_vllm.bench.serve.rounds import Goal, Round, Timed
from avmp_vllm.bench.statistics import Interval
from avmp_vllm.demo.replay import Answer, Replay
from avmp_vllm.demo.server import Metrics
from avmp_vllm.demo.workload import SAMPLE, Conversation
from avmp_vllm.models.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[2]

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


def test_answers_are_compared_request_by_request():
    """Text of vLLM's client, tokens of ours; an answer that is missing equals nothing."""
    texts = ["a", "b", "c", "d", "e"]
    found = Round.from_vllm({**RECORDED, "generated_texts": texts})
    other = Round.from_vllm({**RECORDED, "generated_texts": ["a", "b", "c", "x", "e"]})
    assert (found.equal_to(found), found.equal_to(other)) == (5, 4)
    broken = {**RECORDED, "generated_texts": texts, "errors": [*[""] * 4, "OSError: gone"]}
    assert Round.from_vllm(broken).equal_to(Round.from_vllm(broken)) == 4
    assert Round.from_vllm(RECORDED).equal_to(found) is None
    ours = [
        Round.from_replay(Replay([Answer("a", "xy", ttft_s=0.1, token_ids=tokens)], 1.0))
        for tokens in ([1, 2], [12])
    ]
    assert (ours[0].equal_to(ours[0]), ours[0].equal_to(ours[1])) == (1, 0)
    with pytest.raises(ValueError, match="zip"):
        ours[0].equal_to(found)


def _side(value, key="throughput"):
    counts = {"answered": 1, "failed": 0, "prompt_tokens": 1, "answer_tokens": 1}
    return {
        "counts": counts,
        "figures": {key: value},
        "errors": [],
        "foreign_share": 0.25,
        "equal": 1,
    }


def _rounds(avmp, stock, key="throughput", **more):
    """Rounds of AVMP, stock, and further sides with their values (``_`` stands for ``-``)."""
    columns = {"avmp": avmp, "stock": stock} | {
        name.replace("_", "-"): values for name, values in more.items()
    }
    return [
        {side: _side(value, key) for side, value in zip(columns, values, strict=True)}
        for values in zip(*columns.values(), strict=True)
    ]


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


def test_the_baseline_is_stock_s_best_figure_by_figure():
    """By the mean; the control is no candidate; its ratio is to its own setting."""
    more = {"stock_dense": [2.0, 6.0], "stock_dense_again": [4.0, 8.0]}
    rounds = _rounds([8.0, 4.0], [3.0, 3.0], **more)
    assert report.stock_sides(rounds) == ["stock", "stock-dense"]
    assert report.control_side(rounds) == "stock-dense-again"
    assert report.baselines(rounds)["throughput"] == "stock-dense"
    assert report.ratios(rounds)["throughput"].point == 1.5
    assert report.control_ratios(rounds)["throughput"].point == 1.5
    rounds = _rounds([8.0, 4.0], [3.0, 3.0], "ttft_p50_ms", **more)
    assert report.baselines(rounds)["ttft_p50_ms"] == "stock"
    assert report.ratios(rounds)["ttft_p50_ms"].point == 2
    line = next(
        row for row in report.scenario_table(rounds).splitlines() if "first token p50" in row
    )
    assert "2.000 [1.333, 2.667]  stock " in line
    assert "the control differs" in line
    assert "stock better" not in line
    for one, value in zip(rounds, (1.0, 7.0), strict=True):
        one["stock-dense-again"]["figures"]["ttft_p50_ms"] = value
    line = next(
        row for row in report.scenario_table(rounds).splitlines() if "first token p50" in row
    )
    assert "the control differs" not in line
    assert "stock better" in line


def test_no_worse_than_the_control_shows():
    """Without a bound of its own a target takes the control's, if that is the looser one."""
    target = report.Target("turns", "ample", "ttft_p50_ms", None, False)
    ratio = Interval(1.02, 1.01, 1.03)
    assert target.judge(ratio, Interval(1.0, 0.95, 1.05)) == "reached"
    assert target.judge(ratio, Interval(1.0, 0.99, 1.02)) == "open"
    assert target.judge(ratio, Interval(1.0, 0.99, 1.005)) == "missed"
    assert target.judge(ratio) == "missed"
    # Two servers of one setting differ: the machine was too busy for any verdict.
    for control in (Interval(0.9, 0.85, 0.95), Interval(1.2, 1.1, 1.3)):
        assert target.judge(ratio, control) == "not judged"
        assert target._replace(bound=2.0).judge(ratio, control) == "not judged"
    above = target._replace(above=True)
    assert above.judge(Interval(0.98, 0.97, 0.99), Interval(1.0, 0.96, 1.04)) == "reached"


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
    found = {(t.workload, t.regime, t.key): said for t, _, _, said in report.targets(scenarios)}
    assert found == {
        ("single", "ample", "throughput"): "missed",
        ("turns", "tight", "ttft_p50_ms"): "reached",
    }
    heads = dict.fromkeys(scenarios, "head")
    text = "\n".join(report.lines(scenarios, heads))
    assert "stock better" in text
    assert "AVMP better" in text
    assert "turns, tight: ttft_p50_ms <= 0.769" in text


def test_parity_is_in_the_report_and_in_the_status(tmp_path, monkeypatch):
    """One answer that differs from stock's is 1, with a tiny Jamba; so is a failed request."""

    class Finished:
        def __init__(self, parameters, **settings):
            self.found = _rounds([1.0, 2.0], [1.0, 1.0], stock_again=[1.0, 1.0])
            for change in changes:
                change(self.found[0])

        def run(self):
            pass

        def rounds(self):
            return {"turns/tight": self.found}

        def goals(self):
            return {"turns/tight": [1.0, 1.0]}

    monkeypatch.setattr(command, "Job", Finished)
    words = ("--workload", "turns", "--regime", "tight", "--output", str(tmp_path / "out.json"))

    changes = []
    assert command.run(_arguments(*words)) == 0

    changes.append(lambda one: one["avmp"].update(equal=0))
    assert command.run(_arguments(*words)) == 1
    read = results.read(tmp_path / "out.json", command.BENCHMARK)
    assert read["timings"]["turns/tight"]["equal"]["avmp"] == [1, 2]
    assert command.run(_arguments(*words, "--model", "real")) == 0

    changes.append(lambda one: one["stock-again"]["counts"].update(failed=1))
    changes.append(lambda one: one["stock-again"]["errors"].append("HTTP 500"))
    assert command.run(_arguments(*words, "--model", "real")) == 1


def test_unknown_parity_is_not_reported():
    """Where a client gave no texts."""
    rounds = _rounds([1.0], [1.0])
    rounds[0]["avmp"]["equal"] = None
    assert report.parity(rounds) == {"stock": (1, 1)}
    text = "\n".join(report.lines({"turns/tight": rounds}, {"turns/tight": "head"}))
    assert "Answers equal to those of stock" in text
    assert "avmp 1 of" not in text


def test_failures_stand_in_the_report():
    """A server that answers nothing must not look fast."""
    rounds = _rounds([1.0], [1.0])
    rounds[0]["avmp"]["counts"]["failed"] = 3
    rounds[0]["avmp"]["errors"] = ["HTTP 500"]
    text = "\n".join(report.lines({"single/ample": rounds}, {"single/ample": "head"}))
    assert "FAILED requests: {'avmp': 3, 'stock': 0}" in text
    assert "HTTP 500" in text


LOAD = Load(SAMPLE, requests=12, concurrency=4, answer_tokens=8, max_model_len=400, think_s=1.0)


def test_rounds_of_conversations():
    """Same seed, same requests; another seed, another opening; never more than asked, all fit."""
    load = Conversations(LOAD, build_tokenizer())
    first, again, second = load.chats(1), load.chats(1), load.chats(2)
    assert first == again
    assert first != second
    for chats in (first, second):
        assert sum(len(chat.turns) for chat in chats) == 12
        assert max(len(chat.turns) for chat in chats) > 1
        for chat in chats:
            assert len(chat.turns) <= LOAD.turns
            assert sum(len(turn) + 8 for turn in chat.turns) <= 400
            assert len(chat.pauses_s) == len(chat.turns)
            assert min(chat.pauses_s) > 0
    # Nothing that a cache could hit in common: the openings differ within the first page.
    openings = [
        {chat.turns[0][:16] for chat in chats if len(chat.turns[0]) >= 16}
        for chats in (first, second)
    ]
    assert not openings[0] & openings[1]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_turns_are_the_pieces_of_the_chat_template(most):
    """With answers between them they make the prompt that the template makes of the whole."""
    tokenizer = build_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}]
    answers = ["First, a page.", "Then two: «größer»!", "No.", "Yes.\nBut."]
    for number, answer in enumerate(answers):
        messages.append({"role": "user", "content": f"What is next, number {number}?  "})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": " "})  # nothing is said, nothing is sent
    chat = make_chat(
        Conversation("a", tuple(messages)),
        tokenizer,
        answer_tokens=30,
        longest=1000,
        most_turns=most,
        think_s=0,
        rng=random.Random(1),
    )
    assert len(chat.turns) == min(most, 4)
    prompt = []
    for number, turn in enumerate(chat.turns):
        prompt += turn
        whole = tokenizer.apply_chat_template(
            messages[: 2 * number + 2], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert prompt == whole
        prompt += tokenizer.encode(answers[number], add_special_tokens=False)


def _converse(chats, users, handler):
    """Hold chats with a small server; its handler gets each request's body."""

    async def serve():
        async def answer(incoming):
            response = web.StreamResponse()
            events = await handler(await incoming.json())
            await response.prepare(incoming)
            for event in events:
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            return response

        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            return await converse(url, "tiny", chats, users, 3)
        finally:
            await runner.cleanup()

    return asyncio.run(serve())


def _piece(tokens, finish=None):
    return {"choices": [{"text": "", "token_ids": tokens, "finish_reason": finish}]}


def test_a_prompt_holds_the_answers_that_the_server_gave():
    """As they came, in the order of the chats, and no more users at a time than there are."""
    chats = [Chat(str(i), ((i,), (10 + i,), (20 + i,)), (0.0, 0.0, 0.001)) for i in range(4)]
    prompts, running, most, counter = [], 0, 0, itertools.count(100)

    async def handler(body):
        nonlocal running, most
        running += 1
        most = max(most, running)
        prompts.append(body["prompt"])
        await asyncio.sleep(0.01)
        running -= 1
        a, b, c = itertools.islice(counter, 3)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 3}
        return [_piece([a]), _piece([b, c], "length"), {"choices": [], "usage": usage}]

    found = _converse(chats, 2, handler)
    names = [f"{i}/{k}" for i in range(4) for k in range(3)]
    assert [answer.name for answer in found.answers] == names
    assert [answer.error for answer in found.answers] == [None] * 12
    assert most == 2
    by_chat = {i: [p for p in prompts if p[0] == i] for i in range(4)}
    for i in range(4):
        given = [tuple(answer.token_ids) for answer in found.answers[3 * i : 3 * i + 3]]
        assert by_chat[i] == [
            [i],
            [i, *given[0], 10 + i],
            [i, *given[0], 10 + i, *given[1], 20 + i],
        ]
    assert prompts.index(by_chat[2][0]) > prompts.index(by_chat[0][2])  # user 0 holds 0, then 2
    rounds = Round.from_replay(found)
    assert rounds.texts[0] == tuple(found.answers[0].token_ids)
    assert rounds.counts()["prompt_tokens"] == sum(map(len, prompts))


@pytest.mark.parametrize("short", [True, False])
def test_turns_behind_a_failure_fail(short):
    """They cannot be sent, and other chats go on. An answer of another length is a failure."""

    async def handler(body):
        if body["prompt"][0] == 0:
            return [_piece([7], "length")] if short else [{"error": "engine died"}]
        return [_piece([7, 8, 9], "length")]

    chats = [Chat(name, ((first,), (1,)), (0.0, 0.0)) for name, first in (("a", 0), ("b", 5))]
    found = _converse(chats, 2, handler)
    errors = [answer.error for answer in found.answers]
    assert errors[0] == ("1 tokens came instead of 3" if short else "engine died")
    assert errors[1] == f"the turn before it failed: {errors[0]}"
    assert errors[2:] == [None, None]
    assert Round.from_replay(found).failed == 2


def test_the_sides_and_what_vllm_makes_of_their_options():
    """Dense retention is None, which the command line has a word for."""
    made = sides.sides_of(list(sides.STOCK_SETTINGS), "stock-dense")
    assert list(made) == ["avmp", *sides.STOCK_SETTINGS, "stock-dense-again"]
    assert made["avmp"].manager == "avmp"
    assert {side.manager for name, side in made.items() if name != "avmp"} == {"default"}
    assert made["stock-dense-again"] == made["stock-dense"]
    ours = sides.sides_of(["stock"], "stock", {"cold_states": "int12"})
    assert ours["avmp"].options == ("--additional-config", '{"avmp": {"cold_states": "int12"}}')
    assert ours["stock"].options == ours["stock-again"].options == made["avmp"].options == ()
    pytest.importorskip("vllm")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    found = {name: parser.parse_args(list(made[name].options)) for name in sides.STOCK_SETTINGS}
    intervals = [one.prefix_cache_retention_interval for one in found.values()]
    assert intervals == [0, None, 0]
    assert found["stock-unit"].prefix_match_unit == 16


def test_where_a_first_tokens_time_goes_is_a_mean_of_the_round(tmp_path):
    """Sums of seconds over a server's life, before and after two requests."""

    def page(queue, prefill, steps):
        return Metrics(
            f"vllm:request_queue_time_seconds_sum {queue}\n"
            f"vllm:request_prefill_time_seconds_sum {prefill}\n"
            f"vllm:iteration_tokens_total_count {steps}\n"
        )

    pages = iter([page(1, 5, 10), page(1.01, 5.2, 40)])
    server = SimpleNamespace(
        pid=os.getpid(), url="", check_alive=lambda: None, metrics=lambda: next(pages)
    )
    round_ = SimpleNamespace(
        counts=lambda: {"answered": 2, "answer_tokens": 8}, figures=lambda goal: {}, errors=[]
    )
    load = SimpleNamespace(drive=lambda *args: round_)
    _, found = sides.drive(server, load, "model", 0, tmp_path / "log", None)
    assert found["figures"]["queue_ms"] == pytest.approx(5)
    assert found["figures"]["prefill_ms"] == pytest.approx(100)
    assert found["figures"]["steps"] == 30


def test_the_tiny_jamba_has_the_proportions_of_a_real_one():
    """Mamba layers to attention, stock's block, padding, a state in tokens of KV."""
    pytest.importorskip("transformers")
    from avmp_vllm.models.tiny_jamba import tiny_jamba_config

    tiny = tiny_jamba_config(**SHAPES[JAMBA]).to_dict()
    real = json.loads((ROOT / "configs/models/jamba-reasoning-3b.json").read_text())

    def proportions(config, kv_bytes, conv_bytes, unit):
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        inner = config["mamba_expand"] * hidden
        token = 2 * config["num_key_value_heads"] * hidden // heads * kv_bytes
        layer = inner * (4 * config["mamba_d_state"] + conv_bytes * (config["mamba_d_conv"] - 1))
        attention = config["num_hidden_layers"] // config["attn_layer_period"]
        mamba = config["num_hidden_layers"] - attention
        block = -(-layer // token // unit) * unit
        return mamba / attention, block, block * token / layer, mamba * layer / (attention * token)

    # Attention blocks are multiples of 128 tokens on CPU, of 64 there.
    small, large = proportions(tiny, 4, 4, 128), proportions(real, 2, 2, 64)
    assert small == pytest.approx((13, 384, 1.032, 4836), abs=1e-3)
    assert large == pytest.approx((13, 704, 1.006, 9100), abs=1e-3)


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
    assert command.run(_arguments("--think-s", "-1")) == 2
    assert "--think-s -1" in capsys.readouterr().err


def test_a_file_of_another_version_is_refused(tmp_path, capsys):
    """Its parameters do not say all that a run needs."""
    parameters = command._parameters(_arguments())
    del parameters["think_s"]
    path = tmp_path / "old.json"
    results.write(path, command.result_of(parameters, {}, {}))
    assert command.run(_arguments("--check", str(path))) == 2
    assert "another version" in capsys.readouterr().err


def test_settings_of_stock():
    """The default is always there and first; single turns need no other; a typing error is one."""
    found = command._parameters(_arguments("--stock", "stock-unit,stock-dense"))
    assert found["stock"] == {"single": ["stock"], "turns": ["stock", "stock-unit", "stock-dense"]}
    assert found["control"] == {"single": "stock", "turns": "stock-dense"}
    assert found["shapes"] == {"single": "padded", "turns": "jamba"}
    with pytest.raises(SystemExit):
        _arguments("--stock", "stock-dence")


def test_result_file_holds_everything(tmp_path):
    """Written, read and drawn again from the file alone."""
    parameters = command._parameters(_arguments("--workload", "single", "--regime", "tight"))
    assert parameters["arena_mib"] == {"single": {"tight": 4}}
    rounds = {"single/tight": _rounds([2.0, 3.0], [1.0, 1.0])}
    result = command.result_of(parameters, rounds, {"single/tight": [100.0, 20.0]})
    path = tmp_path / "serve.json"
    results.write(path, result)
    read = results.read(path, command.BENCHMARK)
    assert read == json.loads(json.dumps(result))
    assert read["timings"]["single/tight"]["ratios"]["throughput"][0] == 2.5
    head = command.head(parameters, "single/tight", [100.0, 20.0], rounds["single/tight"])
    assert head.startswith("4 MiB, 8 rounds of 32 requests, 24 requests at a time")
    assert "25 to 25%" in head
