"""Sampling that depends on a row's own seed and on nothing else in the batch, log-probs included.

Hugging Face `generate` calls `SeededSampler` where it would filter logits: each row's token is found by
inverse CDF from that row's own uniform of that step, and every other token is ruled out, so that the greedy
search which `generate` then runs has one choice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from prefopt.engines.base import SamplingSpec
from prefopt.errors import EngineError


def tempered_logps(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """(R, V) fp32 log-probs that ``spec`` samples from, -inf where top-k or top-p ruled a token out.

    Order as in vLLM and transformers: temperature, top-k, then top-p over what top-k left. A token enters the
    nucleus if those likelier than it hold less than ``top_p`` together, so the likeliest always does. At
    temperature 0 the untempered log-probs: nothing is sampled.
    """
    logps = logits.float()
    if spec.temperature == 0:
        return logps.log_softmax(-1)
    logps = (logps / spec.temperature).log_softmax(-1)
    if 0 < spec.top_k < logps.shape[-1]:
        lowest = logps.topk(spec.top_k, dim=-1).values[:, -1:]
        logps = logps.masked_fill(logps < lowest, -torch.inf).log_softmax(-1)
    if spec.top_p < 1:
        ordered, order = logps.sort(dim=-1, descending=True, stable=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        outside = torch.zeros_like(ordered, dtype=torch.bool)
        outside = outside.scatter(-1, order, before >= spec.top_p)
        logps = logps.masked_fill(outside, -torch.inf).log_softmax(-1)
    return logps


def inverse_cdf(logps: Tensor, uniforms: Tensor) -> Tensor:
    """(R,) the first token whose cumulative probability exceeds the row's uniform; never one of probability 0.

    Args:
        logps: (R, V) log-probs; -inf is allowed.
        uniforms: (R,) fp64 in [0, 1).
    """
    # fp64: over 128k tokens, fp32 sums would be off by more than the rarest tokens weigh
    cumulative = logps.double().exp().cumsum(-1)
    total = cumulative[:, -1]
    # below the total, also after rounding: else there is no first token above it
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def draw_uniforms(seeds: Sequence[int], num_steps: int) -> Tensor:
    """(R, num_steps) fp64 in [0, 1), each row from a generator of its own, on the CPU whatever the device.

    Args:
        seeds: any integers; only their lowest 64 bits count.
    """
    generator = torch.Generator()
    rows = []
    for seed in seeds:
        generator.manual_seed(seed % 2**63)
        rows.append(torch.rand(num_steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


class SeededSampler(LogitsProcessor):
    """Leaves one token a row, and remembers the log-prob it was sampled with.

    Args:
        spec: how to sample.
        seeds: of the R rows.
        prompt_width: columns of ``input_ids`` before the first new token, padding included.
        device: of the logits.
        deadline: `time.monotonic` after which generation stops with EngineError.
    """

    def __init__(
        self,
        spec: SamplingSpec,
        seeds: Sequence[int],
        *,
        prompt_width: int,
        device: torch.device,
        deadline: float,
    ) -> None:
        self.spec = spec
        self.prompt_width = prompt_width
        self.deadline = deadline
        self.uniforms = draw_uniforms(seeds, spec.max_new_tokens).to(device)
        self.logps = torch.zeros(len(seeds), spec.max_new_tokens, device=device)
        """(R, steps) fp32; what stands after a row's stop token means nothing."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """(R, V) scores that are -inf but for the chosen token of each row."""
        step = input_ids.shape[1] - self.prompt_width
        if time.monotonic() > self.deadline:
            raise EngineError(
                f"the hf engine was still generating at its deadline, after {step} of "
                f"{self.spec.max_new_tokens} tokens of {len(input_ids)} responses. Raise engine.timeout_s, or "
                "lower regime.max_new_tokens or engine.batch_size"
            )
        logps = tempered_logps(scores, self.spec)
        if self.spec.temperature == 0:
            token = logps.argmax(-1)
        else:
            token = inverse_cdf(logps, self.uniforms[:, step])
            # NaN logits compare with nothing; the recorded NaN is what the engine reports
            token = token.clamp(max=logps.shape[-1] - 1)
        self.logps[:, step] = logps.gather(-1, token[:, None])[:, 0]
        return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0)
