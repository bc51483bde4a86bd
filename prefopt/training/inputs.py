"""What an objective sees of one forward: a policy's log-probs or a reward model's scores, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import TrainingError
from prefopt.model.collate import make_batch, response_mask
from prefopt.model.layouts import log_ratio_tolerance
from prefopt.reference.base import Reference
from prefopt.types import Group, ResponseLogps, ResponseScores


def split_forward(output: Any) -> tuple[Tensor, Tensor | None]:
    """A model's log-probs or scores, fp32, and the routers' balancing loss where it gives one."""
    main, balance = output if isinstance(output, tuple) else (output, None)
    return main.float(), balance


def response_logps(
    groups: Sequence[Group], policy: Tensor, reference: Tensor | None, *, counts: bool
) -> ResponseLogps:
    """Of (R, T) log-probs. ``counts`` False: another rank has one micro-batch more; run with it, add nothing."""
    batch, device = make_batch(groups), policy.device

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    samples = moved(batch.samples)
    return ResponseLogps(
        policy=policy,
        mask=response_mask(batch).to(device),
        pairs=batch.pairs.to(device) if counts else batch.pairs[:0].to(device),
        reference=moved(reference),
        behavior=moved(batch.behavior_logps),
        rewards=moved(batch.rewards),
        advantages=moved(batch.advantages),
        samples=samples if counts or samples is None else torch.zeros_like(samples),
        group=moved(batch.group),
    )


def response_scores(groups: Sequence[Group], scores: Tensor, *, counts: bool) -> ResponseScores:
    """Of (R,) scores; ``counts`` as in `response_logps`."""
    batch = make_batch(groups)
    return ResponseScores(
        scores=scores,
        pairs=(batch.pairs if counts else batch.pairs[:0]).to(scores.device),
        rewards=None if batch.rewards is None else batch.rewards.to(scores.device),
    )


def check_initial(
    model: Any,
    layout: Any,
    groups: Sequence[Group],
    logps: Tensor | None,
    reference: Reference,
    precision: str,
) -> None:
    """At step 0 the policy is its own initial reference; TrainingError for any other: it is a wrong one.

    Args:
        model: the prepared `LogpModel`, in training mode.
        layout: of ``groups``.
        logps: what ``reference`` says of them.
        precision: of the recipe.
    """
    if not reference.is_initial_policy:
        return
    model.eval()
    with torch.no_grad():
        lp = response_logps(groups, model(layout).float(), logps, counts=True)
    model.train()
    gap = (lp.log_ratio.abs().sum() / lp.mask.sum()).item()
    limit = log_ratio_tolerance(model, precision)
    if not gap <= limit:
        raise TrainingError(
            f"the policy is not its own reference at step 0: mean |log-ratio| {gap:.3g} nats a token "
            f"(limit {limit:g}); the reference log-probs are not of these weights ({reference.where})"
        )
