"""Under ZeRO-3 transformers splits all that it loads over the processes; what stands beside the policy is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from prefopt.model.adapters import save_full
from prefopt.model.load import load_policy
from prefopt.recipe.schema import ModelSection
from prefopt.signals.reward_model import reward_model
from tests.unit.every_causal_lm import tiny_causal_lm
from tests.unit.tiny_models import tiny_config
from tests.unit.tiny_tokenizers import make_tokenizer


@contextlib.contextmanager
def zero3() -> Iterator[None]:
    """What accelerate sets up in a ZeRO-3 launch. There are no others to share with: a load that tries fails."""
    held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    try:
        yield
        assert is_deepspeed_zero3_enabled(), "what trains is split as before"
    finally:
        unset_hf_deepspeed_config()
        del held


def test_a_frozen_policy_is_whole(tmp_path: Path) -> None:
    """References of other weights, implicit rewards."""
    want: Any = tiny_causal_lm("llama").get_input_embeddings().weight
    tiny_causal_lm("llama").save_pretrained(tmp_path)
    with zero3():
        loaded = load_policy(ModelSection(path=str(tmp_path)), None, seed=0, trainable=False)
    found: Any = loaded.model.get_input_embeddings().weight
    assert found.equal(want)


def test_a_reward_model_that_scores_is_whole(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    config = tiny_config("llama", vocab_size=len(tokenizer), num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with zero3():
        reward_model(path=str(tmp_path), device="cpu").close()


def test_experts_that_are_read_back_are_whole(tmp_path: Path) -> None:
    """Their files name tensors otherwise than memory, so the model is loaded again, by one process."""
    model = tiny_causal_lm("mixtral")
    with zero3():
        save_full(model, tmp_path, dict(model.state_dict()))
