"""When AVMP's counters go out."""

from __future__ import annotations

import pytest
from enginelib import counted, engine, greedy, mixed_prompts

from avmp_vllm.core import Kind
from avmp_vllm.engine.scheduler import metrics


def test_now_and_then_and_behind_the_last_request(monkeypatch):
    """By a clock that is set by hand."""
    now = 100.0
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    pace, period = metrics.Pace(), metrics.PERIOD_S
    assert [pace.due(idle=False) for _ in range(3)] == [True, False, False]
    assert pace.due(idle=True)
    now += 0.9 * period
    assert not pace.due(idle=False)
    now += 0.2 * period
    assert [pace.due(idle=False) for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
def test_when_all_is_answered_they_are_exact(tiny_jamba, monkeypatch, ahead):
    """However seldom they go out while requests run."""
    monkeypatch.setattr(metrics, "PERIOD_S", 1e9)
    sent = []
    attach = metrics.attach
    monkeypatch.setattr(
        metrics, "attach", lambda stats, manager: (sent.append(1), attach(stats, manager))[1]
    )
    tight = {"admission": "growth", "growth_tokens": 0}
    with engine(
        tiny_jamba, avmp=tight, kv_cache_memory_bytes=1_600_000, async_scheduling=ahead
    ) as llm:
        for round_number in (1, 2):
            greedy(llm, mixed_prompts())
            did = counted(llm).statistics
            found = {m.name: [] for m in llm.get_metrics()}
            for metric in llm.get_metrics():
                found[metric.name].append(getattr(metric, "value", None))
            assert sorted(found["vllm:avmp_relocations"]) == sorted(
                did.relocations[kind] for kind in Kind
            )
            assert sum(found["vllm:avmp_pages_used"]) == 0
            # The first step of all, and the last one of each round, or the few that find it empty.
            assert round_number <= len(sent) <= 1 + 3 * round_number
