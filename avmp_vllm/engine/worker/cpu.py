"""The CPU worker."""

from __future__ import annotations

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from avmp_vllm.engine.worker.memory import ArenaWorker
from avmp_vllm.engine.worker.v1.runner import AVMPCPUModelRunner


class AVMPCPUWorker(ArenaWorker, CPUWorker):
    """vLLM's CPU worker with AVMP's runner."""

    def init_device(self) -> None:
        """Set the process up as vLLM does, then make AVMP's runner instead of vLLM's."""
        super().init_device()
        if self.use_v2_model_runner:
            from avmp_vllm.engine.worker.v2.runner import AVMPCPUModelRunnerV2

            self.model_runner = AVMPCPUModelRunnerV2(self.vllm_config, self.device)
        else:
            self.model_runner = AVMPCPUModelRunner(self.vllm_config, torch.device("cpu"))
