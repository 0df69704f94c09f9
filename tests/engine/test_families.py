"""Every family of hybrids on the live engine: the same tokens as stock vLLM's, on Runner V1.

Layers and caches are vLLM's own; what its CPU build lacks or does wrongly, plain torch does in its
place, under stock vLLM as under AVMP: see ``standins``. Jamba and Granite are in
``test_equality.py``. On Runner V2 the families are in ``test_families_v2.py``.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from enginelib import (
    AMPLE,
    assert_nothing_held,
    counted,
    engine,
    greedy,
    mixed_prompts,
    runner_of,
    scheduler_of,
    tokens,
)
from hybrids import COUNT, FAMILIES, LONGEST, NEW_TOKENS, layers_of
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from avmp_vllm.backing.torch_buffer import TorchBuffer
from avmp_vllm.core import Kind, MovePlan
from avmp_vllm.engine.layout import arena
from avmp_vllm.engine.worker.v1.runner import MovePlanRunnerMixin
from avmp_vllm.models.tiny_hybrids import write_tiny_qwen3_next

_PROMPTS = mixed_prompts(1, COUNT)


class Checkpoints:
    """Checkpoints by family, and stock vLLM's answers; made when first asked for."""

    def __init__(self, factory: Any) -> None:
        self._factory = factory
        self._paths: dict[str, str] = {}
        self._answers: dict[str, list[list[list[int]]]] = {}

    def path(self, name: str) -> str:
        """The folder."""
        if name not in self._paths:
            self._paths[name] = str(self._factory.mktemp(name))
            FAMILIES[name].write(self._paths[name])
        return self._paths[name]

    def answers(self, name: str) -> list[list[list[int]]]:
        """Stock vLLM's, without prefix cache or pressure."""
        if name not in self._answers:
            with layers_of(name), engine(self.path(name)) as llm:
                self._answers[name] = greedy(llm, _PROMPTS, NEW_TOKENS)
        return self._answers[name]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Checkpoints:
    """Shared by the module's tests."""
    return Checkpoints(tmp_path_factory)


@contextlib.contextmanager
def serving(checkpoints: Checkpoints, name: str, **options: Any) -> Iterator[Any]:
    """An engine of a family under AVMP, without room to grow: it admits until it must preempt."""
    avmp = {
        "checkpoint_tokens": 128,
        "migration_batch": 8,
        "admission": "growth",
        "growth_tokens": 0,
        **options.pop("avmp", {}),
    }
    model = checkpoints.path(name)
    with layers_of(name), engine(model, avmp=avmp, max_model_len=LONGEST, **options) as llm:
        yield llm


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_equal_stock(checkpoints, name):
    """Cache off and on, ample and tight; with a cache two rounds, the second in opposite order."""
    family, expected = FAMILIES[name], checkpoints.answers(name)
    assert len({tuple(answer) for (answer,) in expected}) == COUNT
    migrated = moved = preempted = 0
    for caching in (False, True):
        for memory in (AMPLE, family.tight):
            with serving(
                checkpoints, name, kv_cache_memory_bytes=memory, enable_prefix_caching=caching
            ) as llm:
                assert greedy(llm, _PROMPTS, NEW_TOKENS) == expected
                if caching:
                    assert greedy(llm, _PROMPTS[::-1], NEW_TOKENS)[::-1] == expected
                assert_nothing_held(llm)
                did = counted(llm)
                hits = sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
                config = runner_of(llm).kv_cache_config
                assert len(config.kv_cache_groups) == family.tables
                assert len(config.kv_cache_tensors) == sum(family.layouts)
            if memory == AMPLE:
                assert not sum(did.statistics.migrations.values())
                assert bool(hits) is caching
            else:
                migrated += sum(did.statistics.migrations.values())
                moved += sum(did.statistics.relocations.values())
                preempted += did.preemptions
    assert migrated
    assert moved
    assert preempted


@pytest.mark.parametrize("name", ["mixed_window", "mixed_mixed"])
def test_the_longest_request_on_several_tables(checkpoints, name):
    """``--max-model-len -1``: a request of what is found ends without help; a page more is none."""
    with (
        layers_of(name),
        engine(
            checkpoints.path(name), avmp={}, max_model_len=-1, kv_cache_memory_bytes=1_000_000
        ) as llm,
    ):
        longest = llm.llm_engine.model_config.max_model_len
        geometry = scheduler_of(llm).kv_cache_manager.arena.geometry
        assert longest == geometry.longest(1) < 32_768
        assert not geometry.fits(geometry.pages_for(longest + 1), 1)
        ((answer,),) = greedy(llm, [{"prompt_token_ids": tokens(random.Random(1), longest - 4)}], 4)
        assert len(answer) == 4
        assert_nothing_held(llm)


def test_the_cpus_own_delta_net(tmp_path):
    """Without a stand-in, in bf16, which it is written for; states lie a block's stride apart.

    One request after another: bf16 rounds with the batch, so that stock differs from itself.
    """
    width = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}  # it knows few others
    model = str(write_tiny_qwen3_next(tmp_path, **width))
    answers = []
    for avmp in (None, {}):
        with engine(model, avmp=avmp, dtype="bfloat16", max_num_seqs=1) as llm:
            answers.append(greedy(llm, _PROMPTS[:4], NEW_TOKENS))
    assert answers[0] == answers[1]


def _offsets_forgotten(monkeypatch):
    """Every layout begins at the first byte of its page."""
    made = arena.KVCacheTensor
    monkeypatch.setattr(arena, "KVCacheTensor", lambda **f: made(**{**f, "offset": 0}))


def _first_layout_of_states_alone(monkeypatch):
    """A relocated state leaves the bytes of its other layouts behind."""
    applied = TorchBuffer.apply

    def apply(self, plan):
        for move in plan.relocations:
            words = self._words[self.page(move.kind, move.target)]
            before = words.copy()
            applied(self, MovePlan(plan.number, relocations=[move]))
            if move.kind is Kind.SSM:
                kept = FAMILIES["mixed_mixed"].first_layout // words.itemsize
                words[kept:] = before[kept:]
        plan.relocations = []
        applied(self, plan)

    monkeypatch.setattr(TorchBuffer, "apply", apply)


def _window_not_resolved(monkeypatch):
    """Kernels find the window's handles in place of its pages."""
    made = MovePlanRunnerMixin.initialize_kv_cache
    by_handle = SimpleNamespace(resolve=lambda kind, handles, out: np.copyto(out, handles))

    def make(self, kv_cache_config, *args, **kwargs):
        made(self, kv_cache_config, *args, **kwargs)
        tables = self.input_batch.block_table.block_tables
        for group, table in zip(kv_cache_config.kv_cache_groups, tables, strict=True):
            if isinstance(group.kv_cache_spec, SlidingWindowSpec):
                table.block_table._page_table = by_handle

    monkeypatch.setattr(MovePlanRunnerMixin, "initialize_kv_cache", make)


@pytest.mark.parametrize(
    ("name", "breakage"),
    [
        pytest.param("mixed_kv", _offsets_forgotten, id="offsets-of-pages"),
        pytest.param("mixed_states", _offsets_forgotten, id="offsets-of-states"),
        pytest.param("mixed_mixed", _first_layout_of_states_alone, id="second-layout"),
        pytest.param("mixed_window", _window_not_resolved, id="window-by-handle"),
    ],
)
def test_control_what_is_left_out_changes_answers(checkpoints, monkeypatch, name, breakage):
    """The test above would notice."""
    expected = checkpoints.answers(name)
    breakage(monkeypatch)
    with serving(
        checkpoints,
        name,
        kv_cache_memory_bytes=FAMILIES[name].tight,
        enable_prefix_caching=True,
        avmp={"verify": False},
    ) as llm:
        rounds = [greedy(llm, _PROMPTS[::way], NEW_TOKENS)[::way] for way in (1, -1)]
        assert sum(counted(llm).statistics.relocations.values())
    assert rounds != [expected] * 2
