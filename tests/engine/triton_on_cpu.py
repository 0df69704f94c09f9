"""Imported before vLLM: run every Triton kernel in Triton's interpreter, and use Model Runner V2.

Triton has no CPU backend here, and without one vLLM on CPU turns Triton off. An entry of that name
is all it looks for; nothing is ever compiled for it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from triton.backends import backends


class _Driver:
    """Says that there is one, and of what kind, to vLLM's linear attention as it is imported."""

    @staticmethod
    def is_active() -> bool:
        """It is."""
        return True

    def get_current_target(self) -> SimpleNamespace:
        """No GPU."""
        return SimpleNamespace(backend="cpu", arch=0, warp_size=1)


backends["cpu"] = SimpleNamespace(compiler=None, driver=_Driver)


def _with_bool_mask(access: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Take masks made of a scalar and a vector condition, which are of another type than bool."""

    def masked(builder: Any, *args: Any) -> Any:
        args[at].data = args[at].data.astype(bool, copy=False)
        return access(builder, *args)

    return masked


def _mend() -> None:
    """Have the interpreter run vLLM's kernels, and spare it what compiled kernels do not do.

    It replaces ``triton.language`` at every launch and at every call of one kernel function from
    another, 1.4 ms each; here all runs interpreted, so once is enough. And it checks every integer
    operation for overflow, as compiled kernels only do in debug mode.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    scope = interpreter._LangPatchScope()
    scope.restore = lambda: None
    replace = interpreter._patch_lang
    replace(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: scope
    builder = interpreter.InterpreterBuilder
    for name, at in (("create_masked_load", 1), ("create_masked_store", 2)):
        setattr(builder, name, _with_bool_mask(getattr(builder, name), at))
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


_mend()
