"""Model Runner V2, vLLM's default on CUDA, over an arena.

Plans are applied outside of any captured graph. What a graph reads (block tables, slot mapping,
page table) lies in buffers that keep their addresses. Dummy runs read null pages and write to none.
Warm-up requests, which vLLM numbers 1 and up in all groups, get free KV pages, and null in place of
SSM blocks because their numbers lack the SSM pool's tag.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from avmp_vllm.backing.device_page_table import DevicePageTable
from avmp_vllm.backing.kernel_buffer import KernelBuffer
from avmp_vllm.backing.torch_buffer import bytes_behind
from avmp_vllm.engine.entry import seams
from avmp_vllm.engine.entry.config import selected
from avmp_vllm.engine.handles import selection as handle_kernels
from avmp_vllm.engine.layout.arena import AVMPCacheConfig
from avmp_vllm.engine.layout.cold import state_codec
from avmp_vllm.engine.layout.groups import first_spec, kind_of_spec
from avmp_vllm.engine.layout.message import PLAN
from avmp_vllm.engine.worker.elastic import ArenaRange, allocated_from, memory_for
from avmp_vllm.engine.worker.plans import PlanApplier
from avmp_vllm.engine.worker.v2.block_tables import ArenaBlockTables
from avmp_vllm.engine.worker.v2.check import BatchCheck

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.worker.gpu.input_batch import InputBatch


class AVMPModelRunnerV2(GPUModelRunner):
    """Runner V2, as it runs on CUDA."""

    kv_cache_config: AVMPCacheConfig
    _block_tables: ArenaBlockTables
    _page_table: DevicePageTable
    _plans: PlanApplier | None = None
    arena_memory: ArenaRange | None = None
    _check: BatchCheck | None = None
    _planned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        seams.install(seams.RUNNER_V2)
        super().__init__(*args, **kwargs)
        config = selected(self.vllm_config.additional_config)
        assert config is not None
        self._verify = config.verify
        self._by_handle = config.kernels == "handles"
        if self._by_handle:
            handle_kernels.register()

    @property
    def block_tables(self) -> ArenaBlockTables:
        """The tables that vLLM's code sees."""
        return self._block_tables

    @block_tables.setter
    def block_tables(self, stock: BlockTables) -> None:
        # vLLM makes its tables in the middle of initialize_kv_cache, and hands their addresses out
        # before it returns; ours must stand in their place from the start.
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self._page_table = DevicePageTable(self.kv_cache_config.own, self.device)
        self._block_tables = ArenaBlockTables(
            stock,
            [kind_of_spec(spec) for spec in specs],
            self._page_table,
            by_handle=[self._by_handle and handle_kernels.takes_handles(spec) for spec in specs],
            keep_rows=[
                self.num_speculative_steps > 0
                or (isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "align")
                for spec in map(first_spec, specs)
            ],
        )

    def initialize_kv_cache(
        self,
        kv_cache_config: AVMPCacheConfig,
        is_profiling: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Make the cache, and what applies move plans to it."""
        if self._by_handle:
            handle_kernels.check_groups(kv_cache_config)
        memory = memory_for(kv_cache_config, self.device, is_profiling)
        with allocated_from(memory):
            super().initialize_kv_cache(kv_cache_config, is_profiling, *args, **kwargs)
        geometry = kv_cache_config.own
        if self._by_handle:
            handle_kernels.bind(
                self.compilation_config.static_forward_context,
                self._page_table.resident,
                self.dtype,
                geometry.page_tokens,
            )
        # The cache that CUDA graphs are profiled on gets no plans, and must not be kept alive.
        if not is_profiling:
            codec = state_codec(self.vllm_config, kv_cache_config)
            buffer = KernelBuffer(bytes_behind(self.kv_caches[0]), geometry, codec)
            self._page_table.warm_up()
            buffer.warm_up()
            self.arena_memory = memory
            self._plans = (
                PlanApplier(self._page_table, buffer, kv_cache_config.shift)
                if memory is None
                else memory.applier(self._page_table, buffer)
            )
            self._plans.saves.bind(self.compilation_config.static_forward_context)
            if self._verify:
                self._check = BatchCheck(self._block_tables, self._page_table.resident, geometry)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The layers' specs; AVMP's own kernels save states inside of chunks."""
        specs = super().get_kv_cache_spec()
        return handle_kernels.saving_inside(specs) if self._by_handle else specs

    def _init_kv_zero_meta(self) -> None:
        """Nothing to prepare: move plans zero pages, by kind."""

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Apply the step's plan, even if the step has no tokens, then run it."""
        if self._plans is not None:
            self._plans.apply_from(scheduler_output)
        # Under verification every step of the scheduler has a plan; warm-ups and dummies have none.
        self._planned = getattr(scheduler_output, PLAN, None) is not None
        result = super().execute_model(scheduler_output, *args, **kwargs)
        if self._plans is not None:
            self._plans.saves.end()
        return result

    def prepare_attn(
        self, input_batch: InputBatch
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Gather and resolve the batch's block tables and slot mapping.

        Raises:
            InvariantViolation: Under verification, naming the first handle that names no page.
        """
        if self._check is not None and self._planned:
            self._check.check(input_batch)
        return self._block_tables.resolve(input_batch)

    def prepare_dummy_attn(
        self, input_batch: InputBatch, valid_state_slots: bool = False
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Null pages for a dummy run; with state slots, which only ReplaySSM asks for, refuse."""
        if valid_state_slots:
            raise NotImplementedError("AVMP has no state slots of its own for dummy runs")
        return super().prepare_dummy_attn(input_batch)

    def shutdown(self) -> None:
        """Let go of the arena's bytes with everything else."""
        self._plans = self._check = None
        super().shutdown()
        if self.arena_memory is not None:
            self.arena_memory.close()


class AVMPCPUModelRunnerV2(AVMPModelRunnerV2, CPUModelRunner):
    """Runner V2 on the CPU, which needs a Triton that runs there."""
