"""``avmp top``: recorded metrics drawn, a real server watched, and what its errors say."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from avmp_vllm.demo.server import LOCALHOST, free_port, vllm_server
from avmp_vllm.models.tiny_jamba import write_tiny_jamba
from avmp_vllm.top.client import metrics_address
from avmp_vllm.top.reading import Page, Reading
from avmp_vllm.top.view import frame, share_out, size

DATA = Path(__file__).parent / "data"
BEFORE, AFTER = ((DATA / f"{name}.prom").read_text() for name in ("before", "after"))
WIDTH = 80

#: The two recorded pages, a second and a half apart. 78 columns for 2,275,328 bytes: KV has 21
#: pages of 32,768 in use and 22 cached, SSM 4 blocks of 116,736 and 2; the gap is half a column.
DRAWN = """\
avmp top  http://localhost:8000  tiny-jamba  over 1.5 s

[███████████████████████▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒······▒▒▒▒▒▒▒▒████████████████]
█ KV   ▒ cached   · free (162.0 KiB)   SSM █
"""


def _reading(before: str = BEFORE, after: str = AFTER, seconds: float = 1.5) -> Reading:
    return Reading(Page(before, 10.0), Page(after, 10.0 + seconds))


def _drawn(reading: Reading, note: str = "") -> str:
    console = Console(width=WIDTH, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(frame(reading, "http://localhost:8000", WIDTH, note))
    return captured.get()


# -- drawing ---------------------------------------------------------------------------------------


def test_recorded_pages_are_drawn():
    """The bar to scale, and every figure beside it."""
    text = _drawn(_reading(), "a note")
    assert text.startswith(DRAWN)
    rows = {line[:20].strip(): line.split() for line in text.splitlines()}
    assert rows["KV      1.4 MiB"][3:7] == ["44", "21", "22", "1"]
    assert rows["SSM   798.0 KiB"][3:7] == ["7", "4", "2", "1"]
    assert rows["migrations KV to SSM"][4:6] == ["22", "7.3"]  # 11 in 1.5 s
    assert rows["prompt tokens"][2:4] == ["7,827", "2,080.0"]
    assert "states kept  tail 3, answer 1,204\n" in text
    assert "state hits   tail 2 of 6, answer 900 of 901\n" in text
    assert "requests running" in text
    assert "prefix hits, window" in text
    assert text.rstrip().endswith("a note")
    assert all(len(line) <= WIDTH for line in text.splitlines())


def test_means_and_ratios_are_of_the_window():
    """And not of the server's whole life."""
    before = "vllm:x_sum 10\nvllm:x_count 10\nhits 5\nasked 10\n"
    after = "vllm:x_sum 16\nvllm:x_count 12\nhits 6\nasked 14\n"
    reading = _reading(before, after, 2.0)
    assert reading.mean("vllm:x") == 3.0
    assert reading.ratio("hits", "asked") == 0.25
    assert reading.rate("asked") == 2.0
    assert reading.mean("vllm:y") is None
    assert _reading(before, after, 0.0).rate("asked") is None


def test_a_restarted_server_counts_from_its_start():
    """No rate is negative."""
    assert _reading("asked 100\n", "asked 30\n", 3.0).rate("asked") == 10.0


def test_engines_are_summed():
    """Data parallel: two engines of the same arena."""
    second = AFTER.replace('engine="0"', 'engine="1"')
    one, two = _reading(after=AFTER), _reading(after=AFTER + second)
    assert two.engines == 2
    assert two.bands["kv"].used == 2 * one.bands["kv"].used
    assert two.gap_bytes == 2 * one.gap_bytes > 0
    assert "2 engines" in _drawn(two)


def test_without_states_their_lines_say_so():
    """A retention interval decides, or nothing was asked for yet."""
    lines = [line for line in AFTER.splitlines() if "avmp_state" not in line]
    text = _drawn(_reading(after="\n".join(lines) + "\n"))
    assert "states kept  -\nstate hits   -\n" in text


def test_an_arena_before_its_first_request_is_said_to_be_empty():
    """All gauges are zero then."""
    lines = [line.rpartition(" ")[0] + " 0" for line in AFTER.splitlines()]
    text = _drawn(_reading("", "\n".join(lines) + "\n"))
    assert "not laid out yet" in text


@given(st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=8), st.data())
def test_a_bar_is_full_and_shows_every_part(sizes, data):
    """Whatever the sizes, the columns are all used, and a part with bytes has one."""
    columns = data.draw(st.integers(len(sizes), 300))
    shares = share_out(sizes, columns)
    assert sum(shares) == (columns if sum(sizes) else 0)
    for share, bytes_ in zip(shares, sizes, strict=True):
        assert share >= 0
        assert share or not bytes_ or bytes_ / sum(sizes) * columns < 1


def test_sizes_have_units():
    """From bytes to GiB."""
    counts = (0, 900, 2048, 5 << 20, 3 << 30)
    assert [size(c) for c in counts] == ["0 B", "900 B", "2.0 KiB", "5.0 MiB", "3.00 GiB"]


# -- the command -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _serving(*pages: str) -> Iterator[str]:
    """A server that answers with the pages in turn, the last one for ever."""
    left = list(pages)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = (left.pop(0) if len(left) > 1 else left[0]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer((LOCALHOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://{LOCALHOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


COMMAND = [sys.executable, "-m", "avmp_vllm.cli", "top"]


def _top(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "--interval", "0.1", *words], capture_output=True, text=True, check=False
    )


def test_once_prints_one_frame():
    """Not coloured where it is no terminal."""
    with _serving(BEFORE, AFTER) as url:
        done = _top("--once", url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("avmp top") == 1
    assert "\x1b" not in done.stdout
    assert DRAWN.splitlines()[2] in done.stdout


def test_a_terminal_is_redrawn_until_interrupted():
    """A real one; the server goes away meanwhile, and that is said in the frame."""
    leader, follower = pty.openpty()
    with _serving(BEFORE, AFTER) as url:
        child = subprocess.Popen(
            [*COMMAND, "--interval", "0.2", url],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
        )
        shown = _read_until(leader, "a second")
    shown += _read_until(leader, "no metrics at")
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == 0
    os.close(follower)
    os.close(leader)
    assert "\x1b[?1049h" in shown  # the terminal's other screen, so that nothing scrolls away


def _read_until(terminal: int, word: str) -> str:
    shown, end = "", time.monotonic() + 30
    while word not in shown:
        assert time.monotonic() < end, shown
        shown += os.read(terminal, 65536).decode(errors="replace")
    return shown


def test_no_server_is_one_line():
    """The address, the reason, and a question that helps."""
    done = _top("--once", f"{LOCALHOST}:{free_port()}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("avmp top: error: no metrics at http://127.0.0.1:")
    assert "refused" in line


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            "vllm:num_requests_running 0\n",
            "runs vLLM without AVMP; start it with `vllm serve MODEL",
        ),
        ("python_info 1\n", "has no metrics of vLLM"),
        ("<html>{", "no metrics at"),
    ],
    ids=["stock", "not-vllm", "no-metrics"],
)
def test_another_server_is_one_line(page, message):
    """Stock vLLM: how AVMP is turned on."""
    with _serving(page) as url:
        done = _top("--once", url)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert message in line


def test_without_a_terminal_the_live_view_is_refused():
    """Frames in a file help nobody."""
    done = _top()
    assert done.returncode == 2
    assert "--once" in done.stderr


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan"])
def test_bad_intervals(value):
    """The value is named."""
    done = subprocess.run(
        [*COMMAND, "--interval", value], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"'{value}' is not a number of seconds" in done.stderr


@pytest.mark.parametrize(
    "url", ["a:1", "http://a:1", "http://a:1/", "http://a:1/metrics", "a:1/metrics"]
)
def test_addresses(url):
    """A host and a port are enough."""
    assert metrics_address(url) == "http://a:1/metrics"


@pytest.mark.timeout(420)
def test_a_real_server_is_watched(tmp_path):
    """From before its first request to after it."""
    model = write_tiny_jamba(tmp_path / "jamba")
    options = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager")
    options += ("--kv-cache-memory-bytes", "2400000", "--max-num-seqs", "8")
    options += ("--enable-prefix-caching",)
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    server = vllm_server(
        model,
        block_manager="avmp",
        log=tmp_path / "log",
        options=(*options, "--served-model-name", "tiny"),
        environment=environment,
    )
    with server:
        server.wait_ready(300)
        done = _top("--once", server.url)
        assert done.returncode == 0, done.stderr
        assert "not laid out yet" in done.stdout
        body = {"model": "tiny", "prompt": list(range(20, 120)), "max_tokens": 40}
        body["ignore_eos"] = True  # past 128 tokens, where the answer's state is copied
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        no_proxy.open(request, timeout=120).close()
        time.sleep(1)  # statistics follow the last step
        done = _top("--once", server.url)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout.splitlines()[0]
    assert "█" in done.stdout or "▒" in done.stdout
    rows = {line[:20].strip(): line.split() for line in done.stdout.splitlines()}
    assert rows["prompt tokens"][2] == "100"
    assert int(rows["answer tokens"][2]) > 0
    # The prompt's last page costs no cut, as its layers save the state inside of the chunk.
    assert "states kept  tail 1, answer 1" in done.stdout
