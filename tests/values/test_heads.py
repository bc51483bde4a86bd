"""Value heads against plain arithmetic, their training on values that are known, and what they are saved as."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefopt.data.rows import Refused
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import ModelSection
from prefopt.values.features import FrozenReference, StateBatch, StoredStates
from prefopt.values.heads import DROPOUT, HEADS, NUM_HEADS, make_head
from prefopt.values.training import Example, FitSettings, errors, fit_head
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import TokenizerFactory

CPU = torch.device("cpu")
WIDTH = 16


def states_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, WIDTH, generator=generator) for length in lengths]


def padded(states: list[Tensor], width: int, fill: float) -> tuple[Tensor, Tensor]:
    whole = torch.full((len(states), width, WIDTH), fill)
    mask = torch.zeros(len(states), width, dtype=torch.bool)
    for row, each in enumerate(states):
        whole[row, : len(each)] = each
        mask[row, : len(each)] = True
    return whole, mask


# --- forward -------------------------------------------------------------------------------------


def by_hand(head: Any, states: Tensor) -> float:
    """The attention head on one prompt, an attention head after the other, from its published formula."""
    projections = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    (w_q, w_k, w_v), (b_q, b_k, b_v) = projections
    query, keys, values = w_q @ head.query + b_q, states @ w_k.T + b_k, states @ w_v.T + b_v
    size = WIDTH // NUM_HEADS
    found = []
    for number in range(NUM_HEADS):
        part = slice(number * size, (number + 1) * size)
        scores = keys[:, part] @ query[part] / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum()
        found.append(weights @ values[:, part])
    output = head.attention.out_proj.weight @ torch.cat(found) + head.attention.out_proj.bias
    logit = head.summary.weight[0] @ output + head.summary.bias[0]
    return float(head.max_value / (1 + math.exp(-logit.item())))


def test_the_attention_head_is_its_formula() -> None:
    head = make_head("attention", WIDTH, 3.0, seed=1).eval()
    (states,) = states_of([5])
    value = head(states[None], torch.ones(1, 5, dtype=torch.bool))
    assert value.shape == (1,)
    assert value.item() == pytest.approx(by_hand(head, states), rel=1e-5)
    assert 0 < value.item() < 3


def test_the_mean_head_is_a_logistic_regression_on_the_mean() -> None:
    """States (1, 3, 0 …), (3, 5, 0 …): mean (2, 4); w = (0.5, -0.25), b = 0.5: 2 σ(0.5)."""
    head: Any = make_head("mean", WIDTH, 2.0, seed=1).eval()
    with torch.no_grad():
        head.summary.weight.zero_()
        head.summary.weight[0, :2] = torch.tensor([0.5, -0.25])
        head.summary.bias.fill_(0.5)
    states = torch.zeros(1, 2, WIDTH)
    states[0, :, :2] = torch.tensor([[1.0, 3.0], [3.0, 5.0]])
    value = head(states, torch.ones(1, 2, dtype=torch.bool)).item()
    assert value == pytest.approx(2 / (1 + math.exp(-0.5)), rel=1e-6)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("fill", [0.0, 7.0, math.nan])
def test_padding_changes_no_value_and_no_gradient(kind: str, fill: float) -> None:
    head = make_head(kind, WIDTH, 1.0, seed=2).eval()
    states = states_of([3, 6])
    alone = torch.cat([head(*padded([each], len(each), 0.0)) for each in states])
    alone.sum().backward()
    expected = {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    together = head(*padded(states, 9, fill))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    together.sum().backward()
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_dropout_acts_in_training_and_not_in_a_prediction(kind: str) -> None:
    head = make_head(kind, WIDTH, 1.0, seed=2)
    batch = padded(states_of([6]), 6, 0.0)
    torch.manual_seed(0)
    assert head.train()(*batch).item() != head(*batch).item()
    assert head.eval()(*batch).item() == head(*batch).item()
    assert [m.p for m in head.modules() if isinstance(m, nn.Dropout)] == [DROPOUT]


def test_a_width_that_eight_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hidden size 20 .* set head: mean"):
        make_head("attention", 20, 1.0, seed=0)


# --- features ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: TokenizerFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = tiny_tokenizer("chatml")
    tiny_model("llama", len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_features_are_the_last_hidden_states_of_transformers_whatever_the_batch(
    policy: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    section = ModelSection(path=str(policy))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20], [5, 6, 7, 8]]
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
    seen: list[list[int]] = []
    for batch_tokens in (1, 12, 1000):
        reference = FrozenReference(section, device="cpu", batch_tokens=batch_tokens)
        for batch in reference.states(prompts):
            seen.append(batch.indices)
            for row, index in enumerate(batch.indices):
                with torch.no_grad():
                    output = model(torch.tensor([prompts[index]]), output_hidden_states=True)
                expected = output.hidden_states[-1][0]
                found = batch.states[row, batch.mask[row]]
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen == [[1], [3], [0], [2], [1], [3, 0, 2], [1, 3, 0, 2]]


def test_an_adapters_features_are_those_of_the_adapted_policy(policy: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(str(tmp_path))
    assert isinstance(adapted, PeftModel)
    section = ModelSection(path=str(tmp_path))
    (batch,) = FrozenReference(section, device="cpu", batch_tokens=100).states([[5, 6, 7]])
    with torch.no_grad():
        expected = adapted(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states[-1]
        plain = base.eval()
        with adapted.disable_adapter():
            other = plain(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(batch.states, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(batch.states, other, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_states_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    states = [each.to(dtype) for each in states_of([2, 5, 1])]
    whole, mask = padded([each.float() for each in states], 5, math.nan)
    batches = [
        StateBatch([1, 0], whole[[1, 0]].to(dtype), mask[[1, 0]]),
        StateBatch([2], whole[[2]].to(dtype), mask[[2]]),
    ]
    stored = StoredStates(tmp_path / "s", [2, 5, 1], batches)
    assert (tmp_path / "s").stat().st_size == 8 * WIDTH * states[0].element_size()
    found, kept = stored.batch([2, 1], CPU)
    assert torch.equal(found[0, :1], states[2].float()) and torch.equal(found[1], states[1].float())
    assert kept.sum(1).tolist() == [1, 5] and not found[0, 1:].any()
    stored.close()
    assert not (tmp_path / "s").exists()


def test_prompts_that_cannot_be_read_whole_are_refused(policy: Path) -> None:
    reference = FrozenReference(ModelSection(path=str(policy)), device="cpu", batch_tokens=100)
    short, long = reference.prompt_ids(["abc", "abcdefghij" * 3], 10)
    assert isinstance(short, tuple)
    assert isinstance(long, Refused) and str(long.reason) == "prompt_too_long"


# --- training ------------------------------------------------------------------------------------


def stored(path: Path, states: list[Tensor]) -> StoredStates:
    batches = (
        StateBatch([i], each[None], torch.ones(1, len(each), dtype=torch.bool))
        for i, each in enumerate(states)
    )
    return StoredStates(path, [len(each) for each in states], batches)


def task(tmp_path: Path, num_prompts: int = 120) -> tuple[StoredStates, list[Example]]:
    """A prompt is worth 0.9 if one of its states points along the first axis, else 0.2; ± 0.05 of noise."""
    draw = random.Random(0)
    states = states_of([draw.randint(2, 6) for _ in range(num_prompts)])
    examples = []
    for number, each in enumerate(states):
        good = draw.random() < 0.5
        each[draw.randrange(len(each)), 0] = 6.0 if good else 0.0
        examples.append(Example(number, (0.9 if good else 0.2) + draw.uniform(-0.05, 0.05)))
    return stored(tmp_path / "states", states), examples


def test_a_value_that_depends_on_the_prompt_is_learned(tmp_path: Path) -> None:
    """Held-out prompts alone are measured: a constant has the rewards' variance, about 0.12, and R² 0."""
    states, examples = task(tmp_path)
    settings = FitSettings(learning_rate=3e-3, epochs=15, validation_frac=0.25)
    fit = fit_head(states, examples, settings, CPU)
    assert len(fit.held_out) == 30
    assert fit.constant_mse > 0.1
    assert fit.kept.validation.mse < 0.25 * fit.constant_mse
    assert fit.kept.validation.r2 is not None and fit.kept.validation.r2 > 0.7
    kept = [e for e in examples if e.prompt in fit.held_out]
    again = errors([fit.values[e.prompt] for e in kept], [e.reward for e in kept])
    assert again == fit.kept.validation  # the head that is kept is the one that was measured


def test_the_same_seed_gives_the_same_head_and_leaves_the_random_state_alone(
    tmp_path: Path,
) -> None:
    states, examples = task(tmp_path, 100)

    def weights(seed: int) -> list[Tensor]:
        fit = fit_head(states, examples, FitSettings(epochs=2, seed=seed), CPU)
        return [p.detach() for p in fit.head.parameters()]

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    one, other = weights(3), weights(3)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(1)
    third = weights(3)
    assert all(
        torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, other, third, strict=True)
    )
    assert not all(torch.equal(a, b) for a, b in zip(one, weights(4), strict=True))


@pytest.mark.parametrize("keep", ["validation", "train"])
def test_the_epoch_that_is_kept_is_the_lowest_by_the_rule(tmp_path: Path, keep: Any) -> None:
    """Rewards at random, few prompts, a high rate: the head learns them by heart, so that the rules differ."""
    draw = random.Random(1)
    states = stored(tmp_path / "states", states_of([3] * 40))
    examples = [Example(number, draw.random()) for number in range(40)]
    settings = FitSettings(learning_rate=5e-3, epochs=12, validation_frac=0.25, keep=keep)
    fit = fit_head(states, examples, settings, CPU)
    train = min(fit.epochs, key=lambda epoch: epoch.train_mse)
    validation = min(fit.epochs, key=lambda epoch: epoch.validation.mse)
    assert train.number > validation.number
    assert fit.kept == (train if keep == "train" else validation)


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    """Their rewards changed, the weights are the same to the bit; those of the others changed, they are not."""
    states, examples = task(tmp_path, 100)
    settings = FitSettings(epochs=1, keep="train", learning_rate=1e-3)
    fit = fit_head(states, examples, settings, CPU)

    def trained(turned: bool) -> list[Tensor]:
        changed = [
            Example(e.prompt, 1 - e.reward) if (e.prompt in fit.held_out) == turned else e
            for e in examples
        ]
        return list(fit_head(states, changed, settings, CPU).head.parameters())

    own = list(fit.head.parameters())
    assert all(torch.equal(a, b) for a, b in zip(own, trained(True), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(own, trained(False), strict=True))


def test_a_dev_set_that_is_too_small_is_refused_with_what_would_do(tmp_path: Path) -> None:
    states, examples = task(tmp_path, 60)
    with pytest.raises(DataError, match=r"dev set of 60 .* leaves 6 .* Give 100 prompts or more"):
        fit_head(states, examples, FitSettings(), CPU)


def test_r2_of_equal_rewards_is_undefined() -> None:
    """Predictions 0.5 and 0.7 against 0.6: MSE 0.01. Against 0.5, 0.7: 0, R² 1. A constant mean: R² 0."""
    assert errors([0.5, 0.7], [0.6, 0.6]).mse == pytest.approx(0.01)
    assert errors([0.5, 0.7], [0.6, 0.6]).r2 is None
    assert errors([0.5, 0.7], [0.5, 0.7]).r2 == 1
    assert errors([0.6, 0.6], [0.5, 0.7]).r2 == pytest.approx(0.0)


def test_states_that_cannot_be_written_leave_no_file_behind(tmp_path: Path) -> None:
    def batches() -> Any:
        yield StateBatch([0], torch.zeros(1, 2, WIDTH), torch.ones(1, 2, dtype=torch.bool))
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"No space left on device.*2 prompts, 5 tokens; make room"):
        StoredStates(tmp_path / "s", [2, 3], batches())
    assert not (tmp_path / "s").exists()
