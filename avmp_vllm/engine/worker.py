"""The CPU worker, and what every Model Runner V1 does: apply move plans, resolve block tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.backing.torch_buffer import TorchBuffer
from avmp_vllm.core import InvariantViolation, Kind, MovePlan
from avmp_vllm.engine.block_tables import PAGE_TABLE, HandleBuffer
from avmp_vllm.engine.layout import AVMPCacheConfig, kind_of_spec
from avmp_vllm.engine.scheduler import PLAN

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.mamba_utils import MambaBuffers


class MovePlanRunnerMixin(GPUModelRunner):
    """Model Runner V1 over an arena."""

    page_table: PageTable
    arena_buffer: TorchBuffer
    _plans_applied = 0

    def initialize_kv_cache(
        self, kv_cache_config: AVMPCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        """Make the cache, then put handles into the block tables and a page table behind them."""
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        assert kv_cache_config.geometry is not None
        self.page_table = PageTable(kv_cache_config.geometry)
        for group, table in zip(
            kv_cache_config.kv_cache_groups,
            self.input_batch.block_table.block_tables,
            strict=True,
        ):
            kind = kind_of_spec(group.kv_cache_spec)
            table.block_table = HandleBuffer(table.block_table, table, self.page_table, kind)

    def initialize_kv_cache_tensors(
        self, kv_cache_config: AVMPCacheConfig, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Make the tensors, and keep hold of the one buffer that all of them view."""
        tensors = super().initialize_kv_cache_tensors(kv_cache_config, *args, **kwargs)
        storage = next(iter(tensors.values())).untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        assert kv_cache_config.geometry is not None
        self.arena_buffer = TorchBuffer(raw, kv_cache_config.geometry)
        return tensors

    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Apply the step's plan, even if the step has no tokens, then run it."""
        plan = getattr(scheduler_output, PLAN, None)
        if plan is not None:
            self._apply(plan)
        return super().execute_model(scheduler_output, *args, **kwargs)

    def _apply(self, plan: MovePlan) -> None:
        self._plans_applied += 1
        if plan.number != self._plans_applied:
            raise InvariantViolation(
                f"move plan {plan.number} arrived after {self._plans_applied - 1} plans"
            )
        self.page_table.apply(plan.relocations)
        self.arena_buffer.apply(plan)
        if plan.digest is not None:
            known, expected = plan.digest
            if self.page_table.digest(dict(zip(Kind, known, strict=True))) != expected:
                raise InvariantViolation(
                    f"the worker's page table differs from the scheduler's at plan {plan.number}"
                )

    def _get_mamba_bufs(self) -> MambaBuffers:
        buffers = super()._get_mamba_bufs()
        setattr(buffers.preprocess, PAGE_TABLE, self.page_table)
        return buffers


class AVMPCPUModelRunner(MovePlanRunnerMixin, CPUModelRunner):
    """Runner V1 on the CPU."""


class AVMPCPUWorker(CPUWorker):
    """vLLM's CPU worker with AVMP's runner."""

    def init_device(self) -> None:
        """Set the process up as vLLM does, then make AVMP's runner instead of vLLM's."""
        super().init_device()
        self.model_runner = AVMPCPUModelRunner(self.vllm_config, torch.device("cpu"))
