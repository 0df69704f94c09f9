"""Page sizes, cache groups and tensors of an arena.

Stock vLLM gives every kind of layer one page size. Here the attention layers form one group with
pages of ``page_tokens`` tokens, the SSM layers another with one exact state a block, and two
``KVCacheTensor`` descriptions lay both views over the same buffer from byte 0, with plain strides::

    KV page k   at k * F: | layer 0 | layer 1 | ... |         F = layers * one layer's page
    SSM block s at s * B: | layer 0 | layer 1 | ... | pad |   B = layers * one layer's state, padded
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
)

from avmp_vllm.core import ArenaTooSmall, Geometry, Kind, KVLayer, SSMLayer
from avmp_vllm.core.capacity import STATE_ALIGNMENT
from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine import last_line
from avmp_vllm.engine.config import AVMPConfig, ConfigError, selected

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

logger = init_logger("vllm." + __name__)

#: Default spacing of state checkpoints, in tokens, before rounding up to whole pages.
CHECKPOINT_TOKENS = 512


@dataclass
class AVMPCacheConfig(KVCacheConfig):
    """vLLM's cache configuration with an arena behind it.

    ``num_blocks`` counts the KV view's pages. Being a class of this module, it survives the deep
    copies and the pickling that vLLM does.
    """

    geometry: Geometry | None = None

    def num_blocks_of(self, tensor: KVCacheTensor) -> int:
        """Length of the view that a tensor describes."""
        assert self.geometry is not None
        if set(tensor.layers) <= set(group_of(self, Kind.SSM).layer_names):
            return self.geometry.blocks
        return self.geometry.pages


def kind_of_spec(spec: KVCacheSpec) -> Kind:
    """Which pool a layer's cache belongs to."""
    return Kind.SSM if isinstance(spec, MambaSpec) else Kind.KV


def group_of(kv_cache_config: KVCacheConfig, kind: Kind) -> KVCacheGroupSpec:
    """The cache group of a pool."""
    return next(
        group
        for group in kv_cache_config.kv_cache_groups
        if kind_of_spec(group.kv_cache_spec) is kind
    )


# -- page sizes ------------------------------------------------------------------------------------


def align_hybrid_block_size(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Platform._align_hybrid_block_size``: keep both kinds of page at their exact size."""

    @last_line.left_by(ConfigError)
    def wrapper(cls: type, vllm_config: VllmConfig, backend_cls: type[AttentionBackend]) -> None:
        config = selected(vllm_config.additional_config)
        if config is None:
            return stock(cls, vllm_config, backend_cls)
        cache = vllm_config.cache_config
        cache.block_size = page_tokens(config, cache, backend_cls)
        cache.mamba_page_size_padded = None
        if cache.mamba_cache_mode == "align":
            cache.mamba_block_size = checkpoint_tokens(config, cache)
        return None

    return wrapper


def page_tokens(config: AVMPConfig, cache: CacheConfig, backend_cls: type[AttentionBackend]) -> int:
    """Tokens of a KV page: what the user asks for, else the least that the backend takes.

    Raises:
        ConfigError: The backend does not take pages of that size.
    """
    least = min(
        size.base if isinstance(size, MultipleOf) else size
        for size in backend_cls.get_supported_kernel_block_sizes()
    )
    least = max(least, 16)
    if config.page_tokens is not None:
        option, value = "page_tokens", config.page_tokens
    elif cache.user_specified_block_size:
        option, value = "--block-size", cache.block_size
    else:
        return least
    if not backend_cls.supports_block_size(value) or value % least:
        nearest = ceil_div(value, least) * least
        while not backend_cls.supports_block_size(nearest):
            nearest += least
        resolved = ", set kernels to 'resolved'" if config.kernels == "handles" else ""
        raise ConfigError(
            f"{option} = {value}: {backend_cls.get_name()} takes pages of a multiple of {least} "
            f"tokens; choose {nearest}{resolved}, or leave the option out"
        )
    return value


def checkpoint_tokens(config: AVMPConfig, cache: CacheConfig) -> int:
    """Tokens between two state checkpoints.

    Raises:
        ConfigError: Not a multiple of the page, or the page itself.
    """
    page = cache.block_size
    if config.checkpoint_tokens is not None:
        option, value = "checkpoint_tokens", config.checkpoint_tokens
    elif cache.mamba_block_size not in (None, *_stock_block_sizes(cache)):
        option, value = "--mamba-block-size", cache.mamba_block_size
    else:
        return max(ceil_div(CHECKPOINT_TOKENS, page), 2) * page
    if value % page or value == page:
        raise ConfigError(
            f"{option} = {value}: a state checkpoint must be a multiple of the page's {page} "
            f"tokens, and more than one page, or every {page} decoded tokens would keep a whole "
            f"state; {max(ceil_div(value, page), 2) * page} is the next that works"
        )
    return value


def _stock_block_sizes(cache: CacheConfig) -> tuple[int, ...]:
    """What vLLM fills into ``mamba_block_size`` by itself: a block size of its own defaults."""
    return (cache.block_size, type(cache).DEFAULT_BLOCK_SIZE, 128)


# -- groups and tensors ----------------------------------------------------------------------------


def get_kv_cache_configs(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the engine core's ``get_kv_cache_configs``: one arena a rank, two groups over it."""

    def wrapper(
        vllm_config: VllmConfig,
        kv_cache_specs: list[dict[str, KVCacheSpec]],
        available_memory: list[int],
    ) -> list[KVCacheConfig]:
        if selected(vllm_config.additional_config) is None:
            return stock(vllm_config, kv_cache_specs, available_memory)
        configs = [
            arena_config(vllm_config, specs, min(available_memory)) for specs in kv_cache_specs
        ]
        geometry = configs[0].geometry
        assert geometry is not None
        if any(config.geometry != geometry for config in configs):
            raise ConfigError("ranks have different page sizes, which AVMP cannot serve")
        fit_model_len(vllm_config, configs[0])
        clamp_sequences(vllm_config, geometry)
        return list(configs)

    return wrapper


def arena_config(
    vllm_config: VllmConfig, specs: dict[str, KVCacheSpec], arena_bytes: int
) -> AVMPCacheConfig:
    """Lay one rank's layers out over an arena.

    Args:
        vllm_config: For the retention setting.
        specs: Layer name to its exact cache spec.
        arena_bytes: Bytes of the arena.

    Raises:
        ConfigError: A kind of layer that has no pool, or more than one layout of a kind.
        ArenaTooSmall: Not even one page of each kind.
    """
    layers: dict[Kind, dict[str, KVCacheSpec]] = {kind: {} for kind in Kind}
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec and not isinstance(spec, MambaSpec):
            raise ConfigError(
                f"layer {name} keeps a {type(spec).__name__}: AVMP has pools for full attention "
                "and SSM layers only; use --block-manager default"
            )
        layers[kind_of_spec(spec)][name] = spec
    shared = {kind: _only_spec(kind, layers[kind]) for kind in Kind}
    page = shared[Kind.KV].page_size_bytes
    state = ceil_div(shared[Kind.SSM].page_size_bytes, STATE_ALIGNMENT) * STATE_ALIGNMENT
    try:
        geometry = Geometry.from_layers(
            arena_bytes,
            [KVLayer(page // shared[Kind.KV].block_size)] * len(layers[Kind.KV]),
            [SSMLayer(state)] * len(layers[Kind.SSM]),
            shared[Kind.KV].block_size,
        )
    except ValueError as error:  # No bytes at all, or fewer than a page of each kind.
        raise ArenaTooSmall(
            f"{error}; raise --kv-cache-memory-bytes or --gpu-memory-utilization"
        ) from None
    return AVMPCacheConfig(
        num_blocks=geometry.pages,
        kv_cache_tensors=[
            KVCacheTensor(
                size=arena_bytes,
                layers=list(layers[kind]),
                layer_stride=stride,
                block_stride=geometry.unit(kind),
            )
            for kind, stride in ((Kind.KV, page), (Kind.SSM, state))
        ],
        kv_cache_groups=[KVCacheGroupSpec(list(layers[kind]), shared[kind]) for kind in Kind],
        prefix_cache_retention_interval=(vllm_config.cache_config.prefix_cache_retention_interval),
        geometry=geometry,
    )


def _only_spec(kind: Kind, layers: dict[str, KVCacheSpec]) -> KVCacheSpec:
    """The spec that all layers of a kind share."""
    if not layers:
        raise ConfigError(
            f"the model has no {kind.name} layer: AVMP manages models that mix attention and SSM "
            "layers; use --block-manager default"
        )
    first = next(iter(layers.values()))
    for name, spec in layers.items():
        if spec != first:
            raise ConfigError(
                f"layer {name} has another {kind.name} layout than the first: {spec} against "
                f"{first}; AVMP takes one layout of each kind, use --block-manager default"
            )
    return replace(first)


def blocks_per_request(spec: MambaSpec, steps: int) -> int:
    """Most SSM blocks that one request must be able to hold at a time.

    With prefix caching, a running state moves to another block with its chunks. So a request holds
    the state of the last step that is known to have run, that of each step in flight with the one
    that it saves inside of its chunk, and that of the step being scheduled. One that begins at a
    cached state holds that, its private copy, and its own.

    Args:
        spec: Of the SSM layers.
        steps: That may be in flight at once, the one being scheduled included.
    """
    if spec.mamba_cache_mode != "align":
        return 1
    return max(3, 2 + (steps - 1) * (1 + spec.num_prefill_checkpoint_blocks))


def fit_model_len(vllm_config: VllmConfig, kv_cache_config: AVMPCacheConfig) -> None:
    """Check that a request of the longest length fits, or with ``-1`` find that length.

    Raises:
        ArenaTooSmall: With the numbers and what to change.
    """
    model, geometry = vllm_config.model_config, kv_cache_config.geometry
    assert geometry is not None
    blocks = blocks_per_request(
        group_of(kv_cache_config, Kind.SSM).kv_cache_spec, vllm_config.max_concurrent_batches
    )
    if model.original_max_model_len == -1:
        fixed = (geometry.null_blocks + blocks) * geometry.block_bytes
        room = geometry.pages * geometry.page_bytes - fixed
        longest = max(room, 0) // geometry.page_bytes * geometry.page_tokens
        if 0 < longest < model.max_model_len:
            logger.info("AVMP: max_model_len reduced to %d, which the arena holds", longest)
            model.max_model_len = longest
    geometry.require_one_request(model.max_model_len, blocks)


def clamp_sequences(vllm_config: VllmConfig, geometry: Geometry) -> None:
    """Lower ``max_num_seqs`` to what the arena can hold at one page each."""
    scheduler = vllm_config.scheduler_config
    fit = max(geometry.sequences(1), 1)
    if scheduler.max_num_seqs > fit:
        logger.warning(
            "AVMP: --max-num-seqs %d lowered to %d, the sequences of one page that the arena of "
            "%d bytes holds; give it more bytes with --kv-cache-memory-bytes to run more",
            scheduler.max_num_seqs,
            fit,
            geometry.arena_bytes,
        )
        scheduler.max_num_seqs = fit


def checkpoint_spacing(kv_cache_config: KVCacheConfig) -> int:
    """Tokens between two state checkpoints of a running engine."""
    return group_of(kv_cache_config, Kind.SSM).kv_cache_spec.block_size
