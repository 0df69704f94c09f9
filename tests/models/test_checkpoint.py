"""The tiny checkpoints: same arguments same bytes, text survives the tokenizer, chats render."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from avmp_vllm.models import tiny_hybrids
from avmp_vllm.models.tiny_jamba import write_tiny_jamba
from avmp_vllm.models.tokenizer import BOS, build_tokenizer, readable_ids


@pytest.fixture(scope="module")
def jamba(tmp_path_factory):
    return write_tiny_jamba(tmp_path_factory.mktemp("jamba"))


@pytest.fixture(scope="module")
def tokenizer(jamba):
    return AutoTokenizer.from_pretrained(jamba)


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_same_seed_gives_the_same_bytes(jamba, tmp_path):
    torch.randn(3)  # the state of torch's own generator must not matter
    assert contents(write_tiny_jamba(tmp_path / "again")) == contents(jamba)


def test_another_seed_gives_other_weights_only(jamba, tmp_path):
    first, second = contents(jamba), contents(write_tiny_jamba(tmp_path / "other", seed=1))
    assert {name for name in first if first[name] != second[name]} == {"model.safetensors"}


def test_writing_leaves_torchs_generator_alone(tmp_path):
    before = torch.random.get_rng_state()
    write_tiny_jamba(tmp_path / "jamba", num_hidden_layers=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_layers_are_those_of_a_jamba(jamba):
    config = json.loads((jamba / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(jamba)
    assert config["architectures"] == ["JambaForCausalLM"]
    kinds = [type(layer).__name__ for layer in model.model.layers]
    assert [index for index, kind in enumerate(kinds) if "Attention" in kind] == [2, 6]
    moe = [type(layer.feed_forward).__name__ for layer in model.model.layers]
    assert [index for index, kind in enumerate(moe) if "Moe" in kind] == [1, 3, 5, 7]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(NotADirectoryError, match="taken"):
        write_tiny_jamba(tmp_path / "taken")


def test_the_answers_vary_and_have_length(jamba, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(jamba)
    answers = []
    for text in ("What is a page?", "Write a letter.", "def f(x):"):
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
        answers.append(tokens[0, prompt["input_ids"].shape[1] :].tolist())
    assert len({tuple(answer) for answer in answers}) == 3
    assert all(len(answer) > 8 and len(set(answer)) > len(answer) // 2 for answer in answers)
    spoken = set(readable_ids(tokenizer))
    assert all(token in spoken for answer in answers for token in answer)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=200))
def test_any_text_survives_the_tokenizer(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text


TOKENIZER = build_tokenizer()


def test_every_byte_is_in_the_vocabulary():
    assert len(TOKENIZER) <= 512
    assert len(ByteLevel.alphabet()) == 256
    assert set(ByteLevel.alphabet()) <= set(TOKENIZER.get_vocab())


def test_merges_shorten_english():
    text = "What is the difference between the two?"
    assert len(TOKENIZER(text)["input_ids"]) < 0.75 * len(text)


def test_the_tokenizer_on_disk_is_the_one_built(tokenizer):
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(tokenizer, name) == getattr(TOKENIZER, name)


def test_a_chat_has_one_beginning_and_ends_with_the_assistants_turn(tokenizer):
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Grüße, 世界"},
    ]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert text.count(BOS) == 1
    assert ids["input_ids"].count(tokenizer.bos_token_id) == 1
    assert text.index("Be short.") < text.index("Grüße, 世界") < text.rindex("assistant")
    assert tokenizer.decode(ids["input_ids"]) == text
    assert text.endswith("assistant\n")


@pytest.mark.parametrize(
    "write",
    [
        tiny_hybrids.write_tiny_granite_hybrid,
        tiny_hybrids.write_tiny_nemotron_h,
        tiny_hybrids.write_tiny_falcon_h1,
        tiny_hybrids.write_tiny_zamba2,
        tiny_hybrids.write_tiny_lfm2,
        tiny_hybrids.write_tiny_qwen3_next,
        tiny_hybrids.write_tiny_qwen3_5,
        tiny_hybrids.write_tiny_llama,
        tiny_hybrids.write_tiny_mamba,
    ],
)
def test_the_other_families_load_and_speak(write, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write(tmp_path))
    prompt = torch.arange(10, 30)[None]
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert len(set(tokens[0, 20:].tolist())) > 4
