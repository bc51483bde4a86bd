"""From unreduced losses to the one scalar a step minimises, and who is to blame where it is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.errors import TrainingError
from prefopt.training.windows import Window
from prefopt.types import Group, ObjectiveOutput, ResponseLogps


def reduced(output: ObjectiveOutput, window: Window) -> Tensor:
    """The scalar to minimise: each kind of loss over its count in the global batch (1 if it has none)."""
    loss = output.losses.sum() / max(1, window.num_pairs)
    if output.token_losses is not None:
        loss = loss + output.token_losses.sum() / max(1, window.num_chosen_tokens)
    if output.sample_losses is not None:
        loss = loss + output.sample_losses.sum() / max(1, window.num_samples)
    if output.sample_token_losses is not None:
        loss = loss + output.sample_token_losses.sum() / max(1, window.num_sample_tokens)
    return loss


def name_culprits(
    groups: Sequence[Group], forward: Tensor, output: ObjectiveOutput, step: int
) -> str:
    """Which pairs or samples have a loss that is not finite, and whether the ``forward`` of the model is."""
    losses = output.losses if output.token_losses is None else output.losses + output.token_losses
    owners, what = [group.id for group in groups for _ in group.pairs], "pairs"
    of_samples = [output.sample_losses, output.sample_token_losses]
    if found := [part for part in of_samples if part is not None]:
        losses, what = torch.cat([losses, torch.stack(found).sum(0)]), "pairs or samples"
        owners += [
            f"{group.id} response {i}" for group in groups for i in range(len(group.responses))
        ]
    bad = [
        f"{owners[i]} (loss {losses[i].item()})"
        for i in (~losses.isfinite()).nonzero()[:, 0].tolist()
    ]
    broken = "" if forward.isfinite().all() else "; the policy's own log-probs are not finite"
    return (
        f"step {step + 1}: the loss of {len(bad)} {what} is not finite{broken}: {', '.join(bad[:16])}. "
        "Look at them with `prefopt show`; with fp16 weights use bf16, else lower train.learning_rate"
    )


class PolicyGap:
    """Mean |policy - sampler| log-prob of a window, which on policy is rounding and nothing else.

    Weights that a wrapper did not update, a reference that stayed in their place, a tokenizer applied twice:
    all train without complaint, and all show here.
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, lp: ResponseLogps, window: Window) -> None:
        """Adds the samples of a micro-batch, on their device: nothing waits for it before `check`."""
        if window.max_policy_gap is None or lp.samples is None or lp.behavior is None:
            return
        counted = lp.mask & lp.samples[:, None]
        total = ((lp.policy.detach() - lp.behavior).abs() * counted).sum()
        self._parts.append(torch.stack([total, counted.sum().to(total.dtype)]))

    def check(self, window: Window) -> None:
        """Raises TrainingError if the policy in training is not the one that sampled the window; forgets."""
        if window.max_policy_gap is None or not self._parts:
            return
        total, count = torch.stack(self._parts).sum(0).tolist()
        self._parts = []
        if not count or total / count <= window.max_policy_gap:
            return
        raise TrainingError(
            f"step {window.step + 1}: the policy in training gives the samples log-probs that differ from their "
            f"sampler's by {total / count:.3g} nats a token (limit {window.max_policy_gap:g}), and the two should "
            "be the same weights. If it is rounding (an engine in a lower precision), raise engine.max_logp_gap; "
            "otherwise the weights on one side are stale"
        )
