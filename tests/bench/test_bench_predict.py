"""`avmp bench predict`: loads, judging by hand, reservations, the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.predict import answers, report
from avmp_vllm.bench.predict.answers import Answer, Load, load
from avmp_vllm.bench.predict.command import run_trace
from avmp_vllm.bench.predict.judge import Judge, cuts, spearman
from avmp_vllm.bench.predict.models import LONG, MIXED, MODELS, SHORT, Model
from avmp_vllm.bench.predict.published import PUBLISHED
from avmp_vllm.bench.predict.reservations import (
    RULES,
    Constant,
    Ledger,
    Majority,
    Mean,
    paged,
    s3_bucket,
    s3_end,
)
from avmp_vllm.bench.scheduler import loads
from avmp_vllm.cli import main
from avmp_vllm.predict.bins import LengthBins

BINS = LengthBins(2048, 4)


# -- loads -----------------------------------------------------------------------------------------


def test_events_come_in_order_and_each_answer_ends() -> None:
    found = Load((Answer(0.0, 5, 100), Answer(1.0, 5, 3), Answer(2.5, 5, 40)), (0,))
    events = list(found.events(0.02))
    assert [(e.kind, e.index, e.tokens) for e in events] == [
        ("arrive", 0, 0),
        ("progress", 0, 16),
        ("progress", 0, 32),
        ("arrive", 1, 0),
        ("finish", 1, 3),
        ("progress", 0, 64),
        ("finish", 0, 100),
        ("arrive", 2, 0),
        ("progress", 2, 16),
        ("progress", 2, 32),
        ("finish", 2, 40),
    ]
    at_once = [(e.kind, e.index) for e in found.events(0.0)]
    assert at_once[:4] == [("arrive", 0), ("progress", 0), ("progress", 0), ("progress", 0)]
    assert at_once.index(("finish", 0)) < at_once.index(("arrive", 1))


def test_a_drift_joins_its_parts() -> None:
    found = load("lognormal[:30]+lognormal[:20]", 0)
    assert found.starts == (0, 30)
    assert len(found.answers) == 50
    times = [answer.time for answer in found.answers]
    assert times == sorted(times)
    assert times[0] == 0
    assert [a.tokens for a in found.answers[:20]] != [a.tokens for a in found.answers[30:]]
    assert load("lognormal[:30]+lognormal[:20]", 0) == found
    assert load("lognormal[:30]", 1) != load("lognormal[:30]", 0)


def test_the_drawn_trace_is_as_stated() -> None:
    lengths = np.array([answer.tokens for answer in load("lognormal", 0).answers])
    assert len(lengths) == answers.LOGNORMAL_REQUESTS
    assert np.median(lengths) == pytest.approx(loads.ANSWER_MEDIAN, rel=0.05)
    assert np.log(lengths).std() == pytest.approx(loads.ANSWER_SPREAD, rel=0.05)
    assert lengths.max() <= loads.ANSWER_CAP


def test_conversations_are_known_by_their_prefix(tmp_path: Path) -> None:
    turns = [("human", "a" * 400), ("gpt", "b" * 800), ("human", "c" * 200), ("gpt", "d" * 40)]
    rows = [{"id": "x", "conversations": [{"from": f, "value": v} for f, v in turns]}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(rows))
    first, second = load(str(path), 0).answers
    assert (first.prompt, first.tokens, second.prompt, second.tokens) == (100, 200, 350, 10)
    assert first.hashes == second.hashes[: len(first.hashes)]
    assert first.hashes[-1] in second.prompt_hashes
    again = load(f"{path}+{path}", 0).answers
    assert not set(again[0].hashes) & set(again[2].hashes)  # parts share nothing


def test_alpacas_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("len_reference,len_t0.7,len_t0.0\n1,20,3\n4,50,6\n")
    assert [a.tokens for a in load(str(path), 0).answers] == [20, 50]
    assert [a.tokens for a in load(f"{path}@len_reference", 0).answers] == [1, 4]
    path.write_text("len_reference,len_t0.7\n1,0\n")
    with pytest.raises(InputError, match=r"a\.csv:2: len_t0\.7 = '0'"):
        load(str(path), 0)


@pytest.mark.parametrize("name", ["missing.csv", "missing.json", "t.txt"])
def test_bad_traces_are_named(name: str) -> None:
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        load(f"lognormal[:5]+{name}", 0)


# -- judging ---------------------------------------------------------------------------------------


def test_a_forecast_judged_by_hand() -> None:
    """A curve that falls in a straight line to 2,048, four answers."""
    lengths = [100, 200, 1024, 2048]
    found = Load(tuple(Answer(float(i), 1, n) for i, n in enumerate(lengths)), (0,))
    edges = np.array([0, 256, 1024, 2048])
    judge = Judge(BINS, edges)
    curve = 1 - BINS.edges / 2048
    for length in lengths:
        judge.note(curve, length)
    summary = judge.summary(found)
    expected = -(2 * math.log(1 / 8) + math.log(3 / 8) + math.log(1 / 2)) / 4
    assert summary["log_loss"] == pytest.approx(expected, abs=1e-6)
    assert summary["p50"] == 0.75
    assert summary["p90"] == 0.75
    assert summary["error"] == (924 + 824 + 0 + 1024) / 4
    # With 128 generated the first has ended; the median of what is left is 1,088.
    assert summary["remaining_error"][1] == pytest.approx((888 + 64 + 960) / 3, abs=1e-6)
    assert summary["spearman"] == 0


@given(st.lists(st.integers(1, 2000), min_size=5, max_size=60))
def test_cuts_leave_a_fifth_each_or_less(lengths: list[int]) -> None:
    found = cuts(np.array(lengths))
    assert found.tolist() == sorted(set(found.tolist()))
    for share, cut in zip((0.2, 0.4, 0.6, 0.8), cuts(np.arange(1, 1001)), strict=True):
        assert cut == pytest.approx(1000 * share, abs=1)


def test_rank_correlation() -> None:
    one = np.array([1.0, 2.0, 2.0, 5.0])
    assert spearman(one, one**3) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, np.ones(4)) == 0
    # By the formula with mean ranks: 1, 2.5, 2.5, 4 against 4, 1, 2, 3.
    assert spearman(one, np.array([9.0, 1.0, 2.0, 3.0])) == pytest.approx(-0.3162, abs=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_no_model_looks_at_the_answer(name: str) -> None:
    """Two requests that differ in the answer alone are forecast alike."""
    answers_of = [(7, 3), (900, 40), (55, 700)]

    def ask(model: Model, tokens: int) -> bytes:
        for index, (prompt, length) in enumerate(answers_of):
            answer = Answer(0.0, prompt, length)
            model.arrive(index, answer)
            model.finish(index, answer)
        return model.arrive(9, Answer(1.0, 60, tokens)).tobytes()

    assert ask(MODELS[name](2048), 5) == ask(MODELS[name](2048), 2000)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_learns(name: str) -> None:
    model = MODELS[name](2048)
    for index in range(300):
        answer = Answer(0.0, 50, 100 + index % 20)
        model.arrive(index, answer)
        model.progress(index, 64)
        model.finish(index, answer)
    curve = model.arrive(999, Answer(0.0, 50, 1))
    assert curve[0] == 1
    assert curve[-1] == 0
    assert (np.diff(curve) <= 1e-12).all()
    assert 90 <= BINS.quantile(curve, 0.5) <= 125


# -- reservations ----------------------------------------------------------------------------------


def test_a_ledger_by_hand() -> None:
    """Two fit, one outgrows its bucket and moves to the pool, one has none."""
    ledger = Ledger()
    for reserved, tokens in ((100, 100), (100, 50), (100, 101), (0, 65)):
        ledger.note(reserved, tokens)
    assert ledger.summary() == {
        "fit": round(2 / 3, 6),
        "fill": round(316 / (100 + 100 + (100 + 128) + 128), 6),
        "in_buckets": 0.75,
        "right_of_ten": 0.75,
    }
    assert paged([1, 16, 17])["fill"] == round(34 / 64, 6)


@given(st.integers(1, 5000))
def test_s3s_buckets(tokens: int) -> None:
    bucket = s3_bucket(tokens)
    assert 0 <= bucket <= 9
    assert tokens <= s3_end(bucket) or tokens > 2048
    assert bucket == 0 or tokens > s3_end(bucket - 1)
    assert s3_bucket(s3_end(bucket)) == bucket


def test_rules_without_a_forecast() -> None:
    nothing = None
    mean, majority = Mean(), Majority()
    assert Constant(7).reserve(nothing, nothing) == 7
    assert mean.reserve(nothing, nothing) == 0
    for tokens in (10, 15, 700, 710, 720):
        mean.finish(tokens)
        majority.finish(tokens)
    assert mean.reserve(nothing, nothing) == 431
    assert majority.reserve(nothing, nothing) == s3_end(3)


@pytest.fixture(scope="module")
def found() -> tuple[Load, dict]:
    """Prompts that tell the answer, and as many that tell nothing."""
    rng = np.random.default_rng(0)
    made, clock = [], 0.0
    for _ in range(1500):
        clock += float(rng.exponential(0.5))
        if rng.random() < 0.5:
            made.append(Answer(clock, 100, int(rng.integers(40, 60))))
        else:
            made.append(Answer(clock, 1000, int(rng.integers(500, 700))))
    one = Load(tuple(made), (0, 750))
    return one, run_trace(one, 2048, 0.03)


def test_a_trace_that_prompts_explain(found) -> None:
    _, result = found
    models = result["models"]
    assert result["requests"] == 1500
    assert models[MIXED]["log_loss"] < min(models[n]["log_loss"] for n in (SHORT, LONG)) - 0.4
    assert models[MIXED]["error"] < 60 < models[SHORT]["error"]
    assert models[MIXED]["p90"] > 0.88
    assert report.by_ladder(result["weights"])["prompt length"] > 0.9
    assert sum(result["weights"]) == pytest.approx(1, abs=1e-3)
    assert len(models[MIXED]["parts"]) == 2


def test_fit_says_nothing_without_fill(found) -> None:
    """The longest bucket fits everything and is mostly empty; a forecast fills its buckets."""
    _, result = found
    rules = result["reservations"]
    assert set(rules) == {*RULES, "pages of 16"}
    assert rules["constant 2048"]["fit"] == 1
    assert rules["constant 2048"]["fill"] < 0.2
    by_forecast = rules["eight adaptive, P90"]
    assert by_forecast["fit"] > 0.85
    assert by_forecast["fill"] > 0.7
    assert by_forecast["fill"] > rules["eight adaptive, global P90"]["fill"] + 0.1
    assert (
        rules["S3's ten, likeliest"]["right_of_ten"] > rules["S3's ten, majority"]["right_of_ten"]
    )


def test_goals_are_judged(found) -> None:
    _, result = found
    lines = report.goals(result)
    assert len(lines) == 4
    assert "reached" in lines[0]
    worse = json.loads(json.dumps(result))
    worse["models"][MIXED]["log_loss"] = worse["models"][SHORT]["log_loss"] + 0.01
    worse["models"][MIXED]["p90"] = 0.7
    worse["models"][MIXED]["parts"][1] |= {"p90": 0.7, "p90_after": 0.7}
    assert [("MISSED" in line) for line in report.goals(worse)] == [True] * 4


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("predict") / "result.json"
    traces = ["lognormal[:250]", "lognormal[:150]+lognormal[:100]"]
    assert main(["bench", "predict", "--trace", *traces, "--output", str(path)]) == 0
    return path


def test_the_command_writes_and_checks(result, capsys) -> None:
    written = json.loads(result.read_text())
    assert set(written["counts"]) == {"lognormal[:250]", "lognormal[:150]+lognormal[:100]"}
    assert main(["bench", "predict", "--check", str(result)]) == 0
    out = capsys.readouterr().out
    assert "0 difference(s)" in out
    for figure in PUBLISHED:
        assert f"{figure.source}: {figure.what}" in out
    assert [path.name for path in result.parent.iterdir()] == ["result.json"]


def test_check_notices_a_difference(result, tmp_path, capsys) -> None:
    changed = json.loads(result.read_text())
    changed["counts"]["lognormal[:250]"]["models"][MIXED]["log_loss"] += 1e-6
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed))
    assert main(["bench", "predict", "--check", str(path)]) == 1
    assert "log_loss" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--trace is needed"),
        (["--trace", "lognormal", "--longest", "100"], "--longest 100"),
        (["--trace", "lognormal", "--longest", "0"], "--longest 0"),
        (["--trace", "lognormal", "--token-ms", "-1"], "--token-ms -1"),
        (["--trace", "missing.csv"], "missing.csv: cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "predict", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_tables_fit_a_terminal(result, capsys) -> None:
    assert main(["bench", "predict", "--check", str(result)]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    # The last line names the file, wherever the tests keep theirs.
    assert max(len(line) for line in out.splitlines() if str(result) not in line) <= 100
