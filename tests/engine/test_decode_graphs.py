"""Which batches Runner V1 takes for pure decodes, of which CUDA has full graphs.

A graph of decodes updates a state that each row has. A prompt's first token has none, so beside
decodes it must not run in one, although the batch has their shape. CPUs have no graphs, but vLLM's
runner asks for one there too.
"""

from __future__ import annotations

import random
from typing import Any

from enginelib import engine, greedy, runner_of, scheduler_of, tokens
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from avmp_vllm.engine.worker.v1.runner import MovePlanRunnerMixin

#: (whether a row is a prompt's first token, what the dispatcher was told) of batches of one token
#: a row.
Asked = list[tuple[bool, bool]]


def one_token_batches(model: str) -> Asked:
    """Serve prompts of one token beside answers, and note what is asked of the dispatcher."""
    rng = random.Random(4)
    prompts = [{"prompt_token_ids": tokens(rng, count)} for count in (40, 30, 1, 1, 20, 1)]
    asked: Asked = []
    with engine(model, avmp={}, enable_prefix_caching=True, max_num_seqs=2) as llm:
        scheduler, dispatcher = scheduler_of(llm), runner_of(llm).cudagraph_dispatcher
        schedule, dispatch = scheduler.schedule, dispatcher.dispatch
        first = [False, False]

        def noting(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            first[0] = set(output.num_scheduled_tokens.values()) == {1}
            first[1] = any(not new.num_computed_tokens for new in output.scheduled_new_reqs)
            return output

        def dispatching(*args: Any, **kwargs: Any) -> Any:
            if first[0]:
                asked.append((first[1], kwargs["uniform_decode"]))
            return dispatch(*args, **kwargs)

        scheduler.schedule, dispatcher.dispatch = noting, dispatching
        greedy(llm, prompts, 6)
    assert {begins for begins, _ in asked} == {True, False}
    return asked


def test_first_tokens_run_in_no_graph_of_decodes(tiny_jamba):
    assert all(uniform is not begins for begins, uniform in one_token_batches(tiny_jamba))


def test_control_stock_goes_by_shape(tiny_jamba, monkeypatch):
    """What vLLM does by itself is seen."""
    stock = GPUModelRunner._determine_batch_execution_and_padding
    monkeypatch.setattr(MovePlanRunnerMixin, "_determine_batch_execution_and_padding", stock)
    assert all(uniform for _, uniform in one_token_batches(tiny_jamba))
