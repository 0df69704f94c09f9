"""``avmp bench engine``: two real engines on the CPU, and what is made of their answers."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from avmp_vllm.bench import pairs, results
from avmp_vllm.bench.engine import command, report
from avmp_vllm.bench.engine.process import EngineError, EngineProcess
from avmp_vllm.bench.engine.rounds import agreement, compared, measure, turns
from avmp_vllm.bench.engine.workloads import (
    AMPLE,
    DECODE,
    DROPPED,
    JOIN,
    JOIN_SLICES,
    JOINS,
    PREFILL,
    TIGHT,
    Workload,
    workloads,
)
from avmp_vllm.bench.statistics import Interval
from avmp_vllm.cli import main

_SIZES = """
    --rounds 1 --batches 1,5 --prompt 20 --steps 6 --slice-steps 3 --prefill 100
    --prefill-repeats 1 --join 40 --join-requests 3 --pressure-requests 10
    --pressure-prompt 150 --pressure-answer 20
    --ample-mib 8 --tight-mib 2 --variants stock,avmp
"""
SMALL = _SIZES.split()


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    """One round of everything on real engines."""
    path = tmp_path_factory.mktemp("engine") / "engine.json"
    assert main(["bench", "engine", *SMALL, "--output", str(path)]) == 0
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "engine-logs",
        "engine.json",
        "tiny-jamba-random",
    ]
    return results.read(path, command.BENCHMARK)


def test_answers_of_real_engines_are_equal_and_varied(result):
    """In every workload; and the random weights give answers of which a lost byte would show."""
    for name, requests in (
        ("decode 1", 1),
        ("decode 5", 5),
        ("prefill 100", 1),
        ("join 3", 3 + JOIN_SLICES * JOINS),
    ):
        (one,) = result["counts"][name]
        assert one["avmp"] == {"requests": requests, "equal": requests, "first_difference": None}
    (one,) = result["counts"]["decode 5"]
    assert one["stock"]["distinct_tokens"] > 15
    (one,) = result["counts"]["pressure 10"]
    assert one["avmp"]["equal"] == 10  # fp32: no rounding of other batches


def test_memory_binds_where_it_should(result):
    (one,) = result["timings"]["workloads"]["pressure 10"]["rounds"]
    assert one["stock"]["at_once"] < 10
    assert one["avmp"]["at_once"] >= one["stock"]["at_once"]
    assert one["avmp"]["migrations"] >= 0
    assert "migrations" not in one["stock"]


def test_engines_say_what_they_are(result):
    stock, avmp = (result["timings"]["engines"][AMPLE][name] for name in ("stock", "avmp"))
    assert (stock["runner"], avmp["runner"]) == ("CPUModelRunner", "AVMPCPUModelRunner")
    assert stock["eager"]
    assert stock["cudagraph_mode"] == avmp["cudagraph_mode"] == "NONE"
    assert min(avmp["block_tokens"]) == 32
    assert min(stock["block_tokens"]) > 32
    assert result["timings"]["engines_stay_up"].keys() == {AMPLE, TIGHT}


class Fake:
    """An engine that answers at once: so many seconds a step, these tokens."""

    def __init__(self, name, seconds=0.01, token=7, log=None):
        self.name, self.seconds, self.token, self.log = name, seconds, token, log
        self.work = None

    def order(self, do, **order):
        if self.log is not None:
            self.log.append((self.name, do))
        if do == "begin":
            self.work = Workload(**order["workload"])
            return {"seconds": self.seconds}
        if do == "steps":
            return {"seconds": [self.seconds] * order["count"], "cpu_s": 0.5 * order["count"]}
        if do == "joins":
            number = self.work.slice_steps
            return {
                "seconds": [self.seconds, 3 * self.seconds] * (number // 2),
                "steps": [2] * number,
            }
        tokens = [[self.token] * self.work.answer for _ in range(self.work.requests)]
        counters = {"preemptions": 2.0}
        return {
            "seconds": 4.0,
            "cpu_s": 1.0,
            "tokens": tokens,
            "at_once": 3,
            "counters": counters,
        }


DECODES = Workload("decode 2", DECODE, AMPLE, 2, 10, 8, slices=2, slice_steps=3)


def test_slices_take_turns():
    """All engines are prefilled, then step in turn, the first of a slice the last of the next."""
    log: list[tuple[str, str]] = []
    found = measure(DECODES, {"a": Fake("a", log=log), "b": Fake("b", 0.03, log=log)}, 1)
    assert [name for name, do in log if do == "steps"] == ["a", "b", "b", "a"]
    assert [do for _, do in log[:2]] == ["begin", "begin"]
    assert found["a"]["figures"] == {
        "step_mean_ms": pytest.approx(10),
        "step_p50_ms": pytest.approx(10),
        "step_p99_ms": pytest.approx(10),
        "cpu_ms": pytest.approx(500),
        "preemptions": 2,
    }
    assert found["b"]["figures"]["step_mean_ms"] == pytest.approx(30)
    assert turns("ab", 1) == ["a", "b"]
    assert turns("ab", 2) == ["b", "a"]


def test_prefills_and_pressure():
    """Time to the first token; tokens over the time from the first request to the last answer."""
    prefill = Workload("prefill 9", PREFILL, AMPLE, 1, 9, 1, slices=3)
    (found,) = measure(prefill, {"a": Fake("a", 0.02)}, 1).values()
    assert found["figures"] == {"ttft_ms": pytest.approx(20), "preemptions": 6}
    assert len(found["tokens"]) == 3
    pressure = Workload("pressure 2", "pressure", TIGHT, 2, 9, 5)
    (found,) = measure(pressure, {"a": Fake("a", 1.0)}, 1).values()
    assert found["figures"]["throughput"] == pytest.approx(2 * 5 / (1.0 + 4.0))
    assert found["figures"]["at_once"] == 3


def test_joins():
    """Between the others' start and end; those that go on apart from those that are new."""
    log: list[tuple[str, str]] = []
    join = Workload("join 2", JOIN, AMPLE, 2, 9, 50, slices=2, slice_steps=4, joiner=5)
    found = measure(join, {"a": Fake("a", 0.02, log=log)}, 1)["a"]["figures"]
    assert [do for _, do in log] == ["begin", "joins", "joins", "finish"]
    assert found["ttft_ms"] == pytest.approx(20)
    assert found["ttft_on_ms"] == pytest.approx(60)
    assert found["ttft_p50_ms"] == pytest.approx(40)
    assert found["steps"] == 2
    first, second, third, _ = join.joiners(1, 99)
    assert (len(first), len(second), len(third)) == (5, 10, 5)
    assert second[:5] == first
    assert third != first
    assert join.joiners(1, 99) != join.joiners(2, 99)


def test_on_a_card_a_prefix_cache_makes_tokens_no_error():
    """Each side cuts prompts at places of its own; on the CPU, in fp32, they must be equal."""
    parameters = vars(_arguments(*SMALL)) | {"batches": [5], "arena_mib": {AMPLE: 1}}
    parameters |= {"step_tokens": 64}
    for platform, caching, exact in (
        ("cpu", True, True),
        ("cuda", True, False),
        ("cuda", False, True),
    ):
        found = workloads(parameters | {"platform": platform, "prefix_caching": caching})
        assert {one.exact for one in found} == {exact}
    (*_, join) = found
    rounds = _rounds(join, 8, stock=0.1, resolved=0.1)
    assert report.differing(join, rounds) == ["resolved"]
    assert report.differing(replace(join, exact=False), rounds) == []


def test_prompts_depend_on_the_round_only():
    assert DECODES.prompts(1, 99) == DECODES.prompts(1, 99)
    assert DECODES.prompts(1, 99) != DECODES.prompts(2, 99)
    assert all(10 <= len(prompt) <= 74 for prompt in DECODES.prompts(1, 99))


def test_answers_outlast_the_counted_steps():
    """A decode ends behind its last slice, whatever its prefill took."""
    parameters = vars(_arguments(*SMALL)) | {"batches": [5], "arena_mib": {AMPLE: 1}}
    (decode, *_) = workloads(parameters | {"step_tokens": 64, "platform": "cpu"})
    assert decode.answer >= 2 + 5 * 84 // 64 + 2 * (DROPPED + 3)


def test_agreement_names_the_first_difference():
    same = [[1, 2, 3], [4, 5, 6]]
    assert agreement(same, same) == {"requests": 2, "equal": 2, "first_difference": None}
    other = [[1, 9, 3], [4, 5]]
    assert agreement(same, other) == {"requests": 2, "equal": 0, "first_difference": 1}


def _rounds(workload, token, count=5, **seconds):
    def one():
        engines = {name: Fake(name, value) for name, value in seconds.items()}
        engines["resolved"].token = token
        return compared(measure(workload, engines, 1), "stock")

    return [one() for _ in range(count)]


def test_a_variant_with_stock_s_kernels_must_give_stock_s_tokens():
    equal = _rounds(DECODES, 7, stock=0.1, resolved=0.1, handles=0.1)
    assert report.differing(DECODES, equal) == []
    differ = _rounds(DECODES, 8, stock=0.1, resolved=0.1, handles=0.1)
    assert report.differing(DECODES, differ) == ["resolved"]
    text = "\n".join(report.lines([DECODES], {"decode 2": differ}, {AMPLE: "head"}))
    assert "No control" in text
    assert "DIFFERENT TOKENS: resolved" in text
    assert "resolved 0 of 10 (first difference at token 0), handles 10 of 10" in text
    pressure = Workload("pressure 2", "pressure", TIGHT, 2, 9, 5)
    rounds = _rounds(pressure, 8, stock=0.1, resolved=0.1)
    assert report.differing(pressure, rounds) == []


def test_target_and_control():
    """Within 0.3%, and no verdict where two stock engines differ from one another."""
    good = _rounds(DECODES, 7, stock=0.1, resolved=0.1002)
    assert [row[3] for row in report.targets([DECODES], {"decode 2": good})] == ["reached"] * 2
    bad = _rounds(DECODES, 7, stock=0.1, resolved=0.1004)
    assert [row[3] for row in report.targets([DECODES], {"decode 2": bad})] == ["missed"] * 2
    noisy = _rounds(DECODES, 7, stock=0.1, resolved=0.1004, **{"stock again": 0.11})
    found = {row[0]: row[3] for row in report.targets([DECODES], {"decode 2": noisy})}
    assert "two stock engines differ" in found["decode 2, resolved"]
    assert found["decode 2, stock again"] == "control"


def test_comparison_leaves_out_what_nobody_measured():
    rows = (pairs.Row("x", "x", ".1f", True), pairs.Row("y", "y", ".1f", True))
    rounds = [{"a": {"figures": {"x": 2.0}}, "b": {"figures": {"x": 1.0}}}] * 2
    text = pairs.comparison(rounds, rows, ["a"], "b", {"a": "A", "b": "B"})
    assert "A / B" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["x"]
    assert pairs.judge(Interval(1, 0.9, 1.1), 1.0, True) == "open"


def _arguments(*words):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "stock,other"], "--variants other: unknown; known: stock, avmp"),
        (["--variants", "avmp"], "name stock and others"),
        (["--variants", "stock,handles"], "need a GPU"),
        (["--batches", "1,x"], "--batches 1,x"),
        (["--check", "none.json"], "none.json: cannot be read"),
    ],
)
def test_bad_options_are_one_error(words, message, capsys):
    assert command.run(_arguments(*words)) == 2
    assert message in capsys.readouterr().err


def test_default_variants_have_a_control():
    assert command._variants(None, False) == ["stock", "avmp", "stock again"]
    assert command._variants(None, True) == ["stock", "resolved", "handles", "stock again"]


def _job(folder: Path, journal, keep, monkeypatch, log, fail=None):
    """A job over fakes, one of which may be interrupted at its last order."""
    parameters = command._parameters(
        _arguments(*SMALL, "--rounds", "3", "--regime", AMPLE, "--batches", "2"), False
    )

    @contextlib.contextmanager
    def engine(variant, regime):
        log.append(f"start {variant}")
        fake = Fake(variant)
        order = fake.order

        def counted(**words):
            if words["do"] == "begin" and words["seed"] == fail:
                raise KeyboardInterrupt
            return order(**words)

        fake.order = counted
        yield fake, {"used_bytes": 10, "free_bytes": 12}
        log.append(f"stop {variant}")

    job = command.Job(parameters, keep, folder, journal)
    monkeypatch.setattr(job, "_engine", engine)
    return parameters, job


@pytest.mark.parametrize("keep", [True, False, None])
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, keep):
    """Behind its finished rounds, with engines that stay up and with ones that do not."""
    path, log = tmp_path / "engine.json", []
    journal = results.Journal(path, {})
    _, job = _job(tmp_path, journal, keep, monkeypatch, log, fail=3)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    journal.close()
    journal = results.Journal(path, {})
    assert {"ample/1", "ample/2"} <= journal.done.keys()
    assert "ample/3" not in journal.done
    log.clear()
    _, job = _job(tmp_path, journal, keep, monkeypatch, log)
    job.run()
    # 12 free bytes hold one engine of 10 besides the first, used to 90%: 10.8.
    assert log.count("start avmp") == 1
    assert job.kept() == {AMPLE: keep is not False}
    assert len(job.rounds()["decode 2"]) == 3
    text = json.dumps(command.result_of(job))
    assert '"step_mean_ms"' in text


def test_engines_that_do_not_fit_take_turns(tmp_path, monkeypatch):
    """One at a time: each is stopped before the next starts."""
    log: list[str] = []
    journal = results.Journal(tmp_path / "engine.json", {})
    _, job = _job(tmp_path, journal, None, monkeypatch, log)
    monkeypatch.setattr(command, "USABLE", 0.5)
    job.run()
    assert job.kept() == {AMPLE: False}
    assert log[:6] == ["start stock", "stop stock"] * 2 + ["start avmp", "stop avmp"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('out of memory')", r"ended with status 1\n.*\n.*out of memory"),
        ('input(); print(\'{"error": "KeyError: 5"}\')', "KeyError: 5"),
    ],
)
def test_an_engine_that_fails_says_why(tmp_path, program, message):
    """The error is the engine's own, with its log; nothing is left running."""
    with EngineProcess(tmp_path / "log") as idle:
        idle.stop()
        idle.command = [sys.executable, "-c", program]
        idle.start()
        pid = idle.pid
        with pytest.raises(EngineError, match=message):
            idle.order(do="steps")
    assert not Path(f"/proc/{pid}").exists()
