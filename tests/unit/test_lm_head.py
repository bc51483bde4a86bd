"""Gradients of a head that trains: many chunks are as exact as one, in every dtype and kind of head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close

from prefopt.model.lm_head import LogitTransform, head_logps
from prefopt.model.logps import LogpModel
from tests.unit.tiny_models import tiny_model

VOCABULARY, WIDTH, TOKENS = 512, 64, 8192
PLAIN = LogitTransform()


def head_of(kind: str) -> Any:
    """A linear head, one with a bias, or a frozen one under LoRA with dropout."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(WIDTH, VOCABULARY, bias=kind == "bias"))
    if kind != "lora":
        return model[0]
    adapted: Any = get_peft_model(model, LoraConfig(r=8, target_modules=["0"], lora_dropout=0.1))
    adapted = adapted.base_model.model[0]
    nn.init.normal_(adapted.lora_B["default"].weight, std=0.1)
    return adapted


def inputs(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, targets, and a weight for each token's log-prob."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, WIDTH, generator=draw)
    targets = torch.randint(VOCABULARY, (tokens,), generator=draw)
    return hidden, targets, torch.randn(tokens, generator=draw)


def gradients(
    head: nn.Module, hidden: Tensor, size: int, *, autocast: bool = False, **keys: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a weighted sum of log-probs: by the hidden states, and by what trains of the head."""
    _, targets, weights = inputs(len(hidden))
    head.zero_grad()
    hidden = hidden.detach().requires_grad_()
    torch.manual_seed(2)  # what dropout draws
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps = head_logps(
            head, hidden, targets, PLAIN, **{"temperature": 1.0, "size": size, **keys}
        )
    (logps * weights.to(logps.dtype)).sum().backward()
    assert hidden.grad is not None
    return hidden.grad, {n: p.grad for n, p in head.named_parameters() if p.grad is not None}


def error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def truth_of(head: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """The same weights and states in fp64, by autograd alone."""
    double = head_of("bias" if getattr(head, "bias", None) is not None else "linear").double()
    double.load_state_dict(head.state_dict())
    _, targets, weights = inputs(len(hidden))
    logits = double(hidden.double())
    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (logps * weights.double()).sum().backward()
    return {n: p.grad for n, p in double.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["linear", "bias"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_many_chunks_round_the_gradient_no_more_than_one(kind: str, autocast: bool) -> None:
    """One chunk of 8,192 tokens errs by 0.23 %, as products in bfloat16 do; 128 chunks added up in it, by 1.4 %.

    In float32 the sum adds no error; each chunk's product is rounded once more where the weights are bfloat16.
    """
    head, hidden = head_of(kind), inputs()[0].bfloat16()
    head = head.bfloat16() if not autocast else head.bfloat16().float()
    truth = truth_of(head, hidden)
    _, one = gradients(head, hidden, TOKENS, autocast=autocast)
    _, many = gradients(head, hidden, 64, autocast=autocast)
    for name, wanted in truth.items():
        assert many[name].dtype == dict(head.named_parameters())[name].dtype
        assert error(many[name], wanted) < 1.3 * error(one[name], wanted) < 0.004


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_an_adapter_on_the_head_has_the_same_gradient_in_any_number_of_chunks(
    autocast: bool,
) -> None:
    head, hidden = head_of("lora").eval(), inputs(2048)[0]
    _, one = gradients(head, hidden, 2048, autocast=autocast)
    _, many = gradients(head, hidden, 64, autocast=autocast)
    assert one.keys() == many.keys() == {"lora_A.default.weight", "lora_B.default.weight"}
    for name, wanted in one.items():
        assert error(many[name], wanted.double()) < (0.004 if autocast else 1e-6)


def test_an_adapters_dropout_is_the_same_in_the_backward_pass() -> None:
    """Log-probs from the values that were dropped in the forward, and the random state goes on from there."""
    head, hidden = head_of("lora").train(), inputs(256)[0]
    found = gradients(head, hidden, 64)
    after = torch.rand(1)
    torch.manual_seed(2)
    _, targets, weights = inputs(256)
    leaf = hidden.clone().requires_grad_()
    logits = torch.cat([head(h) for h in leaf.split(64)])
    logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    trains = {n: p for n, p in head.named_parameters() if p.requires_grad}
    wanted = torch.autograd.grad((logps * weights).sum(), [leaf, *trains.values()])
    assert_close(torch.rand(1), after, rtol=0, atol=0)
    for got, want in zip([found[0], *found[1].values()], wanted, strict=True):
        assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_head_alone_may_train_and_a_bias_alone() -> None:
    head, hidden = head_of("bias"), inputs(256)[0]
    _, both = gradients(head, hidden, 64)
    head.weight.requires_grad_(False)
    head.weight.grad = None
    states, found = gradients(head, hidden, 64)
    assert found.keys() == {"bias"}
    assert_close(found["bias"], both["bias"])
    frozen = head_of("bias").requires_grad_(False)
    assert_close(gradients(frozen, hidden, 64)[0], states)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_tied_embeddings_get_both_gradients(arch: str) -> None:
    """The one weight is read twice: by lookup, and by the head in chunks."""
    from tests.unit.test_logps import make_groups, naive_logps, weighted_gradients

    model = tiny_model(arch, vocab_size=97, tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    groups = make_groups()
    want = weighted_gradients(model, naive_logps(model, groups))
    logp_model = LogpModel(model)
    got = weighted_gradients(model, logp_model(logp_model.layout(groups)))
    for name, gradient in want.items():
        assert_close(got[name], gradient, rtol=1e-4, atol=1e-5)
