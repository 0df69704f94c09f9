"""In-process engines and workloads that the engine tests share."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from avmp_vllm.core import Kind, Statistics

#: Enough bytes for every workload here without any pressure.
AMPLE = 64 << 20

Prompt = dict[str, list[int]]


def tokens(rng: random.Random, count: int) -> list[int]:
    """Random token ids that no tokenizer of ours gives a special meaning."""
    return [rng.randrange(10, 250) for _ in range(count)]


def mixed_prompts(seed: int = 1, count: int = 20) -> list[Prompt]:
    """Short and long prompts; a third share a prefix that ends inside a page."""
    rng = random.Random(seed)
    prefix = tokens(rng, 150)
    prompts = []
    for index in range(count):
        prompt = tokens(rng, rng.choice([1, 5, 33, 90, 200, 290]))
        if index % 3 == 0:
            prompt = prefix + prompt[:60]
        prompts.append({"prompt_token_ids": prompt})
    return prompts


def short_prompts(seed: int = 1) -> list[Prompt]:
    """A few tokens each, for kernels that run interpreted."""
    rng = random.Random(seed)
    return [{"prompt_token_ids": tokens(rng, count)} for count in (18, 3, 14)]


def branching_prompts() -> list[Prompt]:
    """Prompts of which each leaves an earlier one inside of a block of 128 tokens, pages being 32.

    The second and third resume behind the first's last page, at 160. The others leave those behind
    the block's end at 256, so that a state at 160 which is published for 256 is read.
    """
    rng = random.Random(5)
    first = tokens(rng, 180)
    long, short = first + tokens(rng, 260), first + tokens(rng, 180)
    prompts = [first, long, short, long[:260] + tokens(rng, 8), short[:260] + tokens(rng, 8)]
    return [{"prompt_token_ids": prompt} for prompt in prompts]


@contextlib.contextmanager
def engine(model: str, *, avmp: dict[str, Any] | None = None, **options: Any) -> Iterator[LLM]:
    """Run a real vLLM engine in this process.

    Args:
        model: Folder of a checkpoint.
        avmp: AVMP's options, or None for stock vLLM.
        options: Of ``LLM``; the defaults here suit tiny models in fp32.
    """
    arguments = {
        "dtype": "float32",
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "max_model_len": 512,
        "kv_cache_memory_bytes": AMPLE,
        "enable_prefix_caching": False,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "seed": 0,
        "disable_log_stats": False,
        **options,
    }
    if torch.cuda.is_available():
        # With the bytes given, all that this does is refuse to start beside other engines.
        arguments.setdefault("gpu_memory_utilization", 0.01)
    if avmp is not None:
        # Short prompts are worth a state here, or next to nothing would hit.
        avmp = {"verify": True, "cut_tokens": 0, **avmp}
        arguments["additional_config"] = {"block_manager": "avmp", "avmp": avmp}
    llm = LLM(model, **arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(
    llm: LLM, prompts: Sequence[Prompt], max_tokens: int = 40, **sampling: Any
) -> list[list[list[int]]]:
    """Greedy token ids of each prompt, a list for each of its ``n`` answers."""
    # top_k=1 is greedy too, and unlike temperature 0 vLLM takes it together with n > 1.
    params = SamplingParams(top_k=1, max_tokens=max_tokens, ignore_eos=True, **sampling)
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [[list(answer.token_ids) for answer in output.outputs] for output in outputs]


@functools.cache
def _stock_answers(model: str, seed: int, count: int, max_tokens: int) -> list[list[list[int]]]:
    with engine(model) as llm:
        return greedy(llm, mixed_prompts(seed, count), max_tokens)


def stock_answers(
    model: str, seed: int = 1, count: int = 20, max_tokens: int = 40
) -> list[list[list[int]]]:
    """What stock vLLM answers to the mixed prompts, without prefix cache or pressure."""
    return _stock_answers(model, seed, count, max_tokens)


def scheduler_of(llm: LLM) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def runner_of(llm: LLM) -> Any:
    """The engine's model runner."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


@dataclass
class Counted:
    """What an engine did."""

    statistics: Statistics
    preemptions: int


def counted(llm: LLM) -> Counted:
    """The arena's counters and vLLM's count of preemptions."""
    preemptions = sum(
        metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"
    )
    return Counted(scheduler_of(llm).kv_cache_manager.arena.statistics, int(preemptions))


def assert_nothing_held(llm: LLM) -> None:
    """After the last request every page is free or evictable, and the bytes add up."""
    manager = scheduler_of(llm).kv_cache_manager
    manager.verify()
    for kind in Kind:
        assert manager.arena.used(kind) == 0, kind
    assert manager.usage == 0.0
