"""Model Runner V2 without a GPU: ``python v2_process.py RESULT.json JAMBA GRANITE``.

V2 needs Triton, whose interpreter can only be chosen for a whole process. So the V2 tests run in
this one, a scenario after another, and write down what happened.
"""

from __future__ import annotations

import triton_on_cpu  # noqa: F401

# isort: split
import json
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from enginelib import (
    assert_nothing_held,
    counted,
    engine,
    greedy,
    mixed_prompts,
    runner_of,
    scheduler_of,
    short_prompts,
)
from vllm.v1.worker import mamba_utils

from avmp_vllm.backing.device_page_table import DevicePageTable
from avmp_vllm.backing.kernel_buffer import KernelBuffer
from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.engine.plans import bytes_behind

# Programs a state in the copies of prefix caching; each costs the interpreter a millisecond.
mamba_utils._TEMPORAL_TILES = 1

#: Of each scenario: arena bytes, prefix caching, and the mixed prompts (seed, count, new tokens).
#: Chosen so that capacity migrates, live pages relocate and requests are preempted.
WORKLOADS = {
    "no_cache": (1_300_000, False, (3, 12, 24)),
    "cache": (1_200_000, True, (1, 8, 12)),
    "granite": (880_000, True, (1, 8, 12)),
}


@contextmanager
def workload(name: str, model: str, **options: Any) -> Iterator[Any]:
    """An engine under pressure, and a function that serves the workload's prompts once."""
    memory, caching, (seed, count, new_tokens) = WORKLOADS[name]
    # Without room to grow, so that requests are admitted until some must be preempted.
    avmp = {
        "checkpoint_tokens": 128,
        "migration_batch": 8,
        "growth_tokens": 0,
        **options.pop("avmp", {}),
    }
    with engine(
        model,
        avmp=avmp,
        kv_cache_memory_bytes=memory,
        enable_prefix_caching=caching,
        **options,
    ) as llm:
        # Temperature 0 takes the sampler's argmax; the top-k kernel does not run interpreted.
        yield llm, lambda: greedy(llm, mixed_prompts(seed, count), new_tokens, temperature=0)


def serve(name: str, model: str, rounds: int = 2, **options: Any) -> dict[str, Any]:
    """Serve a workload some times (the second hits a prefix cache) and say what happened."""
    with workload(name, model, **options) as (llm, once):
        answers = [once() for _ in range(rounds)]
        assert_nothing_held(llm)
        did = counted(llm)
        return {
            "rounds": answers,
            "runner": type(runner_of(llm)).__name__,
            "scheduler": type(scheduler_of(llm)).__name__,
            "migrations": sum(did.statistics.migrations.values()),
            "relocations": sum(did.statistics.relocations.values()),
            "preemptions": did.preemptions,
        }


def broken(model: str, *patches: Any) -> dict[str, Any]:
    """Serve a workload with something left out; checks that would notice it are off."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return serve("cache", model, rounds=1, avmp={"verify": False})


def without_rows() -> Any:
    """Leave the physical SSM blocks by request slot as they are, null."""
    # vLLM's CPU worker replaces what the CPU lacks, so it comes before the runner's modules.
    import avmp_vllm.engine.worker  # noqa: F401

    # isort: split
    from avmp_vllm.engine.v2_block_tables import ArenaBlockTables

    made = ArenaBlockTables.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "keep_rows": False})

    return mock.patch.object(ArenaBlockTables, "__init__", make)


def poisoned(model: str) -> dict[str, Any]:
    """Every page that a relocation leaves is filled with NaN."""
    applied = KernelBuffer.apply

    def poisoning(self: KernelBuffer, plan: Any) -> None:
        copies = plan.relocations
        for move in copies:
            applied(self, SimpleNamespace(relocations=[move], zeros=[], copies=[]))
            size = self._page_bytes[move.kind]
            page = self._bytes[move.source * size : (move.source + 1) * size]
            page.view(torch.float32).fill_(float("nan"))
        applied(self, SimpleNamespace(relocations=[], zeros=plan.zeros, copies=plan.copies))

    with mock.patch.object(KernelBuffer, "apply", poisoning):
        return serve("cache", model, rounds=1)


def dummy_runs(model: str) -> dict[str, Any]:
    """Warm-up and dummy runs, as on CUDA, before and between real steps; graphs' addresses."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    def dummy(runner: Any, arena: torch.Tensor) -> bool:
        """Run one; return whether all bytes outside of the null pages stayed."""
        geometry = runner.kv_cache_config.geometry
        null = geometry.null_blocks * geometry.block_bytes
        before = arena[null:].clone()
        for tokens, decode in ((16, False), (4, True)):
            runner._dummy_run(tokens, uniform_decode=decode)
        return torch.equal(before, arena[null:])

    with workload("cache", model) as (llm, once):
        worker = llm.llm_engine.model_executor.driver_worker.worker
        runner = worker.model_runner
        arena = bytes_behind(runner.kv_caches[0])
        tables = runner.block_tables
        addresses = [t.data_ptr() for t in (*tables.input_block_tables, tables.slot_mappings)]
        addresses.append(runner._page_table.resident.entries.data_ptr())
        states = [table.gpu.data_ptr() for table in tables.block_tables]
        warmed = run_mixed_prefill_decode_warmup(
            runner, worker.execute_model, worker.sample_tokens, 40
        )
        untouched = [dummy(runner, arena)]
        seen: set[int] = set()
        executed = runner.execute_model
        steps = 0

        def with_dummies(output: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if not kwargs.get("dummy_run") and steps % 5 == 0:
                steps += 1
                untouched.append(dummy(runner, arena))
            return executed(output, *args, **kwargs)

        resolved = tables.resolve

        def noting(batch: Any) -> Any:
            block_tables, slots = resolved(batch)
            seen.update(t.data_ptr() for t in (*block_tables, slots))
            return block_tables, slots

        with (
            mock.patch.object(runner, "execute_model", with_dummies),
            mock.patch.object(tables, "resolve", noting),
        ):
            rounds = [once() for _ in range(2)]
        assert_nothing_held(llm)
        after = [t.data_ptr() for t in (*tables.input_block_tables, tables.slot_mappings)]
        after.append(runner._page_table.resident.entries.data_ptr())
        return {
            "rounds": rounds,
            "warmed": warmed,
            "dummies": len(untouched),
            "untouched": all(untouched),
            "same_addresses": after == addresses
            and seen == set(addresses[:-1])
            and states == [table.gpu.data_ptr() for table in tables.block_tables],
        }


def graph_profiling(model: str) -> dict[str, Any]:
    """The throwaway cache for graph profiling: made, run on, released; then serve as if nothing."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.worker.gpu import cudagraph_utils

    with workload("cache", model) as (llm, once):
        runner = runner_of(llm)
        real = runner.kv_cache_config
        # What CUDA would have set; no graphs are captured on the CPU.
        runner.compilation_config.max_cudagraph_capture_size = 4
        with set_current_vllm_config(runner.vllm_config):
            cudagraph_utils._teardown_profiling_state(runner)
            runner._plans = None
            cudagraph_utils._init_minimal_kv_cache_for_profiling(runner)
            least = runner.kv_cache_config.geometry
            storage = weakref.ref(bytes_behind(runner.kv_caches[0]).untyped_storage())
            held = storage() is not None
            runner._dummy_run(16)
            sized = runner.cache_config.num_gpu_blocks
            planless = runner._plans is None
            cudagraph_utils._teardown_profiling_state(runner)
            runner.initialize_kv_cache(real)
        return {
            "rounds": [once()],
            "sequences": least.sequences(1),
            "planless": planless,
            "sized": sized,
            "pages": least.pages,
            "released": held and storage() is None,
        }


def by_handle(model: str) -> dict[str, Any]:
    """AVMP's own kernels. Interpreted, their scan takes a second for a few tokens of prompt."""
    with engine(model, avmp={"kernels": "handles"}, enable_prefix_caching=True) as llm:
        runner = runner_of(llm)
        geometry = runner.kv_cache_config.geometry
        answers = greedy(llm, short_prompts(), 5, temperature=0)
        assert_nothing_held(llm)
        tables = runner.block_tables.input_block_tables
        return {
            "rounds": [answers],
            "page_tokens": geometry.page_tokens,
            "backends": sorted({g.backend.__name__ for gs in runner.attn_groups for g in gs}),
            "ssm_handles": bool((tables[1] >> 30).any()),
        }


def scenarios(jamba: str, granite: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """All that this process can do, by name."""
    write_nothing = mock.patch.object(DevicePageTable, "apply", PageTable.apply)
    move_nothing = mock.patch("avmp_vllm.backing.kernel_buffer.relocate")
    return {
        "no_cache": lambda: serve("no_cache", jamba, rounds=1),
        "cache": lambda: serve("cache", jamba),
        "async": lambda: serve("cache", jamba, async_scheduling=True),
        "granite": lambda: serve("granite", granite),
        "handles": lambda: by_handle(jamba),
        "handles_granite": lambda: by_handle(granite),
        "poisoned": lambda: poisoned(jamba),
        "dummy_runs": lambda: dummy_runs(jamba),
        "graph_profiling": lambda: graph_profiling(jamba),
        "no_table_writes": lambda: broken(jamba, write_nothing),
        "no_copies": lambda: broken(jamba, move_nothing),
        "no_rows": lambda: broken(jamba, without_rows()),
    }


def main(result: str, jamba: str, granite: str, *names: str) -> None:
    """Run the scenarios (default: all) and write what they return."""
    done: dict[str, Any] = {}
    for name, run in scenarios(jamba, granite).items():
        if names and name not in names:
            continue
        began = time.monotonic()
        done[name] = run()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        Path(result).write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
