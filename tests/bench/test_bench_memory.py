"""`avmp bench memory`: the load, each rule against what it must back, calls, the command."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch

from avmp_vllm import cli
from avmp_vllm.backing.memory import BackingError
from avmp_vllm.backing.posix import AnonymousMemory
from avmp_vllm.bench.memory import calls, contiguous
from avmp_vllm.bench.memory.backed import replay, sizes_of
from avmp_vllm.bench.memory.command import report_backed, report_calls
from avmp_vllm.bench.memory.rules import ExpandablePool, KvcachedPool, Live, TwoPools
from avmp_vllm.bench.memory.traffic import BUSY, EBB, END, QUIET, Load, Step, steps
from avmp_vllm.bench.scheduler.traces import Segment, TraceRequest
from avmp_vllm.models.shapes import read_shape
from avmp_vllm.plots.command import draw

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
LOAD = Load(busy=12, quiet=2, quiet_share=0.25, step=0.01, token=0.0, sequence=0.001)
MIB = 1 << 20


def drawn(count: int, seed: int = 0) -> list[TraceRequest]:
    """Requests of mixed lengths."""
    rng = random.Random(seed)
    found = []
    for n in range(count):
        prompt, answer = (
            Segment(f"p{n}", rng.randint(1, 900)),
            Segment(f"o{n}", rng.randint(1, 120)),
        )
        found.append(TraceRequest(float(n), (prompt,), answer))
    return found


def test_as_many_run_as_the_load_says() -> None:
    requests = drawn(80)
    run = list(steps(requests, LOAD))
    parts = [step.part for step in run]
    assert parts == sorted(parts, key=[BUSY, EBB, QUIET, END].index)
    assert {step.running for step in run if step.part == BUSY} == {12}
    assert {step.running for step in run if step.part == QUIET} == {2}
    assert [len(step.taken) > 0 for step in run if step.part == EBB].count(True) < len(run)
    held: dict[int, list[int]] = {}
    for step in run:
        for request, pages, blocks in step.taken:
            mine = held.setdefault(request, [0, 0])
            mine[0] += pages
            mine[1] += blocks
        for request in step.dropped:
            pages, blocks = held.pop(request)
            assert pages == -(-requests[request].tokens // 16)
            assert blocks == 1
    assert not held
    assert run[-1].idle
    ends = [step.begin + step.lasts for step in run]
    assert [step.begin for step in run[1:]] == ends[:-1]


def test_kvcached_fills_what_came_back_last_and_frees_what_is_empty() -> None:
    """Chunks of four: the one that was opened or came back last is filled first."""
    pool = KvcachedPool(1, 4)
    first = pool.take(6)
    assert first == [0, 0, 0, 0, 1, 1]
    pool.give(first[:1])  # chunk 0 comes back after chunk 1
    assert pool.take(2) == [0, 1]
    assert pool.held == 2
    pool.give([0, 0, 0])
    assert pool.held == 2, "one unit of chunk 0 is left, and pins it"
    pool.give([0])
    assert pool.held == 1
    # A unit larger than a chunk has chunks of its own.
    assert KvcachedPool(9, 4).chunk == 12
    assert KvcachedPool(9, 4).units == 1


@pytest.mark.parametrize(("unit", "chunk"), [(1, 4), (3, 4), (4, 4), (9, 4), (5, 16)])
@pytest.mark.parametrize("kind", [KvcachedPool, ExpandablePool])
def test_a_pool_backs_what_is_held_and_no_empty_chunk(kind: type, unit: int, chunk: int) -> None:
    pool, rng, held = kind(unit, chunk), random.Random(unit), []
    for _ in range(2_000):
        if held and rng.random() < 0.5:
            rng.shuffle(held)
            count = rng.randint(1, len(held))
            pool.give(held[:count])
            del held[:count]
        else:
            held += pool.take(rng.randint(1, 9))
        if kind is ExpandablePool:
            assert len(set(held)) == len(held)
            touched = {
                byte // chunk for place in held for byte in range(place * unit, place * unit + unit)
            }
            assert pool.bytes == len(touched) * chunk
        else:
            assert pool.held == len(set(held))
            assert all(held.count(place) <= pool.units for place in set(held))
        bytes_backed = pool.bytes if kind is ExpandablePool else pool.held * pool.chunk
        assert bytes_backed >= len(held) * unit
    pool.give(held)
    assert pool.held == 0


def test_expandable_takes_the_lowest_place() -> None:
    pool = ExpandablePool(1, 4)
    assert pool.take(6) == [0, 1, 2, 3, 4, 5]
    pool.give([1, 4])
    assert pool.take(3) == [1, 4, 6]


def test_live_is_the_sum() -> None:
    live = Live(10, 100)
    assert live.step(Step(0, BUSY, taken=[(0, 3, 1), (1, 1, 1)])) == 240
    assert live.step(Step(1, BUSY, taken=[(0, 1, 0)], dropped=[1])) == 140


def replayed(**changes: object) -> dict:
    """A run of the small load on pages of 4 KiB and states of 100 KiB."""
    given = {"chunk": 1 << 16, "every": 1, "hold": 1.0} | changes
    return replay(4096, 102_400, drawn(160), LOAD, **given)  # type: ignore[arg-type]


def test_no_rule_backs_less_than_is_held_and_avmp_the_least_after_a_burst() -> None:
    seen: list[int] = []
    cell = replay(4096, 102_400, drawn(160), LOAD, 1 << 16, 1, 1.0, seen.append)
    assert sum(seen) == 160
    for part in (BUSY, EBB, QUIET):
        mean = cell["mean"][part]
        assert all(mean[rule] >= mean["live"] > 0 for rule in mean)
        assert mean["avmp-held"] >= mean["avmp"]
        assert mean["avmp"] <= mean["live"] + cell["null_bytes"] + 2 * (1 << 16)
    ebb = cell["mean"][EBB]
    assert ebb["avmp"] < ebb["expandable"]
    assert ebb["avmp"] < ebb["kvcached"]
    assert cell["at_the_end"]["live"] == 0
    assert cell["at_the_end"]["expandable"] == cell["at_the_end"]["kvcached"] == 0
    assert cell["at_the_end"]["avmp"] < cell["null_bytes"] + (1 << 16)
    assert cell["relocated_bytes"] > 0


def test_the_same_run_gives_the_same_counts() -> None:
    assert replayed() == replayed()


def test_control_without_trim_nothing_comes_back() -> None:
    """What makes the bands follow is the trim."""
    trimmed, left = replayed(), replayed(every=10**9)
    assert left["mean"][QUIET]["avmp"] > 2 * trimmed["mean"][QUIET]["avmp"]


def test_memory_that_is_held_longer_is_called_for_less() -> None:
    short, long = replayed(hold=0.0), replayed(hold=100.0)
    assert sum(short["calls"].values()) > 3 * sum(long["calls"].values())
    assert long["steps_without_a_call"] > short["steps_without_a_call"]
    assert long["mean"][QUIET]["avmp-held"] > short["mean"][QUIET]["avmp-held"]


def test_both_pools_are_counted() -> None:
    pools = TwoPools(KvcachedPool, 1, 3, 4)
    assert pools.step(Step(0, BUSY, taken=[(7, 5, 1)])) == 8 + 4
    assert pools.step(Step(1, BUSY, dropped=[7])) == 0


def test_every_shipped_shape_has_sizes() -> None:
    for path in MODELS.glob("*.json"):
        page, block = sizes_of(read_shape(str(path)), "auto")
        assert 0 < page < block
        assert block % 128 == 0


def test_calls_are_timed_on_every_driver_at_hand() -> None:
    names = dict(calls.drivers())
    assert names["anonymous"] is not None
    assert names["memfd"] is not None
    for make in filter(None, names.values()):
        found = calls.run_costs(make, 2 * MIB, 2, rounds=2)
        assert set(found) == set(calls.KINDS)
        assert all(seconds > 0 for seconds in found.values())
    moved = calls.give_and_take(AnonymousMemory, 8 * MIB, 2 * MIB, rounds=1)
    assert moved["take"] > 0
    assert moved["give back"] > 0


def test_a_system_too_small_is_said() -> None:
    with pytest.raises(BackingError, match=r"the system has no"):
        calls.give_and_take(lambda: AnonymousMemory(limit=4 * MIB), 8 * MIB, 2 * MIB, rounds=1)


def test_times_on_cuda_are_held_against_the_target() -> None:
    def said(seconds: float) -> str:
        times = {"give back": seconds, "take": 0.15}
        costs = {"runs": {}, "give_and_take": {"bytes": 10 << 30, str(2 * MIB): times}}
        return report_calls({"cuda": costs})[-1]

    assert "given back in 90.0 ms, taken in 150.0 ms (target 100 and 200 ms: met)" in said(0.09)
    assert "MISSED" in said(0.11)


def test_what_cannot_be_measured_here_says_so() -> None:
    said = "\n\n".join(report_calls({"cuda": None}))
    assert said == "cuda: no such driver here; not measured yet"


def test_contiguous_and_paged_views_hold_the_same_bytes() -> None:
    """A layer's every element once in each view; page j of a slot is where its tokens are."""
    slots, tokens, layers = 2, 4 * contiguous.PAGE_TOKENS, 3
    elements = slots * tokens * layers * contiguous.KV_HEADS * 2 * contiguous.HEAD_SIZE
    arena = torch.arange(elements, dtype=torch.float64)
    seen: dict[str, list[torch.Tensor]] = {"paged": [], "contiguous": []}
    for layer in range(layers):
        found = contiguous.views(arena, slots, tokens, layers, layer)
        for name, views in found._asdict().items():
            seen[name] += [view.flatten() for view in views]
        for cache in found.contiguous:
            assert cache.shape == (slots, tokens, contiguous.KV_HEADS, contiguous.HEAD_SIZE)
            pages = contiguous.trivial_pages(cache)
            assert pages.data_ptr() == cache.data_ptr()
            assert torch.equal(pages.reshape(cache.shape), cache)
    for parts in seen.values():
        assert torch.equal(torch.cat(parts).sort().values, arena)


def test_attention_over_contiguous_memory_is_reported() -> None:
    row = {"batch": "decode", "layers": 4, "flash, pages": 2e-6, "flash, contiguous": 1e-6}
    said = contiguous.report({"rows": [row, {"batch": "b", "layers": 8, "error": "no room"}]})
    assert re.search(r"decode +4 +2\.0 +0\.500 +- +-", said)
    assert "no room" in said
    if not torch.cuda.is_available():
        assert "no CUDA device" in contiguous.report(contiguous.measure(1))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace file of 60 requests."""
    path = tmp_path / "trace.csv"
    rows = [f"{r.arrival},{r.prompt_tokens},{r.output.tokens}" for r in drawn(60)]
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "\n".join(rows) + "\n")
    return path


def test_the_command_writes_what_it_can_check_and_draw(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "memory.json"
    words = ["bench", "memory", "--traces", str(trace), "--no-calls", "--busy", "8", "--quiet", "2"]
    model = str(MODELS / "jamba-reasoning-3b.json")
    assert cli.main([*words, "--models", model, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "trace.csv: backed / live" in said
    assert "jamba-reasoning-3b" in said
    assert cli.main(["bench", "memory", "--check", str(output)]) == 0
    assert "0 difference(s)" in capsys.readouterr().out
    result = json.loads(output.read_text())
    result["counts"]["trace.csv"]["jamba-reasoning-3b"]["peak"]["avmp"] += 1
    output.write_text(json.dumps(result))
    assert cli.main(["bench", "memory", "--check", str(output)]) == 1
    assert "DIFFERS /trace.csv/jamba-reasoning-3b/peak/avmp" in capsys.readouterr().out
    assert list(draw(output)) == ["memory"]
    assert "MISSED" in "\n".join(report_backed(missed(result["counts"])))


def missed(counts: dict) -> dict:
    """The same with more backed in the quiet part than the target allows."""
    for models in counts.values():
        for cell in models.values():
            cell["mean"][QUIET]["avmp"] = 2 * cell["mean"][QUIET]["live"] + 1
    return counts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--busy", "0"], "--busy 0: must be more than 0"),
        (["--hold", "-1"], "--hold -1.0: must not be below 0"),
        (["--requests", "1"], "--requests 1: must be at least 2"),
        (["--quiet-share", "1"], "--quiet-share 1.0: must be between 0 and 1"),
        (["--max-model-len", "1"], "holds no two requests of at most --max-model-len tokens"),
        (["--models", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_options_are_one_line(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    model = ["--models", str(MODELS / "jamba-reasoning-3b.json")]
    given = ["bench", "memory", "--traces", str(trace), "--no-calls"]
    output = ["--output", str(tmp_path / "memory.json")]
    assert cli.main([*given, *model, *output, *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
