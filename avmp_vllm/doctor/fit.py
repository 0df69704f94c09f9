"""What fits into the memory of a command line.

The model's layers are built without weights (on torch's ``meta`` device) and asked for their caches
as a worker asks them; the rest is the arithmetic of the engine's start-up log.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from avmp_vllm.doctor.check import Check, fail, ok, one_line, refusal_of, warn
from avmp_vllm.doctor.installation import GIB, host_memory

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from avmp_vllm.engine.layout.arena import AVMPCacheConfig

#: Bytes beside weights and cache: activations, graphs, the runtime. As round as the planner's.
RESERVE = GIB


class Layers(NamedTuple):
    """A model's layers without weights: the caches they ask for, and the bytes of the weights."""

    specs: dict[str, Any]
    weight_bytes: int


class Memory(NamedTuple):
    """Bytes for the cache, bytes that must be free for a start, and how the first was found."""

    cache: int
    needed: int
    how: str


def check_fit(vllm_config: VllmConfig) -> Iterator[Check]:
    """What fits, and whether one request of the longest length does."""
    from avmp_vllm.core import ArenaTooSmall
    from avmp_vllm.engine.entry.config import ConfigError
    from avmp_vllm.engine.layout.arena import config_for
    from avmp_vllm.engine.layout.limits import fit_model_len, refuse_drafts

    drafts = vllm_config.speculative_config
    for stands, what in (
        (vllm_config.parallel_config.world_size > 1, "several ranks"),
        (drafts is not None and drafts.method != "ngram", "a drafter's own layers"),
    ):
        if stands:
            yield warn("fits", f"not reckoned for {what}", "the start-up log says what fits")
            return
    try:
        layers = _build_layers(vllm_config)
        memory = _memory(vllm_config, layers.weight_bytes)
        yield _check_free(memory, layers.weight_bytes)
        if memory.cache <= 0:
            return
        refuse_drafts(vllm_config, layers.specs)
        config = config_for(vllm_config, layers.specs, memory.cache)
        yield _page_sizes(config)
        fit_model_len(vllm_config, config)
        yield from _sequences(vllm_config, config)
    except (ConfigError, ArenaTooSmall) as error:
        yield refusal_of("fits", error)
    except Exception as error:  # what vLLM raises for layers it cannot build without weights
        way_out = "`avmp plan MODEL --memory ...` reckons it from the model's config.json alone"
        yield warn("fits", f"cannot be told without loading it: {one_line(error)[:300]}", way_out)


def _build_layers(vllm_config: VllmConfig) -> Layers:
    """Build the model's layers on torch's ``meta`` device, in a process group of one."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    with tempfile.NamedTemporaryFile() as store, set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{store.name}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
            model = initialize_model(vllm_config)
        current_platform.update_block_size_for_backend(vllm_config)
        specs = get_kv_cache_spec(vllm_config)
        # The stock side of the comparison reads the layout that an engine settles here.
        layouts = get_supported_kv_cache_layouts(get_current_attn_backends(vllm_config))
        names = [layout.name for layout in layouts]
        resolve_kv_cache_layout(vllm_config, [names], specs.values())
    weights = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    return Layers(specs, sum(weights.values()))


def _memory(vllm_config: VllmConfig, weight_bytes: int) -> Memory:
    """Bytes for the cache: those given, or an estimate of what vLLM would find."""
    cache = vllm_config.cache_config
    if cache.kv_cache_memory_bytes:
        given = cache.kv_cache_memory_bytes
        return Memory(given, given + weight_bytes, "given")
    total, share = _device_memory()[1], cache.gpu_memory_utilization
    return Memory(
        int(total * share) - weight_bytes - RESERVE,
        int(total * share),  # vLLM does not start on less, whatever it needs
        f"estimated: {share:g} x {_size(total)} - {_size(weight_bytes)} of weights "
        f"- {_size(RESERVE)} for the rest",
    )


def _size(count: int) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / (1 << 20):,.1f} MiB"


def _device_memory() -> tuple[int, int]:
    """Free and total bytes where the cache would be."""
    import torch
    from vllm.platforms import current_platform

    return host_memory() if current_platform.is_cpu() else torch.cuda.mem_get_info()


def _check_free(memory: Memory, weight_bytes: int) -> Check:
    """Whether the device has now what the server would take."""
    free = _device_memory()[0]
    data = {"cache_bytes": memory.cache, "weight_bytes": weight_bytes, "free_bytes": free}
    if memory.cache <= 0:
        return fail(
            "memory",
            f"nothing is left for the cache: {memory.how}",
            "raise --gpu-memory-utilization, quantize the model, or use a larger device",
            **data,
        )
    says = f"{_size(memory.cache)} for the cache, {memory.how}"
    if memory.needed > free:
        return fail(
            "memory",
            f"{says}; the server needs {_size(memory.needed)} and {_size(free)} are free now",
            "end what holds memory, or lower --kv-cache-memory-bytes or --gpu-memory-utilization",
            **data,
        )
    return ok("memory", says, **data)


def _page_sizes(config: AVMPCacheConfig) -> Check:
    geometry = config.geometry
    assert geometry is not None
    return ok(
        "page sizes",
        f"KV page {geometry.page_bytes:,} bytes ({geometry.page_tokens} tokens), "
        f"SSM block {geometry.block_bytes:,} bytes (one state)",
        page_bytes=geometry.page_bytes,
        page_tokens=geometry.page_tokens,
        block_bytes=geometry.block_bytes,
    )


def _sequences(vllm_config: VllmConfig, config: AVMPCacheConfig) -> Iterator[Check]:
    """The sequences that fit at some lengths."""
    from avmp_vllm.engine.layout import capacity, limits

    geometry = config.geometry
    assert geometry is not None
    states = capacity.states_per_sequence(vllm_config, config)
    stock = capacity.plan_stock(vllm_config, config)
    longest = vllm_config.model_config.max_model_len
    for tokens in dict.fromkeys(min(length, longest) for length in (256, 4096, longest)):
        fit = geometry.sequences(tokens, states, config.reserve)
        of_stock = stock.sequences(tokens) if stock else None
        yield ok(
            "fits",
            f"sequences of {tokens:,} tokens: {fit:,} (stock vLLM: "
            f"{'cannot plan it' if of_stock is None else f'{of_stock:,}'})",
            tokens=tokens,
            sequences=fit,
            stock_sequences=of_stock,
        )
    wanted, most = vllm_config.scheduler_config.max_num_seqs, limits.most_sequences(config)
    if wanted > most:
        yield warn(
            "sequences",
            f"--max-num-seqs {wanted} will be lowered to {most}, which fit at one page each",
            "give more bytes with --kv-cache-memory-bytes, or lower --max-num-seqs",
        )
