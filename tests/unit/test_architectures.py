"""Every causal LM of the installed transformers: packed where that is right, else padded, else refused in words.

Models are tiny, random and made in place (`every_causal_lm`), with windows and chunks shorter than the rows and
longer than the layouts' own probe.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from prefopt.errors import ModelError
from prefopt.model.layouts import build_logp_model
from prefopt.model.load import disable_dropout
from prefopt.model.logps import LogpModel, decoder_of
from prefopt.model.short_windows import short_windows
from prefopt.types import Group, Response
from tests.unit.every_causal_lm import MODEL_TYPES, VOCABULARY, WINDOW, tiny_causal_lm
from tests.unit.test_logps import assert_same_gradients, naive_logps, weighted_gradients
from tests.unit.tiny_models import tiny_config, tiny_model


def told_to_users() -> dict[str, set[str]]:
    """Section of docs/architectures.md -> the model types it names: what must hold."""
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    models = page.read_text(encoding="utf-8").partition("\n# ")[0]
    sections = models.split("\n## ")[1:]
    return {part.partition("\n")[0]: set(re.findall(r"`([^`. ]+)`", part)) for part in sections}


TOLD = told_to_users()

# One of a kind, for every run of the tests: a window and chunks that only the mask knows, a body by another name,
# attention to picked tokens, sinks, latent attention, a convolution over tokens, a head with a step of its own.
KINDS = ("phimoe", "llama4", "doge", "gpt_oss", "deepseek_v3", "lfm2", "modernbert-decoder")


def long_groups() -> list[Group]:
    """Ragged groups with rows up to three windows long, prompts longer and shorter than one."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (count,), generator=generator).tolist())

    shapes = [(5, (7, 4)), (1, (3, 12)), (WINDOW + 6, (1, 21)), (6, (5, 60, 11)), (3, (4,))]
    return [
        Group(f"g{i}", ids(prompt), tuple(Response(ids(size)) for size in sizes))
        for i, (prompt, sizes) in enumerate(shapes)
    ]


def assert_right(model: PreTrainedModel, engine: LogpModel) -> None:
    """Log-probs and gradients are those of one row at a time through ``model``, another copy of the weights."""
    want = naive_logps(model, long_groups())
    got = engine(engine.layout(long_groups()))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert_same_gradients(weighted_gradients(engine.model, got), weighted_gradients(model, want))


def assert_same_in_training(engine: LogpModel) -> None:
    """Nothing is drawn at random in training, where dropout is off: a text has one log-prob."""
    with torch.no_grad():
        found, layout = [], engine.layout(long_groups())
        for training in (False, True, True):
            found.append(engine.train(training)(layout))
    assert torch.equal(found[1], found[2])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def check(model_type: str) -> None:
    if model_type in TOLD["Refused"]:
        with pytest.raises(
            ModelError, match=r"model\.layout = auto: the padded layout cannot be used"
        ):
            build_logp_model(tiny_causal_lm(model_type))
        return
    engine = build_logp_model(tiny_causal_lm(model_type))
    assert engine.packed == (model_type in TOLD["Packed"])
    disable_dropout(engine.model)
    assert_right(tiny_causal_lm(model_type), engine)
    assert_same_in_training(engine)
    if engine.packed:
        padded = build_logp_model(tiny_causal_lm(model_type), "padded")
        assert_right(tiny_causal_lm(model_type), padded)


@pytest.mark.parametrize("model_type", KINDS)
def test_every_kind_is_right_or_refused(model_type: str) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [m for m in MODEL_TYPES if m not in TOLD["Not tried"] | set(KINDS)]
)
def test_every_causal_lm_is_right_or_refused(model_type: str) -> None:
    check(model_type)


def test_the_page_names_every_causal_lm_once() -> None:
    assert sorted(name for names in TOLD.values() for name in names) == sorted(MODEL_TYPES)


class HiddenWindowLlama(LlamaForCausalLM):
    """Its window of 4,096 tokens is applied by what prepares its own attention's mask, and by nothing else."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        if self.config._attn_implementation == "sdpa":
            length, window = input_ids.shape[1], self.config.sliding_window
            back = torch.arange(length)[:, None] - torch.arange(length)
            attention_mask = ((back >= 0) & (back < window))[None, None]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)


def test_a_window_much_longer_than_the_probe_is_found_where_only_the_models_own_mask_has_it() -> (
    None
):
    config = tiny_config("llama", VOCABULARY)
    config.sliding_window = 4096
    with torch.random.fork_rng(devices=[]):
        model = HiddenWindowLlama._from_config(config, attn_implementation="sdpa")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    with pytest.raises(ModelError, match="packed layout cannot be used here: log-probs differ"):
        build_logp_model(model, "packed")
    assert config.sliding_window == 4096


def test_a_window_that_nothing_shows_to_act_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", VOCABULARY)
    model.config.sliding_window = 4096
    assert not build_logp_model(model).packed
    assert "its configuration names sliding_window = 4096" in caplog.text
    assert "set it to null in config.json" in caplog.text


def test_a_window_that_the_configuration_gives_to_no_layer_is_no_reason() -> None:
    assert build_logp_model(tiny_causal_lm("dots1", sliding_window=4096)).packed


def test_windows_are_cut_where_they_are_read_and_put_back() -> None:
    model: Any = tiny_causal_lm("gemma3", sliding_window=4096)
    layer = model.get_decoder().layers[0].self_attn
    text = model.config.get_text_config()
    with short_windows(model) as cut:
        assert cut == {"sliding_window": 4096}
        assert text.sliding_window == layer.sliding_window == 2
    assert text.sliding_window == layer.sliding_window == 4096


def test_a_body_that_cannot_be_told_is_one_sentence() -> None:
    model = tiny_causal_lm("llama4")
    model.add_module("another", tiny_causal_lm("llama4").model)
    with pytest.raises(ModelError, match="cannot tell which part gives the hidden states"):
        decoder_of(model)
    with pytest.raises(ModelError, match="cannot tell which part"):
        build_logp_model(model)
