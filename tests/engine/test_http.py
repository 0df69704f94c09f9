"""``vllm serve --block-manager avmp`` over HTTP, beside a stock server: errors, aborts, metrics."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import re
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from avmp_vllm.core.keeper import Origin
from avmp_vllm.demo.server import Metrics, Server, vllm_server

OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--seed", "0"),
    *("--kv-cache-memory-bytes", "2400000", "--max-num-seqs", "8"),
    *("--enable-prefix-caching", "--disable-uvicorn-access-log"),
)
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_LOG_STATS_INTERVAL": "1",
    "AVMP_VERIFY": "1",
}


@pytest.fixture(scope="module")
def servers(tiny_jamba, tmp_path_factory):
    """A stock and an AVMP server with the same bytes, started together."""
    logs = tmp_path_factory.mktemp("logs")
    made = {
        manager: vllm_server(
            tiny_jamba,
            block_manager=manager,
            log=logs / f"{manager}.log",
            options=OPTIONS,
            environment=ENVIRONMENT,
        )
        for manager in ("default", "avmp")
    }
    with made["default"], made["avmp"]:
        for server in made.values():
            server.wait_ready(300)
        yield made


def _post(server: Server, path: str, body: bytes) -> tuple[int, dict]:
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def _choice(server: Server, model: str, prompt: list[int], tokens: int, **options: Any) -> dict:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **options}
    status, answer = _post(server, "/v1/completions", json.dumps(body).encode())
    assert status == 200, answer
    return answer["choices"][0]


def _complete(server: Server, model: str, prompt: list[int], tokens: int = 30) -> str:
    return _choice(server, model, prompt, tokens)["text"]


def _eventually_idle(server: Server) -> Metrics:
    """Wait until no page is referenced (statistics follow the last step)."""
    for _ in range(50):
        metrics = server.metrics()
        if metrics.value("vllm:avmp_pages_used") == 0:
            return metrics
        time.sleep(0.2)
    raise AssertionError("pages stay referenced after the last request")


def _prompts() -> list[list[int]]:
    return [[20 + (7 * i + j) % 200 for j in range(10 + 37 * (i % 12))] for i in range(24)]


def _conversation(server: Server, model: str) -> list[list[int]]:
    """Answers of four turns, each prompt with all that was said before it."""
    history, said = [20 + 11 * j % 200 for j in range(40)], []
    for turn in range(4):
        options = {"ignore_eos": True, "return_token_ids": True}
        said.append(_choice(server, model, history, 90, **options)["token_ids"])
        history = history + said[-1] + [30 + (13 * j + turn) % 200 for j in range(20)]
    return said


def test_a_conversation_begins_inside_of_its_last_answer(servers, tiny_jamba):
    """Which its metrics say: by where the states stand, of which kinds they are."""
    said = [_conversation(server, tiny_jamba) for server in servers.values()]
    assert said[0] == said[1]
    metrics = _eventually_idle(servers["avmp"])
    for name in ("states_kept", "states_made_total", "state_hits_total"):
        assert metrics.value(f"vllm:avmp_{name}", state="answer") > 0, name
    # Each answer passes a multiple of 64 tokens once or twice.
    copies = metrics.value("vllm:avmp_state_copies_total", cause="answer")
    assert 4 <= copies <= 8
    copied = metrics.value("vllm:avmp_copied_bytes_total", cause="answer")
    assert copied == copies * 116_736
    assert metrics.value("vllm:avmp_state_price") is not None
    for name in ("states_refused_total", "states_given_up_total", "state_misses_total"):
        for origin in Origin:
            assert metrics.value(f"vllm:avmp_{name}", state=origin.value) is not None


def test_answers_under_load_equal_stock(servers, tiny_jamba):
    """Eight at a time in an arena that holds fewer; capacity moves; nothing is held afterwards."""
    succeeded = _eventually_idle(servers["avmp"]).value("vllm:request_success_total")
    answers = {}
    for name, server in servers.items():
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers[name] = list(
                pool.map(lambda p, s=server: _complete(s, tiny_jamba, p), _prompts())
            )
    assert answers["avmp"] == answers["default"]
    metrics = _eventually_idle(servers["avmp"])
    for direction in ("kv_to_ssm", "ssm_to_kv"):
        assert metrics.value("vllm:avmp_migrations_total", direction=direction) > 0
    assert metrics.value("vllm:avmp_relocated_bytes_total") > 0
    for pool_name in ("kv", "ssm"):
        assert metrics.value("vllm:avmp_peak_pages_used", pool=pool_name) > 0
        assert metrics.value("vllm:avmp_capacity_pages", pool=pool_name) > 0
    # vLLM's own metrics are there beside them.
    assert metrics.value("vllm:request_success_total") - succeeded == len(_prompts())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b'{"model": MODEL, "prompt": "a'),
        ("/v1/completions", b'{"model": MODEL, "prompt": [20, 21], "max_tokens": 2000}'),
        ("/v1/completions", b'{"model": MODEL, "prompt": "' + b"too long " * 400 + b'"}'),
        ("/v1/completions", b'{"model": MODEL, "prompt": "a", "temperature": -3}'),
        ("/v1/completions", b'{"model": "another", "prompt": "a"}'),
        ("/v1/chat/completions", b'{"model": MODEL, "messages": "hello"}'),
    ],
    ids=["malformed", "too-many-tokens", "too-long", "bad-value", "bad-model", "bad-type"],
)
def test_bad_requests_are_answered_as_stock_does(servers, tiny_jamba, path, body):
    """Same status, same error."""
    body = body.replace(b"MODEL", json.dumps(tiny_jamba).encode())
    stock, avmp = (_post(servers[name], path, body) for name in ("default", "avmp"))
    assert stock[0] in (400, 404, 422)
    assert avmp[0] == stock[0]
    assert avmp[1]["error"]["message"] == stock[1]["error"]["message"]
    _eventually_idle(servers["avmp"])


def test_clients_that_disconnect_lose_nothing(servers, tiny_jamba):
    """Streams that are dropped after a few tokens give their pages back; others are unharmed."""
    server = servers["avmp"]
    expected = _complete(servers["default"], tiny_jamba, _prompts()[5])
    address = urlsplit(server.url)
    before = server.metrics().value("vllm:generation_tokens_total")
    for round_ in range(3):
        dropped = []
        for index in range(4):
            connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
            body = {
                "model": tiny_jamba,
                "prompt": _prompts()[index + 4 * round_],
                "max_tokens": 80,
                "ignore_eos": True,
                "stream": True,
            }
            connection.request(
                "POST",
                "/v1/completions",
                json.dumps(body),
                {"Content-Type": "application/json"},
            )
            dropped.append((connection, connection.getresponse()))
        for connection, response in dropped:
            assert response.readline().startswith(b"data:")
            connection.close()
            response.close()
        assert _complete(server, tiny_jamba, _prompts()[5]) == expected
    metrics = _eventually_idle(server)
    # The dropped streams ended early: 12 of 80 tokens, and 3 whole answers of 30.
    assert metrics.value("vllm:generation_tokens_total") - before < 12 * 80 + 3 * 30
    server.check_alive()


def test_log_has_capacity_and_counters(servers):
    """The capacity block at start-up, and a line of counters with vLLM's own."""
    log = servers["avmp"].log.read_text()
    assert "AVMP arena: 2,400,000 bytes" in log
    assert "migrations: ssm_to_kv" in log
    assert re.search(r"states kept: .*answer \d+.*; state hits: .*answer \d+", log)
    assert "AVMP" not in servers["default"].log.read_text()
