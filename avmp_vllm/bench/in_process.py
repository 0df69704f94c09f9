"""A vLLM engine in this process, so that it can be driven step by step and looked into."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM


@contextlib.contextmanager
def engine_in_process(model: str | Path, **options: Any) -> Iterator[LLM]:
    """Make an engine whose core and worker run here; shut it down at the end.

    Call it before vLLM is imported, which reads the environment once.

    Args:
        model: Folder or hub name.
        options: Of ``vllm.LLM``.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM

    fixed = {"distributed_executor_backend": "uni", "seed": 0, "disable_log_stats": False}
    llm = LLM(str(model), **{**fixed, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
