"""Every type and option of the installed peft: trained, saved, merged and reloaded rightly, or refused by name.

What is right: in both layouts the gradients of an adapter that acts are those of the model's own forward, every
trained tensor has one, the base stays as it was, and what is read back, and what is merged, is the model that was
trained.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM

from prefopt.errors import ConfigError, ModelError
from prefopt.model.adapters import add_adapter, load_saved_adapter, merged_into_base, save_adapter
from prefopt.model.layouts import build_logp_model
from prefopt.model.load import disable_dropout, num_embeddings, seeded
from prefopt.recipe.checks.peft import peft_keys_exist
from prefopt.recipe.checks.rules import Surroundings
from prefopt.recipe.peft_config import peft_config
from prefopt.recipe.peft_unfit import unfit
from prefopt.recipe.schema import PeftSection, Recipe
from tests.unit.test_logps import (
    VOCABULARY,
    assert_same_gradients,
    make_groups,
    naive_logps,
    weighted_gradients,
)
from tests.unit.tiny_models import tiny_model

TARGETS = ["q_proj", "v_proj"]

# Types that train here, each with what the tiny model needs: sizes that divide its own.
TYPES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "adamss": {"r": 4},
    "beft": {"target_modules": TARGETS},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "deft": {},
    "delora": {"r": 4},
    "fourierft": {"n_frequency": 16},
    "frod": {},
    "glora": {"r": 4},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "ia3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "ln_tuning": {},
    "loha": {"r": 4},
    "lokr": {"r": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4},
    "osf": {},
    "peanut": {},
    "psoft": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "supertuning": {},
    "tinylora": {},
    "trainable_tokens": {"token_indices": [3, 4, 5]},
    "unilora": {},
    "vblora": {"vector_length": 8, "num_vectors": 16},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 16},
}
# Options of LoRA that train here.
OPTIONS: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "use_rslora": {"use_rslora": True},
    **{
        f"init_{start}": {"init_lora_weights": start}
        for start in (False, "gaussian", "olora", "pissa", "orthogonal", "mica")
    },
    "target_parameters": {
        "target_modules": [],
        "target_parameters": ["self_attn.q_proj.weight"],
    },
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "trainable_tokens_by_name": {"trainable_token_indices": {"embed_tokens": [3, 4]}},
    "save_the_head": {"modules_to_save": ["lm_head"]},
    "save_the_embedding": {"modules_to_save": ["embed_tokens"]},
    "save_both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapt_the_head": {"target_modules": ["q_proj", "lm_head"]},
    "adapt_the_embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "rank_pattern": {
        "target_modules": TARGETS,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 16},
    },
    "layers_to_transform": {"target_modules": TARGETS, "layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": ["q_proj"]},
    "lora_bias": {"lora_bias": True},
    "use_bdlora": {
        "target_modules": TARGETS,
        "use_bdlora": {
            "target_modules_bd_a": ["q_proj"],
            "target_modules_bd_b": ["v_proj"],
            "nblocks": 2,
        },
    },
    "kasa_without_its_terms": {"kasa_config": {"beta": 0.0, "gamma": 0.0}},
}
# Right, and not to be merged; merging says why.
UNMERGED = {"beft", "lora_bias"}
# A tensor may be without a gradient at first, by the method: experts, banks of which a part is picked.
PARTLY = {"vblora"}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "prompt_tuning": ({}, "adds virtual tokens"),
    "multitask_prompt_tuning": ({}, "adds virtual tokens"),
    "p_tuning": ({}, "adds virtual tokens"),
    "prefix_tuning": ({}, "adds virtual tokens"),
    "cpt": ({}, "adds virtual tokens"),
    "cartridge": ({}, "adds virtual tokens"),
    "adaption_prompt": ({"adapter_len": 4, "adapter_layers": 1}, "prompts of its own"),
    "adalora": ({}, "prunes its ranks"),
    "poly": ({}, "the id of a task"),
    "xlora": ({}, "mixes adapters"),
    "shadow": ({}, "a second model"),
    "lily": ({}, "the mean over all tokens"),
    "pvera": ({}, "draws its weights anew"),
    "adamss": ({"use_asa": True}, "between optimizer steps"),
}
REFUSED_OPTIONS: dict[str, tuple[Any, str]] = {
    "init_lora_weights": ("eva", "a pass over data"),
    "alora_invocation_tokens": ([3], "acts only after these tokens"),
    "arrow_config": ({}, "routes between adapters"),
    "monteclora_config": ({}, "draws its weights anew"),
    "velora_config": ({}, "averages over a forward"),
    "kasa_config": ({}, "adds two terms to the loss"),
    "use_qalora": (True, "GPTQ"),
    "megatron_config": ({"hidden_size": 8}, "Megatron"),
    "layer_replication": ([[0, 2], [1, 2]], "several times over one set of weights"),
}
QUICK = ("lora", "trainable_tokens", "ln_tuning", "trainable_token_indices", "target_parameters")


def section(case: str) -> PeftSection:
    if case in TYPES:
        return PeftSection.model_validate({"type": case, **TYPES[case]})
    return PeftSection.model_validate({"type": "lora", "r": 4, **OPTIONS[case]})


def adapted(case: str, arch: str) -> PeftModel:
    """A new adapter, always the same, on the tiny model."""
    with seeded(0):
        model = add_adapter(tiny_model(arch, VOCABULARY), peft_config(section(case)))
    disable_dropout(model)
    return model.eval()


def stir(model: PeftModel) -> None:
    """Moves every trained value, so that the adapter acts and all its parts have a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def base_values(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}


def train(case: str, arch: str, layout: str) -> PeftModel:
    """The adapter after three steps, its first gradients compared with those of the model's own forward."""
    own = adapted(case, arch)
    stir(own)
    want = weighted_gradients(own, naive_logps(own, make_groups()))
    model = adapted(case, arch)
    stir(model)
    engine = build_logp_model(model, layout)
    frozen = base_values(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    for step in range(3):
        logps = engine(engine.layout(make_groups()))
        got = weighted_gradients(model, logps)
        if step == 0:
            assert_same_gradients(got, want)
            without = [n for n, g in got.items() if not g.any()]
            assert case in PARTLY or not without, without
        optimizer.step()
    assert all(torch.equal(value, frozen[name]) for name, value in base_values(model).items())
    return model


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 3, 9, 4, 10, 11]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def check(case: str, arch: str, directory: Path) -> None:
    tiny_model(arch, VOCABULARY).save_pretrained(directory / "base")
    train(case, arch, "padded")
    model = train(case, arch, "packed")
    assert num_embeddings(model) == VOCABULARY
    save_adapter(model, directory / "adapter")
    base: Any = model.get_base_model()
    base.set_attn_implementation("sdpa")
    want = logits(model.eval())
    size = want.abs().max().item()

    def read_back() -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(directory / "base")
        return load_saved_adapter(base, directory / "adapter", trainable=False)

    torch.testing.assert_close(logits(read_back()), want, rtol=0, atol=1e-6 * size)
    plain = logits(AutoModelForCausalLM.from_pretrained(directory / "base"))
    assert (plain - want).abs().max() > 1e-3 * size
    if case in UNMERGED:
        with pytest.raises(ModelError, match="cannot be merged into its base"):
            merged_into_base(read_back())
        return
    merged = logits(merged_into_base(read_back()))
    torch.testing.assert_close(merged, want, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("case", QUICK)
def test_an_adapter_trains_saves_merges_and_reloads(case: str, tmp_path: Path) -> None:
    check(case, "llama", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in [*TYPES, *OPTIONS] if case not in QUICK])
def test_every_adapter_trains_saves_merges_and_reloads(case: str, tmp_path: Path) -> None:
    check(case, "llama", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        "trainable_token_indices",
        "trainable_tokens_by_name",
        "save_the_embedding",
        "trainable_tokens",
    ],
)
def test_tied_embeddings_train_as_one(case: str, tmp_path: Path) -> None:
    check(case, "llama_tied", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_train_where_the_model_has_some(bias: str, tmp_path: Path) -> None:
    OPTIONS["bias"] = {"bias": bias, "target_modules": TARGETS}
    try:
        check("bias", "qwen2", tmp_path)
    finally:
        del OPTIONS["bias"]


def test_biases_that_are_not_there_are_refused() -> None:
    config = peft_config(PeftSection.model_validate({"type": "lora", "bias": "all"}))
    with pytest.raises(
        ConfigError, match=r"peft\.bias = 'all': no module that it would train has a bias"
    ):
        add_adapter(tiny_model("llama", VOCABULARY), config)


def test_an_ia3_adapter_on_all_linear_layers_is_read_back(tmp_path: Path) -> None:
    """peft wants its feed-forward modules to be targets by name, and names targets it finds in full."""
    options = {"target_modules": "all-linear", "feedforward_modules": ["down_proj", "up_proj"]}
    config = peft_config(PeftSection.model_validate({"type": "ia3", **options}))
    model = add_adapter(tiny_model("llama", VOCABULARY), config)
    stir(model)
    save_adapter(model, tmp_path)
    again = load_saved_adapter(tiny_model("llama", VOCABULARY), tmp_path, trainable=False)
    assert torch.equal(logits(again.eval()), logits(model.eval()))
    assert len(again.peft_config["default"].feedforward_modules) == 4  # two of each layer


def test_a_feedforward_module_that_is_no_target_is_refused() -> None:
    config = peft_config(
        PeftSection.model_validate({"type": "ia3", "feedforward_modules": ["up_proj"]})
    )
    with pytest.raises(ConfigError, match=r"feedforward_modules.*subset"):
        add_adapter(tiny_model("llama", VOCABULARY), config)


@pytest.mark.parametrize("case", [*TYPES, *OPTIONS])
def test_check_has_nothing_against_what_trains(case: str) -> None:
    recipe = {
        "model": {"path": "org/m"},
        "data": {},
        "train": {"learning_rate": 1e-6},
        "run": {"output_dir": "o"},
    }
    drawn = Recipe.model_validate({**recipe, "peft": section(case)})
    assert [each.text for each in peft_keys_exist(drawn, Surroundings())] == []


def test_every_type_and_option_of_peft_is_here() -> None:
    types = {str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert types == TYPES.keys() | REFUSED.keys()
    tried = {key for options in OPTIONS.values() for key in options} | REFUSED_OPTIONS.keys()
    plain = {"r", "lora_alpha", "lora_dropout", "target_modules", "peft_type", "task_type"}
    # by the loading code, or that only choose, name or wrap what another key does
    plain |= {
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
    plain |= {"bias", "fan_in_fan_out", "layers_pattern", "runtime_config", "ensure_weight_tying"}
    plain |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core"}
    plain |= {"qalora_group_size"}
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= tried | plain


def test_the_page_says_the_same() -> None:
    page = Path(__file__).parents[2] / "docs" / "architectures.md"
    adapters = page.read_text(encoding="utf-8").partition("\n# ")[2]
    trained, refused = adapters.split("\n## ")[1:]
    names = set(re.findall(r"`(\w+)`", trained))
    assert names == TYPES.keys()
    assert set(re.findall(r"`(\w+)`", refused)) == REFUSED.keys() - {"adamss"}


def refusals() -> list[tuple[Mapping[str, Any], str, str]]:
    found: list[tuple[Mapping[str, Any], str, str]] = []
    for kind, (options, why) in REFUSED.items():
        key = next(iter(options)) if kind == "adamss" else "type"
        found.append(({"type": kind, **options}, key, why))
    for key, (value, why) in REFUSED_OPTIONS.items():
        found.append(({"type": "lora", key: value}, key, why))
    for start in ("lora_ga", "corda", "loftq", "pissa_niter_4"):
        found.append(({"type": "lora", "init_lora_weights": start}, "init_lora_weights", ""))
    return found


@pytest.mark.parametrize(("settings", "key", "why"), refusals())
def test_what_needs_more_than_its_layers_is_refused_by_name(
    settings: Mapping[str, Any], key: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=rf"peft\.{key} = .*{why}"):
        peft_config(PeftSection.model_validate(settings))


def test_a_saved_adapter_is_held_to_the_same(tmp_path: Path) -> None:
    options = {"alora_invocation_tokens": [3], "target_modules": TARGETS}
    model = add_adapter(
        tiny_model("llama", VOCABULARY), LoraConfig(task_type="CAUSAL_LM", **options)
    )
    save_adapter(model, tmp_path)
    with pytest.raises(ModelError, match="alora_invocation_tokens"):
        load_saved_adapter(tiny_model("llama", VOCABULARY), tmp_path, trainable=True)
    # a pass over data decided where it began, and that is long past
    assert not list(unfit("lora", {"init_lora_weights": "eva"}.get, new=False))


def test_an_adapter_that_could_not_be_loaded_again_is_refused_at_the_start() -> None:
    """peft guesses the feedforward modules of (IA)3 beside any targets, and later refuses the two together."""
    config = peft_config(PeftSection.model_validate({"type": "ia3", "target_modules": TARGETS}))
    with pytest.raises(ConfigError, match="could be trained, and not be loaded again"):
        add_adapter(tiny_model("llama", VOCABULARY), config)
