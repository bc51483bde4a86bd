"""The A-LoL family: a whole response is one action, weighed by its reward or by its positive advantage.

    A-LoL          A⁺ clip(ρ, 1 ± ε) NLL           ρ = sg[π(y) / π_ref(y)],  A⁺ = max(A, 0),  NLL = -Σ_t log π(y_t)
    A-LoL ref-free A⁺ NLL                          ρ ≡ 1
    A-LoL seq      A⁺ Σ_t clip(ρ_t, 1 ± ε) nll_t   ρ_t = sg[π(y_t) / π_ref(y_t)]
    A-LoL KL       A⁺ NLL + β (NLL_ref - NLL)      ρ ≡ 1
    R-LoL          R clip(ρ, 1 ± ε) NLL
    wBC            R NLL
    R-GOLD         R Σ_t sg[max(π(y_t), 0.1)] nll_t

Every NLL is a sum over tokens and every batch a mean over responses, as in the authors' code ("consistently better
than mean"). The clip is a clamp of a detached weight and not PPO's minimum: it never takes a gradient away.
Rewards and advantages are used as they are: the authors' rewards are in (0, 1), and a negative R pushes its
response down. Source of all: Baheti et al. 2023, arXiv:2305.14718 (ICLR 2024); code abaheti95/LoL-RL@9f8d816.
"""

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from prefopt.objectives._samples import (
    importance_ratio,
    on_rows,
    on_tokens,
    sample_nll,
    token_mean,
    weighted_output,
)
from prefopt.objectives._terms import response_sums
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps

Probability = Annotated[float, Field(ge=0, le=1)]
_A, _R, _REF = Need.ADVANTAGES, Need.REWARDS, Need.REFERENCE
_SOURCE = "arXiv:2305.14718; LoL-RL@9f8d816"


@objective("a_lol", needs={_A, _REF}, credit="group_mean", source=f"{_SOURCE}, --algorithm a_lol")
def a_lol(lp: ResponseLogps, *, epsilon: PositiveFloat = 0.9) -> ObjectiveOutput:
    """Per-response A-LoL loss, in nats.

        L = max(A, 0) · clip(ρ, 1-ε, 1+ε) · -Σ_t log π(y_t),  ρ = sg[exp(Σ_t log π(y_t) - log π_ref(y_t))]

    A response whose advantage is not positive is no part of the method: it gets no loss here, and
    ``data.sampling`` need not draw it. ρ is the exponential of a sum over tokens, so that it is soon at a bound.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``advantages`` and ``samples`` (R,).
        epsilon: ε, clip of the ratio on both sides, > 0; 1 or more never clips below. 0.9 on HH; the other tasks
            of the code do not clip (its ``ppo_clip: None``), which is a large value here.

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metrics of the weights as `weighted_output`,
        ``ratio/mean`` of the clipped ρ and ``ratio/clipped_frac``.
    Raises: ValueError for samples without advantages or a reference.
    Source: Baheti et al. 2023, arXiv:2305.14718, and its code.
    """
    return _clipped(lp, _positive_advantages(lp), epsilon)


@objective(
    "a_lol_ref_free",
    needs={_A},
    credit="group_mean",
    source=f"{_SOURCE}, --algorithm a_lol_ref_free",
)
def a_lol_ref_free(lp: ResponseLogps) -> ObjectiveOutput:
    """Per-response A-LoL loss without a reference, in nats: the advantage-weighted NLL.

        L = max(A, 0) · -Σ_t log π(y_t)

    Args:
        lp: token log-probs. Uses ``policy`` (R, T), ``advantages`` and ``samples`` (R,).

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metrics of the weights as `weighted_output`.
    Raises: ValueError for samples without advantages.
    Source: as `a_lol`, with ρ ≡ 1.
    """
    return weighted_output(lp, _positive_advantages(lp))


@objective(
    "a_lol_seq", needs={_A, _REF}, credit="group_mean", source=f"{_SOURCE}, --algorithm a_lol_seq"
)
def a_lol_seq(lp: ResponseLogps, *, epsilon: PositiveFloat = 0.9) -> ObjectiveOutput:
    """Per-response A-LoL loss with a ratio for each token, in nats.

        L = max(A, 0) · Σ_t clip(ρ_t, 1-ε, 1+ε) · -log π(y_t),  ρ_t = sg[π(y_t) / π_ref(y_t)]

    It is not `a_lol` written otherwise: (Π ρ_t)(Σ nll_t) is not Σ ρ_t nll_t. A token's ratio stays near 1 where
    the response's is at a bound.

    Args:
        lp: as in `a_lol`.
        epsilon: ε, clip of each token's ratio on both sides, > 0; 0.9 on HH.

    Returns: as `a_lol`; the weights are A⁺, and ``ratio/…`` is over the tokens of a response.
    Raises: as `a_lol`.
    Source: as `a_lol`.
    """
    policy = on_tokens(lp, lp.policy, Need.SAMPLES)
    ratios = importance_ratio((policy - on_tokens(lp, lp.reference, _REF)).detach())  # (R, T)
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon)
    weights = _positive_advantages(lp)
    metrics = {
        "ratio/mean": token_mean(lp, clipped),
        "ratio/clipped_frac": token_mean(lp, (clipped != ratios).to(ratios.dtype)),
    }
    losses = weights * -response_sums(clipped * policy, lp.mask)
    return weighted_output(lp, weights, losses=losses, metrics=metrics)


@objective(
    "a_lol_kl",
    needs={_A, _REF},
    credit="group_mean",
    source=f"{_SOURCE}, --algorithm a_lol --kl_beta β --ppo_clip 0",
)
def a_lol_kl(lp: ResponseLogps, *, beta: PositiveFloat) -> ObjectiveOutput:
    """Per-response A-LoL loss with a KL term in place of the ratio, in nats.

        L = A · NLL + β (NLL_ref - NLL)  where A > 0,  0 elsewhere;  NLL = -Σ_t log π(y_t)

    The term is a *difference* of NLLs, log π/π_ref of the response, as in the code; the reviewed submission's
    eq. 6 prints a ratio of logs. Its gradient is that of A - β in place of A: it holds the policy back only while
    A < β pushes down what A > β pushes up, and a response without positive advantage, which the paper's sampling
    never draws, is left alone.

    Args:
        lp: as in `a_lol`.
        beta: β, > 0, in the units of the advantage; towards 0 it is `a_lol_ref_free`. The code's default of 0
            switches the term off and the paper's values were not to be had, so there is no default.

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metrics of the weights (A⁺) as `weighted_output`.
    Raises: as `a_lol`.
    Source: as `a_lol`; the code of the HH task.
    """
    weights = _positive_advantages(lp)
    reference = on_tokens(lp, lp.reference, _REF).sum(-1)
    nll = sample_nll(lp)
    losses = weights * nll + beta * (weights > 0) * (-reference - nll)
    return weighted_output(lp, weights, losses=losses)


@objective("r_lol", needs={_R, _REF}, credit="none", source=f"{_SOURCE}, --algorithm r_lol")
def r_lol(lp: ResponseLogps, *, epsilon: PositiveFloat = 0.9) -> ObjectiveOutput:
    """Per-response R-LoL loss, in nats: `a_lol` with the reward in place of the advantage.

        L = R · clip(ρ, 1-ε, 1+ε) · -Σ_t log π(y_t),  ρ = sg[π(y) / π_ref(y)]

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``rewards`` and ``samples`` (R,).
        epsilon: as in `a_lol`.

    Returns: as `a_lol`.
    Raises: ValueError for samples without rewards or a reference.
    Source: as `a_lol`; the baseline without a value estimate.
    """
    return _clipped(lp, on_rows(lp, lp.rewards, _R).to(lp.policy.dtype), epsilon)


@objective("wbc", needs={_R}, credit="none", source=f"{_SOURCE}, --algorithm wbc")
def wbc(lp: ResponseLogps) -> ObjectiveOutput:
    """Per-response weighted behaviour cloning loss, in nats.

        L = R · -Σ_t log π(y_t)

    Args:
        lp: token log-probs. Uses ``policy`` (R, T), ``rewards`` and ``samples`` (R,).

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metrics of the weights as `weighted_output`.
    Raises: ValueError for samples without rewards.
    Source: as `a_lol`; the baseline without reference and value.
    """
    return weighted_output(lp, on_rows(lp, lp.rewards, _R).to(lp.policy.dtype))


@objective("r_gold", needs={_R}, credit="none", source=f"{_SOURCE}, --algorithm r_gold")
def r_gold(lp: ResponseLogps, *, min_weight: Probability = 0.1) -> ObjectiveOutput:
    """Per-response Reward-GOLD loss, in nats: tokens the policy believes in weigh more.

        L = R · Σ_t sg[max(π(y_t), w_min)] · -log π(y_t)

    Args:
        lp: token log-probs. Uses ``policy`` (R, T), ``rewards`` and ``samples`` (R,).
        min_weight: w_min, floor of a token's weight, in [0, 1]; 1 is `wbc`. 0.1 in the code.

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metrics of the weights (R) as `weighted_output`,
        ``ratio/mean`` (the token weights) and ``ratio/clipped_frac`` (tokens at the floor).
    Raises: ValueError for samples without rewards.
    Source: as `a_lol`, whose GOLD baseline it is; GOLD: Pang and He 2021, arXiv:2009.07839.
    """
    policy = on_tokens(lp, lp.policy, Need.SAMPLES)
    probabilities = policy.detach().exp()  # of log-probs, so at most 1
    token_weights = probabilities.clamp(min=min_weight)
    weights = on_rows(lp, lp.rewards, _R).to(policy.dtype)
    metrics = {
        "ratio/mean": token_mean(lp, token_weights),
        "ratio/clipped_frac": token_mean(lp, (probabilities < min_weight).to(policy.dtype)),
    }
    losses = weights * -response_sums(token_weights * policy, lp.mask)
    return weighted_output(lp, weights, losses=losses, metrics=metrics)


def _positive_advantages(lp: ResponseLogps) -> Tensor:
    """(R,) max(A, 0) of the samples, 0 on other rows."""
    return F.relu(on_rows(lp, lp.advantages, _A)).to(lp.policy.dtype)


def _clipped(lp: ResponseLogps, weights: Tensor, epsilon: float) -> ObjectiveOutput:
    """w · clip(ρ) · NLL with the ratio of the whole response to the reference."""
    log_ratio = on_tokens(lp, lp.policy, Need.SAMPLES) - on_tokens(lp, lp.reference, _REF)
    ratios = importance_ratio(log_ratio.sum(-1).detach())  # (R,)
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon)
    metrics = {
        # Clipped: of whole responses a few ratios of e^20 would be all that a mean shows.
        "ratio/mean": on_rows(lp, clipped, Need.SAMPLES),
        "ratio/clipped_frac": (clipped != ratios).to(ratios.dtype),
    }
    return weighted_output(lp, weights * clipped, metrics=metrics)
