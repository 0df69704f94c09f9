"""Speculative decoding by the model's own drafting layer (MTP): tokens, drafts and acceptance.

A wrong draft changes no token: it is rejected, and the answer only takes longer. So the drafts are
compared, each by what its request had so far. Without a prefix cache: with one, vLLM copies the
states of drafting requests by a kernel that its CPU build lacks. Drafts by ngram, with a prefix
cache, are in ``test_runner_v2.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
from enginelib import AMPLE, assert_nothing_held, counted, engine, greedy, tokens
from vllm.v1.core.sched.scheduler import Scheduler

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.core import Kind
from avmp_vllm.engine.scheduler.scheduler import MovePlanMixin
from avmp_vllm.models.tiny_hybrids import write_tiny_qwen3_next_mtp

MTP = {"method": "mtp", "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def drafting_model(tmp_path_factory) -> str:
    """With heads that vLLM's CPU kernel takes; it knows bf16 alone."""
    wide = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "dtype": "bfloat16"}
    return str(write_tiny_qwen3_next_mtp(tmp_path_factory.mktemp("mtp"), **wide))


def prompts() -> list[dict[str, list[int]]]:
    """Some share a long prefix; the second half asks again what the first half asked."""
    rng = random.Random(2)
    prefix = tokens(rng, 150)
    asked = [
        {"prompt_token_ids": (prefix if index % 2 else []) + tokens(rng, rng.choice([7, 40, 90]))}
        for index in range(8)
    ]
    return asked + asked[:4]


def serve(
    patch: pytest.MonkeyPatch, model: str, memory: int, avmp: dict[str, Any] | None, **options: Any
) -> dict[str, Any]:
    """Serve the prompts twice, and note every draft and what was done with it."""
    drafts: dict[tuple[int, ...], list[int]] = {}
    update: Callable[..., None] = Scheduler.update_draft_token_ids

    def noting(self: Scheduler, made: Any) -> None:
        for name, draft in zip(made.req_ids, made.draft_token_ids, strict=True):
            if name in self.requests:
                drafts[tuple(self.requests[name].all_token_ids)] = list(draft)
        update(self, made)

    with patch.context() as inner:
        inner.setattr(Scheduler, "update_draft_token_ids", noting)
        with engine(
            model,
            avmp=avmp,
            dtype="bfloat16",
            kv_cache_memory_bytes=memory,
            speculative_config=MTP,
            **options,
        ) as llm:
            answers = [greedy(llm, prompts(), 40, temperature=0) for _ in range(2)]
            if avmp is not None:
                assert_nothing_held(llm)
            counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
            return {
                "answers": answers,
                "drafts": drafts,
                "drafted": counts["vllm:spec_decode_num_draft_tokens"],
                "accepted": counts["vllm:spec_decode_num_accepted_tokens"],
                "did": counted(llm) if avmp is not None else None,
            }


@contextlib.contextmanager
def pages_on_the_move() -> Iterator[None]:
    """Before each step all free capacity goes to one pool, and before the next to the other.

    In bf16, which is all that vLLM's CPU kernel of gated delta nets takes, another schedule gives
    other tokens under stock vLLM, too. So pages move here while the schedule stays as it is.
    """
    schedule = MovePlanMixin.schedule
    turn = itertools.cycle(Kind)

    def moving(self: MovePlanMixin, *args: Any, **kwargs: Any) -> Any:
        arena, kind = self.kv_cache_manager.arena, next(turn)
        free = arena.available(kind)
        arena.reserve(*((free, 0) if kind is Kind.KV else (0, free)))
        return schedule(self, *args, **kwargs)

    with mock.patch.object(MovePlanMixin, "schedule", moving):
        yield


@pytest.fixture(scope="module")
def stock(drafting_model) -> dict[str, Any]:
    """Stock vLLM without a prefix cache."""
    with pytest.MonkeyPatch.context() as patch:
        return serve(patch, drafting_model, AMPLE, None)


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_drafts_equal_stock(monkeypatch, drafting_model, stock, moving):
    """Tokens, every draft, and what became of it."""
    with pages_on_the_move() if moving else contextlib.nullcontext():
        avmp = serve(monkeypatch, drafting_model, AMPLE, {})
    for what in ("answers", "drafts", "drafted", "accepted"):
        assert avmp[what] == stock[what], what
    assert sum(min(draft) >= 0 for draft in stock["drafts"].values()) > 100
    assert 0 < stock["accepted"] < stock["drafted"]
    if moving:
        statistics = avmp["did"].statistics
        assert min(statistics.migrations.values()) > 20
        assert sum(statistics.relocations.values()) > 20


def test_control_rows_not_resolved_change_drafts(monkeypatch, drafting_model, stock):
    """Table entries that stay as they were: the drafter reads pages that have moved."""
    monkeypatch.setattr(PageTable, "apply", lambda self, relocations: None)
    with pages_on_the_move():
        avmp = serve(monkeypatch, drafting_model, AMPLE, {"verify": False})
    assert avmp["drafts"] != stock["drafts"]
