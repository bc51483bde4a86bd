"""What every run logs beside its objective's own metrics (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prefopt.model.collate import TokenLayout
from prefopt.model.distributed import max_over_processes
from prefopt.training.metrics import MeanMeter, peak_memory_gib
from prefopt.types import Group, ObjectiveOutput, ResponseLogps, ResponseScores


def add_batch_metrics(
    meter: MeanMeter, seen: ResponseLogps | ResponseScores, output: ObjectiveOutput
) -> None:
    """What is known of a micro-batch, the objective's own metrics included; of training and of evaluation."""
    meter.add_values(output.metrics)
    if isinstance(seen, ResponseScores):
        meter.add("loss/pairs", output.losses.detach().sum(), float(len(seen.pairs)))
        meter.add_values({"rewards/mean": seen.scores[seen.pairs]})
        return
    add_pair_metrics(meter, seen, output)
    add_sample_metrics(meter, seen, output)


def add_pair_metrics(meter: MeanMeter, lp: ResponseLogps, output: ObjectiveOutput) -> None:
    """Losses, and log-probs and lengths of both sides; means over pairs, of ``/token`` over tokens."""
    count = float(len(lp.pairs))
    meter.add("loss/pairs", output.losses.detach().sum(), count)
    chosen, rejected = lp.pairs[:, 0], lp.pairs[:, 1]
    sums, lengths = lp.policy.detach().sum(-1), lp.lengths
    for side, rows in (("chosen", chosen), ("rejected", rejected)):
        meter.add(f"logps/{side}", sums[rows].sum(), count)
        meter.add(f"logps/{side}_per_token", sums[rows].sum(), lengths[rows].sum())
        meter.add(f"tokens/{side}", lengths[rows].sum(), count)
    # Whatever the objective: does the policy prefer the chosen side, a token for a token? Ties are no.
    per_token = sums / lengths.clamp(min=1)
    meter.add("logps/accuracy", (per_token[chosen] > per_token[rejected]).sum(), count)
    if output.token_losses is not None:
        meter.add("loss/nll", output.token_losses.detach().sum(), lengths[chosen].sum())
    if lp.reference is not None:
        ratio = lp.log_ratio.detach().sum(-1)
        meter.add("log_ratio/chosen", ratio[chosen].sum(), count)
        meter.add("log_ratio/rejected", ratio[rejected].sum(), count)


def add_sample_metrics(meter: MeanMeter, lp: ResponseLogps, output: ObjectiveOutput) -> None:
    """Samples' losses, log-probs and labels, and of rollouts what compares them with their sampler.

    Means over samples, of names a token over tokens. Entropy and KL are the one-sample estimates -log π and
    log π - log π_ref.
    """
    if lp.samples is None:
        return
    rows, count = lp.samples.float(), lp.samples.sum()
    lengths = (lp.lengths * rows).sum()
    meter.add("tokens/sample", lengths, count)
    logps = (lp.policy.detach().sum(-1) * rows).sum()
    meter.add("logps/sample", logps, count)
    meter.add("logps/sample_per_token", logps, lengths)
    _add_labels(meter, lp)
    if output.sample_losses is not None:
        meter.add("loss/samples", output.sample_losses.detach().sum(), count)
    if output.sample_token_losses is not None:
        meter.add("loss/nll", output.sample_token_losses.detach().sum(), lengths)
    for name, value in output.sample_metrics.items():
        meter.add(name, (value.detach() * rows).sum(), count)
    if lp.reference is not None:
        ratio = (lp.log_ratio.detach().sum(-1) * rows).sum()
        # Samples of the policy estimate its KL; those of a data set say how far it has moved on them.
        name = "log_ratio/sample" if lp.behavior is None else "kl/reference"
        meter.add(name, ratio, count)
        meter.add(f"{name}_per_token", ratio, lengths)
    if lp.behavior is not None:
        meter.add("rollout/entropy_per_token", -(lp.behavior.sum(-1) * rows).sum(), lengths)
        gap = ((lp.policy.detach() - lp.behavior) * lp.mask).abs().sum(-1)
        meter.add("rollout/policy_gap", (gap * rows).sum(), lengths)


def _add_labels(meter: MeanMeter, lp: ResponseLogps) -> None:
    """Rewards of the samples that have one, and advantages."""
    assert lp.samples is not None
    if lp.rewards is not None:
        known = lp.samples & ~lp.rewards.isnan()
        meter.add("samples/reward", torch.where(known, lp.rewards, 0.0).sum(), known.sum())
    if lp.advantages is not None:
        count = lp.samples.sum()
        advantages = torch.where(lp.samples, lp.advantages, 0.0)
        meter.add("samples/advantage", advantages.sum(), count)
        meter.add("samples/negative_advantage_frac", (advantages < 0).sum(), count)


def derived(row: dict[str, float]) -> dict[str, float]:
    """``row`` with what is made of its means: the effective share of the samples' weights.

    ``weights/effective_frac`` is Kish's (Σ w)² / (n Σ w²): 1 where all samples weigh the same, 1/n where one
    outweighs all others.
    """
    mean, square = row.get("weights/mean"), row.pop("weights/square", None)
    if mean is not None and square:
        row["weights/effective_frac"] = mean**2 / square
    return row


def add_layout_metrics(
    meter: MeanMeter, groups: Sequence[Group], layout: TokenLayout, *, counts: bool
) -> None:
    """Tokens computed, and what the plain layout (one padded row a response) would have computed.

    A filler (``counts`` False) adds zeros, so that every process reduces the same names.
    """
    weight = int(counts)
    rows = [len(g.prompt_ids) + len(r.ids) for g in groups for r in g.responses]
    shared = sum(len(g.prompt_ids) * (len(g.responses) - 1) for g in groups) if layout.packed else 0
    padded, real = len(rows) * max(rows), sum(rows)
    avoided = padded - real if layout.packed else 0
    meter.add_total("tokens/computed", weight * layout.num_input_tokens)
    meter.add_running("tokens/seen", weight * real)
    meter.add("tokens/padding_avoided_frac", weight * avoided, weight * padded)
    meter.add("tokens/prompt_shared_frac", weight * shared, weight * real)


def window_row(meter: MeanMeter, accelerator: Any, seconds: float) -> dict[str, float]:
    """A row of metrics.jsonl of what was added to ``meter`` in so many seconds. A collective."""
    row = derived(meter.reduce(accelerator))
    row["time/window_s"] = seconds
    row["tokens/per_s"] = row["tokens/computed"] / seconds
    (row["memory/peak_gib"],) = max_over_processes(accelerator, peak_memory_gib(accelerator.device))
    return row
