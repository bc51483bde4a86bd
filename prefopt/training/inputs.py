"""What an objective sees of one forward: a policy's log-probs or a reward model's scores, with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.model.collate import make_batch, response_mask
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
