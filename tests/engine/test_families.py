"""Every family of hybrids on the live engine: the same tokens as stock vLLM's, on Runner V1.

Layers and caches are vLLM's own; what its CPU build lacks or does wrongly, plain torch does in its
place, under stock vLLM as under AVMP: see ``standins``. Jamba and Granite are in
``test_equality.py``. On Runner V2 the families are in ``test_families_v2.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import mixed_jamba
import pytest
import standins
from enginelib import (
    AMPLE,
    assert_nothing_held,
    counted,
    engine,
    greedy,
    mixed_prompts,
    runner_of,
)

from avmp_vllm.engine.layout import arena
from avmp_vllm.engine.worker.v1 import block_tables
from avmp_vllm.models import tiny_hybrids, tiny_latent

_COUNT, _NEW_TOKENS = 8, 12
_PROMPTS = mixed_prompts(1, _COUNT)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family in the tests.

    Attributes:
        write: Writes its tiny checkpoint.
        tight: Bytes of an arena in which the prompts preempt, migrate and relocate.
        tables: Block tables under AVMP.
        layouts: Of KV pages and of states.
    """

    write: Callable[[Any], Any]
    tight: int
    tables: int = 2
    layouts: tuple[int, int] = (1, 1)


def _mixed(name: str) -> Callable[[Any], Any]:
    return lambda path: mixed_jamba.write(path, name)


FAMILIES = {
    "nemotron_h": Family(tiny_hybrids.write_tiny_nemotron_h, 500_000),
    "falcon_h1": Family(tiny_hybrids.write_tiny_falcon_h1, 900_000),
    "zamba2": Family(tiny_hybrids.write_tiny_zamba2, 1_800_000),
    "lfm2": Family(tiny_hybrids.write_tiny_lfm2, 420_000),
    "qwen3_next": Family(tiny_hybrids.write_tiny_qwen3_next, 500_000),
    "qwen3_5": Family(tiny_hybrids.write_tiny_qwen3_5, 500_000),
    "kimi_linear": Family(tiny_latent.write_tiny_kimi_linear, 300_000),
    "bailing_2_5": Family(tiny_latent.write_tiny_bailing_2_5, 300_000),
    "mixed_kv": Family(_mixed("kv"), 1_100_000, layouts=(3, 1)),
    "mixed_states": Family(_mixed("states"), 1_000_000, layouts=(1, 3)),
    "mixed_window": Family(_mixed("window"), 1_000_000, tables=3, layouts=(2, 1)),
    "mixed_mixed": Family(_mixed("mixed"), 1_100_000, tables=3, layouts=(4, 3)),
}


@contextlib.contextmanager
def layers_of(name: str) -> Iterator[None]:
    """Have engines that start here build a family's layers."""
    with standins.installed(name), contextlib.ExitStack() as stack:
        if name.startswith("mixed_"):
            stack.enter_context(mixed_jamba.installed())
        yield


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
                self._answers[name] = greedy(llm, _PROMPTS, _NEW_TOKENS)
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
        "growth_tokens": 0,
        **options.pop("avmp", {}),
    }
    with layers_of(name), engine(checkpoints.path(name), avmp=avmp, **options) as llm:
        yield llm


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_equal_stock(checkpoints, name):
    """Cache off and on, ample and tight; with a cache two rounds, the second in opposite order."""
    family, expected = FAMILIES[name], checkpoints.answers(name)
    assert len({tuple(answer) for (answer,) in expected}) == _COUNT
    moved = preempted = 0
    for memory in (AMPLE, family.tight):
        for caching in (False, True):
            with serving(
                checkpoints, name, kv_cache_memory_bytes=memory, enable_prefix_caching=caching
            ) as llm:
                assert greedy(llm, _PROMPTS, _NEW_TOKENS) == expected
                if caching:
                    assert greedy(llm, _PROMPTS[::-1], _NEW_TOKENS)[::-1] == expected
                assert_nothing_held(llm)
                did = counted(llm)
                hits = sum(
                    m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits"
                )
                config = runner_of(llm).kv_cache_config
                assert len(config.kv_cache_groups) == family.tables
                assert len(config.kv_cache_tensors) == sum(family.layouts)
            if memory == AMPLE:
                assert not sum(did.statistics.migrations.values())
                assert bool(hits) is caching
            else:
                assert sum(did.statistics.migrations.values())
                moved += sum(did.statistics.relocations.values())
                preempted += did.preemptions
    assert moved
    assert preempted


def _forget_offsets(monkeypatch):
    """Every layout of a page begins at its first byte."""
    placed = arena._placed

    def forgetful(table):
        return ((0, spec, names) for _, spec, names in placed(table))

    bytes_of = {}

    def remembered(table):
        (*_, (offset, spec, names)) = placed(table)
        return bytes_of.setdefault(id(table), offset + len(names) * arena._stride(table, spec))

    monkeypatch.setattr(arena, "_bytes", remembered)
    monkeypatch.setattr(arena, "_placed", forgetful)


def _leave_windows_unresolved(monkeypatch):
    """The window's block table is never filled for kernels: it reads the null page."""
    copied = block_tables.HandleBuffer.copy_to_gpu

    def copy(self, rows=None):
        windows = _leave_windows_unresolved.tables
        if self._table not in windows and self._table.block_size == 32:
            windows.append(self._table)
        if windows.index(self._table) == 1 if self._table in windows else False:
            return self.gpu[: len(self.np) if rows is None else rows]
        return copied(self, rows)

    _leave_windows_unresolved.tables = []
    monkeypatch.setattr(block_tables.HandleBuffer, "copy_to_gpu", copy)
