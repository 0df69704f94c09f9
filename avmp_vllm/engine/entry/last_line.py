"""A refusal is the last line that the user of a command line reads.

AVMP refuses where it learns of the reason: in the process that the user started, in the engine
core, in a worker. vLLM prints the tracebacks of the others, and the first process then ends with
one of its own that names no reason. So whoever refuses leaves the message in a file, and the first
process prints it when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from avmp_vllm.engine.entry.config import ConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.core import EngineCore

#: Environment variable that names the file to the processes below.
FILE = "AVMP_LAST_LINE"


@functools.cache
def print_at_the_end() -> None:
    """Let this process end with the message of a refusal, if an exception ends it.

    An error of AVMP's options needs no traceback; any other exception keeps its own, above the
    message of the process that refused.
    """
    if multiprocessing.parent_process() is not None:
        return  # The process that the user started does it.
    # Without a file, only this process's own refusals are known.
    with contextlib.suppress(OSError):
        descriptor, path = tempfile.mkstemp(prefix="avmp-")
        os.close(descriptor)
        atexit.register(Path(path).unlink, missing_ok=True)
        os.environ[FILE] = path
    stock = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ConfigError):
            message = str(error)
        else:
            stock(kind, error, traceback)
            message = _left()
        if message:
            print("vllm: error: AVMP:", " ".join(message.split()), file=sys.stderr)

    sys.excepthook = hook


@contextlib.contextmanager
def left_by(*refusals: type[ValueError]) -> Iterator[None]:
    """Leave the message of such an exception for the process that the user started."""
    try:
        yield
    except refusals as error:
        if FILE in os.environ:
            with contextlib.suppress(OSError):
                Path(os.environ[FILE]).write_text(str(error), "utf-8", "backslashreplace")
        raise


def initialize_kv_caches(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``EngineCore._initialize_kv_caches``: leave the message of what is refused there.

    The scheduler is made of what it returns; that of an elastic arena reaches the workers by it.
    """
    from avmp_vllm.core import ArenaTooSmall  # Only where AVMP is in charge.

    refusals = (ConfigError, ArenaTooSmall)

    @left_by(*refusals)
    def wrapper(self: EngineCore, vllm_config: VllmConfig) -> Any:
        try:
            config = stock(self, vllm_config)
        except refusals:
            # Else the workers' shared memory stays, and a warning about it comes after the message.
            self.model_executor.shutdown()
            raise
        if getattr(config, "elastic", None) is not None:
            config.executor = self.model_executor
        return config

    return wrapper


def _left() -> str:
    try:
        return Path(os.environ[FILE]).read_text("utf-8")
    except (KeyError, OSError):
        return ""
