"""Scores of a reward model: packed equals the model's own forward, read at the same token, in both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification

from prefopt.errors import ModelError
from prefopt.model.layouts import build_score_model
from prefopt.model.reward_model import load_reward_model
from prefopt.recipe.schema import ModelSection
from prefopt.types import Group, Response
from tests.unit.memory_trainer import random_pairs
from tests.unit.tiny_models import tiny_model

PAD = 2


def classifier(arch: str, directory: Path) -> Any:
    """With a head of `load_reward_model`, always the same."""
    tiny_model(arch).save_pretrained(directory)
    section = ModelSection(path=str(directory))
    return load_reward_model(section, None, seed=0, pad_token_id=PAD).model.eval()


def own_scores(model: Any, groups: list[Group]) -> torch.Tensor:
    """One unpadded row at a time, by the model's own forward."""
    rows = [[*group.prompt_ids, *r.ids] for group in groups for r in group.responses]
    return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows])


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gemma2"])
@torch.no_grad()
def test_packed_and_padded_scores_are_those_of_the_models_own_forward(
    arch: str, tmp_path: Path
) -> None:
    groups = random_pairs(5)
    wanted = own_scores(classifier(arch, tmp_path), groups)
    for layout in ("packed", "padded"):
        score_model = build_score_model(classifier(arch, tmp_path), layout).eval()
        assert_close(score_model(score_model.layout(groups)), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_response_is_read_before_a_pad_token_that_ends_it(tmp_path: Path) -> None:
    """Where the tokenizer pads with its EOS, what loads the model later reads it there too."""
    group = Group("a", (5, 6), (Response((7, 8, PAD)), Response((9, PAD, 7, PAD, PAD))))
    wanted = own_scores(classifier("llama", tmp_path), [group])
    for layout in ("packed", "padded"):
        score_model = build_score_model(classifier("llama", tmp_path), layout).eval()
        laid_out = score_model.layout([group])
        assert_close(score_model(laid_out), wanted, rtol=1e-4, atol=1e-5)
        if layout == "packed":  # prompt 0-1, first response 2-4, second 5-9
            assert laid_out.predict.tolist() == [3, 7]


@torch.no_grad()
def test_an_encoder_which_reads_its_first_token_runs_padded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=97, num_hidden_layers=2, num_labels=1, pad_token_id=PAD, **sizes)
    encoder = BertForSequenceClassification(config).eval()
    score_model = build_score_model(encoder).eval()
    assert not score_model.packed
    assert "token layout: padded, because the packed layout cannot be used" in caplog.text
    groups = random_pairs(5)
    found = score_model(score_model.layout(groups))
    assert_close(found, own_scores(encoder, groups), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match=r"model\.layout = packed"):
        build_score_model(encoder, "packed")
