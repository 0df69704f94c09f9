"""Reading conversations and making phases of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avmp_vllm.demo.workload import (
    SAMPLE,
    Conversation,
    Message,
    Shape,
    WorkloadError,
    make_phases,
    read_conversations,
)

TURN = {"from": "human", "value": "hello"}


def words(messages: list[Message]) -> int:
    """A tokenizer of words, so that lengths are easy to see."""
    return sum(len(message["content"].split()) for message in messages)


def chat(name: str, *lengths: int) -> Conversation:
    """A conversation whose messages have these lengths in words; the user begins."""
    roles = ("user", "assistant")
    return Conversation(
        name,
        tuple({"role": roles[i % 2], "content": "word " * n} for i, n in enumerate(lengths)),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ('{"id": 1}', "must be a list of conversations, not an object"),
        ("[]", "holds no conversation"),
        ("[3]", "entry 0: must be an object, not a int"),
        ('[{"id": "a"}]', "entry 0: field 'conversations' is missing"),
        ('[{"conversations": "hi"}]', "entry 0: field 'conversations' must be a list, not a str"),
        (
            json.dumps([{"id": "a", "conversations": [TURN]}, {"id": "b", "conversations": ["x"]}]),
            r"entry 1 \(id 'b'\): conversations\[0\]: must be an object, not a string",
        ),
        (
            json.dumps([{"id": "a", "conversations": [TURN, {"value": "x"}]}]),
            r"entry 0 \(id 'a'\): conversations\[1\]: field 'from' is missing",
        ),
        (
            json.dumps([{"id": "a", "conversations": [{"from": "robot", "value": "x"}]}]),
            r"conversations\[0\]: field 'from' is 'robot', which is none of system, human",
        ),
        (
            json.dumps([{"id": "a", "conversations": [{"from": "human", "value": None}]}]),
            r"conversations\[0\]: field 'value' must be a string, not null",
        ),
        (
            json.dumps([{"id": "a", "conversations": [{"from": "gpt", "value": "x"}]}]),
            "holds no conversation with a human turn",
        ),
    ],
)
def test_a_malformed_file_is_one_clear_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "chats.json"
    path.write_text(content)
    with pytest.raises(WorkloadError, match=message) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_conversations(tmp_path / "nothing.json")
    (tmp_path / "binary.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_conversations(tmp_path / "binary.json")


def test_roles_become_those_of_the_chat_api(tmp_path: Path) -> None:
    speakers = ["system", "human", "gpt", "user", "chatgpt"]
    turns = [{"from": speaker, "value": speaker} for speaker in speakers]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"conversations": turns}]))
    (only,) = read_conversations(path)
    roles = [message["role"] for message in only.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert only.id == "0"


def test_phases_are_short_long_short_and_bounded() -> None:
    chats = [chat(f"s{i}", 10, 5, 10) for i in range(40)] + [chat(f"l{i}", 700) for i in range(9)]
    shape = Shape(max_model_len=1000, requests=40, long_share=0.15)
    first, long, second = make_phases(chats, words, shape)
    assert [len(list(phase.requests)) for phase in (first, long, second)] == [17, 6, 17]
    assert all(request.prompt_tokens >= 600 for request in long.requests)
    short = [*first.requests, *second.requests]
    assert all(request.prompt_tokens <= shape.short_prompt for request in short)
    assert len({request.name for request in short}) == len(short)  # enough chats: none twice
    for phase in (first, long, second):
        for request in phase.requests:
            assert request.prompt_tokens + request.max_tokens <= shape.max_model_len
            assert request.messages[-1]["role"] == "user"
    assert make_phases(chats, words, shape) == [first, long, second]


def test_a_turn_carries_the_history_of_the_file() -> None:
    (phase,) = make_phases([chat("a", 3, 4, 5)], words, Shape(max_model_len=500, requests=2))[:1]
    (turns,) = phase.chats
    assert [len(request.messages) for request in turns] == [1, 3][: len(turns)]
    assert turns[0].name == "a/0"
    assert turns[0].prompt_tokens == 3


def test_too_few_short_chats_are_used_twice() -> None:
    chats = [chat("s", 10), chat("t", 10), chat("l", 700)]
    phases = make_phases(chats, words, Shape(max_model_len=1000, requests=20))
    assert [phase.name for phase in phases] == ["short chats", "long chats", "short chats again"]
    assert [r.name for r in phases[0].requests] == [r.name for r in phases[2].requests]


def test_conversations_that_do_not_fit_are_an_error_that_names_the_option() -> None:
    with pytest.raises(WorkloadError, match="--max-model-len"):
        make_phases([chat("l", 700)], words, Shape(max_model_len=500))


def test_the_shipped_sample_is_valid_and_feeds_every_phase() -> None:
    chats = read_conversations(SAMPLE)
    assert len(chats) >= 40
    assert len({entry.id for entry in chats}) == len(chats)
    users = [[m["role"] for m in entry.messages].count("user") for entry in chats]
    assert all(1 <= count <= 3 for count in users)
    systems = [m["content"] for entry in chats for m in entry.messages if m["role"] == "system"]
    assert len(systems) > len(set(systems)) > 1  # prefixes that chats share
    shape = Shape(max_model_len=1024, long_prompt=250, short_prompt=80, long_answer=16)
    phases = make_phases(chats, words, shape)
    assert len(phases) == 3
    assert all(len(phase.chats) > 4 for phase in phases)
