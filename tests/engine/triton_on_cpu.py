"""Imported before vLLM: run every Triton kernel in Triton's interpreter, and use Model Runner V2.

Triton has no CPU backend here, and without one vLLM on CPU turns Triton off. An entry of that name
is all it looks for; nothing is ever compiled for it.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from triton.backends import backends

backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
