"""Model Runner V1: applies move plans, resolves block tables on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.backing.torch_buffer import TorchBuffer, bytes_behind
from avmp_vllm.engine.entry import seams
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.cold import state_codec
from avmp_vllm.engine.layout.groups import kind_of_spec
from avmp_vllm.engine.worker.elastic import ArenaRange, allocated_from, memory_for
from avmp_vllm.engine.worker.plans import PlanApplier
from avmp_vllm.engine.worker.profiling import initialize_least_cache
from avmp_vllm.engine.worker.v1.block_tables import PAGE_TABLE, HandleBuffer

if TYPE_CHECKING:
    import numpy as np
    import torch
    from vllm.sequence import IntermediateTensors
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.mamba_utils import MambaBuffers


class MovePlanRunnerMixin(GPUModelRunner):
    """Model Runner V1 over an arena."""

    page_table: PageTable
    _any_cache: torch.Tensor | None
    intermediate_tensors: IntermediateTensors | None
    _plans: PlanApplier | None = None
    arena_memory: ArenaRange | None = None

    def initialize_kv_cache(
        self,
        kv_cache_config: AVMPCacheConfig,
        is_profiling: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make the cache, then put handles into the block tables and a page table behind them."""
        memory = memory_for(kv_cache_config, self.device, is_profiling)
        if memory is not None:
            seams.install(seams.RUNNER_V1)
        with allocated_from(memory):
            super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        geometry = kv_cache_config.own
        self.page_table = PageTable(geometry)
        for group, table in zip(
            kv_cache_config.kv_cache_groups,
            self.input_batch.block_table.block_tables,
            strict=True,
        ):
            kind = kind_of_spec(group.kv_cache_spec)
            table.block_table = HandleBuffer(table.block_table, table, self.page_table, kind)
        cache, self._any_cache = self._any_cache, None
        # The cache that CUDA graphs are profiled on gets no plans, and must not be kept alive.
        if not is_profiling:
            assert cache is not None
            codec = state_codec(self.vllm_config, kv_cache_config)
            buffer = TorchBuffer(bytes_behind(cache), geometry, codec)
            self.arena_memory = memory
            self._plans = (
                PlanApplier(self.page_table, buffer, kv_cache_config.shift)
                if memory is None
                else memory.applier(self.page_table, buffer)
            )
            self._plans.saves.bind(self.compilation_config.static_forward_context)

    def initialize_kv_cache_tensors(
        self, kv_cache_config: AVMPCacheConfig, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Make the tensors, and note one of them: all are views of the arena's one buffer."""
        tensors = super().initialize_kv_cache_tensors(kv_cache_config, *args, **kwargs)
        self._any_cache = next(iter(tensors.values()))
        return tensors

    def _init_kv_zero_meta(self) -> None:
        """Nothing to prepare: move plans zero pages, by kind."""

    def _init_minimal_kv_cache_for_profiling(self) -> None:
        initialize_least_cache(self)

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Apply the step's plan, even if the step has no tokens, then run it."""
        if self._plans is not None:
            self._plans.apply_from(scheduler_output)
        result = super().execute_model(scheduler_output, *args, **kwargs)
        if self._plans is not None:
            self._plans.saves.end()
        return result

    def _determine_batch_execution_and_padding(
        self,
        num_tokens: int,
        num_reqs: int,
        num_scheduled_tokens_np: np.ndarray,
        *args: Any,
        force_uniform_decode: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Choose how a batch runs: a graph of decodes only where all rows are decodes.

        Runner V1 goes by shape alone: a prompt of one token beside decodes has theirs, and the
        graph would read a state that the request does not have. V2 looks, as this does.
        """
        if force_uniform_decode is None:
            batch = self.input_batch
            computed = batch.num_computed_tokens_cpu[:num_reqs]
            prompts = computed < batch.num_prompt_tokens[:num_reqs]
            # One token behind others of its prompt does what a decode does.
            if (prompts & ((computed == 0) | (num_scheduled_tokens_np > 1))).any():
                force_uniform_decode = False
        return super()._determine_batch_execution_and_padding(
            num_tokens,
            num_reqs,
            num_scheduled_tokens_np,
            *args,
            force_uniform_decode=force_uniform_decode,
            **kwargs,
        )

    def shutdown(self) -> None:
        """Let go of the arena's bytes with everything else."""
        self._plans = None
        super().shutdown()
        if self.arena_memory is not None:
            self.arena_memory.close()

    def _get_mamba_bufs(self) -> MambaBuffers:
        buffers = super()._get_mamba_bufs()
        setattr(buffers.preprocess, PAGE_TABLE, self.page_table)
        return buffers


class AVMPGPUModelRunner(MovePlanRunnerMixin, GPUModelRunner):
    """Runner V1 on CUDA."""


class AVMPCPUModelRunner(MovePlanRunnerMixin, CPUModelRunner):
    """Runner V1 on the CPU."""

    def sync_and_gather_intermediate_tensors(
        self, *args: Any, **kwargs: Any
    ) -> IntermediateTensors:
        """Make what a later pipeline stage receives into, then receive.

        vLLM makes it in a dummy run, which its CPU worker leaves out where execution is eager and
        the bytes of the cache are given.
        """
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return super().sync_and_gather_intermediate_tensors(*args, **kwargs)
