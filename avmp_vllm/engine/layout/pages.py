"""Tokens of a KV page, and between two checkpoints of a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm
from typing import TYPE_CHECKING, Any

from vllm.config.vllm import set_current_vllm_config
from vllm.v1.attention.backend import MultipleOf

from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.engine.entry import last_line, minors
from avmp_vllm.engine.entry.config import AVMPConfig, ConfigError, selected

if TYPE_CHECKING:
    from vllm.config import CacheConfig, VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

#: Default spacing of state checkpoints, in tokens, before rounding up to whole pages.
CHECKPOINT_TOKENS = 512


def align_hybrid_block_size(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Platform._align_hybrid_block_size``: keep both kinds of page at their exact size."""

    @last_line.left_by(ConfigError)
    def wrapper(cls: Any, vllm_config: VllmConfig, backend_cls: type[AttentionBackend]) -> None:
        config = selected(vllm_config.additional_config)
        if config is None:
            return stock(cls, vllm_config, backend_cls)
        cache = vllm_config.cache_config
        backends = cls._find_non_ssm_backends(vllm_config) or [backend_cls]
        with set_current_vllm_config(vllm_config):
            cache.block_size = page_tokens(config, cache, backends)
        cache.mamba_page_size_padded = None
        if cache.mamba_cache_mode == "align":
            unit = lcm(cache.block_size, minors.state_alignment(vllm_config))
            cache.mamba_block_size = checkpoint_tokens(config, cache, unit)
        return None

    return wrapper


def page_tokens(
    config: AVMPConfig, cache: CacheConfig, backends: Sequence[type[AttentionBackend]]
) -> int:
    """Tokens of a KV page: what the user asks for, else the least that every backend takes.

    Args:
        config: AVMP's options.
        cache: vLLM's options.
        backends: Of all layers with pages.

    Raises:
        ConfigError: A backend does not take pages of that size.
    """
    least = lcm(*map(_least_tokens, backends))
    if config.page_tokens is not None:
        option, value = "page_tokens", config.page_tokens
    elif cache.user_specified_block_size:
        option, value = "--block-size", cache.block_size
    else:
        return least
    if value % least or not _all_take(backends, value):
        nearest = ceil_div(value, least) * least
        while not _all_take(backends, nearest):
            nearest += least
        resolved = ", set kernels to 'resolved'" if config.kernels == "handles" else ""
        names = " and ".join(dict.fromkeys(backend.get_name() for backend in backends))
        raise ConfigError(
            f"{option} = {value}: {names} takes pages of a multiple of {least} "
            f"tokens; choose {nearest}{resolved}, or leave the option out"
        )
    return value


def _least_tokens(backend: type[AttentionBackend]) -> int:
    """The smallest page that a backend takes, at least 16 tokens."""
    sizes = backend.get_supported_kernel_block_sizes() or [MultipleOf(1)]
    return max(min(size.base if isinstance(size, MultipleOf) else size for size in sizes), 16)


def _all_take(backends: Sequence[type[AttentionBackend]], tokens: int) -> bool:
    return all(backend.supports_block_size(tokens) for backend in backends)


def checkpoint_tokens(config: AVMPConfig, cache: CacheConfig, unit: int) -> int:
    """Tokens between two state checkpoints.

    Args:
        config: AVMP's options.
        cache: vLLM's, with the page's tokens.
        unit: Tokens that the spacing must be a multiple of: the page's, or a multiple of them that
            the layers need.

    Raises:
        ConfigError: Not a multiple of the unit, or the page itself.
    """
    page = cache.block_size
    if config.checkpoint_tokens is not None:
        option, value = "checkpoint_tokens", config.checkpoint_tokens
    elif cache.mamba_block_size not in (None, *_stock_block_sizes(cache)):
        option, value = "--mamba-block-size", cache.mamba_block_size
    else:
        return _next_spacing(CHECKPOINT_TOKENS, page, unit)
    if value % unit or value == page:
        layers = f" and the {unit} at which the layers save states" if unit != page else ""
        raise ConfigError(
            f"{option} = {value}: a state checkpoint must be a multiple of the page's {page} "
            f"tokens{layers}, and more than one page, or every {page} decoded tokens would keep a "
            f"whole state; {_next_spacing(value, page, unit)} is the next that works"
        )
    return value


def _next_spacing(tokens: int, page: int, unit: int) -> int:
    """The smallest spacing from so many tokens on that is allowed."""
    return max(ceil_div(tokens, unit), 2 if unit == page else 1) * unit


def _stock_block_sizes(cache: CacheConfig) -> tuple[int, ...]:
    """What vLLM fills into ``mamba_block_size`` by itself: a block size of its own defaults."""
    return (cache.block_size, type(cache).DEFAULT_BLOCK_SIZE, 128)
