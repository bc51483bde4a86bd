"""Seeded sampling and the engine that shares the trainer's policy; what is particular to Hugging Face."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from prefopt.engines.base import PolicyFiles, Request, SamplingSpec
from prefopt.engines.hf import HFEngine
from prefopt.engines.sampling import draw_uniforms, inverse_cdf, tempered_logps
from prefopt.errors import EngineError
from prefopt.model.attention import is_packed
from prefopt.model.logps import LogpModel
from tests.unit.tiny_models import ARCHITECTURES, tiny_model

SPEC = SamplingSpec(12, stop_token_ids=(5, 9))
REQUESTS = [Request(tuple(range(3, 3 + n)), (n, n + 1, n + 2)) for n in (5, 2, 21, 7)]


def logits(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (0.24, 1), (0.26, 2), (0.74, 2), (0.76, 4), (1 - 2**-53, 4)],
)
def test_inverse_cdf_takes_the_token_whose_interval_holds_the_uniform(
    uniform: float, token: int
) -> None:
    """Probabilities 0, 1/4, 1/2, 0, 1/4, 0: the intervals are [0, .25), [.25, .75), [.75, 1)."""
    rows = logits(0.0, 0.25, 0.5, 0.0, 0.25, 0.0)
    assert inverse_cdf(rows, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_a_rows_uniforms_depend_on_its_seed_alone_and_not_on_the_global_generator() -> None:
    torch.manual_seed(1)
    first = draw_uniforms([3, 7, -1, 2**70], 5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(draw_uniforms([7], 9)[:, :5], first[1:2])
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_top_k_comes_before_top_p_and_what_is_left_is_renormalised() -> None:
    """p = .4 .3 .2 .1; k = 3 leaves 4/9 3/9 2/9. Nucleus .5 of that: 4/9 < .5, so the second enters: 4/7 3/7.

    Top-p alone (.5) would be .4 < .5 and also keep two; at .45 the order matters: of 4/9 > .45 - no, 4/9 =
    .444 < .45 keeps two, and .44 keeps one after top-k but two before it.
    """
    rows = logits(0.4, 0.3, 0.2, 0.1)
    both = tempered_logps(rows, SamplingSpec(1, top_k=3, top_p=0.5)).exp()
    torch.testing.assert_close(both, torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]]))
    one = tempered_logps(rows, SamplingSpec(1, top_k=3, top_p=0.44)).exp()
    torch.testing.assert_close(one, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    two = tempered_logps(rows, SamplingSpec(1, top_p=0.44)).exp()
    torch.testing.assert_close(two, torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]]))


def test_temperature_divides_the_logits() -> None:
    """p = .8 .2 at temperature 2: square roots, renormalised: 2/3 1/3."""
    rows = tempered_logps(logits(0.8, 0.2), SamplingSpec(1, temperature=2.0))
    torch.testing.assert_close(rows.exp(), torch.tensor([[2 / 3, 1 / 3]]))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_samples_alike_in_mixed_batches_and_alone(arch: str) -> None:
    """Left padding, sliding windows, softcaps and recurrent states change nothing; score agrees with sampling.

    Tolerance: fp32 rounding of logits of order 10, measured at 3e-6.
    """
    engine = HFEngine.sharing(tiny_model(arch), share_trainable=True, pad_id=0, batch_size=8)
    together = engine.generate(REQUESTS, SPEC)
    for request, group in zip(REQUESTS, together, strict=True):
        [alone] = engine.generate([request], SPEC)
        assert [c.ids for c in alone] == [c.ids for c in group]
        scores = engine.score([(request.prompt_ids, c.ids) for c in group])
        for completion, score in zip(group, scores, strict=True):
            assert completion.logps == pytest.approx(score, abs=1e-4, rel=0)


def test_the_models_own_generation_settings_do_not_leak() -> None:
    model = tiny_model("llama")
    plain = HFEngine.sharing(model, share_trainable=True, pad_id=0).generate(REQUESTS, SPEC)
    settings = model.generation_config
    assert settings is not None
    settings.update(
        repetition_penalty=5.0, min_new_tokens=8, top_k=1, suppress_tokens=[7], num_beams=3
    )
    model.generation_config = settings
    assert HFEngine.sharing(model, share_trainable=True, pad_id=0).generate(REQUESTS, SPEC) == plain
    assert settings.num_beams == 3  # the trainer's own are left alone


def lora_model() -> torch.nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model("llama"), config)


def test_only_the_adapter_is_copied_and_the_trainers_module_is_left_as_it_was() -> None:
    policy = lora_model()
    policy.train()
    trainer = LogpModel(policy, packed=True)
    trainer.causal_lm.gradient_checkpointing_enable()
    engine = HFEngine.sharing(policy, share_trainable=False, pad_id=0)
    own = dict(engine.model.named_parameters())
    for name, parameter in policy.named_parameters():
        assert (own[name] is parameter) == (not parameter.requires_grad), name
    assert is_packed(trainer.causal_lm.config._attn_implementation)
    assert trainer.causal_lm.is_gradient_checkpointing and policy.training
    assert engine.model.get_base_model().config._attn_implementation == "sdpa"
    assert not engine.model.training and not engine.model.get_base_model().is_gradient_checkpointing
    engine.generate(REQUESTS, SPEC)


def test_weights_in_training_reach_a_copy_by_push_and_a_shared_engine_at_once() -> None:
    policy = lora_model()
    copy = HFEngine.sharing(policy, share_trainable=False, pad_id=0)
    shared = HFEngine.sharing(policy, share_trainable=True, pad_id=0)
    old = copy.generate(REQUESTS, SPEC)
    assert shared.generate(REQUESTS, SPEC) == old
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.5)
    new = shared.generate(REQUESTS, SPEC)
    assert new != old
    assert copy.generate(REQUESTS, SPEC) == old
    copy.load_state(4, trained)
    shared.set_version(4)
    assert copy.generate(REQUESTS, SPEC) == new
    assert copy.version == shared.version == 4


def test_a_push_of_other_tensors_changes_nothing() -> None:
    policy = lora_model()
    engine = HFEngine.sharing(policy, share_trainable=False, pad_id=0)
    before = engine.generate(REQUESTS, SPEC)
    tensors = {name: p + 1 for name, p in policy.named_parameters() if p.requires_grad}
    tensors.pop(next(iter(tensors)))
    with pytest.raises(EngineError, match="missing"):
        engine.load_state(1, tensors)
    with pytest.raises(EngineError, match="weights of its own"):
        engine.set_version(1)
    assert engine.generate(REQUESTS, SPEC) == before and engine.version is None


def test_a_sharded_policy_is_refused_with_the_way_out() -> None:
    policy = tiny_model("llama")
    next(policy.parameters()).ds_id = 0  # type: ignore[attr-defined]  what DeepSpeed puts on a parameter
    with pytest.raises(EngineError, match=r"ZeRO-3.*vllm_server"):
        HFEngine.sharing(policy, share_trainable=True, pad_id=0)


def test_a_diverged_policy_is_an_error_that_names_its_version() -> None:
    policy = tiny_model("llama")
    engine = HFEngine.sharing(policy, share_trainable=True, pad_id=0)
    engine.load_policy(PolicyFiles(31, Path("/unread"), is_adapter=False))
    with torch.no_grad():
        next(policy.parameters()).fill_(math.nan)
    with pytest.raises(EngineError, match=r"not finite.*version 31"):
        engine.generate(REQUESTS, SPEC)


def test_another_dtype_is_computed_in_without_a_second_copy_of_the_weights() -> None:
    policy = tiny_model("llama")
    exact = HFEngine.sharing(policy, share_trainable=True, pad_id=0)
    rounded = HFEngine.sharing(policy, share_trainable=True, pad_id=0, dtype=torch.bfloat16)
    sequences = [((3, 4, 5), (6, 7, 8, 9))]
    gap = torch.tensor(exact.score(sequences)) - torch.tensor(rounded.score(sequences))
    assert 1e-4 < gap.abs().max() < 0.5
    assert next(rounded.model.parameters()) is next(policy.parameters())
