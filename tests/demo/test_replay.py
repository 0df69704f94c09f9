"""The client against a small HTTP server that misbehaves in known ways."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from avmp_vllm.demo.replay import Answer, Replay, replay
from avmp_vllm.demo.workload import Phase, Request

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def request(name: str) -> Request:
    return Request(name, ({"role": "user", "content": name},), prompt_tokens=1, max_tokens=2)


def chunk(text: str, finish: str | None = None) -> dict:
    return {"choices": [{"delta": {"content": text}, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


async def stream(incoming: web.Request, *events: dict | bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(incoming)
    for event in events:
        line = event if isinstance(event, bytes) else json.dumps(event).encode()
        await response.write(b"data: " + line + b"\n\n")
    return response


def ask(handler: Handler, phases: list[Phase]) -> Replay:
    """Replay the phases against a server with this handler."""

    async def serve() -> Replay:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            return await replay(f"http://127.0.0.1:{port}", "tiny", phases)
        finally:
            await runner.cleanup()

    return asyncio.run(serve())


def only_answer(handler: Handler) -> Answer:
    (answer,) = ask(handler, [Phase("one", ((request("a"),),), 1)]).answers
    return answer


def test_an_answer_is_put_together_from_its_pieces() -> None:
    bodies = []

    async def handler(incoming: web.Request) -> web.StreamResponse:
        bodies.append(await incoming.json())
        return await stream(
            incoming, chunk(""), chunk("wa"), chunk("ter", "length"), USAGE, b"[DONE]"
        )

    answer = only_answer(handler)
    assert answer.error is None
    assert (answer.text, answer.finish_reason) == ("water", "length")
    assert (answer.prompt_tokens, answer.completion_tokens) == (3, 2)
    assert answer.ttft_s is not None
    assert answer.ttft_s > 0
    assert len(answer.gaps_s) == 1
    assert bodies[0]["temperature"] == 0
    assert bodies[0]["stream"] is True
    assert bodies[0]["messages"] == [{"role": "user", "content": "a"}]


async def _refuse(incoming: web.Request) -> web.StreamResponse:
    return web.json_response({"error": "too long"}, status=400)


async def _error_in_stream(incoming: web.Request) -> web.StreamResponse:
    return await stream(incoming, chunk("wa"), {"error": {"message": "engine died"}})


async def _break_off(incoming: web.Request) -> web.StreamResponse:
    return await stream(incoming, chunk("wa"))


async def _hang_up(incoming: web.Request) -> web.StreamResponse:
    assert incoming.transport is not None
    incoming.transport.close()
    return web.Response()


async def _no_json(incoming: web.Request) -> web.StreamResponse:
    return await stream(incoming, b"{broken")


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_refuse, "HTTP 400.*too long"),
        (_error_in_stream, "engine died"),
        (_break_off, "without a finish reason"),
        (_hang_up, "Disconnected"),
        (_no_json, "JSONDecodeError"),
    ],
)
def test_what_goes_wrong_is_recorded(handler: Handler, message: str) -> None:
    answer = only_answer(handler)
    assert answer.error is not None
    assert re.search(message, answer.error, re.DOTALL)


def test_order_and_concurrency() -> None:
    """Turns of a chat follow one another, phases too; no more chats than allowed run at once."""
    running = 0
    most: dict[str, int] = {}
    arrived: list[str] = []

    async def handler(incoming: web.Request) -> web.StreamResponse:
        nonlocal running
        name = (await incoming.json())["messages"][0]["content"]
        arrived.append(name)
        running += 1
        most[name[0]] = max(most.get(name[0], 0), running)
        await asyncio.sleep(0.02)
        response = await stream(incoming, chunk(name, "length"), USAGE)
        running -= 1
        return response

    phases = [
        Phase("p", tuple((request(f"p{i}.0"), request(f"p{i}.1")) for i in range(6)), 3),
        Phase("q", tuple((request(f"q{i}.0"),) for i in range(4)), 2),
    ]
    answers = ask(handler, phases).answers
    assert [answer.text for answer in answers] == [r.name for p in phases for r in p.requests]
    assert [answer.name[0] for answer in answers] == ["0"] * 12 + ["1"] * 4
    assert most == {"p": 3, "q": 2}
    assert [name[0] for name in arrived] == ["p"] * 12 + ["q"] * 4
    for i in range(6):
        assert arrived.index(f"p{i}.0") < arrived.index(f"p{i}.1")
