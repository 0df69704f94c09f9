"""States that Mamba-1 layers save inside of a prefill chunk: at the right place, and without a cut.

On Model Runner V1, with the layers of the CPU; ``test_runner_v2.py`` has those that take handles.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from enginelib import (
    AMPLE,
    assert_nothing_held,
    branching_prompts,
    counted,
    engine,
    greedy,
    mixed_prompts,
    scheduler_of,
    stock_answers,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn

from avmp_vllm.core import SSM_TAG, InvariantViolation, Save
from avmp_vllm.core.keeper import Origin
from avmp_vllm.engine.cpu import mamba as cpu_mamba
from avmp_vllm.engine.cpu.scan import selective_scan
from avmp_vllm.engine.layout.saves import ChunkSaves, RowSave
from avmp_vllm.engine.scheduler.state_manager import StateManager

#: An arena of the tiny Jamba in which prompts and their states crowd each other out.
TIGHT = 1_500_000
LONG = {"max_model_len": 2048, "max_num_batched_tokens": 2048}


def states_of(llm) -> StateManager:
    """The engine's manager of states."""
    managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    return next(manager for manager in managers if isinstance(manager, StateManager))


def counts_of(llm):
    """What the keeper did with states, by where they stand."""
    return scheduler_of(llm).kv_cache_manager.checkpoints.keeper.counts


@dataclass
class Steps:
    """What an engine scheduled.

    Attributes:
        chunks: Of each request, the chunks of its prompt.
    """

    chunks: dict[str, list[int]]

    def cuts(self) -> int:
        """Chunks of prompts beyond the first, where the budget holds all prompts."""
        return sum(len(chunks) - 1 for chunks in self.chunks.values())


@contextmanager
def noting(llm):
    """Note the chunks that an engine schedules."""
    scheduler, steps = scheduler_of(llm), Steps({})
    schedule = scheduler.schedule

    def wrapper(*args, **kwargs):
        output = schedule(*args, **kwargs)
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            if request.num_computed_tokens - count < request.num_prompt_tokens:
                steps.chunks.setdefault(name, []).append(count)
        return output

    scheduler.schedule = wrapper
    yield steps
    scheduler.schedule = schedule


def long_prompts():
    """Prompts longer than 512 tokens that share, leave and continue one another."""
    rng = random.Random(21)
    trunk = tokens(rng, 1_300)
    prompts = [
        trunk[:900],
        trunk[:620] + tokens(rng, 300),
        trunk[:620] + tokens(rng, 710),
        trunk[:900] + tokens(rng, 100),
        trunk[:330],
        trunk,
    ]
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def one_by_one(llm, prompts, max_tokens=8):
    """Answers, each prompt served alone, so that each may begin where one before it has been."""
    return [greedy(llm, [prompt], max_tokens)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def expected_long(tiny_jamba):
    with engine(tiny_jamba, **LONG) as llm:
        return one_by_one(llm, long_prompts())


# -- the engine ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_no_prompt_is_cut_for_a_state(tiny_jamba, expected_long, ahead, monkeypatch):
    """Every prompt is one chunk, and as many states are kept and hit as where it is cut for them.

    The control: layers that do not offer it, as vLLM's own for CUDA.
    """
    kept, steps, hits = {}, {}, {}
    for offered in (True, False):
        if not offered:
            spec = MambaMixer.get_kv_cache_spec
            monkeypatch.setattr(cpu_mamba.CpuMambaMixer, "get_kv_cache_spec", spec)
        options = {"enable_prefix_caching": True, "async_scheduling": ahead, **LONG}
        with engine(tiny_jamba, avmp={}, **options) as llm, noting(llm) as noted:
            assert one_by_one(llm, long_prompts()) == expected_long
            assert one_by_one(llm, long_prompts()) == expected_long
            steps[offered] = noted.cuts()
            made = {origin: count.made for origin, count in counts_of(llm).items()}
            kept[offered] = made
            hits[offered] = [sum(chunks) for chunks in noted.chunks.values()]
            manager = states_of(llm)
            assert (manager.saved > 0) is offered
            if offered:
                assert manager.saved == sum(made.values()) - made[Origin.ANSWER]
                assert all(made[origin] for origin in Origin if origin is not Origin.ANSWER)
            assert_nothing_held(llm)
    assert steps[True] == 0
    assert steps[False] >= 8
    assert kept[True] == kept[False]
    assert hits[True] == hits[False]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("budget", [48, 256])
def test_answers_equal_stock_under_pressure(tiny_jamba, ahead, budget):
    """States are saved, hit, evicted and relocated, requests preempted; chunks begin anywhere."""
    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba,
        avmp={"admission": "growth", "growth_tokens": 0, "migration_batch": 8},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=True,
        async_scheduling=ahead,
        max_num_batched_tokens=budget,
    ) as llm:
        for order in (1, -1, 1):
            assert greedy(llm, mixed_prompts()[::order]) == expected[::order]
        assert states_of(llm).saved > 10
        assert counts_of(llm)[Origin.TAIL].used > 0
        assert sum(counted(llm).statistics.relocations.values()) > 0
        assert_nothing_held(llm)


def test_answers_equal_stock_while_requests_are_preempted(tiny_jamba):
    """Long answers outgrow the arena; preempted prompts begin again at what they saved."""
    prompts = mixed_prompts(seed=7, count=6)
    answers = {}
    for avmp, memory in ((None, AMPLE), ({"admission": "growth", "growth_tokens": 0}, TIGHT)):
        with engine(
            tiny_jamba, avmp=avmp, kv_cache_memory_bytes=memory, enable_prefix_caching=True
        ) as llm:
            answers[memory] = greedy(llm, prompts, max_tokens=200, n=3)
            if avmp is not None:
                assert counted(llm).preemptions > 0
                assert states_of(llm).saved > 0
                assert_nothing_held(llm)
    assert answers[TIGHT] == answers[AMPLE]


def _shifted(monkeypatch, name, by):
    """Give a part of the layer positions that are some tokens off."""
    right = getattr(cpu_mamba, name)

    def wrong(*args):
        return right(
            *(
                [save._replace(tokens=save.tokens - by) for save in arg]
                if isinstance(arg, list)
                else arg
                for arg in args
            )
        )

    monkeypatch.setattr(cpu_mamba, name, wrong)


@pytest.mark.parametrize("part", ["_cut", "_save_inputs"])
def test_control_a_state_that_is_one_token_off_changes_answers(tiny_jamba, part, monkeypatch):
    """The scan's state, or the convolution's."""
    _shifted(monkeypatch, part, by=1)
    with engine(tiny_jamba) as llm:
        expected = one_by_one(llm, branching_prompts())
    options = {"enable_prefix_caching": True, "kv_cache_memory_bytes": AMPLE}
    with engine(tiny_jamba, avmp={}, **options) as llm:
        found = one_by_one(llm, branching_prompts())
        assert counts_of(llm)[Origin.TAIL].used > 0
    assert found != expected


def test_control_states_that_are_not_saved_are_noticed(tiny_jamba, monkeypatch):
    """A layer that does not ask what to save ends the engine, instead of serving wrong states."""
    monkeypatch.setattr(ChunkSaves, "bind", lambda self, layers: None)
    with (
        engine(tiny_jamba, avmp={}, enable_prefix_caching=True) as llm,
        pytest.raises(InvariantViolation, match="no layer has asked"),
    ):
        greedy(llm, branching_prompts()[:1])


# -- from the plan to the layers -------------------------------------------------------------------


class _Table:
    """Handles to physical blocks."""

    def physical(self, handle: int) -> int:
        return 100 - (handle - SSM_TAG)


@settings(deadline=None, max_examples=60)
@given(
    batch=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_host_and_device_find_the_same(batch, order):
    """Any batch, any order of chunks; the rows of what saves nothing are empty."""
    count = len(batch)
    handles = [SSM_TAG + 1 + row for row in range(count)]
    targets = iter(range(SSM_TAG + 20, SSM_TAG + 60))
    chunks = {
        handles[row]: [Save(handles[row], next(targets), 16 * (k + 1)) for k in range(saves)]
        for row, saves in enumerate(batch)
    }
    planned = list(chunks.values())
    order.shuffle(planned)
    saves = ChunkSaves(_Table())
    saves.begin([save for chunk in planned for save in chunk])
    physical = torch.tensor([_Table().physical(handle) for handle in handles])
    wanted = [
        RowSave(row, save.tokens, _Table().physical(save.target))
        for row, handle in enumerate(handles)
        for save in chunks[handle]
    ]
    assert saves.of_blocks(physical) == wanted
    found = saves.of_handles(torch.tensor(handles, dtype=torch.int32))
    if not wanted:
        assert found is None
    else:
        rows = [
            RowSave(row, int(found[0][row, k]), _Table().physical(int(found[1][row, k])))
            for row in range(count)
            for k in range(max(batch))
            if found[0][row, k]
        ]
        assert rows == wanted
    saves.end()


def test_a_chunk_that_is_not_in_the_batch_is_an_error():
    saves = ChunkSaves(_Table())
    saves.begin([Save(SSM_TAG + 1, SSM_TAG + 2, 16)])
    with pytest.raises(InvariantViolation, match="block 99 is to save a state"):
        saves.of_blocks(torch.tensor([98]))


def test_a_plan_that_nobody_asked_for_is_an_error():
    saves = ChunkSaves(_Table())
    saves.begin([Save(SSM_TAG + 1, SSM_TAG + 2, 16)])
    with pytest.raises(InvariantViolation, match="no layer has asked"):
        saves.end()
    saves.end()  # said once


# -- the layer -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    decodes=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
    seed=st.integers(0, 999),
)
def test_a_saved_state_is_what_a_cut_leaves(lengths, decodes, dtype, data, seed):
    """Scan and convolution, for any positions in a batch of decodes and prefills.

    What is saved is what a chunk leaves that ends there; a copy of inputs to the bit, and a scan
    within rounding (16 bits are rounded where a state is stored). Nothing else changes.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, size, width = 32, 16, 4
    steps = [1] * decodes + lengths
    count, total = len(steps), sum(steps)
    starts = torch.tensor([0, *steps]).cumsum(0)
    resumes = torch.tensor(
        [True] * decodes
        + data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    )
    saves = []
    for row, length in enumerate(lengths):
        most = {"max_size": 3, "unique": True}
        inside = st.lists(st.integers(1, max(length - 1, 1)), **most)
        saves += [
            RowSave(row, position, 1 + count + 3 * row + k)
            for k, position in enumerate(sorted(data.draw(inside)))
            if position < length
        ]

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, dt, B, C = normal(total, channels), normal(total, channels), *(normal(2, total, size))
    A, states = -torch.rand(channels, size, generator=generator), normal(30, channels, size)
    states = states.to(dtype)
    slots = torch.arange(1, 1 + count)

    def scan(state, batch):
        first, last = int(batch.query_start_loc[0]), int(batch.query_start_loc[-1])
        part = slice(first, last)
        batch = batch._replace(query_start_loc=batch.query_start_loc - first)
        return selective_scan(x[part], dt[part], A, B[part], C[part], state, **batch._asdict())

    whole = cpu_mamba.Batch(slots, starts, resumes)
    plain, saving = states.clone(), states.clone()
    y = scan(saving, cpu_mamba._cut(whole, saves, decodes) if saves else whole)
    torch.testing.assert_close(y, scan(plain, whole), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(saving[1 : 1 + count], plain[1 : 1 + count], rtol=1e-2, atol=1e-5)
    for save in saves:
        sequence = decodes + save.row
        begin = int(starts[sequence])
        upto = cpu_mamba.Batch(
            slots[sequence : sequence + 1],
            torch.tensor([begin, begin + save.tokens]),
            resumes[sequence : sequence + 1],
        )
        cut = states.clone()
        scan(cut, upto)
        torch.testing.assert_close(
            saving[save.target], cut[sequence + 1], rtol=1e-5 if dtype == torch.float32 else 1e-2,
            atol=1e-5,
        )  # fmt: skip

    # The convolution, whose states are views of larger blocks.
    conv = normal(30, channels, width - 1).to(dtype)
    inputs = x[decodes:].to(dtype)
    weight = normal(channels, width).to(dtype)
    metadata = type("Metadata", (), {})()
    metadata.query_start_loc_p = (starts[decodes:] - decodes).int()
    metadata.state_indices_tensor_p = slots[decodes:].int()
    metadata.has_initial_states_p = resumes[decodes:]
    saved = conv.clone()
    cpu_mamba._save_inputs(inputs, saved, metadata, saves)
    for save in saves:
        begin = int(metadata.query_start_loc_p[save.row])
        cut = conv.clone()
        causal_conv1d_fn(
            inputs[begin : begin + save.tokens].T.contiguous(),
            weight,
            None,
            activation="silu",
            conv_states=cut,
            has_initial_state=metadata.has_initial_states_p[save.row : save.row + 1],
            cache_indices=metadata.state_indices_tensor_p[save.row : save.row + 1],
            query_start_loc=torch.tensor([0, save.tokens], dtype=torch.int32),
            pad_slot_id=0,
        )
        assert torch.equal(saved[save.target], cut[1 + decodes + save.row])
    untouched = [block for block in range(30) if block not in {save.target for save in saves}]
    assert torch.equal(saved[untouched], conv[untouched])
