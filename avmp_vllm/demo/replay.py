"""Send the phases of a workload to a server's chat API, streaming, and time every answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from avmp_vllm.demo.workload import Phase, Request

_SILENCE_S = 300.0  # a server that sends nothing for so long has failed
_SAMPLE_S = 0.5


@dataclass
class Answer:
    """What came back for one request.

    Attributes:
        name: The request's name, with the number of its phase in front.
        text: The answer.
        finish_reason: ``length`` or ``stop``; None if the stream broke off.
        prompt_tokens, completion_tokens: As the server counted them.
        ttft_s: Seconds from sending to the first piece; None if none came.
        gaps_s: Seconds between the pieces after it.
        error: What went wrong, or None.
        token_ids: The answer in tokens, where the request asked for them.
    """

    name: str
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    error: str | None = None
    token_ids: list[int] = field(default_factory=list)


@dataclass
class Replay:
    """All answers in the order of the requests, and how long the whole took."""

    answers: list[Answer]
    seconds: float


async def replay(
    url: str,
    model: str,
    phases: Sequence[Phase],
    *,
    on_answer: Callable[[Phase, Answer], None] = lambda phase, answer: None,
) -> Replay:
    """Send every request of every phase, phase after phase.

    Args:
        url: Of the server, without a path.
        model: Name that the server knows the model by.
        phases: Run one after another; a phase begins when the one before has all its answers.
        on_answer: Called with every answer as it is complete.
    """
    answers: list[Answer] = []
    begin = time.perf_counter()
    async with open_session(url) as session:
        for number, phase in enumerate(phases):
            answers += await _run_phase(session, model, number, phase, on_answer)
    return Replay(answers, time.perf_counter() - begin)


def open_session(url: str) -> aiohttp.ClientSession:
    """A client of one server; must be called where an event loop runs."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_SILENCE_S)
    # A connection a request: a kept one may be closed by the server just as it is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(url, timeout=timeout, connector=connector)


async def _run_phase(
    session: aiohttp.ClientSession,
    model: str,
    number: int,
    phase: Phase,
    on_answer: Callable[[Phase, Answer], None],
) -> list[Answer]:
    room = asyncio.Semaphore(phase.concurrency)

    async def run_chat(chat: Sequence[Request]) -> list[Answer]:
        answers = []
        async with room:
            for request in chat:
                answer = Answer(f"{number}/{request.name}")
                await _ask(session, model, request, answer)
                answers.append(answer)
                on_answer(phase, answer)
        return answers

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run_chat(chat)) for chat in phase.chats]
    return [answer for task in tasks for answer in task.result()]


async def _ask(
    session: aiohttp.ClientSession, model: str, request: Request, answer: Answer
) -> None:
    """Send a chat and fill in its answer."""
    body = {"messages": list(request.messages), "max_tokens": request.max_tokens}
    await send(session, "/v1/chat/completions", {"model": model, **body}, answer)


async def send(
    session: aiohttp.ClientSession, path: str, body: dict[str, Any], answer: Answer
) -> None:
    """Send one request and fill in its answer. What the network does wrong goes into ``error``.

    Args:
        session: Of the server.
        path: Of the API: chats, or completions.
        body: Model, prompt and length; the answer is greedy, of full length, and streamed.
        answer: Filled in.
    """
    body = {
        **body,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last = time.perf_counter()
    try:
        async with session.post(path, json=body) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:300]}"
                return
            async for line in response.content:
                event = _event(line)
                if event is None:
                    continue
                if "error" in event:
                    answer.error = str(event["error"])[:300]
                    return
                if _take(event, answer):
                    now = time.perf_counter()
                    if answer.ttft_s is None:
                        answer.ttft_s = now - last
                    else:
                        answer.gaps_s.append(now - last)
                    last = now
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
        return
    if answer.finish_reason is None:
        answer.error = "the stream ended without a finish reason"


def _event(line: bytes) -> dict[str, Any] | None:
    """The JSON of a server-sent event; None for an empty line and for the closing mark."""
    data = line.strip().removeprefix(b"data:").strip()
    return json.loads(data) if data and data != b"[DONE]" else None


def _take(event: dict[str, Any], answer: Answer) -> bool:
    """Add an event to the answer; return whether it brought text or tokens."""
    if event.get("usage"):
        answer.prompt_tokens = event["usage"]["prompt_tokens"]
        answer.completion_tokens = event["usage"]["completion_tokens"]
    brought = False
    for choice in event["choices"]:
        text = (choice["delta"].get("content") if "delta" in choice else choice["text"]) or ""
        tokens = choice.get("token_ids") or []
        answer.text += text
        answer.token_ids += tokens
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        brought = brought or bool(text or tokens)
    return brought


async def peak(read: Callable[[], float | None], stop: asyncio.Event) -> float | None:
    """Highest value of ``read`` (called in a thread, twice a second) until ``stop`` is set."""
    highest: float | None = None
    while not stop.is_set():
        value = await asyncio.to_thread(read)
        if value is not None:
            highest = value if highest is None else max(highest, value)
        try:
            await asyncio.wait_for(stop.wait(), _SAMPLE_S)
        except TimeoutError:
            continue
    return highest
