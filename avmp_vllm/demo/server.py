"""One vLLM server as a child process: start, wait until it answers, read its counters, stop it.

Whatever happens inside the ``with`` block, an exception and Ctrl-C included, the server and all
processes it started are gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from prometheus_client.parser import text_string_to_metric_families

LOCALHOST = "127.0.0.1"
_POLL_S = 0.2
_TAIL_LINES = 25
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to localhost


class ServerError(RuntimeError):
    """The server did not start, or died."""


class Metrics:
    """What one ``/metrics`` page said."""

    def __init__(self, text: str) -> None:
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float | None:
        """Sum over the samples of ``name`` that carry ``labels``; None where there is none."""
        values = [
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None


class Server:
    """A child process that serves HTTP on this machine, in a process group of its own.

    Args:
        command: Program and arguments.
        port: Where it listens.
        log: File that takes its output.
        environment: Variables added to this process's own.
        health: Path that answers with status 200 once the server is ready.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
        health: str = "/health",
        grace_s: float = 20.0,
    ) -> None:
        self.command = list(command)
        self.url = f"http://{LOCALHOST}:{port}"
        self.log = log
        self._environment = dict(environment or {})
        self._health = health
        self._grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
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
        """Of the process, whose children do most of the work."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start the process; return without waiting for it."""
        assert self._process is None, "started already"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )

    def wait_ready(
        self, timeout_s: float = 600.0, on_wait: Callable[[float], None] | None = None
    ) -> float:
        """Wait until the health path answers; return the seconds that took.

        Args:
            timeout_s: Seconds to wait.
            on_wait: Called with the seconds waited so far, several times a second.

        Raises:
            ServerError: It died or did not answer in time; the message ends with its log's tail.
        """
        begin = time.monotonic()
        while True:
            waited = time.monotonic() - begin
            self.check_alive()
            if self._answers():
                return waited
            if waited > timeout_s:
                raise ServerError(f"the server gave no answer in {timeout_s:.0f} s\n{self.tail()}")
            if on_wait is not None:
                on_wait(waited)
            time.sleep(_POLL_S)

    def check_alive(self) -> None:
        """Raise ServerError if the process has ended."""
        assert self._process is not None, "not started"
        status = self._process.poll()
        if status is not None:
            raise ServerError(f"the server ended with status {status}\n{self.tail()}")

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

    def get(self, path: str, timeout_s: float = 10.0) -> str:
        """Body of a GET of ``path``.

        Raises:
            OSError: The server cannot be reached or answers with an error.
        """
        with _DIRECT.open(self.url + path, timeout=timeout_s) as response:
            body: bytes = response.read()
        return body.decode()

    def metrics(self) -> Metrics:
        """Read ``/metrics``."""
        return Metrics(self.get("/metrics"))

    def tail(self, lines: int = _TAIL_LINES) -> str:
        """Path and last lines of the log."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n".join([f"the end of {self.log}:", *(f"  | {line}" for line in text[-lines:])])

    def _answers(self) -> bool:
        try:
            self.get(self._health, timeout_s=2.0)
        except OSError:  # refused, timed out, or an HTTP error
            return False
        return True


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        return int(probe.getsockname()[1])


def vllm_server(
    model: str | Path,
    *,
    block_manager: str,
    log: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Server:
    """A ``vllm serve`` of ``model``, not started yet, on a free port.

    Args:
        model: Checkpoint folder or name; the model's name in requests as well.
        block_manager: ``avmp`` or ``default``.
        log: File that takes its output.
        options: More options of ``vllm serve``.
        environment: Variables added to this process's own.

    Raises:
        ServerError: The ``vllm`` command is not installed beside this Python.
    """
    program = Path(sys.executable).with_name("vllm")
    if not program.exists():
        raise ServerError(f"{program} does not exist; install vLLM here with `make setup`")
    port = free_port()
    command = [str(program), "serve", str(model), "--host", LOCALHOST, "--port", str(port)]
    command += ["--block-manager", block_manager, *options]
    return Server(command, port=port, log=log, environment=environment)
