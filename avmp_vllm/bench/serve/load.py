"""The workloads: how a server is driven for one round.

Single turns are driven by vLLM's own client, ``vllm bench serve``, called in this process: starting
it anew for every round would cost more than the round. It has no conversations that
hold the server's own answers, so the project's client drives those. All servers get the same
requests, as long as they give the same answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.serve.chats import Chat, Tokenizer, converse, make_chat
from avmp_vllm.bench.serve.rounds import Round
from avmp_vllm.demo.workload import Conversation, read_conversations


@dataclass(frozen=True)
class Load:
    """What a round sends.

    Attributes:
        sharegpt: File of the conversations.
        requests: Requests of a round (of chats: at most).
        concurrency: Requests (users) at a time.
        answer_tokens: Length of an answer; None: as long as in the file (single turns only).
        max_model_len: Longest prompt and answer.
        turns: Most turns of a chat.
        think_s: Mean seconds between an answer and the next turn of its chat.
    """

    sharegpt: Path
    requests: int
    concurrency: int
    answer_tokens: int | None
    max_model_len: int
    turns: int = 6
    think_s: float = 0.0


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
    """Whole chats, each turn behind the answers that this server gave before it."""

    options = ("--enable-prefix-caching",)

    def __init__(self, load: Load, tokenizer: Tokenizer) -> None:
        assert load.answer_tokens is not None
        self._load = load
        self._answer = load.answer_tokens
        self._tokenizer = tokenizer
        self._chats = [
            chat
            for chat in read_conversations(load.sharegpt)
            if sum(message["role"] == "user" for message in chat.messages) >= 2
        ]
        if not self._chats:
            raise InputError(load.sharegpt, None, "holds no conversation with a second question")

    def chats(self, seed: int) -> list[Chat]:
        """The chats of a round: a random choice, opened by a line that no other round has.

        The line keeps a round from finding its prompts in the cache of the round before.
        """
        load, rng = self._load, random.Random(seed)
        opening = {"role": "system", "content": f"{seed} is the group."}
        chosen: list[Chat] = []
        left = load.requests
        for found in rng.sample(self._chats, len(self._chats)):
            said = [message for message in found.messages if message["role"] != "system"]
            chat = make_chat(
                Conversation(found.id, (opening, *said)),
                self._tokenizer,
                answer_tokens=self._answer,
                longest=load.max_model_len,
                most_turns=min(load.turns, left),
                think_s=load.think_s,
                rng=rng,
            )
            if chat.turns:
                chosen.append(chat)
                left -= len(chat.turns)
            if not left:
                break
        if not chosen:
            raise InputError(load.sharegpt, None, "no turn fits in --max-model-len")
        return chosen

    def drive(self, url: str, model: str, seed: int, log: Path) -> Round:
        """Hold a round's chats."""
        chats = self.chats(seed)
        return Round.from_replay(
            asyncio.run(converse(url, model, chats, self._load.concurrency, self._answer))
        )
