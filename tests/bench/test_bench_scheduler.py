"""`avmp bench scheduler`: vLLM's scheduler under each manager, short of memory."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.scheduler.adaptive import AdaptiveAdmission
from avmp_vllm.bench.scheduler.loads import ALPACA_COLUMNS, read_load
from avmp_vllm.bench.scheduler.traces import Segment, read_trace
from avmp_vllm.cli import main
from avmp_vllm.core import Geometry

MODEL = str(Path(__file__).parents[2] / "configs" / "models" / "jamba-reasoning-3b.json")

HEADER = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Path:
    """Forty requests at once, half of which share a prefix of 1,024 tokens."""
    path = tmp_path_factory.mktemp("trace") / "requests.jsonl"
    lines = []
    for index in range(40):
        prompt = 1200 + 37 * index % 400
        hashes = [0, 1] if index % 2 else [100 + index, 200 + index]
        hashes = [*hashes, *(1000 + 10 * index + i for i in range(-(-prompt // 512) - 2))]
        row = {"timestamp": 0, "input_length": prompt, "output_length": 30 + index}
        lines.append(json.dumps(row | {"hash_ids": hashes}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def result(trace, tmp_path_factory):
    """One run of all variants; the arenas are verified at its end."""
    path = tmp_path_factory.mktemp("result") / "result.json"
    arguments = ["--trace", str(trace), "--model", MODEL, "--memory", "128MiB", "--scale", "10"]
    arguments += ["--max-model-len", "2048", "--requests", "40", "--seeds", "1"]
    assert main(["bench", "scheduler", *arguments, "--output", str(path)]) == 0
    return path


def test_every_request_finishes_with_the_same_tokens(result):
    counts = json.loads(result.read_text())["counts"]
    total = sum(30 + index for index in range(40))
    for variant in ("stock", "static", "avmp"):
        (run,) = counts[variant]
        assert run["finished"] == 40, variant
        assert run["output_tokens"] == total, variant
        assert run["ttft"] == sorted(run["ttft"])
        assert run["concurrency_peak"] >= run["concurrency_mean"] > 0
        assert run["bytes_over_time"]
        for _, live, wasted, evictable in run["bytes_over_time"]:
            assert live >= 0
            assert wasted >= 0
            assert evictable >= 0
            assert live + wasted + evictable <= 128 << 20


def test_memory_binds_and_prefixes_hit(result):
    counts = json.loads(result.read_text())["counts"]
    assert counts["avmp"][0]["hit_tokens"] > 0
    assert counts["avmp"][0]["concurrency_peak"] < 40
    assert counts["static"][0]["concurrency_peak"] <= counts["avmp"][0]["concurrency_peak"]


def test_a_second_run_has_equal_counts(result, capsys):
    assert main(["bench", "scheduler", "--check", str(result)]) == 0
    assert "0 difference(s)" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(trace, tmp_path, monkeypatch, capsys):
    """Behind its finished variants; a run with other parameters begins anew."""
    from avmp_vllm.bench.scheduler import replay as module

    path, built = tmp_path / "result.json", []
    arguments = [
        "bench",
        "scheduler",
        "--trace",
        str(trace),
        "--model",
        MODEL,
        "--memory",
        "128MiB",
    ]
    arguments += ["--max-model-len", "2048", "--requests", "6", "--seeds", "2"]
    arguments += ["--variants", "stock,avmp", "--output", str(path)]
    real = module.replay

    def replay(engine, *rest):
        built.append(type(engine.scheduler).__name__)
        if len(built) == 3:
            raise KeyboardInterrupt
        return real(engine, *rest)

    monkeypatch.setattr(module, "replay", replay)
    assert main(arguments) == 130
    assert not path.exists()
    assert main(arguments) == 0
    assert "Going on behind 2 part(s)" in capsys.readouterr().err
    # The second seed begins with AVMP, which was interrupted.
    assert built == ["Scheduler", "AVMPScheduler"] + ["AVMPScheduler"] * 2 + ["Scheduler"]
    counts = json.loads(path.read_text())["counts"]
    assert [run["finished"] for name in ("stock", "avmp") for run in counts[name]] == [6] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_scheduling_ahead(trace, result, tmp_path):
    """The asynchronous schedulers give every request its tokens, in the same time or nearly."""
    path = tmp_path / "ahead.json"
    arguments = ["--trace", str(trace), "--model", MODEL, "--memory", "128MiB", "--scale", "10"]
    arguments += ["--max-model-len", "2048", "--requests", "40", "--seeds", "1"]
    arguments += ["--async-scheduling", "--variants", "stock,avmp", "--output", str(path)]
    assert main(["bench", "scheduler", *arguments]) == 0
    ahead, behind = (json.loads(p.read_text())["counts"] for p in (path, result))
    assert ahead["stock"][0]["preemptions"] > 0  # with a token on its way
    for variant in ("stock", "avmp"):
        (run,), (other,) = ahead[variant], behind[variant]
        assert run["finished"] == 40
        assert run["output_tokens"] == other["output_tokens"]
        assert 0.9 < run["makespan"] / other["makespan"] < 1.2


def test_a_request_waits_for_the_step_that_was_scheduled_ahead(tmp_path):
    """One request decodes; another arrives within a step, and waits for that and the next one."""
    trace = tmp_path / "two.csv"
    trace.write_text(HEADER + "0,32,20\n0.1001,32,2\n")
    arguments = ["--trace", str(trace), "--model", MODEL, "--memory", "128MiB", "--seeds", "1"]
    arguments += ["--max-model-len", "256", "--variants", "stock", "--no-prefix-caching"]
    arguments += ["--step-ms", "50", "--token-us", "0", "--sequence-us", "0"]
    ttft = {}
    for option in ((), ("--async-scheduling",)):
        path = tmp_path / f"{len(option)}.json"
        assert main(["bench", "scheduler", *arguments, *option, "--output", str(path)]) == 0
        (run,) = json.loads(path.read_text())["counts"]["stock"]
        ttft[len(option)] = run["ttft"]
        assert run["output_tokens"] == 22
    # Steps end at 50, 100, 150, ... ms. It joins the step from 150, or the one from 200.
    assert ttft[0][2] == pytest.approx(0.2 - 0.1001, abs=2e-3)
    assert ttft[1][2] == pytest.approx(0.25 - 0.1001, abs=2e-3)


def test_check_notices_a_difference(result, tmp_path, capsys):
    changed = json.loads(result.read_text())
    changed["counts"]["avmp"][0]["steps"] += 1
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    assert main(["bench", "scheduler", "--check", str(path)]) == 1
    assert "avmp" in capsys.readouterr().out


def test_the_arenas_hold_their_invariants_at_every_step(trace, tmp_path, capsys):
    arguments = ["--trace", str(trace), "--model", MODEL, "--memory", "80MiB", "--seeds", "1"]
    arguments += ["--max-model-len", "2048", "--requests", "8", "--verify"]
    arguments += ["--variants", "static,avmp", "--output", str(tmp_path / "result.json")]
    assert main(["bench", "scheduler", *arguments]) == 0
    assert "avmp" in capsys.readouterr().out


GOOD = '{"timestamp": 0, "input_length": 5, "output_length": 2, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "arrived_at,num_prefill_tokens\n0,1\n", r"t\.csv:1: .*num_decode_tokens"),
        ("t.csv", HEADER + "0,5,5\n1,-4,5\n", r"t\.csv:3: num_prefill_tokens = '-4'"),
        ("t.csv", HEADER + "nan,5,5\n", r"t\.csv:2: arrived_at = 'nan'"),
        ("t.csv", HEADER, "holds no request"),
        ("t.jsonl", GOOD + "{oops\n", r"t\.jsonl:2: is not JSON"),
        ("t.jsonl", GOOD + '{"timestamp": 0}\n', r"t\.jsonl:2: lacks input_length"),
        ("t.jsonl", GOOD.replace("[1]", "[1, 2]"), r"t\.jsonl:1: hash_ids must be a list of 1"),
        ("t.json", "[\n{]", r"t\.json:2: is not JSON"),
        ("t.json", '[{"id": 1}]', "conversation 0 lacks 'conversations'"),
        ("t.txt", "", "a trace ends in"),
    ],
)
def test_malformed_traces_name_file_and_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_trace(path)


def test_an_unreadable_trace_is_one_line(tmp_path, capsys):
    path = tmp_path / "missing.csv"
    assert main(["bench", "scheduler", "--model", MODEL, "--trace", str(path)]) == 2
    error = capsys.readouterr().err
    assert "missing.csv: cannot be read" in error
    assert error.count("\n") == 1


def test_equal_segments_are_equal_tokens():
    assert Segment("a", 9).token_ids() == Segment("a", 9).token_ids()
    assert Segment("a", 9).token_ids() != Segment("b", 9).token_ids()


def test_conversation_turns_share_their_history(tmp_path):
    path = tmp_path / "t.json"
    turns = [("human", "a" * 40), ("gpt", "b" * 80), ("human", "c" * 20), ("gpt", "d")]
    rows = [{"id": "x", "conversations": [{"from": f, "value": v} for f, v in turns]}]
    path.write_text(json.dumps(rows))
    first, second = read_trace(path).draw(0, 10, 1.0, 1.0, 30.0)
    assert (first.prompt_tokens, first.output.tokens) == (10, 20)
    assert second.prompt[:2] == (*first.prompt, first.output)
    assert second.arrival - first.arrival == 30.0


def test_admission_and_victims_beside_one_another(tmp_path, capsys):
    """A load that drifts, in an arena that is too small: options in the names of variants."""
    lengths, path = tmp_path / "lengths.csv", tmp_path / "result.json"
    rows = "".join(f"{40 + 61 * row % 150},1,1,1,1\n" for row in range(40))
    lengths.write_text(",".join(ALPACA_COLUMNS) + "\n" + rows)
    model = MODEL.replace("reasoning-3b", "1.5-mini")  # its states weigh little
    arguments = ["--trace", f"{lengths}[:20]*9+{lengths}[:9]", "--model", model, "--rate", "10"]
    arguments += ["--memory", "64MiB", "--max-model-len", "512", "--seeds", "1"]
    arguments += ["--no-prefix-caching"]
    growth = "avmp+admission=growth+victim=last"
    variants = f"avmp,{growth},{growth}+growth_tokens=0,adaptive,oracle"
    arguments += ["--variants", variants, "--baseline", growth, "--output", str(path)]
    assert main(["bench", "scheduler", *arguments]) == 0
    assert f"ratio to {growth}, 95% interval" in capsys.readouterr().out
    counts = json.loads(path.read_text())["counts"]
    del counts["left_out"]
    assert sorted(counts) == sorted(variants.split(","))
    tokens = {tuple(run["output_tokens"] for run in runs) for runs in counts.values()}
    assert len(tokens) == 1
    preemptions = {name: runs[0]["preemptions"] for name, runs in counts.items()}
    assert preemptions[f"{growth}+growth_tokens=0"] > preemptions["oracle"] == 0
    assert preemptions[f"{growth}+growth_tokens=0"] > preemptions["adaptive"]


def test_an_adaptive_constant_rises_with_preemptions_and_falls_with_answers():
    """From 64 tokens each, of pages of 16, to 128 and 256 and no further; and down to one page."""
    geometry = Geometry(1 << 20, 4096, 16_384, page_tokens=16)
    admission = AdaptiveAdmission(geometry, {"runs": []})
    preempted, ended = (SimpleNamespace(is_finished=lambda end=end: end) for end in (False, True))
    rooms = [admission.room(preempted)]
    for _ in range(3):
        admission.left(preempted)
        rooms.append(admission.room(preempted))
    assert rooms == [4, 8, 16, 16]
    admission.left(ended)
    assert admission.room(ended) == 16  # 252 tokens
    for _ in range(500):
        admission.left(ended)
    assert admission.room(ended) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "avmp+growth_tokens"], "growth_tokens is not OPTION=VALUE"),
        (["--variants", "avmp+growth=1"], "did you mean 'growth_tokens'"),
        (["--variants", "stock+growth_tokens=1"], "stock has none of AVMP's options"),
        (["--variants", "avmp", "--baseline", "stock"], "none of --variants avmp"),
        (["--trace", "lognormal*0"], r"lognormal\*0: is no load"),
        (["--trace", "lognormal[:0]"], "is no load"),
        (["--trace", "lognormal+missing.csv"], "missing.csv: cannot be read"),
    ],
)
def test_wrong_variants_and_loads(options, message, capsys):
    arguments = ["bench", "scheduler", "--model", MODEL, "--trace", "lognormal", *options]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_parts_of_a_load_follow_one_another(tmp_path):
    """Each in its own time, with its own requests and windows."""
    path = tmp_path / "alpaca.csv"
    path.write_text(",".join(ALPACA_COLUMNS) + "\n" + "7,1,1,1,1\n" * 50)
    names = f"lognormal[:30]+{path}[:20]*2+lognormal[:30]"
    drawn = read_load(names).draw(3, 100, 1.0, 5.0, 30.0)
    assert len(drawn) == 80
    assert [r.arrival for r in drawn] == sorted(r.arrival for r in drawn)
    assert {(r.prompt_tokens, r.output.tokens) for r in drawn[30:50]} == {(32, 7)}
    assert drawn[0].output.tokens != drawn[50].output.tokens
    assert len({r.output.key for r in drawn} | {r.prompt[0].key for r in drawn}) == 160
    alone = read_load(f"{path}").draw(1003, 20, 1.0, 5.0, 30.0)
    assert drawn[49].arrival - drawn[30].arrival == pytest.approx(alone[-1].arrival / 2)
    assert read_load(names).draw(3, 100, 1.0, 5.0, 30.0) == drawn
