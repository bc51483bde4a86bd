"""Reward models against a plain forward, one response at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedModel

from prefopt.errors import SignalError
from prefopt.recipe.registry import get_signal
from prefopt.types import Candidates
from tests.signals.cases import candidates
from tests.unit.tiny_models import tiny_config, tiny_model
from tests.unit.tiny_tokenizers import TokenizerFactory

TEXTS = ("Sure! Here is how.", "No.", "I think that it would be helpful, but I am not sure.", "")
Saved = Callable[..., tuple[str, Any, PreTrainedModel]]


@pytest.fixture
def saved(tmp_path: Path, tiny_tokenizer: TokenizerFactory) -> Saved:
    """Saves a tiny reward model with its tokenizer; returns its path, tokenizer and the model."""

    def save(chat: str | None = "chatml", num_labels: int = 1, **config: Any) -> tuple:
        tokenizer = tiny_tokenizer(chat=chat, eos_token="<|im_end|>")
        settings = tiny_config("llama", len(tokenizer), num_labels=num_labels, **config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = AutoModelForSequenceClassification.from_config(settings)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
        path = tmp_path / "rm"
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path), tokenizer, model.eval()

    return save


def plain(model: PreTrainedModel, ids: list[int]) -> float:
    """One row, no padding, no mask: what a model card would do."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, 0].item()


def dialogue(*texts: str) -> Candidates:
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Can you help me with my code?"},
    )
    return candidates(*texts, prompt=turns)


def chat_ids(tokenizer: Any, group: Candidates, text: str, *, tail: bool = False) -> list[int]:
    turns = [*group.prompt.content, {"role": "assistant", "content": text}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole.endswith("<|im_end|>\n")
    whole = whole if tail else whole.removesuffix("\n")
    return tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("pad_token_id", [None, 0, 4])  # none, <pad>, the end token itself
def test_batched_scores_are_those_of_one_row_at_a_time(
    saved: Saved, batch_size: int, pad_token_id: int | None
) -> None:
    """Where the pad token is the end token, the model was trained to be read before it: so it is here."""
    path, tokenizer, model = saved(pad_token_id=pad_token_id)
    signal = get_signal("reward_model").fn(path=path, batch_size=batch_size)
    groups = [dialogue(*TEXTS), dialogue(*reversed(TEXTS[:2]))]
    found = signal.score(groups)
    expected = [[plain(model, chat_ids(tokenizer, g, t)) for t in g.texts] for g in groups]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len({round(score, 4) for score in found[0]}) == len(TEXTS)


def test_the_template_tail_is_read_where_asked_for(saved: Saved) -> None:
    path, tokenizer, model = saved()
    group = dialogue(*TEXTS)
    found = get_signal("reward_model").fn(path=path, keep_tail=True).score([group])
    expected = [[plain(model, chat_ids(tokenizer, group, t, tail=True)) for t in TEXTS]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_plain_text_is_prompt_separator_response_and_one_end(saved: Saved) -> None:
    path, tokenizer, model = saved(chat=None)
    group = candidates(*TEXTS, prompt="How to cook rice?")
    found = get_signal("reward_model").fn(path=path, separator="\n").score([group])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [[*tokenizer(f"How to cook rice?\n{text}")["input_ids"], end] for text in TEXTS]
    expected = [[plain(model, row) for row in rows]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_text_prompt_becomes_a_user_turn_under_chat(saved: Saved) -> None:
    path, *_ = saved()
    signal = get_signal("reward_model").fn(path=path, format="chat")
    turns = ({"role": "user", "content": "Hello"},)
    assert signal.score([candidates("Hi", prompt="Hello")]) == signal.score(
        [candidates("Hi", prompt=turns)]
    )


def test_an_encoder_reads_pairs(tmp_path: Path, tiny_tokenizer: TokenizerFactory) -> None:
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=1,
        pad_token_id=0,
    )
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    group = candidates("Sure, it is easy.", "No.", prompt="Can you help me?")
    signal = get_signal("reward_model").fn(path=str(tmp_path), format="pair")
    expected = [
        plain(model, tokenizer("Can you help me?", text)["input_ids"]) for text in group.texts
    ]
    torch.testing.assert_close(signal.score([group]), [expected], rtol=1e-4, atol=1e-5)


def test_a_response_that_does_not_fit_is_nan_and_counted_never_cut(saved: Saved) -> None:
    path, tokenizer, model = saved()
    group = dialogue("No.", "word " * 200)
    limit = len(chat_ids(tokenizer, group, "No."))
    signal = get_signal("reward_model").fn(path=path, max_length_tokens=limit)
    short, long = signal.score([group])[0]
    assert short == pytest.approx(plain(model, chat_ids(tokenizer, group, "No.")), rel=1e-4)
    assert math.isnan(long)
    assert signal.report() == {"responses": 2, "too_long": 1, "template_refused": 0}


def test_the_models_own_length_is_the_limit(saved: Saved) -> None:
    path, *_ = saved(max_position_embeddings=64)
    signal = get_signal("reward_model").fn(path=path)
    assert math.isnan(signal.score([dialogue("word " * 200)])[0][0])


def test_a_dialogue_the_template_refuses_is_nan_and_counted(saved: Saved) -> None:
    path, *_ = saved(chat="alternating")
    signal = get_signal("reward_model").fn(path=path)
    assert math.isnan(signal.score([dialogue("x")])[0][0])
    assert signal.report()["template_refused"] == 1


def test_an_adapter_is_scored_with_its_own_head(saved: Saved, tmp_path: Path) -> None:
    _, tokenizer, _ = saved()
    base = tiny_model("llama", len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    adapted: Any = get_peft_model(
        loaded, LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    group = dialogue(*TEXTS)
    found = get_signal("reward_model").fn(path=str(tmp_path / "adapter")).score([group])
    expected = [[plain(adapted.eval(), chat_ids(tokenizer, group, t)) for t in TEXTS]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_two_outputs_are_refused(saved: Saved) -> None:
    path, *_ = saved(num_labels=2)
    with pytest.raises(SignalError, match="has 2 outputs, a reward model has 1"):
        get_signal("reward_model").fn(path=path)


def test_a_language_model_is_refused(tmp_path: Path, tiny_tokenizer: TokenizerFactory) -> None:
    tokenizer = tiny_tokenizer(chat="chatml")
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SignalError, match=r"score\.weight.*no reward model"):
        get_signal("reward_model").fn(path=str(tmp_path))


def test_messages_need_a_template(saved: Saved) -> None:
    path, *_ = saved(chat=None)
    with pytest.raises(SignalError, match="chat_template"):
        get_signal("reward_model").fn(path=path).score([dialogue("x")])
