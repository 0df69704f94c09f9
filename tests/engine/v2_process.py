"""Model Runner V2 without a GPU: ``python v2_process.py RESULT.json MODEL,MODEL...``.

V2 needs Triton, whose interpreter can only be chosen for a whole process. So the V2 tests run in
this one, a scenario after another, and write down what happened.
"""

from __future__ import annotations

import triton_on_cpu  # noqa: F401

# isort: split
import gc
import json
import random
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import late_host
import torch
from avmp_kernels import selective_scan, state_update
from cuda_mamba import cuda_mamba_layers
from enginelib import (
    assert_nothing_held,
    branching_prompts,
    counted,
    engine,
    greedy,
    mixed_prompts,
    runner_of,
    scheduler_of,
    tokens,
)
from triton.runtime.interpreter import GridExecutor
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.worker import mamba_utils
from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

from avmp_vllm.backing.device_page_table import DevicePageTable
from avmp_vllm.backing.kernel_buffer import KernelBuffer
from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.backing.torch_buffer import bytes_behind
from avmp_vllm.core import MovePlan
from avmp_vllm.engine.layout.saves import ChunkSaves
from avmp_vllm.engine.scheduler.block_pool import AVMPBlockPool
from avmp_vllm.engine.scheduler.state_pool import StatePool

# Fewer and larger programs: one costs the interpreter as much as it has steps, however wide they
# are. Programs of a state in the copies of prefix caching; state elements of a program of AVMP's.
mamba_utils._TEMPORAL_TILES = 1
selective_scan._TILE = state_update._TILE = 1 << 20

#: Of each scenario: arena bytes, longest request, prefix caching, and the mixed prompts (seed,
#: count, new tokens). Chosen so that capacity migrates, live pages relocate and requests are
#: preempted.
WORKLOADS = {
    "no_cache": (1_300_000, 512, False, (3, 12, 24)),
    "cache": (1_200_000, 512, True, (1, 8, 12)),
    "granite": (880_000, 512, True, (1, 8, 12)),
    "handles": (330_000, 320, True, (1, 5, 12)),
    "handles_granite": (170_000, 320, True, (1, 5, 12)),
    "elastic": (8_000_000, 320, True, (1, 5, 12)),
    "cuda_mamba1": (350_000, 320, True, (1, 5, 12)),
    "cuda_mamba2": (200_000, 320, True, (1, 5, 12)),
}

#: Of a range of 8 MB, as much as the tight arena of the same workload has.
ELASTIC = {"memory": "elastic", "budget": 400_000, "chunk_bytes": 16_384, "slack_bytes": 65_536}


@contextmanager
def workload(name: str, model: str, **options: Any) -> Iterator[Any]:
    """An engine under pressure, and a function that serves the workload's prompts once.

    Every second time it serves them in the opposite order: what the time before cached last is then
    asked for before it is evicted.
    """
    memory, longest, caching, (seed, count, new_tokens) = WORKLOADS[name]
    # Without room to grow, so that requests are admitted until some must be preempted.
    avmp = {
        "checkpoint_tokens": 128,
        "migration_batch": 8,
        "admission": "growth",
        "growth_tokens": 0,
        **options.pop("avmp", {}),
    }
    with engine(
        model,
        avmp=avmp,
        kv_cache_memory_bytes=memory,
        max_model_len=longest,
        enable_prefix_caching=caching,
        **options,
    ) as llm:
        order = 1

        def once() -> list[list[list[int]]]:
            nonlocal order
            prompts = mixed_prompts(seed, count)[::order]
            # Temperature 0 takes the sampler's argmax; the top-k kernel does not run interpreted.
            answers = greedy(llm, prompts, new_tokens, temperature=0)[::order]
            order = -order
            return answers

        yield llm, once


def serve(name: str, model: str, rounds: int = 2, **options: Any) -> dict[str, Any]:
    """Serve a workload some times (the second may hit a prefix cache) and say what happened."""
    with workload(name, model, **options) as (llm, once):
        answers = [once() for _ in range(rounds)]
        assert_nothing_held(llm)
        did = counted(llm)
        runner = runner_of(llm)
        hits = next(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
        return {
            "rounds": answers,
            "runner": type(runner).__name__,
            "page_tokens": runner.kv_cache_config.geometry.page_tokens,
            "backends": sorted({g.backend.__name__ for gs in runner.attn_groups for g in gs}),
            "ssm_handles": bool((runner.block_tables.input_block_tables[-1] >> 30).any()),
            "tables": len(runner.kv_cache_config.kv_cache_groups),
            "hits": hits,
            "scheduler": type(scheduler_of(llm)).__name__,
            "migrations": sum(did.statistics.migrations.values()),
            "relocations": sum(did.statistics.relocations.values()),
            "preemptions": did.preemptions,
            "saved": saved_by(llm),
            "memory": llm.collective_rpc("avmp_memory")[0],
        }


def saved_by(llm: Any) -> int:
    """States that layers have saved inside of chunks, into blocks that AVMP chose."""
    managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
    return sum(getattr(manager, "saved", 0) for manager in managers)


def by_handle(name: str, model: str, **avmp: Any) -> dict[str, Any]:
    """Serve a workload with AVMP's own kernels, steps scheduled ahead."""
    return serve(name, model, async_scheduling=True, avmp={"kernels": "handles", **avmp})


def cuda_layers(name: str, model: str) -> dict[str, Any]:
    """Serve a workload with the Mamba layers and Triton kernels that vLLM runs on CUDA."""
    launched: set[str] = set()
    launch = GridExecutor.__call__

    def noting(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        launched.add(self.fn.__name__)
        launch(self, *args, **kwargs)

    with cuda_mamba_layers(), mock.patch.object(GridExecutor, "__call__", noting):
        return {**serve(name, model), "launched": sorted(launched)}


#: AVMP's options where drafts are made.
DRAFTING = {
    "checkpoint_tokens": 128,
    "admission": "growth",
    "growth_tokens": 0,
    "migration_batch": 8,
}
#: Drafts from what came before.
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}


def drafting(
    model: str,
    avmp: dict[str, Any] | None,
    speculative: dict[str, Any],
    layers: Callable[[], AbstractContextManager[None]],
    memory: int,
    count: int = 8,
) -> dict[str, Any]:
    """Serve prompts whose answers are drafted, and note every draft.

    Args:
        model: Folder of a hybrid.
        avmp: AVMP's options, None for stock vLLM.
        speculative: How drafts are made.
        layers: What has engines build the model's layers.
        memory: Bytes of AVMP's arena; stock vLLM has eight times as many.
        count: Prompts.
    """
    drafts: dict[str, list[int]] = {}
    engines: list[Any] = []
    hand_over = DraftTokensHandler.set_draft_tokens

    def noting(self: Any, batch: Any, made: torch.Tensor) -> None:
        # The scheduler gets placeholders: the drafts themselves stay on the device.
        requests = scheduler_of(engines[0]).requests if engines else {}
        for name, draft in zip(batch.req_ids, made.tolist(), strict=True):
            if name in requests:
                # By the request's number and length, which name it in any engine.
                drafts[f"{name.split('-')[0]} at {requests[name].num_tokens}"] = draft
        hand_over(self, batch, made)

    rng = random.Random(3)
    again = tokens(rng, 40)
    prompts = [
        {"prompt_token_ids": tokens(rng, rng.choice([5, 30, 60])) + again[: 8 * (i % 5)] * 2}
        for i in range(count)
    ]
    with (
        layers(),
        mock.patch.object(DraftTokensHandler, "set_draft_tokens", noting),
        engine(
            model,
            avmp=avmp,
            kv_cache_memory_bytes=8 * memory if avmp is None else memory,
            max_model_len=320,
            max_num_seqs=3,
            enable_prefix_caching=True,
            speculative_config={"num_speculative_tokens": 3, **speculative},
        ) as llm,
    ):
        engines.append(llm)
        # Backwards the second time: what was cached last is asked for before it is evicted.
        answers = [greedy(llm, asked, 16, temperature=0) for asked in (prompts, prompts[::-1])]
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        result = {
            "answers": answers,
            "drafts": drafts,
            "drafted": counts["vllm:spec_decode_num_draft_tokens"],
            "accepted": counts["vllm:spec_decode_num_accepted_tokens"],
            "hits": counts["vllm:prefix_cache_hits"],
        }
        if avmp is not None:
            assert_nothing_held(llm)
            did = counted(llm)
            result["migrations"] = sum(did.statistics.migrations.values())
            result["relocations"] = sum(did.statistics.relocations.values())
        return result


def offloading(model: str) -> dict[str, Any]:
    """Serve two rounds of prompts, with a late host behind an arena that does not hold them."""
    with engine(
        model,
        avmp={"growth_tokens": 0},
        kv_cache_memory_bytes=800_000,
        max_model_len=160,
        enable_prefix_caching=True,
        kv_transfer_config=late_host.config(64 << 20, delay=2),
    ) as llm:
        answers = [greedy(llm, prompts, 4, temperature=0) for prompts in late_host.turns()]
        assert_nothing_held(llm)
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        return {
            "answers": answers,
            "runner": type(runner_of(llm)).__name__,
            "host": counts["vllm:external_prefix_cache_hits"],
            "relocations": sum(counted(llm).statistics.relocations.values()),
        }


def branching(
    model: str, retention: int | None, *patches: Any, kernels: str = "resolved"
) -> dict[str, Any]:
    """Serve branching prompts one after the other, with layers that save states inside of a chunk.

    Args:
        model: Folder of a Mamba-2 hybrid, which runs vLLM's layers for CUDA; of a Mamba-1 hybrid
            with kernels by handle.
        retention: vLLM's ``prefix_cache_retention_interval``.
        patches: Something left out; checks that would notice it are off.
        kernels: AVMP's option.
    """
    with ExitStack() as stack:
        if kernels == "resolved":
            stack.enter_context(cuda_mamba_layers())
        for patch in patches:
            stack.enter_context(patch)
        llm = stack.enter_context(
            engine(
                model,
                avmp={"checkpoint_tokens": 128, "verify": not patches, "kernels": kernels},
                enable_prefix_caching=True,
                prefix_cache_retention_interval=retention,
                max_num_batched_tokens=512,
                kv_cache_memory_bytes=2_000_000,
            )
        )
        scheduler = scheduler_of(llm)
        chunks = 0
        schedule = scheduler.schedule

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal chunks
            output = schedule(*args, **kwargs)
            chunks += output.total_num_scheduled_tokens > 1
            return output

        scheduler.schedule = counting
        answers = [greedy(llm, [prompt], 6, temperature=0)[0] for prompt in branching_prompts()]
        hits = next(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
        return {"answers": answers, "hits": hits, "saved": saved_by(llm), "chunks": chunks}


def one_token_off() -> Any:
    """Have kernels save states one token before their position."""
    right = ChunkSaves.of_handles

    def wrong(self: ChunkSaves, states: torch.Tensor) -> Any:
        found = right(self, states)
        return None if found is None else ((found[0] - 1).clamp(min=0), found[1])

    return mock.patch.object(ChunkSaves, "of_handles", wrong)


def broken(
    model: str,
    *patches: Any,
    name: str = "cache",
    step_tokens: int = 256,
    **avmp: Any,
) -> dict[str, Any]:
    """Serve a workload with something left out; checks that would notice it are off."""
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        return serve(
            name,
            model,
            rounds=1,
            max_num_batched_tokens=step_tokens,
            avmp={"verify": False, **avmp},
        )


def without_rows() -> Any:
    """Leave the physical SSM blocks by request slot as they are, null."""
    # vLLM's CPU worker replaces what the CPU lacks, so it comes before the runner's modules.
    import avmp_vllm.engine.worker.cpu  # noqa: F401

    # isort: split
    from avmp_vllm.engine.worker.v2.block_tables import ArenaBlockTables

    made = ArenaBlockTables.__init__

    def make(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "keep_rows": [False] * len(kwargs["keep_rows"])})

    return mock.patch.object(ArenaBlockTables, "__init__", make)


def poisoned(model: str) -> dict[str, Any]:
    """Every page that a relocation leaves is filled with NaN."""
    applied = KernelBuffer.apply

    def poisoning(self: KernelBuffer, plan: Any) -> None:
        copies = plan.relocations
        for move in copies:
            applied(self, MovePlan(plan.number, relocations=[move]))
            size = self._page_bytes[move.kind]
            page = self._bytes[move.source * size : (move.source + 1) * size]
            page.view(torch.float32).fill_(float("nan"))
        applied(self, MovePlan(plan.number, zeros=plan.zeros, copies=plan.copies))

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
        for count, decode in ((16, False), (4, True)):
            runner._dummy_run(count, uniform_decode=decode)
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


def corrupted(model: str) -> dict[str, Any]:
    """Under verification: bad handles and page-table entries, and what the check says of each."""
    from avmp_vllm.core import SSM_TAG, InvariantViolation, Kind
    from avmp_vllm.engine.worker.v2.check import BatchCheck

    said: dict[str, str] = {}
    steps = good_steps = 0

    with engine(model, avmp={}, max_model_len=320, kv_cache_memory_bytes=330_000) as llm:
        runner = runner_of(llm)
        tables, entries = runner.block_tables, runner._page_table.resident.entries
        num_kv = runner._page_table.resident.num_kv
        checked = BatchCheck.check

        def damaging(self: BatchCheck, batch: Any) -> None:
            """Before a check of two requests: damage, see what it says, mend."""
            nonlocal good_steps
            checked(self, batch)
            if batch.num_reqs < 2:
                good_steps += 1
                return
            slot = int(batch.idx_mapping[1])
            for kind, column in ((Kind.KV, 2), (Kind.SSM, 0)):
                cell = tables.handles[tables.kinds.index(kind)][slot, column : column + 1]
                handle = int(cell)
                page_id = handle & (SSM_TAG - 1)
                entry = entries[page_id + (num_kv if kind is Kind.SSM else 0) :][:1]
                size = len(entries) - num_kv if kind is Kind.SSM else num_kv
                for what, where, bad in (
                    ("of the other pool", cell, handle ^ SSM_TAG),
                    ("beyond the table", cell, handle - page_id + size),
                    ("negative", cell, -handle),
                    ("unmapped", entry, 0),
                    ("outside of the arena", entry, 1 << 20),
                ):
                    good = where.clone()
                    where.fill_(bad)
                    try:
                        checked(self, batch)
                        said[f"{kind.label} {what}"] = "nothing"
                    except InvariantViolation as error:
                        named = hex(int(cell)) in str(error) and batch.req_ids[1] in str(error)
                        said[f"{kind.label} {what}"] = str(error) if named else f"unnamed: {error}"
                    where.copy_(good)
            cell.fill_(5)  # left so: the step must not run
            checked(self, batch)

        executed = runner.model.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            return executed(*args, **kwargs)

        ended = ""
        with (
            mock.patch.object(BatchCheck, "check", damaging),
            mock.patch.object(runner.model, "forward", counting),
        ):
            try:
                greedy(llm, mixed_prompts(1, 3), 2, temperature=0)
            except InvariantViolation as error:
                ended = str(error)
    return {"said": said, "ended": ended, "ran": steps - good_steps}


def unchecked(model: str, kernels: str) -> dict[str, Any]:
    """Without verification: one request's first handles name no page; the others do not notice."""
    from avmp_vllm.core import SSM_TAG, Kind
    from avmp_vllm.engine.worker.v2.block_tables import ArenaBlockTables

    given: set[int] = set()
    damaged = 0
    prompts = mixed_prompts(1, 3)
    with engine(model, avmp={"verify": False, "kernels": kernels}, max_model_len=320) as llm:
        runner = runner_of(llm)
        geometry = runner.kv_cache_config.geometry
        tables = runner.block_tables
        checks = runner._check is not None
        resolved, appended = ArenaBlockTables.resolve, ArenaBlockTables.append_block_ids

        def damaging(self: ArenaBlockTables, batch: Any) -> Any:
            nonlocal damaged
            for request, slot in zip(batch.req_ids, batch.idx_mapping.tolist(), strict=True):
                if request.startswith("0"):
                    damaged += 1
                    for table, kind in zip(tables.handles, tables.kinds, strict=True):
                        # Of the other pool; page 2 is the second request's, or was.
                        table[slot, 0] = 2 + (SSM_TAG if kind is Kind.KV else 0)
            return resolved(self, batch)

        def noting(self: ArenaBlockTables, slot: int, ids: Any, overwrite: bool) -> None:
            given.update(*ids)
            appended(self, slot, ids, overwrite)

        with (
            mock.patch.object(ArenaBlockTables, "resolve", damaging),
            mock.patch.object(ArenaBlockTables, "append_block_ids", noting),
        ):
            answers = greedy(llm, prompts, 6, temperature=0)
        assert_nothing_held(llm)
        null = {kind: 0 if kind is Kind.KV else SSM_TAG for kind in Kind}
        return {
            "rounds": [answers],
            "checks": checks,
            "damaged": damaged,
            "null_given": bool(given & set(null.values())),
            "pools_seen": len({handle >> 30 for handle in given}),
            "pages": geometry.pages,
        }


def refusals(short: str, wide: str) -> dict[str, str]:
    """What AVMP's kernels do not take, each tried on a real start; the errors by name."""
    said = {}
    for name, model, options in (
        ("head size", wide, {}),
        ("page size", short, {"avmp": {"page_tokens": 48}}),
        ("KV dtype", short, {"kv_cache_dtype": "fp8_e5m2"}),
    ):
        avmp = {"kernels": "handles", **options.pop("avmp", {})}
        try:
            with engine(model, avmp=avmp, **options):
                said[name] = "started"
        except ValueError as error:
            said[name] = str(error)
            cleanup_dist_env_and_memory()
    return {**said, **refused_layers(short)}


def refused_layers(model: str) -> dict[str, str]:
    """What no option of vLLM leads to, tried on a model's layers at the last check of a start."""
    from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

    from avmp_vllm.engine.handles import selection as handle_kernels

    with engine(model, avmp={"kernels": "handles"}) as llm:
        runner = runner_of(llm)
        layers = runner.compilation_config.static_forward_context
        conv = next(layer for layer in layers.values() if isinstance(layer, MambaMixer)).conv1d

        def bind(dtype: torch.dtype = torch.float32, page_tokens: int = 16) -> str:
            try:
                handle_kernels.bind(layers, runner._page_table.resident, dtype, page_tokens)
            except ValueError as error:
                return str(error)
            return "taken"

        said = {
            "dtype": bind(dtype=torch.float64),
            "pages at the last check": bind(page_tokens=24),
            "all as it was": bind(),
        }
        states = mock.patch.object(
            MambaMixer, "get_state_dtype", return_value=(torch.float32, torch.float8_e4m3fn)
        )
        with states:
            said["state dtype"] = bind()
        with mock.patch.object(conv, "weight", torch.nn.Parameter(torch.zeros(8, 1, 1))):
            said["convolution"] = bind()
    return said


def scenarios(
    jamba: str, granite: str, short: str, short_granite: str, wide: str
) -> dict[str, Callable[[], dict[str, Any]]]:
    """All that this process can do, by name.

    Args:
        jamba: Folder of a Mamba-1 hybrid.
        granite: Of a Mamba-2 hybrid.
        short: A Mamba-1 hybrid of few layers.
        short_granite: A Mamba-2 hybrid of few layers.
        wide: A Mamba-1 hybrid with heads that AVMP's kernels do not take.
    """
    write_nothing = mock.patch.object(DevicePageTable, "apply", PageTable.apply)
    move_nothing = mock.patch("avmp_vllm.backing.kernel_buffer.relocate")
    publish_anything = mock.patch.object(
        StatePool, "cache_full_blocks", AVMPBlockPool.cache_full_blocks
    )
    return {
        "no_cache": lambda: serve("no_cache", jamba, rounds=1),
        "cache": lambda: serve("cache", jamba),
        "async": lambda: serve("cache", jamba, async_scheduling=True),
        "granite": lambda: serve("granite", granite),
        "handles": lambda: by_handle("handles", short),
        "handles_granite": lambda: by_handle("handles_granite", short_granite),
        "elastic": lambda: serve(
            "elastic", short, async_scheduling=True, avmp={**ELASTIC, "kernels": "handles"}
        ),
        "elastic_resolved": lambda: serve("elastic", short, avmp=ELASTIC),
        "cuda_mamba1": lambda: cuda_layers("cuda_mamba1", short),
        "cuda_mamba2": lambda: cuda_layers("cuda_mamba2", short_granite),
        "offloading": lambda: offloading(jamba),
        "drafts_stock": lambda: drafting(short_granite, None, NGRAM, cuda_mamba_layers, 500_000),
        "drafts": lambda: drafting(short_granite, DRAFTING, NGRAM, cuda_mamba_layers, 500_000),
        "branching": lambda: branching(short_granite, 0),
        "branching_dense": lambda: branching(short_granite, None),
        "branching_interval": lambda: branching(short_granite, 256),
        "branching_dense_broken": lambda: branching(short_granite, None, publish_anything),
        "branching_interval_broken": lambda: branching(short_granite, 256, publish_anything),
        "branching_handles": lambda: branching(short, 0, kernels="handles"),
        "branching_handles_broken": lambda: branching(short, 0, one_token_off(), kernels="handles"),
        "poisoned": lambda: poisoned(jamba),
        "dummy_runs": lambda: dummy_runs(jamba),
        "graph_profiling": lambda: graph_profiling(jamba),
        "no_table_writes": lambda: broken(jamba, write_nothing),
        "no_copies": lambda: broken(jamba, move_nothing),
        # In short steps, so that running states move on to other blocks.
        "no_rows": lambda: broken(jamba, without_rows(), step_tokens=64),
        "handles_no_table_writes": lambda: broken(
            short, write_nothing, name="handles", kernels="handles"
        ),
        "corrupted": lambda: corrupted(short),
        "unchecked": lambda: unchecked(short, "resolved"),
        "unchecked_handles": lambda: unchecked(short, "handles"),
        "refusals": lambda: refusals(short, wide),
    }


def main(
    result: str, runs: dict[str, Callable[[], dict[str, Any]]], names: tuple[str, ...] = ()
) -> None:
    """Run scenarios, all or those named, and write what they return."""
    done: dict[str, Any] = {}
    for name, run in runs.items():
        if names and name not in names:
            continue
        gc.collect()
        gc.freeze()  # vLLM collects a dozen times a start, and thaws what it froze
        began = time.monotonic()
        done[name] = run()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        Path(result).write_text(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1], scenarios(*sys.argv[2].split(",")), tuple(sys.argv[3:]))
