"""vLLM's scheduler over each manager, built without a model.

The specs of the layers come from a configuration file, everything after them (groups, blocks, block
sizes, hashes) from vLLM's and AVMP's own planning functions. The ``VllmConfig`` itself is that of a
placeholder hybrid model: the scheduler reads limits and cache modes from it and no sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec, MambaSpec
from vllm.v1.structured_output import StructuredOutputManager

from avmp_vllm.bench.scheduler.adaptive import AdaptiveAdmission
from avmp_vllm.bench.scheduler.oracle import OracleAdmission
from avmp_vllm.bench.scheduler.static_arena import StaticArena
from avmp_vllm.core import Arena, Geometry, Kind
from avmp_vllm.core.capacity import StaticSplit, stock_block_tokens
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError
from avmp_vllm.engine.layout.arena import arena_config
from avmp_vllm.engine.layout.cold import state_codec
from avmp_vllm.engine.layout.groups import group_of
from avmp_vllm.engine.layout.limits import blocks_per_request, fit_model_len
from avmp_vllm.engine.layout.pages import CHECKPOINT_TOKENS
from avmp_vllm.engine.scheduler.coordinator import DualPoolCoordinator
from avmp_vllm.engine.scheduler.scheduler import AVMPAsyncScheduler, AVMPScheduler
from avmp_vllm.models.shapes import ModelShape, ShapeError
from avmp_vllm.models.tiny_jamba import tiny_jamba_config

_TORCH = {
    "fp8": torch.uint8,
    "fp8_e4m3": torch.uint8,
    "fp8_e5m2": torch.uint8,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "half": torch.float16,
    "bf16": torch.bfloat16,
}
#: AVMP's KV page, as on CUDA.
PAGE_TOKENS = 16
#: Stock's and AVMP's scheduler: those that wait for a step's output, and those that do not.
SCHEDULERS: tuple[tuple[type[Scheduler], type[Scheduler]], ...] = (
    (Scheduler, AVMPScheduler),
    (AsyncScheduler, AVMPAsyncScheduler),
)


class TooSmall(ValueError):
    """A variant cannot hold one request of the longest length."""


@dataclass(frozen=True)
class Settings:
    """What all variants have in common.

    Attributes:
        memory: Bytes of the cache.
        max_model_len: Longest request.
        max_num_seqs: Most running requests.
        max_num_batched_tokens: Most tokens of a step.
        prefix_caching: On or off.
        kv_dtype: Of the attention cache.
        static_ratio: State bytes to KV bytes of the static variant.
        async_scheduling: vLLM's asynchronous schedulers instead of the others.
        verify: Check the arena at every step.
    """

    memory: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    kv_dtype: str
    static_ratio: float
    async_scheduling: bool = False
    verify: bool = False


@dataclass
class Engine:
    """A scheduler and what measures it.

    Attributes:
        scheduler: vLLM's, or AVMP's subclass of it.
        hasher: Hashes a request's blocks, or None without prefix caching.
        arena: Of the variants that have one.
        block_bytes: Of stock's blocks, 0 for the others.
        token_bytes: Of one token in one attention layer.
        state_bytes: Of one state in one SSM layer.
        answers: Tokens of each request's answer by its name, for those who may know.
    """

    scheduler: Scheduler
    hasher: Callable[..., Any] | None
    arena: Arena | None
    block_bytes: int
    token_bytes: int
    state_bytes: int
    answers: dict[str, int] = field(default_factory=dict)

    def referenced_bytes(self) -> int:
        """Bytes of pages that running requests hold."""
        if self.arena is not None:
            return sum(self.arena.used(k) * self.arena.geometry.unit(k) for k in Kind)
        pool = self.scheduler.kv_cache_manager.block_pool
        return (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * self.block_bytes

    def evictable_bytes(self) -> int:
        """Bytes of unreferenced cached pages."""
        if self.arena is not None:
            return sum(self.arena.cached(k) * self.arena.geometry.unit(k) for k in Kind)
        pool = self.scheduler.kv_cache_manager.block_pool
        free = pool.free_block_queue.get_all_free_blocks()
        return sum(block.block_hash is not None for block in free) * self.block_bytes

    def live_bytes(self) -> int:
        """Bytes of tokens and states inside the referenced pages; shared pages count once."""
        requests = self.scheduler.requests
        total = 0
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        groups = self.scheduler.kv_cache_config.kv_cache_groups
        for manager, group in zip(managers, groups, strict=True):
            filled: dict[int, int] = {}
            states = isinstance(manager.kv_cache_spec, MambaSpec)
            size = manager.block_size
            for name, blocks in manager.req_to_blocks.items():
                computed = requests[name].num_computed_tokens
                for index, block in enumerate(blocks):
                    if block.is_null:
                        continue
                    tokens = 1 if states else max(0, min(size, computed - index * size))
                    filled[block.block_id] = max(filled.get(block.block_id, 0), tokens)
            each = self.state_bytes if states else self.token_bytes
            total += sum(filled.values()) * each * len(group.layer_names)
        return total


def _vllm_config(settings: Settings) -> VllmConfig:
    """A hybrid placeholder's configuration with our limits."""
    model = tiny_jamba_config(
        architectures=["JambaForCausalLM"],
        max_position_embeddings=settings.max_model_len,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            enable_prefix_caching=settings.prefix_caching,
            max_model_len=settings.max_model_len,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            async_scheduling=False,
            enforce_eager=True,
        ).create_engine_config()
    # vLLM switches it off on a CPU, but nothing is computed here.
    config.scheduler_config.async_scheduling = settings.async_scheduling
    # Left to the engine core, which asks the workers.
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def _torch_dtype(name: str) -> torch.dtype:
    return _TORCH.get(name) or getattr(torch, name)


def _specs(shape: ModelShape, settings: Settings) -> tuple[FullAttentionSpec, MambaSpec]:
    """Exact specs of one layer of each kind."""
    kv = FullAttentionSpec(
        block_size=PAGE_TOKENS,
        num_kv_heads=shape.kv_heads,
        head_size=shape.token_elements // (2 * shape.kv_heads),
        dtype=_torch_dtype(shape.dtype if settings.kv_dtype == "auto" else settings.kv_dtype),
    )
    ssm = MambaSpec(
        block_size=CHECKPOINT_TOKENS if settings.prefix_caching else settings.max_model_len,
        shapes=tuple(part for part, _ in shape.state_parts),
        dtypes=tuple(_torch_dtype(dtype) for _, dtype in shape.state_parts),
        mamba_cache_mode="align" if settings.prefix_caching else "none",
    )
    return kv, ssm


def _layers(shape: ModelShape, kv: KVCacheSpec, ssm: KVCacheSpec) -> dict[str, KVCacheSpec]:
    layers: dict[str, KVCacheSpec] = {f"kv.{i}": kv for i in range(shape.kv_layers)}
    return layers | {f"ssm.{i}": ssm for i in range(shape.ssm_layers)}


def _stock_config(vllm_config: VllmConfig, shape: ModelShape, settings: Settings) -> KVCacheConfig:
    """What stock vLLM on CUDA makes of the layers."""
    kv, ssm = _specs(shape, settings)
    unit = 128 if shape.latent else PAGE_TOKENS
    block = stock_block_tokens(PAGE_TOKENS, kv.page_size_bytes, ssm.page_size_bytes, unit)
    kv = replace(kv, block_size=block)
    ssm = replace(
        ssm,
        block_size=block if settings.prefix_caching else settings.max_model_len,
        page_size_padded=kv.page_size_bytes,
    )
    (config,) = minors.stock_cache_configs(
        vllm_config, [_layers(shape, kv, ssm)], [settings.memory]
    )
    return config


def _require_static(geometry: Geometry, settings: Settings, states: int) -> None:
    split = StaticSplit(geometry, settings.static_ratio)
    needed = geometry.pages_for(settings.max_model_len)
    if split.pages < needed or split.blocks < states:
        raise TooSmall(
            f"static {settings.static_ratio:g} has {split.pages} KV pages and {split.blocks} SSM "
            f"blocks, and one request of --max-model-len {settings.max_model_len} needs {needed} "
            f"and {states}: raise --memory, lower --max-model-len, or leave static out with "
            "--variants"
        )


def _make_static(scheduler: Scheduler, settings: Settings) -> StaticArena:
    """Put a static arena in the place of AVMP's."""
    manager = scheduler.kv_cache_manager
    coordinator = manager.coordinator
    assert isinstance(coordinator, DualPoolCoordinator)
    spec = group_of(manager.kv_cache_config, Kind.SSM).kv_cache_spec
    _require_static(
        manager.geometry,
        settings,
        blocks_per_request(spec, scheduler.vllm_config.max_concurrent_batches),
    )
    arena = StaticArena(manager.geometry, settings.static_ratio, coordinator._evict)
    manager.arena = coordinator.arena = arena
    if coordinator.checkpoints is not None:
        coordinator.checkpoints.arena = arena
        arena.choose = coordinator.checkpoints.choose
    for pool in coordinator.pools.values():
        pool.arena = arena
    return arena


def options_of(variant: str) -> tuple[str, dict[str, Any]]:
    """A variant's name, and AVMP's options behind it: ``avmp+growth_tokens=16+victim=cheapest``.

    Raises:
        ShapeError: An option without a value, or one that AVMP does not have.
    """
    name, *pairs = variant.split("+")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ShapeError(f"--variants {variant}: {pair} is not OPTION=VALUE")
        options[key] = yaml.safe_load(value)
    if options and name.startswith("stock"):
        raise ShapeError(f"--variants {variant}: {name} has none of AVMP's options")
    try:
        AVMPConfig.read(options)
    except ConfigError as error:
        raise ShapeError(f"--variants {variant}: {error}") from None
    return name, options


def build(variant: str, shape: ModelShape, settings: Settings) -> Engine:
    """Build a variant's scheduler.

    Raises:
        ValueError: The bytes hold no request of the longest length.
    """
    variant, options = options_of(variant)
    vllm_config = _vllm_config(settings)
    cache = vllm_config.cache_config
    stock = variant.startswith("stock")
    if stock:
        if variant == "stock-dense":
            cache.prefix_cache_retention_interval = None
        config = _stock_config(vllm_config, shape, settings)
    else:
        vllm_config.additional_config = {
            "block_manager": "avmp",
            "avmp": {"verify": settings.verify, **options},
        }
        kv, ssm = _specs(shape, settings)
        if variant == "avmp-inside":
            ssm = replace(ssm, prefill_checkpoint_alignment=1)
        config = arena_config(vllm_config, _layers(shape, kv, ssm), settings.memory)
        fit_model_len(vllm_config, config)
        state_codec(vllm_config, config)  # refuses what an engine would refuse
    cache.num_gpu_blocks = config.num_blocks
    cache.block_size = min(g.kv_cache_spec.block_size for g in config.kv_cache_groups)
    block_size, hash_block_size = kv_cache_utils.resolve_kv_cache_block_sizes(config, vllm_config)
    hasher = None
    if settings.prefix_caching:
        hash_function = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        kv_cache_utils.init_none_hash(hash_function)
        hasher = kv_cache_utils.get_request_block_hasher(hash_block_size, hash_function)
    classes = SCHEDULERS[settings.async_scheduling]
    scheduler = classes[not stock](
        vllm_config=vllm_config,
        kv_cache_config=config,
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=block_size,
        hash_block_size=hash_block_size,
    )
    arena: Arena | None = None
    if variant == "static":
        arena = _make_static(scheduler, settings)
    elif not stock:
        arena = scheduler.kv_cache_manager.arena
    block_bytes = 0 if arena else config.kv_cache_tensors[0].size // config.num_blocks
    kv_dtype = settings.kv_dtype
    engine = Engine(
        scheduler, hasher, arena, block_bytes, shape.token_bytes(kv_dtype), shape.state_bytes
    )
    if variant == "adaptive":
        manager = scheduler.kv_cache_manager
        manager.admission = AdaptiveAdmission(manager.geometry, manager._held)
    if variant == "oracle":
        manager = scheduler.kv_cache_manager
        manager.admission = OracleAdmission(
            engine.answers,
            manager.max_model_len,
            manager.geometry,
            manager.states_each,
            0.0,
            manager._held,
        )
    return engine
