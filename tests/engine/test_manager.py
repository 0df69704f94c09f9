"""vLLM's scheduler and cache manager over an arena, driven without a model.

A made-up worker answers every scheduled step with one token for each request that has reached its
end; everything else is vLLM's scheduler, AVMP's manager and the core. Each test names the report of
another system's user that it answers.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, layers, with_blocks
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    make_block_hash_with_group_id,
    maybe_convert_block_hash,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.core import AllocationFailure, ArenaTooSmall, Kind
from avmp_vllm.engine.layout.arena import arena_config
from avmp_vllm.engine.layout.groups import group_of
from avmp_vllm.engine.layout.limits import blocks_per_request
from avmp_vllm.engine.layout.message import PLAN
from avmp_vllm.engine.scheduler.scheduler import AVMPAsyncScheduler, AVMPScheduler

PAGE_TOKENS = 32
CHECKPOINT_TOKENS = 128
MAX_MODEL_LEN = 1024


class Driver:
    """A scheduler and a worker that only keeps its page table.

    Args:
        model: Folder of a config.json.
        arena_bytes: Size of the arena.
        caching: Prefix caching.
        scheduler: Which of the two schedulers.
        batch: ``migration_batch``.
        growth: ``growth_tokens``.
        options: More of AVMP's options, and others in the place of ``growth``.
        checkpoints: Whether the layers save a state in the middle of a prefill, as Mamba-2 on CUDA.
        anywhere: Whether they save states at any position of it, as Mamba-1 on the CPU.
        retention: ``--prefix-cache-retention-interval``.
        ahead: Steps that are scheduled before the output of the first of them arrives.
        budget: Tokens of a step.
        events: Whether the scheduler publishes what the prefix cache stores and removes.
        family: Other layers than a Jamba's, by name.
        fit: ``max_model_len``.
    """

    def __init__(
        self,
        model: str,
        arena_bytes: int,
        caching: bool = True,
        scheduler: type = AVMPScheduler,
        batch: int = 1,
        growth: int = 64,
        options: dict[str, Any] | None = None,
        checkpoints: bool = False,
        anywhere: bool = False,
        retention: int | None = 0,
        ahead: int = 0,
        budget: int = 256,
        events: bool = False,
        family: dict[str, KVCacheSpec] | None = None,
        fit: int = MAX_MODEL_LEN,
    ) -> None:
        config = EngineArgs(
            model=model,
            skip_tokenizer_init=True,
            enable_prefix_caching=caching,
            max_model_len=fit,
            max_num_batched_tokens=budget,
            max_num_seqs=16,
            enforce_eager=True,
            prefix_cache_retention_interval=retention,
            kv_events_config=KVEventsConfig(events, publisher="null") if events else None,
            additional_config={
                "block_manager": "avmp",
                "avmp": {
                    "migration_batch": batch,
                    "cut_tokens": 0,
                    "verify": True,
                    **(
                        options
                        or {"admission": "growth", "growth_tokens": growth, "victim": "last"}
                    ),
                },
            },
        ).create_engine_config()
        kv_cache_utils.init_none_hash(sha256_cbor)
        kv = FullAttentionSpec(
            block_size=PAGE_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.float32
        )
        ssm = MambaSpec(
            block_size=CHECKPOINT_TOKENS if caching else fit,
            shapes=((3, 256), (256, 16)),
            dtypes=(torch.float32, torch.float32),
            mamba_type=MambaAttentionBackendEnum.MAMBA1,
            mamba_cache_mode="align" if caching else "none",
            num_prefill_checkpoint_blocks=int(checkpoints),
            prefill_checkpoint_alignment=1 if checkpoints or anywhere else None,
        )
        jamba = {f"layers.{i}": kv if i % 4 == 2 else ssm for i in range(8)}
        worker_cache = arena_config(config, family or jamba, arena_bytes)
        cache = kv_cache_utils.generate_scheduler_kv_cache_config([worker_cache])
        config.cache_config.num_gpu_blocks = cache.num_blocks
        config.cache_config.block_size = PAGE_TOKENS
        block, hash_block = kv_cache_utils.resolve_kv_cache_block_sizes(cache, config)
        self.scheduler: Any = scheduler(
            config,
            cache,
            StructuredOutputManager(config),
            block_size=block,
            hash_block_size=hash_block,
            log_stats=True,
        )
        self.hasher = kv_cache_utils.get_request_block_hasher(hash_block, sha256_cbor)
        self.manager = self.scheduler.kv_cache_manager
        self.arena = self.manager.arena
        self.table = PageTable(self.arena.geometry)
        self.plans = 0
        self._ahead = ahead
        self._running: deque[tuple[SchedulerOutput, list[list[int]]]] = deque()
        self.hits: dict[str, int] = {}
        self.finished: list[str] = []

    def add(self, name: str, prompt: list[int], answer: int, **features: Any) -> Request:
        """Queue a request that answers with so many tokens; ``features`` are vLLM's."""
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=answer, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.hasher if self.manager.enable_caching else None,
            **features,
        )
        self.scheduler.add_request(request)
        return request

    def apply(self, output: SchedulerOutput) -> None:
        """Follow the plan as a worker does, and compare the page tables."""
        plan = getattr(output, PLAN)
        self.plans += 1
        assert plan.number == self.plans
        self.table.apply(plan.relocations)
        known, digest = plan.digest
        assert self.table.digest(dict(zip(Kind, known, strict=True))) == digest

    def step(self) -> SchedulerOutput:
        """One step of the engine."""
        output = self.scheduler.schedule()
        self.apply(output)
        for new in output.scheduled_new_reqs:
            self.hits.setdefault(new.req_id, new.num_computed_tokens)
            self.check_hit(self.scheduler.requests[new.req_id], new.num_computed_tokens)
        requests = self.scheduler.requests
        # A step that computed a request's last known token is followed by a new one.
        tokens = [
            [self.sampled(each)] if each.num_computed_tokens >= each.num_tokens else []
            for each in map(requests.__getitem__, output.num_scheduled_tokens)
        ]
        self._running.append((output, tokens))
        if len(self._running) > self._ahead or not tokens:
            self._finish(*self._running.popleft())
        return output

    def sampled(self, request: Request) -> int:
        """The token that a request gets next."""
        return len(request.request_id)

    def check_hit(self, request: Request, tokens: int) -> None:
        """A prefix hit has the pages of its prefix, in every table with a slot for each token."""
        coordinator = self.manager.coordinator
        for group in coordinator.slots:
            blocks = coordinator.single_type_managers[group].req_to_blocks[request.request_id]
            for index, block in enumerate(blocks[: tokens // PAGE_TOKENS]):
                known = make_block_hash_with_group_id(request.block_hashes[index], group)
                assert block.block_hash == known

    def _finish(self, output: SchedulerOutput, tokens: list[list[int]]) -> None:
        """Hand a step's tokens to the scheduler."""
        names = list(output.num_scheduled_tokens)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=tokens,
            ),
        )
        self.finished += [name for name in names if name not in self.scheduler.requests]

    def step_unverified(self) -> SchedulerOutput:
        """One step while the test itself holds pages, which verification would miss an owner of."""
        verify, self.manager.verify = self.manager.verify, lambda: None
        try:
            return self.step()
        finally:
            self.manager.verify = verify

    def run(self, limit: int) -> int:
        """Step until nothing is left; the number of steps."""
        for number in range(limit):
            if not self.scheduler.has_unfinished_requests():
                return number
            self.step()
        raise AssertionError(
            f"unfinished after {limit} steps: running "
            f"{[r.request_id for r in self.scheduler.running]}, "
            f"{len(self.scheduler.waiting)} waiting"
        )

    def check_empty(self) -> None:
        """Every page is free or evictable, and the bytes add up."""
        self.apply(self.scheduler.schedule())  # lets go of what finished last
        assert self.arena.used(Kind.KV) == self.arena.used(Kind.SSM) == 0
        self.manager.verify()


def prompt(seed: object, tokens: int) -> list[int]:
    rng = random.Random(str(seed))
    return [rng.randrange(1_000) for _ in range(tokens)]


def arena_for(requests: float, tokens: int = MAX_MODEL_LEN) -> int:
    """Bytes that hold so many requests of a length, three states each, beside the null block."""
    page, block = 2 * 16_384, 6 * 19_456
    return int(block + page + requests * (-(-tokens // PAGE_TOKENS) * page + 3 * block))


@pytest.mark.parametrize("caching", [False, True])
def test_two_requests_that_do_not_fit_together_both_finish(model: str, caching: bool) -> None:
    """SGLang #35158: retract livelock; each takes from the other what it needs, for ever."""
    driver = Driver(model, arena_for(1.2), caching)
    requests = [driver.add(name, prompt(name, 300), 500) for name in ("a", "b")]
    steps = driver.run(limit=3_000)
    assert sorted(driver.finished) == ["a", "b"]
    preemptions = [request.num_preemptions for request in requests]
    assert sum(preemptions) > 0, "the arena was large enough for both: nothing was tested"
    assert max(preemptions) <= 4, preemptions
    assert steps < 2_000
    driver.check_empty()


def family_of(name: str, caching: bool) -> dict[str, KVCacheSpec]:
    """Three layers of each kind, with this file's page and spacing."""
    spacing = CHECKPOINT_TOKENS if caching else MAX_MODEL_LEN
    mode = "align" if caching else "none"
    return layers(with_blocks(FAMILIES[name], PAGE_TOKENS, spacing, mamba_cache_mode=mode))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_under_pressure(model: str, family: str, caching: bool) -> None:
    """Several tables and layouts, with verification at each step; what is kept is hit."""
    specs = family_of(family, caching)
    sizes = Driver(model, 1 << 28, caching, family=specs).arena.geometry
    states, requests = (3, 2.5) if caching else (1, 1)
    each = sizes.pages_for(MAX_MODEL_LEN) * sizes.page_bytes + states * sizes.block_bytes
    memory = int(sizes.null_bytes + sizes.page_bytes + requests * each)
    driver = Driver(model, memory, caching, growth=0, family=specs)
    rng = random.Random(family)
    asked: list[Request] = []
    for turn in range(40):
        begun = [] if turn % 3 else list(rng.choice(asked).all_token_ids) if asked else []
        text = begun[:600] + prompt(turn, rng.randrange(5, 300))
        asked.append(driver.add(f"{turn}", text, rng.randrange(1, 100)))
        for _ in range(rng.randrange(30 if caching else 15)):
            driver.step()
    driver.run(limit=4_000)
    assert len(driver.finished) == 40
    statistics = driver.arena.statistics
    assert statistics.migrations[Kind.KV] > 0
    assert statistics.migrations[Kind.SSM] > 0
    assert sum(statistics.relocations.values()) > 0
    assert (max(driver.hits.values()) > 0) == caching
    driver.check_empty()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_request_of_a_family_is_exact(model: str, family: str) -> None:
    """``--max-model-len -1`` and the refusal, with several tables: it fits, and no token more."""
    specs = family_of(family, False)
    geometry = Driver(model, 1 << 24, False, family=specs).arena.geometry
    longest = geometry.longest(1)
    assert geometry.fits(geometry.pages_for(longest), 1)
    assert not geometry.fits(geometry.pages_for(longest + 1), 1)
    geometry.require_one_request(longest, 1)
    with pytest.raises(ArenaTooSmall, match=f"at most {longest}$"):
        geometry.require_one_request(longest + 1, 1)


@pytest.mark.parametrize("caching", [False, True])
def test_a_request_that_fills_the_arena_is_not_requeued_for_ever(model: str, caching: bool) -> None:
    """vLLM #52520: a request that fits the empty pool waits for ever behind what is cached."""
    driver = Driver(model, arena_for(1.0), caching)
    for index in range(6):
        driver.add(f"small{index}", prompt(index, 200), 20)
    driver.add("whole", prompt("whole", MAX_MODEL_LEN - 24), 24)
    for index in range(6, 9):
        driver.add(f"small{index}", prompt(index, 200), 20)
    driver.run(limit=2_000)
    assert len(driver.finished) == 10
    driver.check_empty()


@pytest.mark.parametrize("retention", [0, None, 2 * CHECKPOINT_TOKENS])
@pytest.mark.parametrize("layers", ["cut", "checkpoints", "anywhere"])
@pytest.mark.parametrize("short_of", [0, 1])
def test_the_smallest_arena_serves_the_longest_request(
    model: str, layers: str, short_of: int, retention: int | None
) -> None:
    """What start-up asks for is what a request holds at most: alone, none is ever preempted.

    The control: with one state less, some are. (States that are saved inside of a chunk are given
    up first. Where only the prompt's own is saved, that is enough.)
    """
    page, block = 2 * 16_384, 6 * 19_456
    checkpoints = layers == "checkpoints"
    states = 3 + checkpoints
    least = (1 + states - short_of) * block + MAX_MODEL_LEN // PAGE_TOKENS * page
    driver = Driver(
        model,
        -(-least // page) * page,
        True,
        AVMPAsyncScheduler,
        checkpoints=checkpoints,
        anywhere=layers == "anywhere",
        retention=retention,
        ahead=1,
    )
    spec = group_of(driver.scheduler.kv_cache_config, Kind.SSM).kv_cache_spec
    assert blocks_per_request(spec, steps=2) == states
    geometry = driver.arena.geometry
    if short_of:
        with pytest.raises(ArenaTooSmall, match=f"{states} SSM block"):
            geometry.require_one_request(MAX_MODEL_LEN, states)
    else:
        geometry.require_one_request(MAX_MODEL_LEN, states)
        assert not geometry.fits(MAX_MODEL_LEN // PAGE_TOKENS + 1, states)
    preemptions, enough = 0, not short_of or (checkpoints and retention == 0)
    for length in (100, 129, 160, 256, 300, 384, 500, 640, 700, 900, 990):
        # Alone, then hitting its own state, then continued beyond it up to the longest.
        first = prompt(length, length)
        longer = first + prompt((length, "more"), min(90, MAX_MODEL_LEN - length - 1))
        for turn, tokens in enumerate((first, first, longer)):
            room = MAX_MODEL_LEN - len(tokens)
            request = driver.add(f"{length}.{turn}", tokens, room if turn == 2 else min(room, 40))
            try:
                driver.run(limit=3_000)
            except AssertionError:
                assert not enough, f"{length}.{turn} never ends"
                return
            preemptions += request.num_preemptions
    assert len(driver.finished) == 33
    assert max(driver.hits.values()) > 0
    assert (preemptions == 0) is enough


@pytest.mark.parametrize("scheduler", [AVMPScheduler, AVMPAsyncScheduler])
def test_churn_under_pressure(model: str, scheduler: type) -> None:
    """SGLang #36770, #35158; kvcached #364: killed or leaking under pressure. Many requests, shared
    prefixes, aborts in mid-air, an arena for one and a half: everyone finishes, every invariant
    holds in every step, and the workers' page table agrees with the scheduler's."""
    driver = Driver(model, arena_for(1.5), True, scheduler)
    rng = random.Random(1)
    shared = prompt("shared", 160)
    names, aborted = [], []
    for index in range(40):
        name = f"r{index}"
        names.append(name)
        own = prompt(name, rng.choice([3, 40, 130, 400]))
        driver.add(name, (shared if index % 3 == 0 else []) + own, rng.choice([1, 30, 120]))
        for _ in range(rng.randint(0, 12)):
            driver.step()
        if index % 7 == 6:
            victims = [r.request_id for r in driver.scheduler.running][-1:]
            driver.scheduler.finish_requests(victims, RequestStatus.FINISHED_ABORTED)
            aborted += victims
    driver.run(limit=5_000)
    assert set(driver.finished) | set(aborted) == set(names)
    statistics = driver.arena.statistics
    for kind in Kind:
        assert statistics.migrations[kind] > 0
        assert statistics.evictions[kind] > 0
    assert sum(statistics.relocations.values()) > 0
    driver.check_empty()


def _preemptions(model: str, growth: int) -> int:
    """Of twelve requests that answer at length in an arena for a few."""
    driver = Driver(model, arena_for(2), caching=False, growth=growth)
    requests = [driver.add(f"r{index}", prompt(index, 90), 200) for index in range(12)]
    driver.run(limit=5_000)
    driver.check_empty()
    return sum(request.num_preemptions for request in requests)


def test_room_to_grow_spares_preemptions(model: str) -> None:
    """Exact pages leave no slack: whoever is admitted into the last bytes makes others preempt."""
    assert _preemptions(model, growth=200) == 0 < _preemptions(model, growth=0)


def _admitted(model: str, states: int, first: int, anywhere: bool) -> bool:
    """Whether a second request runs beside one whose prompt has so many tokens."""
    page, block = 2 * 16_384, 6 * 19_456
    pages = 2 * -(-first // PAGE_TOKENS) + 3
    memory = block + page + states * block + pages * page
    driver = Driver(model, memory, growth=16, anywhere=anywhere, fit=first + 40)
    driver.add("first", prompt("first", first), 40)
    driver.step()
    driver.add("second", prompt("second", first), 40)
    for _ in range(3):  # a copy for the cache may come between
        driver.step()
    running = len(driver.scheduler.running)
    driver.run(limit=500)
    driver.check_empty()
    return running == 2


@pytest.mark.parametrize("anywhere", [False, True])
def test_a_block_is_kept_free_only_for_a_state_that_moves(model: str, anywhere: bool) -> None:
    """States move on every 128 tokens; a request that does not soon leaves room for another."""
    assert _admitted(model, states=2, first=200, anywhere=anywhere)
    assert not _admitted(model, states=2, first=250, anywhere=anywhere)


def test_states_that_a_chunk_saves_keep_nobody_out(model: str) -> None:
    """They may take the block that is kept free for a state that moves: they can go at once."""
    assert _admitted(model, states=3, first=250, anywhere=True)


def test_a_copy_for_the_cache_is_not_worth_a_preemption(model: str) -> None:
    """The state at a prompt's last page is copied for later requests, if there is room for it."""
    driver = Driver(model, arena_for(2))
    request = driver.add("first", prompt("first", 100), 40)
    while request.num_computed_tokens < 96:
        driver.step()
    (manager,) = (m for m in driver.manager.coordinator.single_type_managers if m._partial_hit_reqs)
    assert list(manager._partial_hit_reqs) == ["first"]  # the copy is due in the next step
    # Leave a few pages, and no state.
    filler = driver.arena.allocate(pages=driver.arena.available(Kind.KV) - 2)
    assert driver.arena.available(Kind.SSM) == 0
    for _ in range(5):
        driver.step_unverified()
    assert request.status == RequestStatus.RUNNING
    assert request.num_preemptions == 0
    assert not manager._partial_hit_reqs
    driver.arena.release(filler)
    driver.run(limit=200)
    assert driver.finished == ["first"]
    driver.check_empty()
    # Nobody hits the state that was overwritten.
    assert hit(driver, "second", prompt("first", 100)) == 0


@pytest.mark.parametrize("caching", [False, True])
def test_a_failing_manager_call_changes_nothing(model: str, caching: bool) -> None:
    """All or nothing: with room for the pages but not for the state, and the other way round,
    ``allocate_slots`` answers None and the arena is as before."""
    driver = Driver(model, arena_for(1.0), caching)
    arena, manager = driver.arena, driver.manager
    for kind in Kind:
        leave = arena.available(kind) - (1 if kind is Kind.SSM else 3)
        held = arena.allocate(*((leave, 0) if kind is Kind.KV else (0, leave)))
        request = driver.add(f"late{kind}", prompt(kind, 250), 1)
        before = (arena.digest(), [(arena.used(k), arena.free(k)) for k in Kind], arena.gap_bytes)
        assert manager.allocate_slots(request, 250) is None
        after = (arena.digest(), [(arena.used(k), arena.free(k)) for k in Kind], arena.gap_bytes)
        assert before == after
        arena.release(held)
        assert manager.allocate_slots(request, 250) is not None
        manager.free(request)
        driver.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)


def hit(driver: Driver, name: str, tokens: list[int]) -> int:
    """Run a request to its end; how many of its tokens came from the cache."""
    driver.add(name, tokens, 4)
    driver.run(limit=100)
    return driver.hits[name]


def test_a_short_prompt_hits_the_cache(model: str) -> None:
    """vLLM #40696: prompts under 528 tokens get no prefix hit. A second identical prompt of 200
    tokens hits up to its last page boundary. The first that parts from it before that leaves a
    state at the last checkpoint that both have in common, for the next."""
    driver = Driver(model, arena_for(4.0))
    tokens = prompt("twice", 200)
    assert hit(driver, "first", tokens) == 0
    assert hit(driver, "second", tokens) == 192
    assert hit(driver, "parts", [*tokens[:150], *prompt("tail", 100)]) == 0
    assert hit(driver, "parts too", [*tokens[:150], *prompt("other", 100)]) == 128


def _adapter(name: str) -> dict[str, Any]:
    return {"lora_request": LoRARequest(name, 1 + len(name), "/nowhere")}


def _picture(name: str) -> dict[str, Any]:
    """Tokens 10 to 20 of the prompt stand for a picture."""
    feature = MultiModalFeatureSpec(
        data=None, modality="image", identifier=name, mm_position=PlaceholderRange(10, 10)
    )
    return {"mm_features": [feature]}


@pytest.mark.parametrize(
    ("mine", "others"),
    [
        pytest.param(_adapter("a"), [{}, _adapter("bb")], id="lora"),
        pytest.param(_picture("cat"), [{}, _picture("dog")], id="picture"),
        pytest.param({"cache_salt": "a"}, [{}, {"cache_salt": "b"}], id="salt"),
    ],
)
def test_answers_are_found_by_their_own_alone(
    model: str, mine: dict[str, Any], others: list[dict[str, Any]]
) -> None:
    """A conversation resumes inside of its answer: not another adapter's, picture's or salt's."""
    driver = Driver(model, arena_for(8.0), options={})
    driver.scheduler.max_num_encoder_input_tokens = 1000
    driver.scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=1000)
    said = prompt("chat", 100)
    request = driver.add("first", said, 90, **mine)
    driver.run(limit=200)
    said = [*said, *request.output_token_ids, *prompt("next", 20)]
    for number, other in enumerate(others):
        driver.add(f"other{number}", said, 4, **other)
        driver.run(limit=20)
        assert driver.hits[f"other{number}"] == 0
    driver.add("own", said, 4, **mine)
    driver.run(limit=20)
    # Behind the prompt's last page, at 96; states of answers stand 64 tokens apart.
    assert driver.hits["own"] >= 128
    driver.check_empty()


def test_a_state_is_had_although_the_cache_is_all_pages(model: str) -> None:
    """SGLang #34441: the state side starves beside a cache of pages. Eviction crosses over."""
    driver = Driver(model, arena_for(1.3))
    for index in range(12):
        hit(driver, f"r{index}", prompt(index, 600))
    arena = driver.arena
    assert arena.cached(Kind.KV) > 0
    with pytest.raises(AllocationFailure):
        arena.allocate(blocks=arena.available(Kind.SSM) + 1)
    evicted = dict(arena.statistics.evictions)
    blocks = arena.allocate(blocks=arena.available(Kind.SSM))
    assert arena.statistics.evictions[Kind.KV] > evicted[Kind.KV]
    assert arena.cached(Kind.SSM) == 0
    left = arena.cached(Kind.KV) * arena.geometry.page_bytes
    assert left < arena.geometry.block_bytes + arena.geometry.page_bytes
    arena.release(blocks)
    # What was evicted is forgotten, and what is computed again is found again.
    assert hit(driver, "again", prompt(11, 600)) == 0
    assert hit(driver, "found", prompt(11, 600)) == 576
    driver.check_empty()


def test_cache_events_tell_what_both_pools_cache(model: str) -> None:
    """A router that follows the events knows the cache of either pool, evictions included.

    As in vLLM, two blocks of equal content are stored and removed each.
    """
    driver = Driver(model, arena_for(1.3), events=True)
    mirror: dict[int | None, Counter[Any]] = {0: Counter(), 1: Counter()}
    removed = dict.fromkeys(mirror, 0)

    def follow(batch: Any) -> None:
        for event in batch.events:
            hashes = Counter(event.block_hashes)
            if isinstance(event, BlockStored):
                mirror[event.group_idx] += hashes
            else:
                assert isinstance(event, BlockRemoved)
                assert hashes <= mirror[event.group_idx]
                mirror[event.group_idx] -= hashes
                removed[event.group_idx] += len(event.block_hashes)

    driver.scheduler.kv_event_publisher.publish = follow
    shared = prompt("shared", 250)
    for index in range(24):
        own = prompt(index, random.Random(index).choice([40, 200, 600]))
        hit(driver, f"r{index}", [*shared, *own] if index % 4 == 0 else own)
        follow(SimpleNamespace(events=driver.manager.take_events()))
        for group, kind in enumerate(driver.manager.coordinator.kinds):
            entries = driver.manager.coordinator.pools[kind].cached_block_hash_to_block._cache
            cached = {maybe_convert_block_hash(get_block_hash(key)) for key in entries}
            assert set(mirror[group]) == cached, (index, kind)
    assert all(removed.values()), removed
    # A reset is one event, after everything that was stored before it.
    hit(driver, "last", prompt("last", 200))
    driver.check_empty()
    driver.manager.reset_prefix_cache()
    *earlier, last = driver.manager.take_events()
    assert isinstance(last, AllBlocksCleared)
    assert all(isinstance(event, (BlockStored, BlockRemoved)) for event in earlier)


@pytest.mark.parametrize("kind", Kind)
def test_blocks_are_evicted_by_handle(model: str, kind: Kind) -> None:
    """Page 3 and state 3 are two blocks: who evicts one does not evict the other. A state without
    its pages is of no use, and pages without their state."""
    driver = Driver(model, arena_for(3.0))
    cached: dict[str, dict[Kind, set[int]]] = {}
    before: set[int] = set()
    for name in ("first", "second"):
        hit(driver, name, prompt(name, 300))
        driver.check_empty()
        now = {each: set(driver.arena.cached_handles(each)) for each in Kind}
        cached[name] = {each: now[each] - before for each in Kind}
        before = set().union(*now.values())
    assert all(cached["second"].values())
    driver.manager.evict_blocks(
        {max(cached["second"][kind])} | (cached["second"][kind] if kind is Kind.SSM else set())
    )
    for each in Kind:
        left = set(driver.arena.cached_handles(each))
        assert cached["first"][each] <= left
        assert not cached["second"][each] & left or kind is Kind.KV
    assert hit(driver, "again", prompt("second", 300)) < 288
    driver.manager.verify()


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_budget_of_one_checkpoint_does_not_hold_a_long_prompt_up(
    model: str, checkpoints: bool
) -> None:
    """Beside a decode no chunk as long as the checkpoints' spacing fits into the step."""
    driver = Driver(model, arena_for(3), checkpoints=checkpoints, budget=CHECKPOINT_TOKENS)
    driver.add("short", prompt("short", 20), 60)
    driver.step()
    driver.add("long", prompt("long", 700), 2)
    steps = 0
    while "long" not in driver.finished:
        driver.step()
        steps += 1
    # 700 tokens at 127 a step, two states on the way, and the second token.
    assert steps <= 6 + 2 + 1
    driver.run(limit=200)
    driver.check_empty()


def test_resetting_the_cache_frees_everything(model: str) -> None:
    driver = Driver(model, arena_for(2.0))
    for index in range(4):
        hit(driver, f"r{index}", prompt(index, 300))
    driver.check_empty()
    assert sum(driver.arena.cached(kind) for kind in Kind) > 0
    assert driver.manager.reset_prefix_cache()
    assert sum(driver.arena.cached(kind) for kind in Kind) == 0
    assert hit(driver, "after", prompt(0, 300)) == 0
    driver.check_empty()


def test_the_same_requests_give_the_same_plans(model: str) -> None:
    """Determinism, byte for byte, through vLLM's scheduler."""

    def plans() -> Iterable[str]:
        driver = Driver(model, arena_for(1.2))
        for index in range(8):
            driver.add(f"r{index}", prompt(index % 5, 60 * index + 5), 30)
        while driver.scheduler.has_unfinished_requests():
            yield repr(getattr(driver.step(), PLAN))

    first, second = list(plans()), list(plans())
    assert any("relocations=[R" in plan for plan in first)
    assert first == second
