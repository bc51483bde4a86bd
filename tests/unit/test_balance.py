"""The balancing loss of mixtures of experts: transformers' own number, in both layouts, in every stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prefopt.data.groups import GroupList
from prefopt.errors import ConfigError
from prefopt.model.balance import RouterBalance, router_balance, token_weights
from prefopt.model.collate import pack, pad
from prefopt.model.layouts import build_logp_model, build_score_model
from prefopt.model.load import disable_dropout
from prefopt.model.reward_model import load_reward_model
from prefopt.recipe.schema import ModelSection
from prefopt.types import Group, ObjectiveOutput
from tests.unit.every_causal_lm import tiny_causal_lm
from tests.unit.memory_trainer import make_trainer, random_pairs
from tests.unit.test_logps import make_groups

COEFFICIENT = 0.02
KINDS = ("mixtral", "gpt_oss", "jetmoe")  # packed, padded, another name for the coefficient
MORE = (
    "dbrx", "ernie4_5_moe", "flex_olmo", "granitemoe", "granitemoehybrid", "jamba", "laguna", "mellum", "minimax",
    "minimax_m2", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text",
)  # fmt: skip


def balanced(model: Any, coefficient: float | None, layout: str = "auto") -> Any:
    """In training mode, with its balancing loss switched on."""
    disable_dropout(model)
    return build_logp_model(model, layout, coefficient).train()


def own_number(model: Any) -> torch.Tensor:
    """transformers' own, of its forward over the padded batch and mask of the same inputs."""
    layout = pad(make_groups())
    output = model(
        input_ids=layout.input_ids,
        attention_mask=layout.attention_mask,
        output_router_logits=True,
        use_cache=False,
    )
    return output.aux_loss


def check(model_type: str) -> None:
    want = own_number(tiny_causal_lm(model_type))
    model = tiny_causal_lm(model_type)
    for layout in ("auto", "padded"):
        model = tiny_causal_lm(model_type)
        engine = balanced(model, COEFFICIENT, layout)
        assert engine.balance.coefficient == COEFFICIENT
        logps, found = engine(engine.layout(make_groups()))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
        found.backward()
        gates = [p.grad for n, p in model.named_parameters() if "gate" in n or "router" in n]
        assert any(gradient is not None and gradient.any() for gradient in gates)
        assert torch.equal(engine.eval()(engine.layout(make_groups())), logps)  # nothing beside


@pytest.mark.parametrize("model_type", KINDS)
def test_it_is_transformers_own_number_in_both_layouts(model_type: str) -> None:
    check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MORE)
def test_it_is_transformers_own_number_for_every_architecture_that_has_one(model_type: str) -> None:
    check(model_type)


def test_a_shared_prompt_weighs_as_often_as_it_stands_in_the_plain_layout() -> None:
    groups = make_groups()
    packed, padded = pack(groups), pad(groups)
    assert token_weights(packed).sum() == token_weights(padded).sum()
    assert token_weights(packed)[0, :5].tolist() == [2] * 5  # a prompt of 5 before two responses


def test_the_configuration_asks_for_it_and_the_recipe_has_the_last_word() -> None:
    silent = tiny_causal_lm("mixtral", router_aux_loss_coef=0.01)
    asking = tiny_causal_lm("mixtral", router_aux_loss_coef=0.01, output_router_logits=True)

    def weight(model: nn.Module, coefficient: float | None) -> float | None:
        found = router_balance(model, coefficient)
        return found.coefficient if found is not None else None

    assert [weight(silent, c) for c in (None, 0.0, 0.5)] == [None, None, 0.5]
    assert [weight(asking, c) for c in (None, 0.0, 0.5)] == [0.01, None, 0.5]


def test_a_model_without_experts_refuses_a_coefficient() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no balancing loss in transformers"):
        router_balance(tiny_causal_lm("llama"), 0.1)
    # Doge's own function takes other arguments
    assert (
        router_balance(tiny_causal_lm("doge", is_moe=True, output_router_logits=True), None) is None
    )


def train(directory: Path, groups: list[Group] | None = None, **options: Any) -> dict[str, float]:
    model = tiny_causal_lm("mixtral", router_aux_loss_coef=COEFFICIENT, output_router_logits=True)
    settings = {"objective": {"name": "dpo", "beta": 0.1}, "max_steps": 1, **options}
    trainer = make_trainer(directory, GroupList(groups or random_pairs(8)), model=model, **settings)
    trainer.train()
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]


def test_training_adds_it_to_the_loss_and_logs_it(tmp_path: Path) -> None:
    row = train(tmp_path / "packed")
    want = row["loss/pairs"] + COEFFICIENT * row["loss/router_balance"]
    assert row["loss/total"] == pytest.approx(want, rel=1e-5)
    assert row["loss/router_balance"] > 1.0
    padded = train(tmp_path / "padded", layout="padded")
    for name in ("loss/total", "loss/router_balance", "train/grad_norm"):
        assert padded[name] == pytest.approx(row[name], rel=1e-4), name


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    plain = train(tmp_path / "plain")
    again = train(tmp_path / "again", gradient_checkpointing=True)
    for name in ("loss/router_balance", "train/grad_norm"):
        assert again[name] == pytest.approx(plain[name], rel=1e-5), name


def test_split_into_forwards_it_is_the_mean_over_their_tokens(tmp_path: Path) -> None:
    """One of each forward, as in transformers: two halves are two numbers, weighed by their tokens."""
    row = train(tmp_path / "halves", micro_batch_size=4)
    want = row["loss/pairs"] + COEFFICIENT * row["loss/router_balance"]
    assert row["loss/total"] == pytest.approx(want, rel=1e-5)


def test_sft_has_it_too(tmp_path: Path) -> None:
    alone = [replace(g, responses=g.responses[:1], pairs=()) for g in random_pairs(8)]
    row = train(tmp_path, alone, stage="sft", objective=None)
    want = row["loss/nll"] + COEFFICIENT * row["loss/router_balance"]
    assert row["loss/total"] == pytest.approx(want, rel=1e-5)


def test_a_reward_model_has_it_too(tmp_path: Path) -> None:
    tiny_causal_lm("mixtral").save_pretrained(tmp_path)
    found = []
    for layout in ("packed", "padded"):
        loaded = load_reward_model(ModelSection(path=str(tmp_path)), None, seed=0, pad_token_id=2)
        engine = build_score_model(loaded.model, layout, COEFFICIENT)
        assert isinstance(engine.balance, RouterBalance)
        scores, balance = engine.train()(engine.layout(make_groups()))
        assert scores.shape == (10,)
        found.append(balance)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)


def test_an_objective_that_asks_for_nothing_leaves_no_weight_without_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The routers' loss goes through no head and no last expert, and DDP waits for every weight's gradient."""
    model = tiny_causal_lm("mixtral", router_aux_loss_coef=COEFFICIENT, output_router_logits=True)
    settings = {"objective": {"name": "dpo", "beta": 0.1}, "max_steps": 1}
    trainer = make_trainer(tmp_path, GroupList(random_pairs(8)), model=model, **settings)
    nothing = ObjectiveOutput(losses=torch.zeros(8))
    monkeypatch.setattr(trainer, "objective", lambda seen: nothing)
    without: list[str] = []

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        without.extend(n for n, p in trainer.model.named_parameters() if p.grad is None)

    monkeypatch.setattr(trainer.accelerator, "backward", backward)
    trainer.train()
    assert without == []
