"""The parent's end of the pipe to an engine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from avmp_vllm.demo.child import Child, ChildError


class EngineError(ChildError):
    """An engine did not start, refused an order, or died."""


class EngineProcess(Child):
    """An engine in a child process.

    Args:
        log: File that takes what it prints.
        environment: Variables added to this process's own.
    """

    error = EngineError
    name = "engine"

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "avmp_vllm.bench.engine.child"]
        super().__init__(command, log=log, environment=environment)

    def start(self) -> None:
        """Start the process; the engine is made by the first order."""
        self._open(stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def stop(self) -> None:
        """Close the pipe, then stop the process."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        super().stop()

    def order(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer.

        Raises:
            EngineError: With the end of the log.
        """
        assert self._process is not None, "not started"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            self._process.wait()
            self.check_alive()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{answer['error']}\n{self.tail()}")
        return answer
