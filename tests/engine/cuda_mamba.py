"""vLLM's own Mamba layers and Triton kernels, as on CUDA, in a process whose Triton is interpreted.

On CPU vLLM replaces these functions when their modules are imported, and AVMP the layers. Here the
modules are loaded once more, as they are on CUDA. Mamba-1's scan over a prefill is no Triton kernel
but C++ for CUDA: for that one AVMP's scan for CPUs stands in.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.runtime import Autotuner
from triton.runtime.interpreter import _implicit_cvt
from vllm.config.mamba import MambaBackendEnum
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.mamba import mamba_mixer, mamba_mixer2
from vllm.model_executor.layers.mamba.ops import ssd_combined, ssu_dispatch
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

from avmp_vllm.engine.cpu import scan as cpu_scan

_OPS = "vllm.model_executor.layers.mamba.ops."


@functools.cache
def as_on_cuda(name: str) -> ModuleType:
    """Load one of vLLM's Mamba kernel modules as it is on CUDA."""
    spec = importlib.util.find_spec(_OPS + name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(type(current_platform), "is_cpu", return_value=False):
        spec.loader.exec_module(module)
    return module


def causal_conv1d_fn(
    *args: Any, query_start_loc: torch.Tensor, metadata: Any = None, **kwargs: Any
) -> torch.Tensor:
    """vLLM's Triton kernel over a prefill.

    Its launch swaps two arguments for tensors of the metadata, which the interpreter does not
    expect after it has made pointers of all arguments; so pointers are what it finds there.
    """
    nums, batch, offsets = compute_causal_conv1d_metadata(
        query_start_loc, device=query_start_loc.device
    )
    for entry in nums.values():
        for name in ("batch_ptr", "token_chunk_offset_ptr"):
            entry[name] = _implicit_cvt(entry[name])
    given = SimpleNamespace(nums_dict=nums, batch_ptr=batch, token_chunk_offset_ptr=offsets)
    return as_on_cuda("causal_conv1d").causal_conv1d_fn(
        *args, query_start_loc=query_start_loc, metadata=given, **kwargs
    )


def selective_state_update(*args: Any, **kwargs: Any) -> None:
    """vLLM's Triton kernel, without looking for a tuned launch of this device."""
    module = as_on_cuda("mamba_ssm")
    with (
        module.override_ssm_config((256, 4)),
        mock.patch.object(torch.accelerator, "device_index", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
    ):
        module.selective_state_update(*args, **kwargs)


def selective_scan_fn(
    x: torch.Tensor,
    states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    dt_bias: torch.Tensor,
    *,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    query_start_loc: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Take the place of vLLM's C++ scan; all but the states are ``[channels, tokens]``."""
    return cpu_scan.selective_scan(
        x.T,
        dt.T,
        A,
        B.T,
        C.T,
        states,
        slots=cache_indices,
        query_start_loc=query_start_loc,
        has_initial_state=has_initial_state,
        D=D,
        z=z.T,
        dt_bias=dt_bias,
    ).T


class _TritonBackend(ssu_dispatch.TritonSSUBackend):
    """vLLM's Triton backend of decode steps."""

    def __init__(self, mamba_config: Any) -> None:
        super().__init__(mamba_config)
        self._kernel = selective_state_update


def _init_mamba1(made: Any) -> Any:
    """Wrap the layer's constructor: the CPU's GEMM takes contiguous inputs only."""

    def init(self: mamba_mixer.MambaMixer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.out_proj.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))

    return init


@contextlib.contextmanager
def cuda_mamba_layers() -> Iterator[None]:
    """Have engines that start here run vLLM's own Mamba layers with its Triton kernels."""
    load_general_plugins()
    for name in ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_state_passing"):
        for tuned in vars(importlib.import_module(_OPS + name)).values():
            if isinstance(tuned, Autotuner):
                del tuned.configs[1:]  # there is no device to tune for
    scan = as_on_cuda("ssd_combined")._mamba_chunk_scan_combined_fwd
    update = as_on_cuda("causal_conv1d").causal_conv1d_update
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(op_registry_oot))
        for layer in ("MambaMixer", "MambaMixer2"):
            op_registry_oot.pop(layer)
        stack.enter_context(
            mock.patch.dict(ssu_dispatch._BACKEND_REGISTRY, {MambaBackendEnum.CPU: _TritonBackend})
        )
        init = _init_mamba1(mamba_mixer.MambaMixer.__init__)
        for owner, name, replacement in (
            (mamba_mixer, "causal_conv1d_fn", causal_conv1d_fn),
            (mamba_mixer2, "causal_conv1d_fn", causal_conv1d_fn),
            (mamba_mixer, "causal_conv1d_update", update),
            (mamba_mixer2, "causal_conv1d_update", update),
            (mamba_mixer, "selective_scan_fn", selective_scan_fn),
            (mamba_mixer.MambaMixer, "__init__", init),
            (ssd_combined, "_mamba_chunk_scan_combined_fwd", scan),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
