"""Starting and stopping a child process that serves HTTP, with real processes."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from avmp_vllm.demo.run import termination_as_interrupt
from avmp_vllm.demo.server import LOCALHOST, Metrics, Server, ServerError, free_port


def http_server(tmp_path: Path, *, grace_s: float = 10.0) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", LOCALHOST]
    return Server(command, port=port, log=tmp_path / "log", health="/", grace_s=grace_s)


def python(tmp_path: Path, code: str, *, grace_s: float = 10.0) -> Server:
    """A process that runs ``code`` and never answers."""
    return Server(
        [sys.executable, "-c", code], port=free_port(), log=tmp_path / "log", grace_s=grace_s
    )


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(path: Path) -> int:
    """The number that a child writes into a file."""
    for _ in range(500):
        if path.exists() and path.read_text().endswith("\n"):
            return int(path.read_text())
        time.sleep(0.02)
    raise TimeoutError(path)


def listens(server: Server) -> bool:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_it_starts_answers_and_stops(tmp_path: Path) -> None:
    waited: list[float] = []
    with http_server(tmp_path) as server:
        assert server.wait_ready(30, on_wait=waited.append) >= 0
        assert "Directory listing" in server.get("/")
        server.check_alive()
        assert listens(server)
    assert not listens(server)
    server.stop()  # twice does no harm


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_it_stops_on_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    server = http_server(tmp_path)

    def serve_and_fail() -> None:
        with server:
            server.wait_ready(30)
            raise error

    with pytest.raises(error):
        serve_and_fail()
    assert not listens(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_demo_stops_it(tmp_path: Path, number: signal.Signals) -> None:
    server = http_server(tmp_path)

    def serve_until_terminated() -> None:
        with termination_as_interrupt(), server:
            server.wait_ready(30)
            os.kill(os.getpid(), number)
            time.sleep(5)  # the signal arrives here

    with pytest.raises(KeyboardInterrupt):
        serve_until_terminated()
    assert not listens(server)


def test_its_children_stop_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(f'{{child.pid}}\\n')\n"
        "time.sleep(600)"
    )
    with python(tmp_path, code):
        child = wait_for(tmp_path / "pid")
        assert runs(child)
    for _ in range(100):  # whoever adopted the orphan has to reap it
        if not runs(child):
            break
        time.sleep(0.05)
    state = Path(f"/proc/{child}/stat")
    assert not runs(child) or " Z " in state.read_text()


def test_a_deaf_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, time, pathlib\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(f'{{os.getpid()}}\\n')\n"
        "time.sleep(600)"
    )
    with python(tmp_path, code, grace_s=0.3):
        pid = wait_for(tmp_path / "pid")
    assert not runs(pid)


def test_a_server_that_dies_shows_its_last_words(tmp_path: Path) -> None:
    code = "import sys; print('no such model'); sys.exit(7)"
    with python(tmp_path, code) as server, pytest.raises(ServerError) as caught:
        server.wait_ready(30)
    assert "status 7" in str(caught.value)
    assert "no such model" in str(caught.value)
    assert str(tmp_path / "log") in str(caught.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with (
        python(tmp_path, "import time; time.sleep(600)") as server,
        pytest.raises(ServerError, match="no answer in 0 s"),
    ):
        server.wait_ready(0.4)


def test_metrics_add_up_over_labels() -> None:
    metrics = Metrics(
        "# TYPE a counter\n"
        'a_total{pool="kv",engine="0"} 1.0\n'
        'a_total{pool="kv",engine="1"} 2.0\n'
        'a_total{pool="ssm",engine="0"} 4.0\n'
    )
    assert metrics.value("a_total") == 7
    assert metrics.value("a_total", pool="kv") == 3
    assert metrics.value("a_total", pool="kv", engine="1") == 2
    assert metrics.value("a_total", pool="tape") is None
    assert metrics.value("b_total") is None
