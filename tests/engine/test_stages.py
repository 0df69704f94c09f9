"""Pipeline parallelism: two stages whose pages have different sizes, tokens equal to one process.

Workers are processes of their own here, each with an arena and the same move plans. What happens
in many more schedules, without a model, is in ``tests/fuzz`` and ``tests/core``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from enginelib import (
    assert_nothing_held,
    counted,
    engine,
    greedy,
    mixed_prompts,
    scheduler_of,
    stock_answers,
)
from families import attention, state
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.core import Kind, PipelineGeometry
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout import arena
from avmp_vllm.engine.layout.capacity import describe
from avmp_vllm.engine.layout.stages import PARTITION, Stage, split_layers, stages_of
from avmp_vllm.models.tiny_jamba import write_tiny_jamba

#: Bytes of a stage in which the mixed prompts preempt, migrate and relocate.
TIGHT = 1_000_000
LAYER_PAGE, LAYER_STATE = 16_384, 19_456


@pytest.fixture(scope="module")
def jamba(tmp_path_factory) -> str:
    """Attention in layers 1, 4 and 7 of eight: stages differ however they are cut."""
    folder = tmp_path_factory.mktemp("stages")
    return str(write_tiny_jamba(folder, attn_layer_period=3, attn_layer_offset=1))


def serve(model: str, caching: bool, ranks: int = 1, **avmp: Any) -> tuple[list[Any], Any]:
    """Two rounds of the mixed prompts through two stages; the answers and the engine's counts.

    Args:
        model: Folder of the checkpoint.
        caching: Prefixes.
        ranks: Of a stage, which share its heads and channels, and so its bytes.
        avmp: More of AVMP's options.
    """
    with engine(
        model,
        avmp={"checkpoint_tokens": 128, "growth_tokens": 0, **avmp},
        kv_cache_memory_bytes=TIGHT // ranks,
        enable_prefix_caching=caching,
        pipeline_parallel_size=2,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp",
    ) as llm:
        rounds = [greedy(llm, mixed_prompts()) for _ in range(2)]
        scheduler = scheduler_of(llm)
        text = "\n".join(describe(scheduler.vllm_config, scheduler.kv_cache_config))
        hits = next(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
        assert_nothing_held(llm)
        geometry = scheduler.kv_cache_manager.geometry
        return rounds, (geometry, counted(llm), hits, text)


@pytest.mark.parametrize(
    ("split", "caching", "ranks", "layers"),
    [
        ("5,3", True, 1, [(2, 3), (1, 2)]),
        ("4,4", False, 1, [(1, 3), (2, 2)]),
        ("5,3", True, 2, [(2, 3), (1, 2)]),
    ],
    ids=["5,3-cache", "4,4-no-cache", "5,3-cache-tensor"],
)
def test_answers_equal_one_process(jamba, monkeypatch, split, caching, ranks, layers):
    """Under pressure, each stage's arena follows the same plans by its own sizes."""
    expected = stock_answers(jamba)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join("01" * ranks))
    monkeypatch.setenv(PARTITION, split)
    rounds, (geometry, did, hits, text) = serve(jamba, caching, ranks)
    assert rounds == [expected] * 2
    page, state = LAYER_PAGE // ranks, LAYER_STATE // ranks
    assert [(g.page_bytes, g.block_bytes) for g in geometry.stages] == [
        (page * kv, state * ssm) for kv, ssm in layers
    ]
    statistics = did.statistics
    assert min(statistics.migrations.values()) > 0
    assert sum(statistics.relocations.values()) > 0
    assert (hits > 0) == caching
    for number, (kv, ssm) in enumerate(layers):
        size = TIGHT // ranks
        assert f"stage {number}: {size:,} bytes; KV page {page * kv:,} ({kv} layers)" in text
        assert f"SSM block {state * ssm:,} ({ssm} layers)" in text


def test_control_a_stage_with_anothers_indices_changes_answers(jamba, monkeypatch):
    """The second stage takes the plan's indices, which are the first one's, for its own."""
    expected = stock_answers(jamba)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv(PARTITION, "5,3")
    right = arena.arena_configs

    def wrong(*args: Any) -> list[arena.AVMPCacheConfig]:
        first, second = right(*args)
        only_its_own = PipelineGeometry.over([second.own] * 2)
        return [first, replace(second, geometry=only_its_own)]

    monkeypatch.setattr(arena, "arena_configs", wrong)
    rounds, _ = serve(jamba, True, verify=False)
    assert rounds != [expected] * 2


# -- splits ----------------------------------------------------------------------------------------


class Sizes:
    """What the layout reads of vLLM's configuration."""

    def __init__(self, layers: int) -> None:
        self.max_in_flight_tokens = 256
        self.model_config = self.cache_config = self
        self.max_model_len, self.prefix_cache_retention_interval = 4096, 0
        self._layers = layers

    def get_total_num_hidden_layers(self) -> int:
        return self._layers


def specs(kinds: str, first: int = 0) -> dict[str, Any]:
    """Layers of attention, states, both or neither (``a``, ``s``, ``b``, ``-``)."""
    found = {}
    for index, kind in enumerate(kinds, first):
        if kind in "ab":
            found[f"layers.{index}.attn"] = attention()
        if kind in "sb":
            found[f"layers.{index}.mixer"] = state()
    return found


def cut(kinds: str, *lengths: int) -> list[Stage]:
    """A model's layers in stages of so many."""
    assert sum(lengths) == len(kinds)
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return [
        Stage(specs(kinds[end - length : end], end - length), 64 << 20)
        for end, length in zip(ends, lengths, strict=True)
    ]


@pytest.mark.parametrize(
    ("kinds", "lengths", "message"),
    [
        ("sssasssa", (2, 6), f"stage 0 has no KV layer .* set {PARTITION}=4,4$"),
        ("aaaassas", (2, 6), f"stage 0 has no SSM layer .* set {PARTITION}=5,3$"),
        ("s-a---s-a", (8, 1), f"stage 1 has no SSM layer .* set {PARTITION}=4,5$"),
        ("sssssa", (3, 3), "stage 0 has no KV layer .* no split of the layers has every kind"),
    ],
)
def test_the_split_that_works_is_named(kinds, lengths, message):
    with pytest.raises(ConfigError, match=message):
        arena.arena_configs(Sizes(len(kinds)), cut(kinds, *lengths))


def test_a_stage_that_has_not_settled_its_blocks_is_refused_for_what_it_lacks():
    """Without attention vLLM leaves the spacing of states at its default."""
    first, second = cut("sssasssa", 2, 6)
    unsettled = {name: replace(spec, block_size=16) for name, spec in first.specs.items()}
    with pytest.raises(ConfigError, match=f"stage 0 has no KV layer .* set {PARTITION}=4,4$"):
        arena.arena_configs(Sizes(8), [Stage(unsettled, 64 << 20), second])


def test_a_drafters_layers_do_not_count():
    """They stand behind the model's own, in the last stage, wherever it begins."""
    first, second = cut("sasa-", 1, 4)
    drafting = Stage({**second.specs, "mtp.layers.5.attn": attention()}, 64 << 20)
    with pytest.raises(ConfigError, match=f"{PARTITION}=2,3"):
        arena.arena_configs(Sizes(5), [first, drafting])


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("as-b"), min_size=2, max_size=9),
    st.integers(2, 4),
)
def test_a_split_is_the_most_even_that_works(kinds: list[str], stages: int):
    """Against every split there is."""
    tables = [{"a": {0}, "s": {1}, "b": {0, 1}, "-": set()}[kind] for kind in kinds]

    def splits(layers: int, left: int) -> list[list[int]]:
        if left == 1:
            return [[layers]]
        return [
            [length, *rest]
            for length in range(1, layers)
            for rest in splits(layers - length, left - 1)
        ]

    def works(lengths: Sequence[int]) -> bool:
        rest = list(tables)
        parts = [[rest.pop(0) for _ in range(length)] for length in lengths]
        return all(len(set().union(*part)) == 2 for part in parts)

    possible = [split for split in splits(len(kinds), stages) if works(split)]
    found = split_layers(tables, stages, 2)
    if not possible:
        assert found is None
    else:
        assert found in possible
        assert max(found) == min(map(max, possible))


def test_ranks_of_a_stage_share_its_layers():
    """The one with the fewest bytes decides for them; other stages keep theirs."""
    first, second = specs("sa"), specs("sa", 2)
    stages = stages_of([first, dict(first), second, dict(second)], [9, 8, 20, 21])
    assert [(stage.arena_bytes, stage.workers) for stage in stages] == [(8, (0, 1)), (20, (2, 3))]
    with pytest.raises(ConfigError, match="ranks have different page sizes"):
        stages_of([first, {**first, "layers.1.attn": attention(heads=1)}], [9, 9])


def test_every_stage_has_every_table():
    """Layers of other bytes, and stages of other numbers of them; one geometry over all."""
    stages = cut("ssassab-", 3, 5)
    configs = arena.arena_configs(Sizes(8), stages)
    assert [config.stage for config in configs] == [0, 1]
    assert len({config.num_blocks for config in configs}) == 1
    for config, stage in zip(configs, stages, strict=True):
        names = [name for group in config.kv_cache_groups for name in group.layer_names]
        assert sorted(names) == sorted(stage.specs)
        assert config.own == config.geometry.stage(config.stage)
        for tensor in config.kv_cache_tensors:
            kind = Kind.KV if "attn" in tensor.layers[0] else Kind.SSM
            assert tensor.block_stride == config.own.unit(kind)
    assert configs[0].shift == (0, 0) != configs[1].shift
