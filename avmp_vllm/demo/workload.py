"""Conversations in ShareGPT's form, and the phases of requests made of them.

Every request carries the history of the file, not the server's own answers. So two servers get the
same requests, byte for byte, whatever they answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]
CountTokens = Callable[[list[Message]], int]

SAMPLE = Path(__file__).with_name("conversations.json")

#: ShareGPT's name of a speaker -> the chat API's.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class WorkloadError(ValueError):
    """A conversation file that cannot be used; the message names file, entry and field."""


@dataclass(frozen=True)
class Conversation:
    """A chat: an identifier and its messages, each with ``role`` and ``content``."""

    id: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Request:
    """One user turn with the history before it.

    Attributes:
        name: ``conversation/turn`` of the file, unique within a phase.
        messages: What is sent.
        prompt_tokens: Their length in tokens under the chat template.
        max_tokens: Length of the answer; the servers are told not to stop before.
    """

    name: str
    messages: tuple[Message, ...]
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Phase:
    """Chats of which ``concurrency`` run at a time; the turns of one chat follow one another."""

    name: str
    chats: tuple[tuple[Request, ...], ...]
    concurrency: int

    @property
    def requests(self) -> Iterator[Request]:
        """All requests, chat by chat."""
        return (request for chat in self.chats for request in chat)


@dataclass(frozen=True)
class Shape:
    """How much of which kind of chat, in requests and tokens.

    Short chats hold a state each and few pages: the SSM pool binds. Long ones hold many pages each:
    the KV pool binds. The order short, long, short moves capacity one way and back.
    """

    max_model_len: int
    requests: int = 120
    short_prompt: int = 160  # longest prompt of a short chat
    short_answer: int = 48
    short_concurrency: int = 24
    short_turns: int = 2  # most turns of a short chat in one phase
    long_prompt: int = 600  # shortest prompt of a long chat
    long_answer: int = 64
    long_concurrency: int = 4
    long_turns: int = 2
    long_share: float = 0.15  # of the requests


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read a ShareGPT file: ``[{"id": ..., "conversations": [{"from": ..., "value": ...}]}]``.

    Chats without a user turn are left out.

    Raises:
        WorkloadError: The file cannot be read, or an entry has another form.
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise WorkloadError(f"{path}: no JSON: {error}") from error
    if not isinstance(entries, list):
        raise WorkloadError(f"{path}: must be a list of conversations, not {_kind(entries)}")
    chats = [_conversation(entry, i, f"{path}: entry {i}") for i, entry in enumerate(entries)]
    chats = [chat for chat in chats if any(m["role"] == "user" for m in chat.messages)]
    if not chats:
        raise WorkloadError(f"{path}: holds no conversation with a human turn")
    return chats


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(
        type(value), f"a {type(value).__name__}"
    )


def _field(entry: Any, name: str, kind: type, where: str) -> Any:
    """Value of a field of an object, which must have this type."""
    if not isinstance(entry, dict):
        raise WorkloadError(f"{where}: must be an object, not {_kind(entry)}")
    if name not in entry:
        raise WorkloadError(f"{where}: field {name!r} is missing")
    if not isinstance(entry[name], kind):
        wanted = "a list" if kind is list else "a string"
        raise WorkloadError(f"{where}: field {name!r} must be {wanted}, not {_kind(entry[name])}")
    return entry[name]


def _conversation(entry: Any, index: int, where: str) -> Conversation:
    turns = _field(entry, "conversations", list, where)
    name = str(entry.get("id", index))
    messages = []
    for i, turn in enumerate(turns):
        here = f"{where} (id {name!r}): conversations[{i}]"
        speaker = _field(turn, "from", str, here)
        if speaker not in ROLES:
            known = ", ".join(ROLES)
            raise WorkloadError(f"{here}: field 'from' is {speaker!r}, which is none of {known}")
        messages.append({"role": ROLES[speaker], "content": _field(turn, "value", str, here)})
    return Conversation(name, tuple(messages))


def requests_of(
    chat: Conversation, count: CountTokens, longest: int
) -> Iterator[tuple[str, tuple[Message, ...], int]]:
    """Name, messages and prompt tokens of each user turn, until a prompt exceeds ``longest``."""
    for i, message in enumerate(chat.messages):
        if message["role"] != "user" or not message["content"].strip():
            continue
        messages = chat.messages[: i + 1]
        tokens = count(list(messages))
        if tokens > longest:
            return
        yield f"{chat.id}/{i}", messages, tokens


def make_phases(chats: Sequence[Conversation], count: CountTokens, shape: Shape) -> list[Phase]:
    """Short chats, long chats, short chats again; the same every time.

    Chats are taken in the order of the file. Where it has too few short ones for two phases, the
    second phase repeats those of the first.

    Raises:
        WorkloadError: No turn fits in ``max_model_len``.
    """
    longest = shape.max_model_len - max(shape.short_answer, shape.long_answer)
    long_wanted = max(1, round(shape.requests * shape.long_share))
    short_wanted = max(2, shape.requests - long_wanted)
    half = -(-short_wanted // 2)
    short: list[tuple[Request, ...]] = []
    long: list[tuple[Request, ...]] = []
    enough = False
    for chat in chats:
        turns = list(requests_of(chat, count, longest))
        few = [t for t in turns if t[2] <= shape.short_prompt][: shape.short_turns]
        many = [t for t in turns if t[2] >= shape.long_prompt][-shape.long_turns :]
        if many and _total(long) < long_wanted:
            long.append(tuple(Request(*turn, shape.long_answer) for turn in many))
        elif few and not enough:
            short.append(tuple(Request(*turn, shape.short_answer) for turn in few))
            enough = min(_total(short[0::2]), _total(short[1::2])) >= half
        if enough and _total(long) >= long_wanted:
            break
    if not short and not long:
        raise WorkloadError(
            f"none of the {len(chats)} conversations has a turn of at most {longest} tokens; "
            "raise --max-model-len"
        )
    first, second = (short[0::2], short[1::2]) if enough else (short, short)
    phases = [
        Phase("short chats", _first(first, half), shape.short_concurrency),
        Phase("long chats", _first(long, long_wanted), shape.long_concurrency),
        Phase("short chats again", _first(second, short_wanted - half), shape.short_concurrency),
    ]
    return [phase for phase in phases if phase.chats]


def _total(chats: Sequence[tuple[Request, ...]]) -> int:
    return sum(len(chat) for chat in chats)


def _first(chats: Sequence[tuple[Request, ...]], wanted: int) -> tuple[tuple[Request, ...], ...]:
    """The first chats that hold ``wanted`` requests, the last one cut short if need be."""
    taken: list[tuple[Request, ...]] = []
    for chat in chats:
        left = wanted - _total(taken)
        if left <= 0:
            break
        taken.append(chat[:left])
    return tuple(taken)
