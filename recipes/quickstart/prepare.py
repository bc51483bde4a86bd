"""What the quickstart starts from, all made in place: a tokenizer, an untrained model, the SFT rows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recipes.quickstart.task import ALPHABET, Problem

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def make_tokenizer(alphabet: str = ALPHABET) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token a character, which puts one BOS in front as Llama's does."""
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=64
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int, hidden_size: int = 128, num_layers: int = 2
) -> LlamaForCausalLM:
    """Returns an untrained Llama of 0.4M parameters for ``tokenizer``; the same weights for the same seed."""
    vocabulary = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[EOS],
        pad_token_id=vocabulary[PAD],
        # 1/sqrt(hidden_size): at this width transformers' 0.02 makes the first hundred steps idle.
        initializer_range=hidden_size**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def write_base(directory: Path, *, seed: int) -> int:
    """Writes model and tokenizer to ``directory``; returns the number of parameters."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model.num_parameters()


def sft_rows(problems: Iterable[Problem], *, flawed_frac: float, seed: int) -> list[dict[str, Any]]:
    """Rows ``{prompt, response}``: the right answer, or with probability ``flawed_frac`` the careless one."""
    draw = random.Random(seed)
    return [
        {
            "prompt": problem.prompt,
            "response": problem.careless_answer if draw.random() < flawed_frac else problem.answer,
        }
        for problem in problems
    ]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
