"""A server whose arena is elastic: its memory falls and rises, by load and by hand, over HTTP."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from avmp_vllm.cli import main
from avmp_vllm.demo.server import Server, vllm_server
from avmp_vllm.engine.entry.memory_api import PATH
from avmp_vllm.models.tiny_jamba import write_tiny_jamba
from avmp_vllm.top import memory
from avmp_vllm.top.client import TopError
from avmp_vllm.top.memory import ask

KEY = "secret"
MIB = 1 << 20
ARENA = 400 * MIB
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--seed", "0"),
    *("--kv-cache-memory-bytes", str(ARENA), "--max-num-seqs", "64", "--api-key", KEY),
    *("--enable-prefix-caching", "--disable-uvicorn-access-log"),
    *("--additional-config", '{"avmp": {"memory": "elastic", "cut_tokens": 0}}'),
)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_SERVER_DEV_MODE": "1",
    "AVMP_VERIFY": "1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A tiny Jamba whose states have 1.5 MiB."""
    return str(write_tiny_jamba(tmp_path_factory.mktemp("jamba"), mamba_d_state=256))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("logs") / "server.log"
    made = vllm_server(
        model, block_manager="avmp", log=log, options=OPTIONS, environment=ENVIRONMENT
    )
    with made:
        made.wait_ready(300)
        yield made


def post(server: Server, path: str, body: Any = None, key: str | None = KEY) -> Any:
    """Status and answer of a POST."""
    request = urllib.request.Request(server.url + path, data=json.dumps(body or {}).encode())
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.loads(response.read() or b"{}")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def resident(server: Server) -> int:
    """Bytes in memory of all of the server's processes."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            session = int(path.read_text().rsplit(")", 1)[1].split()[3])
            status = path.with_name("status").read_text()
        except (OSError, IndexError):
            continue
        if session == server.pid and (found := re.search(r"RssAnon:\s+(\d+)", status)):
            total += int(found[1]) << 10
    return total


def answers(server: Server, model: str) -> list[str]:
    """64 requests at once."""

    def one(index: int) -> str:
        prompt = [20 + (7 * index + j) % 200 for j in range(33 + index)]
        body = {"model": model, "prompt": prompt, "max_tokens": 20, "temperature": 0}
        status, answer = post(server, "/v1/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        return list(pool.map(one, range(64)))


def test_memory_follows_load_and_budget(server, model, capsys):
    """Resident bytes rise with the load, and fall when the budget and the prefix cache do."""
    answers(server, model)
    post(server, "/reset_prefix_cache")
    rest, rested = resident(server), ask(server.url, key=KEY)
    assert rested["backed"] <= rested["held"] + 2 * rested["chunk_bytes"]
    assert rested["budget"] == ARENA
    expected = answers(server, model)
    loaded, full = ask(server.url, key=KEY), resident(server)
    assert loaded["held"] > 40 * MIB, "the prefix cache keeps states"
    assert full - rest > 0.8 * (loaded["backed"] - rested["backed"])
    # Lowered by hand: cached states go, and their bytes with them.
    os.environ["VLLM_API_KEY"] = KEY
    try:
        budget = str(loaded["least_budget"])
        assert main(["memory", server.url, "--budget", budget]) == 0
        printed = capsys.readouterr().out
        assert main(["memory", server.url, "--json"]) == 0
        lowered = json.loads(capsys.readouterr().out)
    finally:
        del os.environ["VLLM_API_KEY"]
    assert f"{lowered['budget']:>20,}  may have memory at most" in printed
    assert re.search(r"[1-9][\d,]+  given back by this command", printed)
    assert lowered["backed"] <= lowered["budget"] == loaded["least_budget"]
    given = loaded["backed"] - lowered["backed"]
    assert given > 40 * MIB
    assert full - resident(server) > 0.8 * given
    # It serves within that, one after the other, and with all of it again after a raise.
    assert answers(server, model) == expected
    assert post(server, PATH, {"budget": "400MiB"})[1]["budget"] == ARENA
    assert answers(server, model) == expected
    again, full = ask(server.url, key=KEY), resident(server)
    assert again["backed"] > 40 * MIB
    assert post(server, "/reset_prefix_cache")[1] == {"success": True}
    rested = ask(server.url, key=KEY)
    assert rested["backed"] <= rested["held"] + 2 * rested["chunk_bytes"]
    assert full - resident(server) > 0.8 * (again["backed"] - rested["backed"])


def test_the_endpoint_is_guarded_and_refuses_by_name(server, capsys):
    """By the API key; and with what would be taken."""
    assert post(server, PATH, {"budget": "300MiB"}, key=None)[0] == 401
    with pytest.raises(TopError, match="give --api-key"):
        ask(server.url, key="wrong")
    for body in ({}, {"budget": None}, {"budget": [1]}):
        status, answer = post(server, PATH, body)
        assert status == 400
        assert "must be a JSON object" in answer["error"]
    with pytest.raises(TopError, match=r"refuses: budget = \d+: one request of max_model_len"):
        ask(server.url, "1MiB", KEY)
    assert main(["memory", server.url, "--budget", "some", "--api-key", KEY]) == 1
    assert "refuses: budget = 'some': write bytes" in capsys.readouterr().err
    assert memory.PATH == PATH


def test_metrics_and_the_log_say_what_has_memory(server, model):
    """Gauges, counters by call, the capacity block and the line of counters."""
    answers(server, model)
    metrics, now = server.metrics(), ask(server.url, key=KEY)
    assert metrics.value("vllm:avmp_memory_budget_bytes") == now["budget"]
    handles = metrics.value("vllm:avmp_memory_handles")
    assert metrics.value("vllm:avmp_memory_backed_bytes") == handles * now["chunk_bytes"]
    for call in ("create", "map", "allow", "unmap", "release"):
        assert metrics.value("vllm:avmp_driver_calls_total", call=call) > 0, call
    assert metrics.value("vllm:avmp_memory_given_back_bytes_total") > 40 * MIB
    assert metrics.value("vllm:avmp_memory_fence_waits_total") == 0, "nothing runs late on a CPU"
    line = re.compile(r"memory: [\d.]+ of 400.0 MiB")
    until = time.monotonic() + 60  # vLLM writes the line every 10 s if something ran since
    while not line.search(log := server.log.read_text()) and time.monotonic() < until:
        answers(server, model)
    assert line.search(log)
    assert f"elastic: at most {ARENA:,} bytes of it have memory, in chunks of 2,097,152" in log


def test_servers_without_the_endpoint(tmp_path):
    """Nobody there, and one line for it."""
    with pytest.raises(TopError, match="is `vllm serve` running"):
        ask("localhost:9")
