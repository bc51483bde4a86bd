"""Small byte-level BPE tokenizers trained in place, with special tokens and templates of real families."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TokenizerFactory = Callable[..., PreTrainedTokenizerFast]

SPECIALS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen: no BOS, a line break after the end of a turn, <|im_end|> is the end."""

LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
"""Llama 3: the template writes the BOS that the tokenizer also adds; contents are stripped."""

ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Zephyr: no BOS in the template of a tokenizer that adds one; role marks are no special tokens."""

THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""DeepSeek-R1-like: the generation prompt opens a thought that a finished turn does not have."""

ALTERNATING = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Mistral: refuses system messages and dialogues that do not alternate."""

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""A template that ends turns with no special token at all."""

TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "zephyr": ZEPHYR,
    "thinking": THINKING,
    "alternating": ALTERNATING,
    "plain": PLAIN,
}

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. What is the best way to cook rice? user assistant "
    "system\n\nTo cook rice, you need water and a pot. I think that it would be helpful, but I am not "
    "sure about this.\nHuman: Can you help me with my code?\n\nAssistant: Sure! Here is how you can do "
    "it in Python: print(1 + 2)"
)


def make_tokenizer(
    chat: str | None = None, *, add_bos: bool = False, vocab_size: int = 400, **special: Any
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, the same for the same arguments.

    Args:
        chat: name of one of ``TEMPLATES``, a template, or None for a tokenizer without one.
        add_bos: whether it puts ``<s>`` before a text by itself, as Llama's and Gemma's do.
        vocab_size: most tokens, the 256 bytes and the specials included.
        special: more keywords, e.g. ``eos_token="<|im_end|>"``.
    """
    backend = Tokenizer.from_str(_trained(vocab_size))
    if add_bos:
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[bos]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        clean_up_tokenization_spaces=False,
        **{**names, **special},
    )
    tokenizer.chat_template = TEMPLATES.get(chat, chat) if chat is not None else None
    return tokenizer


@functools.cache
def _trained(vocab_size: int) -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_CORPUS], trainer)
    return backend.to_str()
