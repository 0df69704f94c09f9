"""The clock of `avmp bench scheduler`, and that no answer's length reaches the scheduler."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.scheduler.step_times import (
    ALIASES,
    CARDS,
    DEFAULT,
    clock,
    of_card,
    of_file,
)
from avmp_vllm.cli import main
from avmp_vllm.models.shapes import ShapeError, read_shape
from avmp_vllm.planner.cards import CARDS as PLANNED

MODELS = Path(__file__).parents[2] / "configs" / "models"
SMALL = read_shape(str(MODELS / "jamba-reasoning-3b.json")).with_state_dtype("float32")
EXPERTS = read_shape(str(MODELS / "jamba-1.5-mini.json"))
NOTHING = dict.fromkeys(DEFAULT)


def test_a_3b_model_on_a_small_card() -> None:
    """Some 6 GB of weights at 360 GB/s; the figures that a roofline by hand gives."""
    times = of_card("rtx3060", SMALL).times
    assert times["step_ms"] == pytest.approx(17, rel=0.03)
    assert times["token_us"] == pytest.approx(240, rel=0.03)
    states = SMALL.state_bytes * SMALL.ssm_layers
    assert times["sequence_us"] == pytest.approx(2 * states / 360e3, rel=1e-3)


def test_experts_are_all_read_and_few_of_them_computed() -> None:
    whole, part = of_card("h100", EXPERTS, EXPERTS.parameters), of_card("h100", EXPERTS)
    assert part.times["step_ms"] == whole.times["step_ms"]
    assert part.times["token_us"] == pytest.approx(whole.times["token_us"] * 12 / 52, rel=1e-3)
    assert "12 billion FLOPs a token" in part.source


@pytest.mark.parametrize("card", [*CARDS, *ALIASES])
def test_every_card_states_its_terms(card: str) -> None:
    found = of_card(card, SMALL)
    known = CARDS[ALIASES.get(card, card)]
    assert f"{known.bandwidth / 1e9:g} GB/s" in found.source
    assert f"{known.rate / 1e12:g} TFLOP/s" in found.source
    assert set(found.times) == set(DEFAULT)
    assert all(value > 0 for value in found.times.values())


def test_cards_are_named_as_the_planner_names_them() -> None:
    assert set(CARDS) <= set(PLANNED)
    assert set(ALIASES.values()) <= set(CARDS)


def test_bad_cards_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="--card rtx9999: unknown; known: rtx3060"):
        of_card("rtx9999", SMALL)
    config = json.loads((MODELS / "jamba-reasoning-3b.json").read_text())
    del config["avmp"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeError, match="does not tell its number of parameters"):
        of_card("h100", read_shape(str(tmp_path)))


def test_what_overrides_what(tmp_path: Path) -> None:
    """The command line, then the file, then the card, then the default."""
    path = tmp_path / "measured.json"
    path.write_text('{"step_ms": 21, "token_us": 300.5}')
    assert clock(SMALL, None, None, NOTHING).times == DEFAULT
    card = of_card("rtx3060", SMALL).times
    assert clock(SMALL, "rtx3060", None, NOTHING).times == card
    found = clock(SMALL, "rtx3060", path, NOTHING | {"token_us": 7.0})
    assert found.times == {"step_ms": 21, "token_us": 7.0, "sequence_us": card["sequence_us"]}
    for words in ("rtx3060 by roofline", "from measured.json", "token_us as given"):
        assert words in found.source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"f\.json:1: is not JSON"),
        ("[1]", "must be an object with any of step_ms, token_us, sequence_us"),
        ("{}", "must be an object"),
        ('{"step": 1}', "must be an object"),
        ('{"step_ms": -1}', r"step_ms = -1 must be a number"),
        ('{"step_ms": true}', r"step_ms = True must be a number"),
        ('{"step_ms": NaN}', r"step_ms = nan must be a number"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        of_file(path)
    with pytest.raises(InputError, match="cannot be read"):
        of_file(tmp_path / "missing.json")


# -- in the benchmark ------------------------------------------------------------------------------


def run(tmp_path: Path, *options: str) -> dict:
    trace = tmp_path / "trace.csv"
    rows = "0,40,7\n0.01,300,40\n0.02,20,1\n"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    path = tmp_path / "result.json"
    arguments = ["--trace", str(trace), "--model", str(MODELS / "jamba-reasoning-3b.json")]
    arguments += ["--memory", "128MiB", "--seeds", "1", "--max-model-len", "512"]
    arguments += ["--variants", "avmp", *options, "--output", str(path)]
    assert main(["bench", "scheduler", *arguments]) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("option", [(), ("--async-scheduling",)])
def test_no_answers_length_reaches_the_scheduler(tmp_path, monkeypatch, option) -> None:
    """What the scheduler is given is the same whatever is answered, and answers end by a token."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from avmp_vllm.bench.scheduler import replay

    given = {}
    real = Scheduler.add_request

    def add_request(self, request):
        parameters = request.sampling_params
        given[request.request_id] = (request.max_tokens, parameters.max_tokens)
        assert parameters.stop_token_ids == [replay.STOP]
        assert parameters.min_tokens == 0
        assert replay.STOP not in request.prompt_token_ids
        return real(self, request)

    monkeypatch.setattr(Scheduler, "add_request", add_request)
    result = run(tmp_path, *option)
    assert given == {
        f"{index}": (512 - prompt, 512 - prompt) for index, prompt in enumerate((40, 300, 20))
    }
    (counts,) = result["counts"]["avmp"]
    assert counts["finished"] == 3
    assert counts["output_tokens"] == 7 + 40 + 1


def test_the_card_is_stated_and_kept(tmp_path, capsys) -> None:
    """In the output and in the file, from which a check takes the numbers."""
    result = run(tmp_path, "--card", "rtx3060", "--sequence-us", "0")
    assert "Clock: rtx3060 by roofline" in capsys.readouterr().out
    parameters = result["parameters"]
    assert parameters["step_ms"] == of_card("rtx3060", SMALL).times["step_ms"]
    assert parameters["sequence_us"] == 0
    # 44 steps at least, one after the other, of which each takes the time of the weights.
    (counts,) = result["counts"]["avmp"]
    assert counts["makespan"] >= 40 * parameters["step_ms"] / 1e3
    assert main(["bench", "scheduler", "--check", str(tmp_path / "result.json")]) == 0


def test_an_unknown_card_is_one_line(tmp_path, capsys) -> None:
    (tmp_path / "t.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,4,7\n")
    arguments = ["--trace", str(tmp_path / "t.csv"), "--card", "abacus"]
    arguments += ["--model", str(MODELS / "jamba-reasoning-3b.json")]
    assert main(["bench", "scheduler", *arguments]) == 2
    assert "--card abacus: unknown" in capsys.readouterr().err
