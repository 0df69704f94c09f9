"""An empty torchvision, where there is none, for text models whose module also reads images."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest import mock

from vllm import ModelRegistry

_NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Import Qwen3.5's module here, where vLLM would start a process to look at it."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("torchvision") is None:
            empty = {}
            for name in (*_NAMES, "torchvision.transforms.v2.functional"):
                empty[name] = ModuleType(name)
                empty[name].__spec__ = ModuleSpec(name, None, is_package=True)
                parent, _, leaf = name.rpartition(".")
                if parent:
                    setattr(empty[parent], leaf, empty[name])
            stack.enter_context(mock.patch.dict(sys.modules, empty))
            from vllm.model_executor.models.qwen3_5 import Qwen3_5ForCausalLM

            stack.enter_context(mock.patch.dict(ModelRegistry.models))
            ModelRegistry.register_model("Qwen3_5ForCausalLM", Qwen3_5ForCausalLM)
        yield
