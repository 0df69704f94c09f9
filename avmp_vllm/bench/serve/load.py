"""The workloads: how a server is driven for one round.

Single turns are driven by vLLM's own client, ``vllm bench serve``, called in this process: starting
it anew for every round would cost more than the round. It has no conversations with history, so the
project's client drives those, with the history of the file and not the server's own answers. Both
servers get the same requests in the same order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.serve.rounds import Round
from avmp_vllm.demo.replay import replay
from avmp_vllm.demo.workload import (
    Conversation,
    CountTokens,
    Phase,
    Request,
    read_conversations,
    requests_of,
)


@dataclass(frozen=True)
class Load:
    """What a round sends.

    Attributes:
        sharegpt: File of the conversations.
        requests: Requests of a round (of chats: at most).
        concurrency: Requests (chats) at a time.
        answer_tokens: Length of an answer; None: as long as in the file (single turns only).
        max_model_len: Longest prompt and answer.
    """

    sharegpt: Path
    requests: int
    concurrency: int
    answer_tokens: int | None
    max_model_len: int


class Workload(Protocol):
    """Drives a server."""

    #: Options of ``vllm serve`` that this workload is about.
    options: tuple[str, ...]

    def drive(self, url: str, model: str, seed: int, log: Path) -> Round:
        """Send the round that ``seed`` names and wait for its answers."""


class SingleTurns:
    """The first question of each conversation, sent by ``vllm bench serve``."""

    # Nothing repeats within a round, and nothing may be left over from the round before.
    options = ("--no-enable-prefix-caching",)

    def __init__(self, load: Load) -> None:
        self._load = load

    def arguments(self, url: str, model: str, seed: int) -> list[str]:
        """Command line of ``vllm bench serve``."""
        load = self._load
        words = [
            *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
            *("--model", model, "--dataset-name", "sharegpt"),
            *("--dataset-path", str(load.sharegpt), "--num-prompts", str(load.requests)),
            *("--max-concurrency", str(load.concurrency), "--seed", str(seed)),
            *("--temperature", "0", "--ignore-eos", "--disable-tqdm", "--save-detailed"),
            *("--ready-check-timeout-sec", "0"),
        ]
        if load.answer_tokens is not None:
            words += ["--sharegpt-output-len", str(load.answer_tokens)]
        return words

    def drive(self, url: str, model: str, seed: int, log: Path) -> Round:
        """Run ``vllm bench serve`` once; what it prints goes to ``log``."""
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        args = parser.parse_args(self.arguments(url, model, seed))
        try:
            with log.open("a") as out, contextlib.redirect_stdout(out):
                result: dict[str, Any] = main(args)
        finally:
            gc.unfreeze()  # it freezes what it finds, and would keep all of it until the end
        return Round.from_vllm(result)


class Conversations:
    """Whole chats: every turn with the history before it, the turns of a chat one after another."""

    options = ("--enable-prefix-caching",)

    def __init__(self, load: Load, count: CountTokens) -> None:
        assert load.answer_tokens is not None
        self._load = load
        self._answer = load.answer_tokens
        self._count = count
        self._chats = [
            chat for chat in read_conversations(load.sharegpt) if len(chat.messages) >= 3
        ]
        if not self._chats:
            raise InputError(load.sharegpt, None, "holds no conversation with a second question")

    def phase(self, seed: int) -> Phase:
        """The chats of a round: a random choice, opened by a line that no other round has.

        The line keeps a round from finding its prompts in the cache of the round before.
        """
        chats = list(self._chats)
        random.Random(seed).shuffle(chats)
        opening = {"role": "system", "content": f"Conversation group {seed}."}
        chosen: list[tuple[Request, ...]] = []
        left = self._load.requests
        for chat in chats:
            turns = self._turns(Conversation(chat.id, (opening, *chat.messages)))[:left]
            if turns:
                chosen.append(turns)
                left -= len(turns)
            if not left:
                break
        if not chosen:
            raise InputError(self._load.sharegpt, None, "no turn fits in --max-model-len")
        return Phase(f"round {seed}", tuple(chosen), self._load.concurrency)

    def _turns(self, chat: Conversation) -> tuple[Request, ...]:
        longest = self._load.max_model_len - self._answer
        found: Sequence[Any] = list(requests_of(chat, self._count, longest))
        return tuple(Request(*turn, self._answer) for turn in found)

    def drive(self, url: str, model: str, seed: int, log: Path) -> Round:
        """Replay a round's chats."""
        return Round.from_replay(asyncio.run(replay(url, model, [self.phase(seed)])))
