"""What the prefix cache hits, and how many states it keeps."""

from __future__ import annotations

import random

import pytest
from enginelib import assert_nothing_held, engine, scheduler_of, tokens
from vllm import SamplingParams

from avmp_vllm.core import Kind


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

    What stays behind is kept where ``--prefix-cache-retention-interval`` asks for it. The default
    of vLLM keeps the state at the prompt's last page alone.
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
        assert manager.arena.cached(Kind.SSM) == (checkpoints if keep_periodic else 0) + 1
        # One running state for each interval, and a private copy of the one at the prompt's end.
        assert sum(taken) == checkpoints + 2
        assert manager.arena.statistics.peak_used[Kind.SSM] <= 3
        assert_nothing_held(llm)


#: By least worth of a state: tokens that are cached, tokens of the prompt, its prefill's chunks.
CHUNKS = {
    0: [(0, 90, [64, 26]), (128, 200, [64, 8])],
    128: [
        (0, 90, [90]),  # a state after 64 tokens is not worth a step
        (0, 150, [128, 22]),
        (0, 577, [576, 1]),  # past the checkpoints at 128, 256, 384 and 512
        (128, 200, [72]),
        (160, 250, [90]),
        # The state at 160 is not published for the block's end, which the first chunk runs past.
        (160, 400, [224, 16]),
    ],
}


def test_a_prompt_is_cut_only_for_a_state_worth_keeping(tiny_jamba):
    """Each cut is a step that the first token waits for; no cut publishes a wrong state."""
    rng = random.Random(9)
    answers = []
    for tail_tokens, cases in CHUNKS.items():
        with engine(
            tiny_jamba,
            avmp={"checkpoint_tokens": 128, "tail_tokens": tail_tokens},
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
                    scheduler._tail_tokens = 0
                    _answer(llm, prompt[: hit + 1])
                    scheduler._tail_tokens = tail_tokens
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
