"""What the prefix cache hits, and how many states it keeps."""

from __future__ import annotations

import random

import pytest
from enginelib import assert_nothing_held, engine, scheduler_of, tokens
from vllm import SamplingParams
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

from avmp_vllm.core import Kind
from avmp_vllm.core.keeper import Origin
from avmp_vllm.engine.cpu.mamba import CpuMambaMixer
from avmp_vllm.engine.scheduler.state_manager import StateManager


def _answer(llm, prompt, max_tokens=8):
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def test_hits_land_on_pages(tiny_jamba):
    """A second identical prompt of 200 tokens hits 192 of them; stock hits one block of 128."""
    prompt = tokens(random.Random(2), 200)
    hits, answers = {}, {}
    for name, avmp in (("stock", None), ("avmp", {})):
        with engine(tiny_jamba, avmp=avmp, enable_prefix_caching=True) as llm:
            first, none = _answer(llm, prompt)
            second, hits[name] = _answer(llm, prompt)
            assert none == 0
            assert first == second
            answers[name] = first
    assert hits == {"stock": 128, "avmp": 192}
    assert answers["avmp"] == answers["stock"]


def test_longer_prompt_hits_the_shorter_ones_last_page(tiny_jamba):
    """A conversation's next turn finds the state of the turn before."""
    rng = random.Random(3)
    first, more = tokens(rng, 170), tokens(rng, 100)
    with engine(tiny_jamba, avmp={}, enable_prefix_caching=True) as llm:
        _answer(llm, first)
        continued, hit = _answer(llm, first + more)
    with engine(tiny_jamba, enable_prefix_caching=False) as llm:
        expected, _ = _answer(llm, first + more)
    assert hit == 160
    assert continued == expected


@pytest.mark.parametrize("spacing", [64, 128])
@pytest.mark.parametrize("keep_periodic", [False, True], ids=["semantic", "periodic"])
def test_a_long_decode_keeps_the_states_that_the_spacing_asks_for(
    tiny_jamba, spacing, keep_periodic
):
    """The running state moves on once a checkpoint interval, and no oftener.

    What stays behind is kept where ``--prefix-cache-retention-interval`` asks for it. By default
    the state of the prompt is kept, and of the answer the last of those at each 64 tokens.
    """
    prompt = tokens(random.Random(4), 50)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": spacing},
        enable_prefix_caching=True,
        prefix_cache_retention_interval=spacing if keep_periodic else 0,
    ) as llm:
        manager = scheduler_of(llm).kv_cache_manager
        pool = manager.coordinator.pools[Kind.SSM]
        taken = []
        get_new_blocks = pool.get_new_blocks
        pool.get_new_blocks = lambda count: taken.append(count) or get_new_blocks(count)
        _answer(llm, prompt, max_tokens=400)
        checkpoints = (50 + 400 - 1) // spacing
        copies = 0 if keep_periodic else (50 + 400 - 1) // 64
        assert manager.arena.cached(Kind.SSM) == (checkpoints if keep_periodic else 1) + 1
        # One running state for each interval, a private copy of the one at the prompt's end, and
        # the copies of the answer's.
        assert sum(taken) == checkpoints + 2 + copies
        assert manager.arena.statistics.peak_used[Kind.SSM] <= 3
        assert_nothing_held(llm)


#: By the tokens that a step is worth: tokens that are cached, of the prompt, its prefill's chunks,
#: where layers do not save states on the way.
CHUNKS = {
    0: [(0, 90, [64, 26]), (128, 200, [64, 8]), (0, 700, [160, 512, 28])],
    10_000: [
        (0, 90, [90]),
        (0, 577, [577]),  # past the checkpoints at 128, 256, 384 and 512
        (128, 200, [72]),
        # The state at 160 is not published for the end of its block, which the chunk runs past.
        (160, 400, [240]),
    ],
}


def test_a_prompt_is_cut_only_for_a_state_worth_keeping(tiny_jamba, monkeypatch):
    """Each cut is a step that the first token waits for; no cut publishes a wrong state."""
    monkeypatch.setattr(CpuMambaMixer, "get_kv_cache_spec", MambaMixer.get_kv_cache_spec)
    rng = random.Random(9)
    answers = []
    for cut_tokens, cases in CHUNKS.items():
        with engine(
            tiny_jamba,
            avmp={"checkpoint_tokens": 128, "cut_tokens": cut_tokens},
            enable_prefix_caching=True,
            max_model_len=1024,
            max_num_batched_tokens=1024,
        ) as llm:
            scheduler = scheduler_of(llm)
            scheduled = []
            schedule = scheduler.schedule

            def noting(*args, schedule=schedule, scheduled=scheduled, **kwargs):
                output = schedule(*args, **kwargs)
                scheduled.append(output.total_num_scheduled_tokens)
                return output

            scheduler.schedule = noting
            for hit, length, chunks in cases:
                prompt = tokens(rng, length)
                if hit:
                    keeper = scheduler.kv_cache_manager.checkpoints.keeper
                    keeper._cut_tokens = 0
                    _answer(llm, prompt[: hit + 1])
                    keeper._cut_tokens = cut_tokens
                scheduled.clear()
                answer, found = _answer(llm, prompt)
                assert found == hit
                assert scheduled[: len(chunks)] == chunks
                assert set(scheduled[len(chunks) :]) <= {0, 1}
                answers.append((prompt, answer))
                # Whatever was published on the way, a shorter prompt computes from it.
                for shorter in range(65, length, 64):
                    answers.append((prompt[:shorter], _answer(llm, prompt[:shorter])[0]))
            scheduler.kv_cache_manager.verify()
            assert_nothing_held(llm)
    with engine(tiny_jamba, max_model_len=1024, max_num_batched_tokens=1024) as llm:
        for prompt, answer in answers:
            assert _answer(llm, prompt)[0] == answer


def _conversation(llm, turns=4):
    """Answers and hits of a conversation, each turn's prompt holding all before it."""
    rng = random.Random(11)
    history, said, hits = tokens(rng, 40), [], []
    for _ in range(turns):
        answer, hit = _answer(llm, history, max_tokens=90)
        said.append(answer)
        hits.append(hit)
        history = history + answer + tokens(rng, 20)
    return said, hits


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_a_conversation_resumes_inside_of_its_last_answer(tiny_jamba, monkeypatch, ahead):
    """The last state at a multiple of 64 tokens is hit, in the answer or its prompt's last page.

    The control: a state that is published for one page less than it covers changes tokens.
    """
    options = {"enable_prefix_caching": True, "async_scheduling": ahead, "max_model_len": 1024}
    with engine(tiny_jamba, max_model_len=1024) as llm:
        expected, _ = _conversation(llm)
    with engine(tiny_jamba, avmp={}, **options) as llm:
        said, hits = _conversation(llm)
        assert scheduler_of(llm).kv_cache_manager.checkpoints.keeper.counts[Origin.ANSWER].made
        assert_nothing_held(llm)
    assert said == expected
    # Prompts of 40, 150, 260 and 370 tokens, whose answers' states stand at 128, 192 and 320.
    assert hits == [0, 128, 192, 320]
    due = StateManager._copy_answer

    def one_page_off(self, request_id):
        due(self, request_id)
        if request_id in self._copies:
            position, copy = self._copies[request_id]
            self._copies[request_id] = position - 32, copy
            self.block_pool.positions[copy.block_id] = position - 32

    monkeypatch.setattr(StateManager, "_copy_answer", one_page_off)
    with engine(tiny_jamba, avmp={"verify": False}, **options) as llm:
        assert _conversation(llm)[0] != expected


def test_each_of_several_answers_is_resumed(tiny_jamba):
    """``n = 3``: every answer goes on as a conversation of its own, from a state inside of it."""

    def talk(llm):
        rng = random.Random(9)
        first, more = tokens(rng, 70), tokens(rng, 20)
        params = SamplingParams(
            n=3, temperature=2.0, seed=4, max_tokens=90, ignore_eos=True, detokenize=False
        )
        (output,) = llm.generate([{"prompt_token_ids": first}], params, use_tqdm=False)
        answers = [list(answer.token_ids) for answer in output.outputs]
        said = [_answer(llm, [*first, *answer, *more], max_tokens=8) for answer in answers]
        return answers, [reply for reply, _ in said], [hit for _, hit in said]

    with engine(tiny_jamba, max_model_len=1024) as llm:
        answers, expected, _ = talk(llm)
    assert len({tuple(answer) for answer in answers}) == 3
    with engine(tiny_jamba, avmp={}, enable_prefix_caching=True, max_model_len=1024) as llm:
        same, said, hits = talk(llm)
        assert_nothing_held(llm)
    assert same == answers
    assert said == expected
    # Answers of 90 tokens behind a prompt of 70 leave a state at 128.
    assert hits == [128] * 3


def test_reset_frees_everything(tiny_jamba):
    """Resetting the prefix cache leaves no page cached in either pool."""
    prompt = tokens(random.Random(6), 200)
    with engine(tiny_jamba, avmp={}, enable_prefix_caching=True) as llm:
        _answer(llm, prompt)
        arena = scheduler_of(llm).kv_cache_manager.arena
        assert arena.cached(Kind.KV) > 0
        assert arena.cached(Kind.SSM) > 0
        assert llm.reset_prefix_cache()
        assert arena.cached(Kind.KV) == arena.cached(Kind.SSM) == 0
        assert_nothing_held(llm)
        assert _answer(llm, prompt)[1] == 0


def test_either_pool_gives_up_cached_pages_for_the_other(tiny_jamba):
    """Cached pages never block: the least recently used go first, whichever pool is short."""
    rng = random.Random(8)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 64},
        enable_prefix_caching=True,
        kv_cache_memory_bytes=2_000_000,
    ) as llm:
        for length in (300, 40, 300, 40, 40, 300, 200, 40) * 3:
            _answer(llm, tokens(rng, length))
        statistics = scheduler_of(llm).kv_cache_manager.arena.statistics
        assert statistics.evictions[Kind.KV] > 0
        assert statistics.evictions[Kind.SSM] > 0
        assert sum(statistics.failures.values()) == 0
        assert_nothing_held(llm)


def test_answers_end_at_pages_that_are_larger_than_their_interval(tiny_jamba):
    """A prefix ends at a page, so an answer's states are kept at each 128 tokens here, not 64."""
    prompt = tokens(random.Random(12), 40)
    avmp = {"page_tokens": 128, "checkpoint_tokens": 256}
    with engine(tiny_jamba, avmp=avmp, enable_prefix_caching=True) as llm:
        answer, _ = _answer(llm, prompt, max_tokens=180)
        assert _answer(llm, prompt + answer)[1] == 128
        assert_nothing_held(llm)
