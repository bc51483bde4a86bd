"""The implicit reward against log-probs from the models' own logits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from prefopt.errors import SignalError
from prefopt.recipe.registry import get_signal
from prefopt.types import Candidates
from tests.signals.cases import candidates
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import TokenizerFactory

TEXTS = ("Sure! Here is how you can do it.", "No.", "What is the best way?")


@pytest.fixture
def models(tmp_path: Path, tiny_tokenizer: TokenizerFactory) -> dict[str, Any]:
    """Two saved models, an adapter on the first, and their tokenizer."""
    tokenizer = tiny_tokenizer()
    found: dict[str, Any] = {"tokenizer": tokenizer}
    for seed, name in enumerate(("base", "other")):
        model = tiny_model("llama", len(tokenizer), seed=seed)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    base = tiny_model("llama", len(tokenizer), seed=0)
    base.config._name_or_path = found["base"]
    base.name_or_path = found["base"]
    adapted: Any = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    found["adapter"] = str(tmp_path / "adapter")
    found["adapted"] = adapted.eval()
    return found


def group_of(tokenizer: Any, *texts: str, prompt: str = "How to cook rice?") -> Candidates:
    ids = [(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts]
    return candidates(
        *texts, prompt=prompt, prompt_ids=tuple(tokenizer(prompt)["input_ids"]), ids=ids
    )


def log_prob(model: Any, group: Candidates, number: int) -> float:
    prompt, response = group.prompt.ids, group.ids[number]
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, ids[0, len(prompt) :, None]).sum().item()


@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_reward_is_beta_times_the_log_ratio(models: dict[str, Any], batch_tokens: int) -> None:
    tokenizer = models["tokenizer"]
    groups = [group_of(tokenizer, *TEXTS), group_of(tokenizer, "No.", prompt="What?")]
    signal = get_signal("implicit_reward").fn(
        path=models["other"], reference=models["base"], beta=0.5, batch_tokens=batch_tokens
    )
    policy = tiny_model("llama", len(tokenizer), seed=1)
    reference = tiny_model("llama", len(tokenizer), seed=0)
    expected = [
        [0.5 * (log_prob(policy, g, i) - log_prob(reference, g, i)) for i in range(len(g.ids))]
        for g in groups
    ]
    torch.testing.assert_close(signal.score(groups), expected, rtol=1e-4, atol=1e-4)


def test_per_token_divides_by_the_length_end_token_included(models: dict[str, Any]) -> None:
    group = group_of(models["tokenizer"], *TEXTS)
    factory = get_signal("implicit_reward").fn
    paths = {"path": models["other"], "reference": models["base"]}
    whole = factory(**paths).score([group])[0]
    per_token = factory(**paths, per_token=True).score([group])[0]
    expected = [value / len(ids) for value, ids in zip(whole, group.ids, strict=True)]
    assert per_token == pytest.approx(expected)


def test_an_adapters_reference_is_its_base(models: dict[str, Any]) -> None:
    group = group_of(models["tokenizer"], *TEXTS)
    found = get_signal("implicit_reward").fn(path=models["adapter"]).score([group])[0]
    adapted = models["adapted"]
    with adapted.disable_adapter():
        reference = [log_prob(adapted, group, i) for i in range(3)]
    expected = [log_prob(adapted, group, i) - reference[i] for i in range(3)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert max(map(abs, found)) > 0.1


def test_a_full_model_without_a_reference_is_refused(models: dict[str, Any]) -> None:
    with pytest.raises(SignalError, match="set reference"):
        get_signal("implicit_reward").fn(path=models["other"])


def test_another_tokenizer_is_noticed(models: dict[str, Any]) -> None:
    group = candidates("Hello there", ids=[(70, 71, 72)])
    signal = get_signal("implicit_reward").fn(path=models["other"], reference=models["base"])
    with pytest.raises(SignalError, match="tokenizer is not the policy's"):
        signal.score([group])


def test_an_empty_response_is_nan(models: dict[str, Any]) -> None:
    signal = get_signal("implicit_reward").fn(path=models["other"], reference=models["base"])
    group = group_of(models["tokenizer"], "No.")
    found = signal.score([candidates("No.", "", prompt_ids=group.prompt.ids, ids=[*group.ids, ()])])
    assert math.isfinite(found[0][0]) and math.isnan(found[0][1])
