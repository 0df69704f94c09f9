"""What happens when a configuration asks for AVMP."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm import envs

from avmp_vllm.engine.entry import connectors, last_line, options, seams
from avmp_vllm.engine.entry.config import SELECTED, ConfigError, selected
from avmp_vllm.engine.entry.minors import vllm_version
from avmp_vllm.version import SUPPORTED_VLLM, SUPPORTED_VLLM_TEXT, minor_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

#: vLLM's worker classes and ours, which subclass them.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "avmp_vllm.engine.worker.cpu.AVMPCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "avmp_vllm.engine.worker.gpu.AVMPGPUWorker",
}
SCHEDULER = "avmp_vllm.engine.scheduler.scheduler.AVMPScheduler"
ASYNC_SCHEDULER = "avmp_vllm.engine.scheduler.scheduler.AVMPAsyncScheduler"


def require_supported_vllm(found: str) -> None:
    """Refuse a vLLM that the seams were not written for.

    Raises:
        ConfigError: Naming both versions.
    """
    if minor_of(found) not in SUPPORTED_VLLM:
        raise ConfigError(
            f"--block-manager avmp works with vLLM {SUPPORTED_VLLM_TEXT}, and this is vLLM "
            f"{found}: install vLLM {SUPPORTED_VLLM_TEXT}, or the avmp-vllm release for "
            f"vLLM {found}"
        )


def create_engine_config(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineArgs.create_engine_config``: put AVMP in charge where it is asked for."""

    @last_line.left_by(ConfigError)
    def wrapper(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        config = selected(self.additional_config)
        if config is None:
            return stock(self, *args, **kwargs)
        require_supported_vllm(vllm_version())
        # Read once, here: other processes get the values, not a file's name or a variable.
        self.additional_config = {**self.additional_config, "avmp": config.model_dump()}
        # Child processes install the engine seams when they load their plugins.
        os.environ[SELECTED] = "avmp"
        seams.install(seams.ENGINE)
        if envs.VLLM_SERVER_DEV_MODE:
            seams.install(seams.API)
        if config.kernels == "handles":
            from avmp_vllm.engine.handles import selection as handle_kernels

            handle_kernels.select_backend(self)
        vllm_config = stock(self, *args, **kwargs)
        if self.async_scheduling and self.speculative_config is None:
            # The CPU platform turns asynchronous scheduling off because it gains nothing there;
            # somebody who asks for it by name gets it.
            vllm_config.scheduler_config.async_scheduling = True
        take_charge(vllm_config)
        return vllm_config

    return wrapper


def take_charge(vllm_config: VllmConfig) -> None:
    """Check that AVMP can serve a configuration, and name its classes there.

    Raises:
        ConfigError: Naming the option that stands in the way.
    """
    options.refuse(vllm_config)
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.worker_cls not in WORKERS:
        raise ConfigError(
            f"--worker-cls {parallel.worker_cls}: AVMP brings its own worker class for CPU and "
            "CUDA; remove the option, or use --block-manager default"
        )
    if scheduler.scheduler_cls is not None:
        raise ConfigError(
            f"--scheduler-cls {scheduler.scheduler_cls}: AVMP brings its own scheduler class; "
            "remove the option, or use --block-manager default"
        )
    connectors.take_charge(vllm_config.kv_transfer_config)
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    scheduler.scheduler_cls = ASYNC_SCHEDULER if scheduler.async_scheduling else SCHEDULER
