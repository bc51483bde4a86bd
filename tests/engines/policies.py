"""The tiny policy of the engine tests on disk: two full models, two adapters, one adapter of a high rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prefopt.engines.base import PolicyFiles, SamplingSpec
from tests.unit.tiny_models import tiny_model

VOCAB = 48
STOP = 2
CONTEXT = 96
"""Longest prompt + response of the engines under test."""
RANK = 4


@dataclass(frozen=True)
class Policies:
    """Where the weights are. ``base`` is what the engines start from."""

    base: Path
    other: Path
    """The same architecture with other weights."""
    adapters: tuple[Path, Path]

    def files(
        self, version: int, *, is_adapter: bool, directory: Path
    ) -> tuple[PolicyFiles, nn.Module]:
        """Version ``version`` under a path of its own below ``directory``, and its fp32 truth.

        Even versions hold the first weights, odd ones the second.
        """
        source = self.adapters[version % 2] if is_adapter else (self.base, self.other)[version % 2]
        path = directory / f"v{version}"
        if not path.exists():
            path.symlink_to(source)
        return PolicyFiles(version, path, is_adapter), self.truth(source)

    def truth(self, source: Path) -> nn.Module:
        """The plain transformers (or peft) model of one of the paths, fp32."""
        if source in self.adapters:
            base = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
            return PeftModel.from_pretrained(base, source).eval()
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


def write_policies(directory: Path) -> Policies:
    """Makes them. head_dim 32 is the smallest that vLLM's attention takes on CPU."""
    models = []
    for seed in (0, 1):
        model = tiny_model(
            "llama", VOCAB, seed=seed, hidden_size=64, intermediate_size=96,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        )  # fmt: skip
        model.save_pretrained(directory / f"model{seed}")
        models.append(directory / f"model{seed}")
    adapters = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=RANK,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
            init_lora_weights=False,
        )
        base = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
        get_peft_model(base, config).save_pretrained(directory / f"adapter{seed}")
        adapters.append(directory / f"adapter{seed}")
    return Policies(models[0], models[1], (adapters[0], adapters[1]))


def sampled_logps(
    model: nn.Module, prompt: tuple[int, ...], response: tuple[int, ...], spec: SamplingSpec
) -> list[float]:
    """Log-probs of the distribution that ``spec`` samples from, written out token by token in fp64.

    Independent of `prefopt.engines.sampling`: a Python loop over sorted probabilities.
    """
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1]
    return [_logp(row, token, spec) for row, token in zip(rows, response, strict=True)]


def _logp(logits: Tensor, token: int, spec: SamplingSpec) -> float:
    probabilities = (logits / (spec.temperature or 1.0)).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    kept = order if spec.temperature == 0 or not spec.top_k else order[: spec.top_k]
    if spec.temperature and spec.top_p < 1:
        whole = sum(probabilities[i].item() for i in kept)
        nucleus, held = [], 0.0
        for i in kept:
            if held >= spec.top_p:
                break
            nucleus.append(i)
            held += probabilities[i].item() / whole
        kept = nucleus
    assert token in kept, f"token {token} is outside what top-k and top-p leave"
    whole = sum(probabilities[i].item() for i in kept)
    return float(torch.log(probabilities[token] / whole))
