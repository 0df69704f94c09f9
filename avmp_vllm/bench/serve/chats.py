"""Conversations that go on: each prompt holds the earlier answers as this server gave them.

Prompts are token ids, and so are answers (``/v1/completions`` with ``return_token_ids``). A client
that sent an answer back as text would have it tokenized anew, and what a model with random weights
wrote is seldom tokenized as it was written: no cache could then hit in an answer, under any rule.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from avmp_vllm.demo.replay import Answer, Replay, open_session, send
from avmp_vllm.demo.workload import Conversation, Message

if TYPE_CHECKING:
    import aiohttp

#: Stands for an answer while a chat template is cut in two.
MARK = "@@answer@@"


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    def apply_chat_template(
        self, conversation: list[Message], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        """A chat as one text."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of a text."""


@dataclass(frozen=True)
class Chat:
    """What one user says.

    Attributes:
        name: Unique within a round.
        turns: Token ids of each turn: the first with all that goes before it, each later one with
            what ends the answer before it; all up to where an answer begins.
        pauses_s: Seconds that pass before each turn.
    """

    name: str
    turns: tuple[tuple[int, ...], ...]
    pauses_s: tuple[float, ...]


def turns_of(messages: Sequence[Message], tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """The user turns of a conversation as they are sent when the answers are the server's own.

    A later turn is the part of the chat template behind the answer before it. Turns without text
    are left out.
    """
    opening = [message for message in messages if message["role"] == "system"][:1]
    said: list[Message] = []
    for message in messages:
        if message["role"] != "user" or not message["content"].strip():
            continue
        before = [said[-1], {"role": "assistant", "content": MARK}] if said else []
        text = tokenizer.apply_chat_template(
            [*opening, *before, message], add_generation_prompt=True, tokenize=False
        )
        if before:
            text = text[text.index(MARK) + len(MARK) :]
        yield tuple(tokenizer.encode(text, add_special_tokens=False))
        said.append(message)


def make_chat(
    chat: Conversation,
    tokenizer: Tokenizer,
    *,
    answer_tokens: int,
    longest: int,
    most_turns: int,
    think_s: float,
    rng: random.Random,
) -> Chat:
    """A conversation cut to what fits.

    Args:
        chat: Messages; what the file answers is left out.
        tokenizer: Of the model.
        answer_tokens: Tokens of each answer.
        longest: Most tokens of a prompt and its answer.
        most_turns: Most turns.
        think_s: Mean of the pause before a turn, drawn from an exponential distribution.
        rng: Draws the pauses.
    """
    turns: list[tuple[int, ...]] = []
    total = 0
    for turn in turns_of(chat.messages, tokenizer):
        total += len(turn) + answer_tokens
        if total > longest or len(turns) == most_turns:
            break
        turns.append(turn)
    pauses = (rng.expovariate(1 / think_s) if think_s else 0.0 for _ in turns)
    return Chat(chat.id, tuple(turns), tuple(pauses))


async def converse(
    url: str, model: str, chats: Sequence[Chat], users: int, answer_tokens: int
) -> Replay:
    """Hold all chats; return the answers in the order of the chats, each named ``chat/turn``.

    Args:
        url: Of the server, without a path.
        model: Name that the server knows the model by.
        chats: User ``u`` holds chats ``u``, ``u + users``, ..., one after another, whichever user
            is done first: so every server has the same chats at the same time.
        users: How many talk at a time.
        answer_tokens: Tokens of each answer.
    """
    answers: list[list[Answer]] = [[] for _ in chats]

    async def talk(session: aiohttp.ClientSession, user: int) -> None:
        for number in range(user, len(chats), users):
            await _hold(session, model, chats[number], answer_tokens, answers[number])

    begin = time.perf_counter()
    async with open_session(url) as session, asyncio.TaskGroup() as group:
        for user in range(users):
            group.create_task(talk(session, user))
    return Replay([one for several in answers for one in several], time.perf_counter() - begin)


async def _hold(
    session: aiohttp.ClientSession,
    model: str,
    chat: Chat,
    answer_tokens: int,
    answers: list[Answer],
) -> None:
    """Hold one chat. Turns behind one that failed are not sent, and count as failed."""
    prompt: list[int] = []
    broken: str | None = None
    for number, (turn, pause) in enumerate(zip(chat.turns, chat.pauses_s, strict=True)):
        answer = Answer(f"{chat.name}/{number}", error=broken)
        answers.append(answer)
        if broken is not None:
            continue
        prompt += turn
        await asyncio.sleep(pause)
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": answer_tokens,
            "return_token_ids": True,
        }
        await send(session, "/v1/completions", body, answer)
        if answer.error is None and len(answer.token_ids) != answer_tokens:
            answer.error = f"{len(answer.token_ids)} tokens came instead of {answer_tokens}"
        if answer.error is not None:
            broken = f"the turn before it failed: {answer.error}"
        prompt += answer.token_ids
