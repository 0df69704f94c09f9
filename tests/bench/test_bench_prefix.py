"""`avmp bench prefix`: keys, each rival's rules on prompts made by hand, the bound, the command.

The last test is what makes the others worth anything: stock's rules against vLLM's own scheduler.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from avmp_vllm import cli
from avmp_vllm.bench.prefix import trace as traces
from avmp_vllm.bench.prefix.avmp import Avmp, AvmpInside
from avmp_vllm.bench.prefix.cache import Served, Sizes
from avmp_vllm.bench.prefix.command import run_cache
from avmp_vllm.bench.prefix.drift import joined, part_of
from avmp_vllm.bench.prefix.lru import Lru, page_key
from avmp_vllm.bench.prefix.offline import bound, options_of, schedule
from avmp_vllm.bench.prefix.overlap import StepTimes, overlapped
from avmp_vllm.bench.prefix.radix_rules import Marconi, MarconiLru, Sglang, SglangStatic, _Weighted
from avmp_vllm.bench.prefix.registry import CACHES
from avmp_vllm.bench.prefix.trace import PAGE, Request, Timing, held, requests_of
from avmp_vllm.bench.prefix.vllm_rules import (
    FirstAvmp,
    Stock,
    StockDense,
    StockInterval,
    StockUnit,
    StockUnitDense,
)
from avmp_vllm.bench.prefix.workloads import GENERATED
from avmp_vllm.bench.scheduler.traces import HASHED_TOKENS, Segment, TraceRequest
from avmp_vllm.models.shapes import read_shape

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
SHAPE = read_shape(str(MODELS / "jamba-reasoning-3b.json")).with_state_dtype("float32")
SIZES = Sizes.of(SHAPE)
BLOCK = SIZES.block_tokens
AMPLE = 8 << 30


def said(*segments: tuple[str, int], answer: int = 32, name: str = "") -> TraceRequest:
    """A request whose answer's name is made of the prompt's."""
    prompt = tuple(Segment(*segment) for segment in segments)
    return TraceRequest(0.0, prompt, Segment(name or "/".join(k for k, _ in segments), answer))


def after(request: TraceRequest, question: str, tokens: int, answer: int = 32) -> TraceRequest:
    """The next turn."""
    prompt = (*request.prompt, request.output, Segment(question, tokens))
    return TraceRequest(0.0, prompt, Segment(question + "!", answer))


def serve(cache: object, *requests: TraceRequest) -> list[Served]:
    """Serve requests in order; check the books after each."""
    found = []
    for request in requests_of([replace(r, arrival=float(i)) for i, r in enumerate(requests)]):
        found.append(cache.serve(request))  # type: ignore[attr-defined]
        cache.verify()  # type: ignore[attr-defined]
        assert found[-1].hit <= request.reusable * PAGE
        assert found[-1].hit % PAGE == 0
    return found


def hits(cache: object, *requests: TraceRequest) -> list[int]:
    """Hit tokens of each request."""
    return [served.hit for served in serve(cache, *requests)]


def drawn(name: str, count: int, minutes: float = 20, seed: int = 0) -> list[TraceRequest]:
    """Requests of a generated trace that the scheduler's limit allows."""
    found = GENERATED[name](seed, count, Timing(minutes=minutes))
    return [request for request in found if request.tokens <= 16384][:count]


# -- keys ------------------------------------------------------------------------------------------


def shared(one: Request, other: Request) -> int:
    """Pages that two requests share."""
    pairs = zip(one.keys, other.keys, strict=False)
    return next(
        (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (one.keys, other.keys)))
    )


def test_a_key_stands_for_all_tokens_before_it() -> None:
    first = said(("a", 40), ("b", 30), answer=50)
    one, two, three, four = requests_of(
        [
            replace(first, arrival=0.0),
            replace(after(first, "c", 20), arrival=1.0),
            replace(said(("a", 40), ("x", 30)), arrival=2.0),
            replace(said(("z", 8), ("a", 40)), arrival=3.0),
        ]
    )
    assert len(one.keys) == 120 // PAGE
    assert one.prompt_pages == 4
    assert shared(one, two) == 120 // PAGE
    assert shared(one, three) == 40 // PAGE
    assert shared(one, four) == 0
    assert len(set(two.keys)) == len(two.keys)


def test_the_last_token_of_a_prompt_is_computed() -> None:
    (request,) = requests_of([said(("a", 64))])
    assert (request.reusable, request.prompt_pages) == (3, 4)


def hashed(prompt: int, names: str, answer: int, number: int) -> TraceRequest:
    """A request of a trace that knows blocks by their hashes."""
    segments = tuple(
        Segment("h" + name, min(HASHED_TOKENS, prompt - i * HASHED_TOKENS))
        for i, name in enumerate(names)
    )
    return TraceRequest(float(number), segments, Segment(f"{number}o", answer))


def test_hashes_imply_the_answer_that_a_prompt_goes_on_from() -> None:
    rows = [
        hashed(1300, "sap", 200, 0),
        hashed(2000, "sabc", 100, 1),  # goes on from the first: 1,500 tokens are shared
        hashed(1400, "sad", 100, 2),  # too short to hold its answer
        hashed(2000, "sefg", 100, 3),  # shares one block, everybody's
        hashed(2048, "sabx", 100, 4),  # shares three blocks with the second
    ]
    one, two, three, four, five = traces.requests_of_blocks(rows)
    assert shared(one, two) == 1500 // PAGE
    assert shared(one, three) == 1024 // PAGE
    assert shared(one, four) == shared(four, five) == 512 // PAGE
    assert shared(two, five) == 1536 // PAGE
    for request in (one, two, three, four, five):
        assert len(request.keys) == request.tokens // PAGE


def test_held_conversations_keep_their_turns_order_and_are_copies() -> None:
    turn = said(("a", 40))
    talk = [turn, after(turn, "b", 20), after(after(turn, "b", 20), "c", 20)]
    timing = Timing(copies=3, minutes=600, pause=10)
    found = held([talk], timing, 7)
    assert found == held([talk], timing, 7)
    assert len(found) == 9
    requests = requests_of(found)
    keys = [request.keys[0] for request in requests]
    assert len(set(keys)) == 3
    for key in set(keys):
        lengths = [request.prompt for request in requests if request.keys[0] == key]
        assert lengths == sorted(lengths)
    assert held([talk], timing._replace(minutes=1e-9), 7)[2].prompt_tokens == 40


@pytest.mark.parametrize("name", GENERATED)
def test_generated_traces_are_stated_by_their_seed(name: str) -> None:
    found = drawn(name, 200)
    assert found == drawn(name, 200)
    assert found != drawn(name, 200, seed=1)
    assert len(found) > 100
    assert all(a.arrival <= b.arrival for a, b in pairwise(found))


def test_dropped_thoughts_are_in_no_later_prompt() -> None:
    for request in requests_of(drawn("thinking", 200)):
        assert len(request.keys) == request.tokens // PAGE
    served = serve(Sglang(AMPLE, SIZES), *drawn("thinking", 200))
    assert sum(s.hit for s in served) < sum(
        s.hit for s in serve(Sglang(AMPLE, SIZES), *drawn("chat", 200))
    )


# -- the list --------------------------------------------------------------------------------------


def test_the_list_gives_up_what_is_idle_longest() -> None:
    lru = Lru(100)
    one, two, three = (lru.add((page_key(n),), 40) for n in (1, 2, 3))
    assert three is None  # both others are held
    lru.release([two, one])  # type: ignore[list-item]
    lru.verify()
    assert lru.add((page_key(4),), 40) is not None
    assert lru.find(page_key(2)) is None
    assert lru.find(page_key(1)) == one
    assert lru.gone == [1, 0]
    lru.verify()


def test_the_list_keeps_two_entries_of_a_name() -> None:
    lru = Lru(100)
    one, two = lru.add((page_key(1),), 40), lru.add((page_key(1), page_key(5)), 40)
    lru.release([one])  # type: ignore[list-item]
    assert lru.find(page_key(1)) == one
    lru.make_room(50)
    assert lru.find(page_key(1)) == two == lru.find(page_key(5))
    lru.verify()


# -- vLLM ------------------------------------------------------------------------------------------


def test_sizes_are_those_of_stock_vllm() -> None:
    expected = Sizes(
        page=16 * 1024,
        state=26 * 358_400,
        block_tokens=704,
        block=2 * 704 * 512,
        kv_blocks=1,
        state_blocks=13,
    )
    assert expected == SIZES


def test_stock_keeps_the_state_at_the_last_block_and_at_no_answer() -> None:
    turn = said(("a", 1500), answer=800)
    one, two = serve(Stock(AMPLE, SIZES), turn, after(turn, "b", 100))
    assert (one.hit, one.cuts, one.states) == (0, 1, 1)
    # Pages of the answer are known to 2,112: a junction, and the last block as well.
    assert (two.hit, two.cuts, two.states) == (2 * BLOCK, 1, 1)


def test_dense_and_interval_keep_states_that_decoding_passes() -> None:
    turn = said(("a", 1500), answer=2000)
    following = after(turn, "b", 100)
    assert hits(StockDense(AMPLE, SIZES), turn, following) == [0, 3499 // BLOCK * BLOCK]
    assert hits(StockInterval(AMPLE, SIZES), turn, following) == [
        0,
        4 * BLOCK if 4 * BLOCK < 3500 else 0,
    ]
    assert hits(Stock(AMPLE, SIZES), turn, following) == [0, 2 * BLOCK]


def test_stock_makes_a_junctions_state_at_second_sight() -> None:
    rows = [said(("s", 1000), (f"q{i}", 2000)) for i in range(3)]
    one, two, three = serve(Stock(AMPLE, SIZES), *rows)
    assert (one.hit, two.hit, three.hit) == (0, 0, BLOCK)
    assert (one.states, two.states, three.states) == (1, 2, 1)
    assert (one.cuts, two.cuts, three.cuts) == (1, 2, 1)


@pytest.mark.parametrize("make", [StockUnit, StockUnitDense, FirstAvmp])
def test_small_units_hit_a_prompts_last_page(make: type[Stock]) -> None:
    turn = said(("a", 1500))
    assert hits(make(AMPLE, SIZES), turn, after(turn, "b", 100), turn) == [0, 1488, 1488]


def test_a_unit_of_16_costs_a_cut_for_each_state() -> None:
    one, two = serve(StockUnit(AMPLE, SIZES), said(("a", 1500)), said(("b", 100)))
    assert (one.cuts, one.states) == (2, 2)  # 1,408 and 1,488
    assert (two.cuts, two.states) == (1, 1)  # 96


def test_the_first_avmp_keeps_a_tail_only_where_it_spares_a_block() -> None:
    assert [s.states for s in serve(FirstAvmp(AMPLE, SIZES), said(("a", 700)))] == [0]
    assert [s.states for s in serve(FirstAvmp(AMPLE, SIZES), said(("a", 721)))] == [1]


def test_stock_evicts_states_before_the_pages_of_the_same_request() -> None:
    # Room for one request: a state (13 blocks) and two of KV, and the null block.
    cache = Stock(16 * SIZES.block, SIZES)
    rows = [said(("a", 1500)), said(("b", 1500)), said(("b", 1500))]
    found = serve(cache, *rows)
    assert [s.hit for s in found] == [0, 0, 2 * BLOCK]
    assert found[1].evicted_states == 1


def test_a_cache_that_holds_nothing_serves() -> None:
    for rival in CACHES.values():
        found = serve(rival.make(1 << 20, SIZES), said(("a", 1500)), said(("a", 1500)))
        assert [s.hit for s in found] == [0, 0]


# -- radix trees -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Sglang, SglangStatic])
def test_sglang_keeps_prompts_and_answers_ends_and_cuts_nothing(make: type[Sglang]) -> None:
    turn = said(("a", 1000), answer=200)
    one, two, three = serve(make(AMPLE, SIZES), turn, after(turn, "b", 100), turn)
    assert (one.states, one.cuts) == (2, 0)
    assert two.hit == 1199 // PAGE * PAGE
    # The same prompt again must compute its last token, which the state is behind.
    assert three.hit == 0


def test_sglang_has_no_state_where_prompts_part() -> None:
    rows = [said(("s", 1000), (f"q{i}", 200)) for i in range(3)]
    assert hits(Sglang(AMPLE, SIZES), *rows) == [0, 0, 0]


def test_sglang_drops_pages_that_no_state_covers() -> None:
    cache = Sglang(2 * SIZES.state + 200 * SIZES.page, SIZES)
    serve(cache, said(("a", 1000), answer=200), said(("b", 1000), answer=200))
    assert cache.tree.states == 2
    assert all(node.state for node in cache.tree.nodes() if not node.children)


def test_the_static_split_is_the_state_pools_limit() -> None:
    cache = SglangStatic(10 * SIZES.state, SIZES)
    serve(cache, *(said((f"a{i}", 100)) for i in range(9)))
    assert cache.tree.states == 4


@pytest.mark.parametrize("make", [MarconiLru, Marconi])
def test_marconi_keeps_answers_ends_and_junctions(make: type[MarconiLru]) -> None:
    turn = said(("s", 1000), ("a", 200))
    found = serve(
        make(AMPLE, SIZES),
        turn,
        after(turn, "b", 100),
        said(("s", 1000), ("x", 200)),
        said(("s", 1000), ("y", 200)),
    )
    assert [s.hit for s in found] == [0, 1231 // PAGE * PAGE, 0, 1000 // PAGE * PAGE]
    assert [s.states for s in found] == [1, 1, 2, 1]
    assert [s.cuts for s in found] == [0, 0, 1, 0]


def test_marconis_eviction_without_a_weight_is_least_recent_use() -> None:
    rows = requests_of(drawn("chat", 400))
    for states in (5, 40):
        memory = states * SIZES.state
        found = run_cache(_Weighted(memory, SIZES, 0.0), rows, verify=True)
        assert found == run_cache(MarconiLru(memory, SIZES), rows, verify=True)


# -- all of them, and the future -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat", "agent"])
@pytest.mark.parametrize("memory", [100 << 20, 1 << 30])
def test_no_cache_hits_more_than_the_bound(name: str, memory: int) -> None:
    rows = requests_of(drawn(name, 300))
    options = options_of(rows)
    most, prices = bound(options, SIZES, memory, steps=100)
    possible = schedule(options, SIZES, memory, prices)
    assert 0 < possible <= most + 1e-6
    assert possible > 0.9 * most
    for rival in CACHES.values():
        cache = rival.make(memory, SIZES)
        found = run_cache(cache, rows, verify=True)
        assert found["hit"] <= most
        assert cache.bytes_used() <= memory
        assert found == run_cache(rival.make(memory, SIZES), rows)


def test_the_bound_of_ample_memory_is_all_that_repeats() -> None:
    rows = requests_of(drawn("agent", 300))
    seen: set[int] = set()
    repeated = 0
    for row in rows:
        keys = row.keys[: row.reusable]
        repeated += PAGE * next((i for i, key in enumerate(keys) if key not in seen), len(keys))
        seen.update(row.keys)
    options = options_of(rows)
    assert bound(options, SIZES, 1 << 50)[0] == pytest.approx(repeated)
    assert schedule(options, SIZES, 1 << 50, np.zeros(len(rows))) == repeated


def test_the_bound_of_two_that_do_not_fit_together() -> None:
    # a, b, a, b: memory for one state and its pages at a time, so one of the two hits.
    rows = [replace(said((name, 1008)), arrival=float(i)) for i, name in enumerate("abab")]
    options = options_of(requests_of(rows))
    memory = SIZES.state + 62 * SIZES.page
    most, prices = bound(options, SIZES, memory)
    assert schedule(options, SIZES, memory, prices) == 62 * PAGE
    assert most == pytest.approx(62 * PAGE, rel=0.01)


def test_nothing_repeats_nothing_is_hit() -> None:
    rows = requests_of([replace(said((f"a{i}", 900)), arrival=float(i)) for i in range(5)])
    options = options_of(rows)
    most, prices = bound(options, SIZES, AMPLE)
    assert (most, schedule(options, SIZES, AMPLE, prices)) == (0, 0)


# -- traffic that changes, and requests at the same time -------------------------------------------


def test_joined_traces_share_no_token_and_follow_one_another() -> None:
    part = requests_of(drawn("agent", 40))
    found, starts = joined([part, part])
    assert (len(found), starts) == (2 * len(part), [0, len(part)])
    assert all(a.time <= b.time for a, b in pairwise(found))
    first, second = (
        {k for r in half for k in r.keys} for half in (found[: len(part)], found[len(part) :])
    )
    assert not first & second
    hits = [run_cache(Avmp(AMPLE, SIZES), rows)["hit"] for rows in (part, found[: len(part)])]
    assert hits[0] == hits[1] > 0
    assert [part_of(place, [0, 600]) for place in (0, 499, 500, 600, 1099, 1100)] == [
        (0, False),
        (0, False),
        (0, True),
        (1, False),
        (1, False),
        (1, True),
    ]


def test_a_cache_that_unlearns_keeps_its_states() -> None:
    rows = requests_of(drawn("thinking", 300))
    cache = Avmp(64 * SIZES.state, SIZES)
    run_cache(cache, rows)
    used, kept = cache.bytes_used(), sorted(cache._nodes)
    learned = cache._keeper.rates
    cache.unlearn()
    assert (cache.bytes_used(), sorted(cache._nodes)) == (used, kept)
    fresh = cache._keeper.rates
    assert (fresh.now, fresh._families, cache._keeper.price) == (learned.now, {}, 0.0)
    assert run_cache(cache, rows[-100:], verify=True)["hit"] > 0


def test_a_learner_that_went_on_is_as_good_as_a_fresh_one_where_memory_is_ample() -> None:
    """Thoughts are dropped, then answers are gone on from: what was useless has become useful."""
    rows, starts = joined([requests_of(drawn(name, 900)) for name in ("thinking", "chat")])
    on, anew = (
        run_cache(Avmp(AMPLE, SIZES), rows, starts=starts, unlearn=unlearn)["parts"]
        for unlearn in (None, starts[1])
    )
    assert on[0] == anew[0]
    assert on[1][1] > 0.95 * anew[1][1] > 0


def test_requests_at_the_same_time_hit_what_is_done() -> None:
    turn = said(("a", 1500))
    (one, again) = requests_of([turn, replace(turn, arrival=0.1)])
    times = StepTimes(20.0, 8.0)
    end = times.seconds(one, 0)
    assert end == pytest.approx(0.03 + 32 * 0.008)
    for start, hit in ((0.1, 0), (end - 0.001, 0), (end, 1488)):
        cache = CACHES["stock-unit"].make(AMPLE, SIZES)
        rows = [one, replace(again, time=start)]
        assert dict(overlapped(cache, rows, times))[1].hit == hit


@pytest.mark.parametrize("name", CACHES)
def test_one_after_the_other_is_a_special_case_of_overlapping(name: str) -> None:
    rows = [replace(r, time=1e3 * i) for i, r in enumerate(requests_of(drawn("chat", 120)))]
    times, memory = StepTimes(20.0, 8.0), 64 * SIZES.state
    found = run_cache(CACHES[name].make(memory, SIZES), rows, True, times=times)
    assert found == run_cache(CACHES[name].make(memory, SIZES), rows)
    # What runs all at once finds nothing.
    at_once = [replace(row, time=0.0) for row in rows]
    assert run_cache(CACHES[name].make(memory, SIZES), at_once, times=times)["hit"] == 0


@pytest.mark.parametrize("name", CACHES)
def test_what_runs_holds_memory(name: str) -> None:
    cache = CACHES[name].make(64 * SIZES.state, SIZES)
    new = replace(said(("new", 3000)), arrival=1e6)
    *rows, last = requests_of([*drawn("chat", 120), new])
    run_cache(cache, rows)
    used = cache.bytes_used()
    assert used > 20 * SIZES.state
    cache.hold(10**9, 64)
    cache.serve(last)
    assert cache.bytes_used() < used / 2
    cache.hold(0, 0)
    assert run_cache(cache, rows, verify=True)["hit"] > 0


def test_a_last_state_that_costs_no_cut_is_made_more_often() -> None:
    rows = requests_of(drawn("thinking", 300))
    plain, inside = (run_cache(make(AMPLE, SIZES), rows) for make in (Avmp, AvmpInside))
    assert inside["cuts"] < plain["cuts"]
    assert inside["hit"] > plain["hit"]


# -- the command -----------------------------------------------------------------------------------


def bench(tmp_path: Path, *more: str) -> int:
    """Run the command on a small trace."""
    words = ["bench", "prefix", "--model", str(MODELS / "jamba-reasoning-3b.json")]
    words += ["--trace", "chat", "--requests", "150", "--memory", "64MiB", "1GiB"]
    return cli.main([*words, *more])


def test_the_command_writes_what_a_check_finds_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "prefix.json"
    assert bench(tmp_path, "--output", str(output), "--verify") == 0
    text = capsys.readouterr().out
    for name in (*CACHES, "offline", "bound"):
        assert name in text
    assert "*" in text
    result = json.loads(output.read_text())
    assert result["counts"]["caches"].keys() == CACHES.keys()
    assert not list(tmp_path.glob("*.journal"))
    assert cli.main(["bench", "prefix", "--check", str(output)]) == 0
    result["counts"]["caches"]["stock"][0]["hit"] += 1
    output.write_text(json.dumps(result))
    assert cli.main(["bench", "prefix", "--check", str(output)]) == 1


def test_the_command_reports_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "prefix.json"
    words = ["bench", "prefix", "--model", str(MODELS / "jamba-reasoning-3b.json")]
    words += ["--trace", "thinking", "--then", "chat", "--requests", "700", "--memory", "1GiB"]
    assert cli.main([*words, "--caches", "stock,avmp", "--output", str(output)]) == 0
    text = capsys.readouterr().out
    counts = json.loads(output.read_text())["counts"]
    start = counts["parts"]["starts"][1]
    assert f"avmp, anew at {start}" in text
    for row in counts["caches"].values():
        assert sum(part[0] for part in row[0]["parts"]) == row[0]["hit"]
    assert cli.main(["bench", "prefix", "--check", str(output)]) == 0


def test_the_result_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "prefix.json"
    assert bench(tmp_path, "--output", str(output)) == 0
    assert cli.main(["plot", str(output)]) == 0
    first = (tmp_path / "prefix.svg").read_bytes()
    assert cli.main(["plot", str(output)]) == 0
    assert (tmp_path / "prefix.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--caches", "stok"], "--caches stok: unknown"),
        (["--pause", "0"], "--pause 0.0"),
        (["--trace", "none.json"], "none.json"),
        (["--cut-ms", "-1"], "--cut-ms -1.0"),
        (["--then", "chat", "--overlap"], "--then and --overlap"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert bench(tmp_path, "--output", str(tmp_path / "x.json"), *words) == 2
    assert message in capsys.readouterr().err


# -- vLLM's own scheduler --------------------------------------------------------------------------

#: Setting -> retention interval in tokens, prefix match unit.
SETTINGS = {
    "stock": (0, None),
    "stock-dense": (None, None),
    "stock-interval": (2 * BLOCK, None),
    "stock-unit": (0, PAGE),
    "stock-unit-dense": (None, PAGE),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_stocks_rules_are_those_of_vllms_scheduler(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request at a time: every hit and every step is the same where running ones fit beside.

    A request that runs holds blocks in vLLM and none here: 2% are allowed for it where the cache
    is full.
    """
    pytest.importorskip("vllm")
    from avmp_vllm.bench.scheduler import engines
    from avmp_vllm.bench.scheduler.replay import StepTime, replay

    interval, unit = SETTINGS[name]
    plain = engines._vllm_config

    def configured(settings: engines.Settings) -> object:
        config = plain(settings)
        config.cache_config.prefix_cache_retention_interval = interval
        config.cache_config.prefix_match_unit = unit
        return config

    monkeypatch.setattr(engines, "_vllm_config", configured)
    # Agents branch and share their tools; chats answer past blocks' ends.
    agents, chats = drawn("agent", 120), drawn("chat", 50)
    requests = [replace(r, arrival=1e3 * i) for i, r in enumerate((*agents, *chats))]
    rows = requests_of(requests)
    for memory, tolerance in ((512 << 20, 0.02), (4 << 30, 0.0)):
        settings = engines.Settings(memory, 16384, 16, 8192, True, "auto", 0.9)
        outcome = replay(engines.build("stock", SHAPE, settings), requests, StepTime(8, 20, 30))
        found = run_cache(CACHES[name].make(memory, SIZES), rows)
        assert found["hit"] == pytest.approx(outcome.hit_tokens, rel=tolerance, abs=0)
        if not tolerance:
            steps = sum(row.answer for row in rows) + found["cuts"]
            assert steps == pytest.approx(outcome.steps, rel=0.001)
