"""The CUDA worker. It has not run on a GPU yet."""

from __future__ import annotations

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from avmp_vllm.engine.worker import MovePlanRunnerMixin


class AVMPGPUModelRunner(MovePlanRunnerMixin, GPUModelRunner):
    """Runner V1 on CUDA."""

    def _init_kv_zero_meta(self) -> None:
        """Nothing to prepare: move plans zero pages, by kind."""


class AVMPGPUWorker(Worker):
    """vLLM's CUDA worker with AVMP's runner."""

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            # Imported here because it needs Triton.
            from avmp_vllm.engine.v2_runner import AVMPModelRunnerV2

            return AVMPModelRunnerV2(self.vllm_config, self.device)
        return AVMPGPUModelRunner(self.vllm_config, self.device)
