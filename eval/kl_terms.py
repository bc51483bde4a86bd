"""What one sampled response says about the distance of two policies: exact per token where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.logps import Policies
from prefopt.errors import ModelError
from prefopt.model.frozen import forward_batches
from prefopt.model.sweep import layout_fn
from prefopt.types import Group


@dataclass(frozen=True)
class ResponseTerms:
    """Sums over the tokens of one response, nats; fp64."""

    num_tokens: int
    log_ratio: float
    """Σ_t log π(y_t) - log π_ref(y_t): k1."""
    k3: float
    """Σ_t r_t - 1 - log r_t with r = π_ref / π: never negative."""
    exact: float
    """Σ_t KL(π(·|y_<t) ‖ π_ref(·|y_<t)) over the whole vocabulary."""
    entropy: float
    """Σ_t entropy of π(·|y_<t), over the whole vocabulary."""
    num_likelier: int
    """Tokens that the policy finds likelier than the reference."""


def kl_terms(policies: Policies, groups: Sequence[Group]) -> list[list[ResponseTerms]]:
    """The terms of every response of every group, at temperature 1.

    Both models' hidden states of a micro-batch are held, logits only a chunk of positions at a time.
    Raises: ModelError if the two have vocabularies of different size.
    """
    found: dict[int, list[ResponseTerms]] = {}
    with torch.inference_mode():
        for rows in forward_batches(policies.policy, groups, policies.batch_tokens):
            batch = [groups[row] for row in rows]
            columns = _token_columns(policies, batch)  # (N, 5), tokens of all responses in order
            lengths = [len(response.ids) for group in batch for response in group.responses]
            parts = iter(np.split(columns, np.cumsum(lengths)[:-1]))
            for row, group in zip(rows, batch, strict=True):
                found[row] = [_summed(next(parts)) for _ in group.responses]
    return [found[row] for row in range(len(groups))]


def _token_columns(policies: Policies, batch: Sequence[Group]) -> np.ndarray:
    """(N, 5) fp64: log-ratio, k3, exact KL, entropy, likelier; of each response token."""
    policy = policies.policy
    layout = layout_fn(packed=policy.packed)(batch).to(policies.device)
    own = policy.states(layout)
    with policies.as_reference() as reference:
        # A second model may take another layout; both list the response tokens in one order.
        theirs_layout = layout_fn(packed=reference.packed)(batch).to(policies.device)
        theirs = reference.states(theirs_layout)
    size = policy.chunk_size(own.device)
    parts = []
    for start in range(0, len(own), size):
        chunk = slice(start, start + size)
        logp = policy.logits(own[chunk]).log_softmax(-1)
        with policies.as_reference() as reference:
            reference_logp = reference.logits(theirs[chunk]).log_softmax(-1)
        parts.append(_columns(logp, reference_logp, layout.targets[chunk]).cpu())
    return torch.cat(parts).numpy()


def _columns(logp: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
    """As `_token_columns`, of (n, V) log-probs."""
    if logp.shape != reference.shape:
        raise ModelError(
            f"the policy has {logp.shape[-1]} output rows and its reference {reference.shape[-1]}: they have no "
            "common vocabulary to compare distributions over. Take the model that MODEL was trained from"
        )
    taken = targets[:, None]
    ratio = (logp.gather(-1, taken) - reference.gather(-1, taken))[:, 0].double()
    k3 = torch.expm1(-ratio) + ratio
    p = logp.exp()
    # A token of probability 0 adds nothing, whatever its log-prob: 0 · -inf would be NaN.
    exact = torch.where(p > 0, p * (logp - reference), 0.0).sum(-1).double()
    entropy = torch.special.entr(p).sum(-1).double()
    return torch.stack([ratio, k3, exact, entropy, (ratio > 0).double()], dim=-1)


def _summed(columns: np.ndarray) -> ResponseTerms:
    ratio, k3, exact, entropy, likelier = columns.sum(0).tolist()
    return ResponseTerms(len(columns), ratio, k3, exact, entropy, round(likelier))
