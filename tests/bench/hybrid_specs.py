"""Run in a process of its own: what vLLM's models of hybrid families ask for, as JSON.

Each configuration of ``hybrid_configs`` is read and built by vLLM as a worker does, on torch's
``meta`` device, and its layers are asked for their caches. Where a machine lacks what a model's
module wants at import (torchvision, Triton's driver), a stand-in that does nothing takes its place:
no layer is run.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import re
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "CRITICAL"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from hybrid_configs import CONFIGS
from hybrid_specs_constants import ARENA, LONGEST, PAGE, SPACING, STEP

# Settles what transformers itself finds of torchvision, before the stand-in does.
importlib.import_module("transformers.image_utils")

_STORE = tempfile.NamedTemporaryFile()  # noqa: SIM115  (as long as the process lives)


class _Any(type):
    """A class has whatever is asked of it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Anything(metaclass=_Any):
    """Whatever a module wants of a library that is missing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


#: What models import and no machine without a GPU needs.
_MISSING = ("torchvision", "cutlass", "cuda", "flashinfer", "deep_gemm")


class _StandIn:
    """Finds those libraries and their modules, none of which does anything."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in _MISSING:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Anything

        module.__getattr__ = attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_StandIn())  # type: ignore[arg-type]  # behind the real one
# CPU builds of some machines settle the state's type by themselves; the planner has CUDA's.
torch.cpu._is_avx512_bf16_supported = lambda: False


def _unpinned(make: Any) -> Any:
    """Without a device there is no pinned memory."""
    return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)


torch.empty, torch.zeros = _unpinned(torch.empty), _unpinned(torch.zeros)

import vllm  # noqa: E402
from vllm.model_executor.models import registry  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.triton_utils import triton  # noqa: E402
from vllm.utils import torch_utils  # noqa: E402
from vllm.v1.worker.workspace import init_workspace_manager  # noqa: E402

registry._run_in_subprocess = lambda look: look()
torch.cuda.Stream = torch.cuda.Event = _Anything  # type: ignore[misc]
torch_utils.get_accelerator_view_from_cpu_tensor = lambda tensor: tensor
init_workspace_manager(torch.device("cpu"))
torch.accelerator.empty_cache = lambda: None
_backend_of_cpu = CpuPlatform.get_attn_backend_cls.__func__


def _backend(
    cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
) -> str:
    """CUDA's backend where CPU has none: sparse MLA."""
    if attn_selector_config.use_sparse:
        return "vllm.v1.attention.backends.mla.flashmla_sparse.FlashMLASparseBackend"
    return _backend_of_cpu(cls, selected_backend, attn_selector_config, num_heads)


CpuPlatform.get_attn_backend_cls = classmethod(_backend)
if not hasattr(triton, "set_allocator"):  # vLLM's own stand-in, where Triton has no driver
    triton.set_allocator = lambda allocator: None
    triton.next_power_of_2 = lambda number: 1 << (number - 1).bit_length()


def hybrids() -> list[str]:
    """Architectures that vLLM registers and whose class says that it is hybrid."""
    root = Path(vllm.__file__).parent
    bases: dict[str, set[str]] = {}
    for folder in ("model_executor/models", "models"):
        for file in (root / folder).rglob("*.py"):
            for found in re.finditer(r"^class (\w+)\(([^)]*)\)", file.read_text(), re.M):
                bases.setdefault(found[1], set()).update(re.findall(r"\w+", found[2]))
    family = {"IsHybrid"}
    while more := {name for name, of in bases.items() if of & family} - family:
        family |= more
    named = {arch for arch, (_, name) in registry._VLLM_MODELS.items() if name in family}
    models = registry.ModelRegistry.models
    return sorted(arch for arch in named if registry.is_hybrid(models[arch].load_model_cls()))


def _register_bailing() -> None:
    """Bailing's configuration comes with its checkpoint."""
    from transformers import AutoConfig, PreTrainedConfig
    from vllm.transformers_utils.configs.bailing_moe_v3_vl import BailingMoeV3TextConfig

    class Bailing(PreTrainedConfig):
        model_type = "bailing_hybrid"

        def __new__(cls, **fields: Any) -> Any:
            if "BailingMoeV3ForCausalLM" in fields.get("architectures", ()):
                return BailingMoeV3TextConfig(**fields)
            return super().__new__(cls)

    AutoConfig.register("bailing_hybrid", Bailing)


def _build(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """vLLM's configuration, and the specs of all layers."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        made = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=LONGEST,
            max_num_batched_tokens=STEP,
            max_num_seqs=16,
            enforce_eager=True,
            enable_prefix_caching=False,  # the CPU platform takes it from MLA models in any case
        ).create_engine_config()
    with set_current_vllm_config(made):
        destroy_model_parallel()  # whose groups depend on whether there are experts
        init_distributed_environment(1, 0, f"file://{_STORE.name}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(made.model_config.dtype), torch.device("meta"):
            initialize_model(made)
        cache = made.cache_config
        cache.block_size, cache.mamba_block_size = PAGE, SPACING
        cache.mamba_cache_mode = "align"
        return made, get_kv_cache_spec(made)


def answer(config: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's layers keep, the arena that holds them, and stock vLLM's plan."""
    from avmp_vllm.engine.layout.arena import arena_config
    from avmp_vllm.engine.layout.capacity import plan_stock
    from avmp_vllm.engine.layout.groups import role_of

    (name,) = config["architectures"]
    registry.ModelRegistry.models[name].load_model_cls()
    for module in [m for n, m in sys.modules.items() if n.startswith("vllm.models.qwen4_exp")]:
        if hasattr(module, "is_flash_attn_varlen_func_available"):
            module.is_flash_attn_varlen_func_available = lambda: True
    made, specs = _build(config)
    arena = arena_config(made, specs, ARENA)
    sizes = {spec.page_size_bytes for spec in specs.values() if spec.tokens_per_state != -1}
    made.cache_config.kv_cache_layout = "BLHNC" if len(sizes) > 1 else "LBHNC"
    stock = plan_stock(made, arena)
    geometry = arena.geometry
    assert geometry is not None
    return {
        "layers": [[role_of(n, s).name, s.page_size_bytes] for n, s in specs.items()],
        "alignment": max(s.get_block_stride_alignment() for s in specs.values()),
        "geometry": [geometry.page_bytes, geometry.block_bytes, geometry.page_tokens],
        "more_groups": [[g.page_tokens, g.most] for g in geometry.more_groups],
        "stock": stock
        and {
            "groups": [[g.page_tokens, g.most] for g in stock.groups],
            "ssm_groups": stock.ssm_groups,
            "states": stock.states,
            "blocks": stock.blocks,
        },
    }


def main() -> None:
    _register_bailing()
    answers: dict[str, Any] = {}
    for name in sys.argv[2:] or CONFIGS:
        try:
            answers[name] = answer(CONFIGS[name])
        except Exception as error:  # told to the test, which names the families it allows this
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
    registered = [] if sys.argv[2:] else hybrids()
    Path(sys.argv[1]).write_text(json.dumps({"registered": registered, "families": answers}))


if __name__ == "__main__":
    main()
