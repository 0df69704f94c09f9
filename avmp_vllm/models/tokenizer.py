"""The tokenizer of the tiny checkpoints: byte-level BPE, built from a text in this file.

All 256 bytes are in the vocabulary, so any UTF-8 text comes back unchanged. A few merges of common
English keep prompts from being one token a byte.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLE, END = "<|role|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, ROLE, END)  # ids 0, 1, 2, 3, 4
VOCABULARY = 384  # 5 special tokens, 256 bytes, the rest merges

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{ROLE}" + "{{ message['role'] }}\n{{ message['content'] | trim }}" + f"{END}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + f"{ROLE}assistant\n" + "{% endif %}"
)

# What the merges are learned from: plain questions and answers, as a chat has them.
_TEXT = """
What is the difference between a page and a block? Can you explain how the memory of the model is
shared, and what happens when there is no more room? The short answer is that each request keeps
its own state, and that the state has the same size from the first token to the last one. The
pages of the attention layers are different: there are more of them with every token that is read
or written. When the conversation is over, everything is given back. Please write a letter to my
teacher that thanks her for the help she gave me this year. Of course! Here is a letter you could
send. How would you change this function so that it returns the number of words in a sentence?
I think that the easiest way is to split the text at the spaces and to count the parts. Then,
could you also show me how to test it? Yes: call it with an empty string, with one word, and with
a string that has some spaces in a row. Which cities should I visit in the summer, and where can I
find good food for a small price? It depends on what you like: the mountains, the sea, or the
streets of an old town. Let me know what else you want to know about it, and I will do my best.
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer; the same one every time.

    A prompt given as text starts with the beginning-of-sequence token. A chat prompt gets it from
    the template (vLLM and transformers add no second one there).
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT.splitlines(), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[ROLE, END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def readable_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the tokens that are printable ASCII, a newline or the end of sequence.

    A tiny model that answers with these only gives text that is valid UTF-8 and easy to read.
    """
    printable = [
        index
        for index in range(len(tokenizer))
        if (text := tokenizer.decode([index])).isascii() and (text.isprintable() or text == "\n")
    ]
    special = set(tokenizer.all_special_ids)
    return [i for i in printable if i not in special] + [tokenizer.eos_token_id]
