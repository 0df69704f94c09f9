"""Engines whose drafter has attention of its own, every draft noted."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from enginelib import AMPLE, assert_nothing_held, counted, engine, greedy, scheduler_of, tokens
from vllm.v1.core.sched.scheduler import Scheduler

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.core import Kind
from avmp_vllm.engine.layout.capacity import describe, states_per_sequence
from avmp_vllm.engine.scheduler.scheduler import MovePlanMixin
from avmp_vllm.models.tiny_hybrids import write_tiny_eagle, write_tiny_qwen3_next_mtp

#: Enough for stock vLLM, too, to serve all prompts at once: in bf16 another schedule gives others.
MEMORY = 4 * AMPLE
#: Tokens that are drafted in a step.
DRAFTED = 3
METHODS = ("mtp", "eagle", "eagle3")
#: Of drafts that must be equal.
FIGURES = ("answers", "drafts", "drafted", "accepted")


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
    model: str, speculative: dict[str, Any], avmp: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """Serve the prompts twice, and note every draft and what was done with it."""
    drafts: dict[tuple[int, ...], list[int]] = {}
    update: Callable[..., None] = Scheduler.update_draft_token_ids

    def noting(self: Scheduler, made: Any) -> None:
        for name, draft in zip(made.req_ids, made.draft_token_ids, strict=True):
            if name in self.requests:
                drafts[tuple(self.requests[name].all_token_ids)] = list(draft)
        update(self, made)

    with (
        mock.patch.object(Scheduler, "update_draft_token_ids", noting),
        engine(
            model,
            avmp=avmp,
            dtype="bfloat16",
            kv_cache_memory_bytes=MEMORY,
            speculative_config=speculative,
            **options,
        ) as llm,
    ):
        answers = [greedy(llm, prompts(), 40, temperature=0) for _ in range(2)]
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        scheduler = scheduler_of(llm)
        cache = scheduler.vllm_config.cache_config
        found = {
            "answers": answers,
            "drafts": drafts,
            "drafted": counts["vllm:spec_decode_num_draft_tokens"],
            "accepted": counts["vllm:spec_decode_num_accepted_tokens"],
            "blocks": cache.num_gpu_blocks,
            "state_dtype": cache.mamba_ssm_cache_dtype,
        }
        if avmp is not None:
            assert_nothing_held(llm)
            config = scheduler.vllm_config, scheduler.kv_cache_config
            found |= {
                "did": counted(llm).statistics,
                "geometry": scheduler.kv_cache_manager.geometry,
                "states": states_per_sequence(*config),
                "capacity": "\n".join(describe(*config)),
            }
        return found


@contextlib.contextmanager
def pages_on_the_move() -> Iterator[None]:
    """Before each step all free capacity goes to one pool, and before the next to the other.

    In bf16, which is all that vLLM's kernels of gated delta nets take, another schedule gives
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


class Runs:
    """One model and its drafters, served in each way once.

    Args:
        folder: Of the checkpoints.
        options: Of all engines.
    """

    def __init__(self, folder: Any, **options: Any) -> None:
        self._options = options
        # With heads that vLLM's CPU kernel takes; it knows bf16 alone.
        wide = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "dtype": "bfloat16"}
        self.model = str(write_tiny_qwen3_next_mtp(folder / "model", **wide))
        fields = {"dtype": "bfloat16", "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
        self.drafters = {
            method: str(write_tiny_eagle(folder / method, method, **fields))
            for method in ("eagle", "eagle3")
        }
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def __call__(self, method: str, way: str) -> dict[str, Any]:
        """``stock``, or AVMP: ``still``, ``moving``, or moving and ``stale`` in its page table."""
        if (method, way) not in self._found:
            speculative = {"method": method, "num_speculative_tokens": DRAFTED}
            if method in self.drafters:
                speculative["model"] = self.drafters[method]
            avmp = None if way == "stock" else {"verify": way != "stale"}
            with contextlib.ExitStack() as stack:
                if way in ("moving", "stale"):
                    stack.enter_context(pages_on_the_move())
                if way == "stale":
                    stack.enter_context(mock.patch.object(PageTable, "apply"))
                self._found[method, way] = serve(self.model, speculative, avmp, **self._options)
        return self._found[method, way]
