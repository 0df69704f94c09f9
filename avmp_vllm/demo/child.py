"""One child process with a log: start it, see that it lives, end it with all that it started.

Whatever happens inside the ``with`` block, an exception and Ctrl-C included, the process and all
processes it started are gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_TAIL_LINES = 25


class ChildError(RuntimeError):
    """The process did not start, or died."""


class Child:
    """A child process, in a process group of its own.

    Args:
        command: Program and arguments.
        log: File that takes its output.
        environment: Variables added to this process's own.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    #: What is raised when the process is gone, and what it is called there.
    error: type[ChildError] = ChildError
    name = "process"

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        grace_s: float = 20.0,
    ) -> None:
        self.command = list(command)
        self.log = log
        self._environment = dict(environment or {})
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process; its children may do most of the work."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the process; return without waiting for it."""
        self._open(stdin=subprocess.DEVNULL)

    def _open(self, **pipes: Any) -> None:
        """Start it, with the log for what ``pipes`` does not take."""
        assert self._process is None, "started already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                **{"stdout": output, "stderr": output, **pipes},
                env={**os.environ, **self._environment},
                start_new_session=True,
            )

    def check_alive(self) -> None:
        """Raise the class's error if the process has ended."""
        assert self._process is not None, "not started"
        status = self._process.poll()
        if status is not None:
            raise self.error(f"the {self.name} ended with status {status}\n{self.tail()}")

    def stop(self) -> None:
        """Stop the process and every process of its group; do nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._grace_s)
        finally:  # after an impatient second Ctrl-C too
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """Path and last lines of the log."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"the end of {self.log}:", *(f"  | {line}" for line in text[-lines:])])


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
