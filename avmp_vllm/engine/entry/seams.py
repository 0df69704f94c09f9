"""Every place where vLLM is changed.

A seam names what is wrapped, what wraps it, why, and which change of vLLM would make it
unnecessary. The selection seams are always there: they add the flag and look at the configuration.
The engine seams are installed in a process only once AVMP is selected, and even then they hand over
to vLLM for a configuration that did not ask for AVMP. Schedulers and workers need no seam: vLLM
takes their class names from its configuration.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from avmp_vllm.engine.entry import minors
from avmp_vllm.version import SUPPORTED_VLLM

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Seam:
    """One wrapped function of vLLM.

    Attributes:
        module: Module that is looked up at call time.
        path: Attribute path in it.
        wrapper: ``module:function`` that takes the stock function and returns its replacement.
        signature: Parameters that the wrapper relies on; the drift test compares them.
        why: What AVMP needs there.
        until: What upstream would have to offer instead.
        minors: Minor releases of vLLM that have it.
    """

    module: str
    path: str
    wrapper: str
    signature: tuple[str, ...]
    why: str
    until: str
    minors: tuple[str, ...] = SUPPORTED_VLLM


SELECTION = (
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.add_cli_args",
        "avmp_vllm.engine.entry.flag:add_cli_args",
        ("parser",),
        "adds --block-manager to every command that takes engine arguments",
        "a plugin hook for command line arguments",
    ),
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.from_cli_args",
        "avmp_vllm.engine.entry.flag:from_cli_args",
        ("cls", "args"),
        "carries the flag's value into additional_config",
        "a plugin hook for command line arguments",
    ),
    Seam(
        "vllm.engine.arg_utils",
        "EngineArgs.create_engine_config",
        "avmp_vllm.engine.entry.selection:create_engine_config",
        ("self", "usage_context", "headless"),
        "checks the options, and names AVMP's scheduler and worker classes",
        "a block manager option in CacheConfig",
    ),
)

ENGINE = (
    Seam(
        "vllm.platforms.interface",
        "Platform._align_hybrid_block_size",
        "avmp_vllm.engine.layout.pages:align_hybrid_block_size",
        ("cls", "vllm_config", "backend_cls"),
        "keeps pages at their exact size instead of inflating one kind to the other",
        "page sizes chosen by the block manager",
    ),
    Seam(
        "vllm.v1.engine.core",
        "EngineCore._initialize_kv_caches",
        "avmp_vllm.engine.layout.arena:initialize_kv_caches",
        ("self", "vllm_config"),
        "what is refused is the last line that the user reads, pipeline stages before all else; an "
        "elastic arena asks the workers for memory",
        "errors of the engine core handed to the process that started it",
    ),
    Seam(
        "vllm.v1.engine.core",
        "EngineCore.collective_rpc",
        "avmp_vllm.engine.scheduler.commands:collective_rpc",
        ("self", "method", "timeout", "args", "kwargs"),
        "a user sets the budget of a running engine",
        "utility methods of a plugin",
    ),
    Seam(
        "vllm.v1.engine.core",
        "get_global_kv_cache_groups",
        "avmp_vllm.engine.layout.arena:get_global_kv_cache_groups",
        ("vllm_config", "kv_cache_specs"),
        "two groups of different page size, before the bytes are known",
        "cache groups and tensors planned by the block manager",
        minors=("0.33",),
    ),
    Seam(
        "vllm.v1.engine.core",
        "get_kv_cache_configs",
        "avmp_vllm.engine.layout.arena:get_kv_cache_configs",
        ("vllm_config", "kv_cache_specs", "available_memory"),
        "two groups of different page size over one buffer",
        "cache groups and tensors planned by the block manager",
    ),
    Seam(
        "vllm.v1.engine.core",
        "update_kv_cache_capacity",
        "avmp_vllm.engine.layout.capacity:update_kv_cache_capacity",
        ("vllm_config", "kv_cache_config"),
        "says what fits in two pools",
        "capacity reported by the block manager",
    ),
    Seam(
        "vllm.v1.worker.mamba_utils",
        "collect_mamba_copy_meta",
        "avmp_vllm.engine.worker.v1.block_tables:collect_mamba_copy_meta",
        (
            "copy_bufs",
            "kv_cache_config",
            "mamba_state_copy_funcs",
            "mamba_group_ids",
            "src_block_idx",
            "dest_block_idx",
            "accept_token_bias",
            "req_state",
            "forward_context",
        ),
        "state copies of Runner V1 read block ids on the host; these are handles",
        "Runner V1's removal",
    ),
    Seam(
        "vllm.v1.metrics.loggers",
        "StatLoggerManager.__init__",
        "avmp_vllm.engine.scheduler.stat_logger:stat_logger_manager_init",
        ("self", "vllm_config", "engine_idxs"),
        "adds AVMP's metrics, without turning statistics on where the user turned them off",
        "a stat logger plugin that is chosen by configuration",
    ),
)

#: Installed where vLLM's development endpoints are, in the process that serves them.
API = (
    Seam(
        "vllm.entrypoints.serve",
        "register_vllm_dev_api_routers",
        "avmp_vllm.engine.entry.memory_api:register_dev_api_routers",
        ("app",),
        "an endpoint that shows and sets the budget of an elastic arena",
        "endpoints of a plugin",
    ),
)

_ALLOCATION = (
    "avmp_vllm.engine.worker.elastic:allocate_kv_cache",
    ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
    "an elastic arena is a range of addresses that has memory by parts",
    "a cache that its worker allocates",
)

#: Installed with the V1 runner over an elastic arena alone.
RUNNER_V1 = (Seam("vllm.v1.worker.gpu_model_runner", "allocate_kv_cache", *_ALLOCATION),)

#: Installed with the V2 runner alone: its modules may only be imported in a worker.
RUNNER_V2 = (
    Seam("vllm.v1.worker.gpu.attn_utils", "allocate_kv_cache", *_ALLOCATION),
    Seam(
        "vllm.v1.worker.gpu.cudagraph_utils",
        "_init_minimal_kv_cache_for_profiling",
        "avmp_vllm.engine.worker.profiling:init_minimal_kv_cache_for_profiling",
        ("runner",),
        "CUDA graphs are profiled on a cache of two page sizes",
        "cache groups and tensors planned by the block manager",
    ),
    Seam(
        "vllm.platforms.cpu",
        "CpuPlatform.get_attn_backend_cls",
        "avmp_vllm.engine.handles.selection:get_attn_backend_cls",
        ("cls", "selected_backend", "attn_selector_config"),
        "vLLM on CPU ignores a registered attention backend; kernels: handles is tested there",
        "registered backends on every platform",
    ),
)


def of(seams: Iterable[Seam], minor: str) -> tuple[Seam, ...]:
    """Those of some seams that a minor release of vLLM has."""
    return tuple(seam for seam in seams if minor in seam.minors)


def _owner(seam: Seam) -> tuple[Any, str]:
    owner: Any = importlib.import_module(seam.module)
    *path, name = seam.path.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def current(seam: Seam) -> Callable[..., Any]:
    """The plain function that stands at a seam now, without its class or static method wrapper."""
    owner, name = _owner(seam)
    return inspect.unwrap(
        getattr(inspect.getattr_static(owner, name), "__func__", getattr(owner, name)),
        stop=lambda function: hasattr(function, "__avmp_stock__"),
    )


def stock(seam: Seam) -> Callable[..., Any]:
    """vLLM's own function of a seam, whether or not it is wrapped now."""
    function = current(seam)
    return getattr(function, "__avmp_stock__", function)


def is_installed(seam: Seam) -> bool:
    """Whether a seam is wrapped in this process."""
    return hasattr(current(seam), "__avmp_stock__")


def install(seams: Iterable[Seam]) -> None:
    """Wrap what is not wrapped yet in this process, and what the installed vLLM has."""
    for seam in of(seams, minors.minor()):
        if is_installed(seam):
            continue
        owner, name = _owner(seam)
        static = inspect.getattr_static(owner, name)
        function = getattr(static, "__func__", static)
        module, wrapper = seam.wrapper.split(":")
        replacement = getattr(importlib.import_module(module), wrapper)(function)
        replacement.__avmp_stock__ = function
        if isinstance(static, (staticmethod, classmethod)):
            replacement = type(static)(replacement)
        setattr(owner, name, replacement)
