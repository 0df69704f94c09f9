"""``kernels: handles``: AVMP's own kernels in a model, through vLLM's registry of backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.v1.attention.backends.registry import (
    AttentionBackendEnum,
    MambaAttentionBackendEnum,
    register_backend,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, iter_layer_specs

from avmp_vllm.core import Kind
from avmp_vllm.engine.entry.config import ConfigError
from avmp_vllm.engine.layout.groups import kind_of_spec

if TYPE_CHECKING:
    import torch
    from avmp_kernels.pages import PageTable
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

BACKEND = "avmp_vllm.engine.handles.attention.HandleAttentionBackend"


def select_backend(engine_args: Any) -> None:
    """Have the engine use AVMP's attention.

    Raises:
        ConfigError: The user asks for another backend.
    """
    given = engine_args.attention_backend or getattr(engine_args.attention_config, "backend", None)
    if given not in (None, AttentionBackendEnum.CUSTOM):
        raise ConfigError(
            f"--attention-backend {getattr(given, 'name', given)}: kernels = 'handles' brings its "
            "own attention; remove the option, or set kernels to 'resolved'"
        )
    register()
    if getattr(engine_args.attention_config, "backend", None) is None:
        engine_args.attention_backend = AttentionBackendEnum.CUSTOM


def register() -> None:
    """Put AVMP's attention into the registry of this process."""
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def get_attn_backend_cls(stock: Callable[..., str]) -> Callable[..., str]:
    """Wrap ``CpuPlatform.get_attn_backend_cls``: on CPU, too, take the backend asked for.

    As on CUDA, the backend first says whether it can serve the layer.
    """

    def wrapper(
        cls: type, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if selected_backend is not AttentionBackendEnum.CUSTOM:
            return stock(cls, selected_backend, attn_selector_config, *args, **kwargs)
        from avmp_vllm.engine.handles.attention import HandleAttentionBackend

        reasons = HandleAttentionBackend.validate_configuration(**attn_selector_config._asdict())
        if reasons:
            raise ConfigError("kernels = 'handles': " + "; ".join(reasons))
        return BACKEND

    return wrapper


def takes_handles(spec: KVCacheSpec) -> bool:
    """Whether AVMP has kernels for a group's layers: full attention of one layout, and Mamba-1."""
    return type(spec) is FullAttentionSpec or all(
        isinstance(layer, MambaSpec) and layer.mamba_type == MambaAttentionBackendEnum.MAMBA1
        for layer in iter_layer_specs(spec)
    )


def check_groups(kv_cache_config: KVCacheConfig) -> None:
    """Check that AVMP's attention can read all pages: one table, of one layout, full attention.

    Raises:
        ConfigError: It cannot; with what the model keeps, and the setting that works.
    """
    paged = [
        group.kv_cache_spec
        for group in kv_cache_config.kv_cache_groups
        if kind_of_spec(group.kv_cache_spec) is Kind.KV
    ]
    if len(paged) == 1 and takes_handles(paged[0]):
        return
    layouts = dict.fromkeys(layer for spec in paged for layer in iter_layer_specs(spec))
    names = " and ".join(dict.fromkeys(type(layout).__name__ for layout in layouts))
    raise ConfigError(
        f"kernels = 'handles': the model keeps {len(layouts)} layouts of pages ({names}) in "
        f"{len(paged)} block table(s), and AVMP's attention reads one layout of full attention in "
        "one; set kernels to 'resolved'"
    )


def saving_inside(specs: dict[str, KVCacheSpec]) -> dict[str, KVCacheSpec]:
    """Have Mamba-1 layers' specs say that they save states at any position of a chunk."""
    return {
        name: replace(spec, prefill_checkpoint_alignment=1)
        if isinstance(spec, MambaSpec) and takes_handles(spec)
        else spec
        for name, spec in specs.items()
    }


def bind(
    layers: dict[str, torch.nn.Module], pages: PageTable, dtype: torch.dtype, page_tokens: int
) -> None:
    """Give a model's layers the page table.

    Args:
        layers: By name: those that have a cache.
        pages: The worker's page table.
        dtype: Of the model.
        page_tokens: Tokens of a KV page.

    Raises:
        ValueError: A layer that the kernels do not take, and the setting that works.
    """
    from avmp_kernels.conv1d import check_width
    from avmp_kernels.state_update import check_supported
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

    from avmp_vllm.engine.handles.attention import HandleAttentionImpl
    from avmp_vllm.engine.handles.mamba import forward_by_handles

    for name, layer in layers.items():
        if isinstance(layer, Attention):
            if not isinstance(layer.impl, HandleAttentionImpl):
                raise ConfigError(
                    f"kernels = 'handles': layer {name} runs {type(layer.impl).__name__} instead "
                    "of AVMP's attention; set kernels to 'resolved'"
                )
            layer.impl.bind(pages, dtype, page_tokens)
        elif isinstance(layer, MambaMixer):
            check_width(layer.conv1d.weight.shape[-1])
            for state in layer.get_state_dtype():
                check_supported(state)
            # vLLM's custom op looks the method up on the layer.
            layer.forward_impl = partial(forward_by_handles, layer, pages)
