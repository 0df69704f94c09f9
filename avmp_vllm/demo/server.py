"""One vLLM server as a child process: start, wait until it answers, read its counters, stop it."""

from __future__ import annotations

import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from avmp_vllm.demo.child import Child, ChildError

LOCALHOST = "127.0.0.1"
_POLL_S = 0.2
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy to localhost


class ServerError(ChildError):
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


class Server(Child):
    """A child process that serves HTTP on this machine.

    Args:
        command: Program and arguments.
        port: Where it listens.
        log: File that takes its output.
        environment: Variables added to this process's own.
        health: Path that answers with status 200 once the server is ready.
        grace_s: Seconds between SIGTERM and SIGKILL.
    """

    error = ServerError
    name = "server"

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
        super().__init__(command, log=log, environment=environment, grace_s=grace_s)
        self.url = f"http://{LOCALHOST}:{port}"
        self._health = health

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

    def _answers(self) -> bool:
        try:
            self.get(self._health, timeout_s=2.0)
        except OSError:  # refused, timed out, or an HTTP error
            return False
        return True


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
