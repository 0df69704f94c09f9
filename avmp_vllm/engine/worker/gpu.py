"""The CUDA worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_vllm.engine.worker.memory import ArenaWorker
from avmp_vllm.engine.worker.v1.runner import AVMPGPUModelRunner

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


class AVMPGPUWorker(ArenaWorker):
    """vLLM's CUDA worker with AVMP's runner."""

    def _make_model_runner(self) -> GPUModelRunner:
        if self.use_v2_model_runner:
            # Imported here because it needs Triton.
            from avmp_vllm.engine.worker.v2.runner import AVMPModelRunnerV2

            return AVMPModelRunnerV2(self.vllm_config, self.device)
        return AVMPGPUModelRunner(self.vllm_config, self.device)
