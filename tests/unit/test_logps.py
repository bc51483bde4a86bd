"""The packed, chunked log-prob engine against the plain forward of transformers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

import prefopt.model.lm_head
import prefopt.model.logps
from prefopt.errors import ModelError
from prefopt.model.attention.reference import visible
from prefopt.model.collate import GroupSpan, make_batch, pack, pad, response_mask
from prefopt.model.layouts import build_logp_model
from prefopt.model.logps import LogpModel
from prefopt.types import Group, Response
from tests.unit.tiny_models import ARCHITECTURES, tiny_model

VOCABULARY = 97


def make_groups(seed: int = 0) -> list[Group]:
    """Ragged groups: K of 1, 2 and 3, a one-token prompt, a one-token response, longer than any window."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist())

    shapes = [(5, (7, 4)), (1, (3, 12)), (14, (1, 9)), (6, (5, 2, 11)), (3, (4,))]
    return [
        Group(
            f"g{i}",
            ids(prompt),
            tuple(Response(ids(n)) for n in sizes),
            ((0, 1),) if len(sizes) > 1 else (),
        )
        for i, (prompt, sizes) in enumerate(shapes)
    ]


def naive_logps(model: torch.nn.Module, groups: list[Group]) -> torch.Tensor:
    """(R, T): one unpadded sequence at a time through the model's own forward, full logits."""
    rows = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response.ids]], dtype=torch.long)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            scores = -cross_entropy(logits, ids[0, 1:], reduction="none")
            rows.append(scores[len(group.prompt_ids) - 1 :])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def weighted_gradients(model: torch.nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss in which every token has a weight of its own."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, logps.numel()).view_as(logps)
    (logps * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    scale = torch.cat([g.flatten() for g in want.values()]).norm()
    error = torch.cat([(got[n] - want[n]).flatten() for n in want]).norm()
    assert error / scale < 1e-4, f"relative gradient error {error / scale:.2e}"


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    """A LoRA model whose B is not zero, so that both factors have gradients."""
    mamba = model.config.model_type == "mamba"  # peft refuses its other linear layers
    targets = ["in_proj", "x_proj"] if mamba else "all-linear"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layouts_agree_with_the_plain_forward(arch: str, tuning: str) -> None:
    model = tiny_model(arch, vocab_size=VOCABULARY).eval()
    if tuning == "lora":
        model = with_lora(model)
    groups = make_groups()
    want = naive_logps(model, groups)
    want_gradients = weighted_gradients(model, want)
    for packed, layout in ((False, pad(groups)), (True, pack(groups))):
        if packed and arch == "mamba":
            continue  # state-space: no attention to give a mask to; test_mamba_refuses_the_packed_layout
        engine = LogpModel(model, packed=packed)
        got = engine(layout)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert_same_gradients(weighted_gradients(model, got), want_gradients)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(arch: str, reentrant: bool) -> None:
    model = with_lora(tiny_model(arch, vocab_size=VOCABULARY))
    layout = pack(make_groups())
    engine = LogpModel(model)
    want = engine(layout)
    want_gradients = weighted_gradients(model, want)
    model.train()  # transformers checkpoints in training mode only
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = engine(layout)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert_same_gradients(weighted_gradients(model, got), want_gradients)


def test_a_trained_head_gets_the_gradient_of_full_logits() -> None:
    """LoRA on lm_head and a fully trained copy of it (modules_to_save) take the recomputing path."""
    for extra in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        config = LoraConfig(r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **extra})
        model = get_peft_model(tiny_model("llama", vocab_size=VOCABULARY), config).eval()
        want = naive_logps(model, make_groups())
        want_gradients = weighted_gradients(model, want)
        got = LogpModel(model)(pack(make_groups()))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        assert_same_gradients(weighted_gradients(model, got), want_gradients)
        assert any("lm_head" in name for name in want_gradients)


@pytest.mark.parametrize(
    ("settings", "scale", "cap"),
    [
        ({"logit_scale": 0.0625}, 0.0625, None),
        ({"lm_head_multiplier": 0.5}, 0.5, None),
        ({"logits_scaling": 4.0}, 0.25, None),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0, None),
        ({"logits_mup_width_multiplier": 2.0}, 0.5, None),
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"logits_soft_cap": 30.0}, 1.0, 30.0),
        ({"output_logit_soft_cap": 30.0}, 1.0, 30.0),
    ],
)
def test_what_an_architecture_does_to_its_logits_is_read_off_its_configuration(
    settings: dict[str, object], scale: float, cap: float | None
) -> None:
    """Each against its own forward is in test_architectures, slow."""
    found = prefopt.model.lm_head.LogitTransform.of(SimpleNamespace(**settings))
    assert (found.scale, found.softcap) == (scale, cap)


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_chunk_size_does_not_matter(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [group for seed in range(4) for group in make_groups(seed)]
    model = with_lora(tiny_model(arch, vocab_size=VOCABULARY))
    whole = LogpModel(model)(pack(groups))
    want = weighted_gradients(model, whole)
    monkeypatch.setattr(
        prefopt.model.logps, "_CHUNK_ELEMENTS_CPU", 1
    )  # the floor of 64 tokens a chunk
    chunked = LogpModel(model)(pack(groups))
    assert len(pack(groups).targets) > 2 * 64
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)
    assert_same_gradients(weighted_gradients(model, chunked), want)


def test_bfloat16_error_is_within_the_plain_forwards_own_error() -> None:
    """Both bf16 paths against the fp32 truth of the same weights: ours may not be the worse one by half."""
    groups = [group for seed in range(4) for group in make_groups(seed)]
    half = tiny_model("llama", vocab_size=VOCABULARY).to(torch.bfloat16)
    truth_model = tiny_model("llama", vocab_size=VOCABULARY).to(torch.bfloat16).float()
    with torch.no_grad():
        truth = naive_logps(truth_model, groups)
        plain = (naive_logps(half, groups) - truth).abs().mean()
        ours = (LogpModel(half)(pack(groups)) - truth).abs().mean()
    assert 0 < ours < 1.5 * plain


def test_temperature_scores_the_sampling_distribution() -> None:
    model = tiny_model("gemma2", vocab_size=VOCABULARY)
    group = make_groups()[0]
    ids = torch.tensor([[*group.prompt_ids, *group.responses[0].ids]], dtype=torch.long)
    logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1] / 0.7
    targets = torch.tensor(group.responses[0].ids).long()
    want = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    for trainable in (True, False):
        model.get_output_embeddings().requires_grad_(trainable)
        got = LogpModel(model, temperature=0.7)(pack([group]))
        torch.testing.assert_close(got[0, : len(want)], want, rtol=0, atol=1e-5)


def test_visibility_is_what_unpacking_says() -> None:
    """Brute force: token i sees token j iff j is an earlier-or-same token of a sequence that holds both."""
    span = GroupSpan(10, 3, (2, 0, 4))
    sequences = [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 5, 6, 7, 8]]
    for window in (None, 2, 3):
        want = torch.zeros(9, 9, dtype=torch.bool)
        for tokens in sequences:
            for place, token in enumerate(tokens):
                first = 0 if window is None else max(0, place - window + 1)
                want[token, tokens[first : place + 1]] = True
        assert torch.equal(visible(span, window), want)


def test_packing_computes_each_prompt_once_and_no_padding() -> None:
    groups = make_groups()
    responses = [len(r.ids) for g in groups for r in g.responses]
    shared = sum(len(g.prompt_ids) for g in groups) + sum(responses) - len(responses)
    assert pack(groups).num_input_tokens == shared
    longest = max(len(g.prompt_ids) + len(r.ids) for g in groups for r in g.responses) - 1
    assert pad(groups).num_input_tokens == len(responses) * longest
    assert response_mask(make_batch(groups)).sum(1).tolist() == responses


def test_pairs_are_row_indices_whatever_the_group_sizes() -> None:
    assert make_batch(make_groups()).pairs.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_auto_layout_packs_attention_and_pads_state_space(caplog: pytest.LogCaptureFixture) -> None:
    assert build_logp_model(tiny_model("gemma2")).packed
    assert "padded" not in caplog.text
    assert not build_logp_model(tiny_model("mamba")).packed
    assert "padded, because the packed layout cannot be used" in caplog.text


def test_packed_is_refused_where_it_cannot_be_right() -> None:
    with pytest.raises(ModelError, match="MambaForCausalLM's attention takes no custom"):
        build_logp_model(tiny_model("mamba"), "packed")


def test_a_head_we_do_not_know_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture that scales its logits in a way the engine does not know must not train."""
    model = tiny_model("gemma2", vocab_size=VOCABULARY)
    monkeypatch.setattr(
        prefopt.model.lm_head.LogitTransform, "of", classmethod(lambda cls, config: cls())
    )
    with pytest.raises(ModelError, match="differ from the model's own forward"):
        build_logp_model(model)


def test_padded_layout_after_packed_gets_its_own_attention_back() -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY)
    packed = build_logp_model(model, "packed")(pack(make_groups()))
    model.set_attn_implementation("sdpa")
    padded = build_logp_model(model, "padded")(pad(make_groups()))
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
