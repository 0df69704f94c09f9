"""`avmp plan ORG/NAME`: the real hub client, against a hub on loopback."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[2] / "configs" / "models" / "jamba-reasoning-3b.json"


class Hub(http.server.BaseHTTPRequestHandler):
    """One model with one file, and the headers by which the client caches it."""

    def do_HEAD(self) -> None:
        known = self.path == "/org/jamba/resolve/main/config.json"
        self.send_response(200 if known else 404)
        if known:
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(CONFIG.stat().st_size))
        else:
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(CONFIG.read_bytes())

    def log_message(self, *args: object) -> None:
        """Stay quiet."""


@pytest.fixture(scope="module")
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _plan(model: str, hub: str, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "avmp_vllm.cli", "plan", model, "--memory", "5GiB"]
    return subprocess.run(command, env=environment, text=True, capture_output=True, check=False)


def test_a_hub_name_plans_like_its_file(hub, tmp_path):
    named = _plan("org/jamba", hub, tmp_path)
    assert named.returncode == 0, named.stderr
    from_file = _plan(str(CONFIG), hub, tmp_path)
    assert named.stdout.splitlines()[1:] == from_file.stdout.splitlines()[1:]
    assert "org/jamba" in named.stdout


def test_an_unknown_hub_name_is_one_line(hub, tmp_path):
    unknown = _plan("org/none", hub, tmp_path)
    assert unknown.returncode == 2
    assert unknown.stdout == ""
    (line,) = unknown.stderr.splitlines()
    assert "org/none" in line
    assert "give the path of a config.json" in line
