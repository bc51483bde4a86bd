"""Offline RLHF as weighted or selected maximum likelihood: filtered, reward-weighted and reward-conditioned.

All three train on rows of one response with a reward, of a data set or of rollouts. The rewards of a data set are
z-scored where ``data.normalize_rewards`` says so; the papers' r̃ is such a reward.
"""

import math

from pydantic import PositiveFloat

from prefopt.objectives._samples import on_rows, sample_nll, sample_output, weighted_output
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective(
    "filtered_nll",
    needs={Need.REWARDS},
    credit="none",
    source="arXiv:2308.12050 (filtered MLE)",
)
def filtered_nll(lp: ResponseLogps, *, threshold: float) -> ObjectiveOutput:
    """NLL of the samples whose reward reaches a threshold, in nats per token.

        L = -Σ_i 1{r_i >= τ} Σ_t log π(y_it) / Σ_i |y_i|, both sums over the global batch

    The denominator counts the tokens of all samples, so a batch with few good ones is a small step. A recipe that
    draws with ``data.sampling: {name: positive}`` has none but good ones in a batch: that is SFT on the filtered
    set, as the paper and its code do. With a threshold below every reward it is `nll` on all samples.

    Args:
        lp: token log-probs. Uses ``policy`` (R, T), ``rewards`` and ``samples`` (R,).
        threshold: τ, in the units of the (normalised) reward; a sample at the threshold is kept. The paper's value
            is not known, so there is no default. ReST's filter is strict, r > τ.

    Returns: losses (P,) of zeros; ``sample_token_losses`` (R,), each kept sample's sum over its tokens; sample
        metrics of the weights (0 and 1) as `weighted_output`.
    Raises: ValueError for samples without rewards.
    Source: Hu et al. 2023, arXiv:2308.12050, by its abstract and the SFT code of its first author
        (OpenRLHF@95ac56d), which means over tokens.
    """
    rewards = on_rows(lp, lp.rewards, Need.REWARDS)
    keeps = on_rows(lp, (rewards >= threshold).to(lp.policy.dtype), Need.SAMPLES)
    return weighted_output(lp, keeps, token_mean=True)


@objective("rwr", needs={Need.REWARDS}, credit="none", source="arXiv:2308.12050 (RWR)")
def rwr(
    lp: ResponseLogps, *, beta: PositiveFloat = 1.0, max_weight: PositiveFloat = 20.0
) -> ObjectiveOutput:
    """Per-response reward-weighted regression loss, in nats.

        L_i = -min(exp(r_i / β), w_max) Σ_t log π(y_it)

    The weight is a number: no gradient goes through it. Its scale is that of the loss, so β, the scale of the
    rewards and the learning rate belong together; `data.normalize_rewards` fixes one of the three.

    Args:
        lp: token log-probs. Uses ``policy`` (R, T), ``rewards`` and ``samples`` (R,).
        beta: temperature, in the units of the reward, > 0. Towards 0 only rewards above 0 count, all with the
            weight w_max; large, every sample weighs the same. The paper's value is not known; 1 is this project's,
            for z-scored rewards.
        max_weight: w_max, > 0. Weights are "usually clipped"; 20 is this project's choice (a reward of 3 at β =
        1).

    Returns: losses (P,) of zeros; ``sample_losses`` (R,), sums over tokens; sample metrics of the weights as
        `weighted_output`, and ``weights/clipped_frac``.
    Raises: ValueError for samples without rewards.
    Source: Hu et al. 2023, arXiv:2308.12050, by its formula; code of it was not to be had.
    """
    exponent = on_rows(lp, lp.rewards, Need.REWARDS) / beta
    limit = math.log(max_weight)
    # Clipped before exp, so it cannot overflow.
    weights = on_rows(lp, exponent.clamp(max=limit).exp(), Need.SAMPLES).to(lp.policy.dtype)
    clipped = on_rows(lp, (exponent > limit).to(lp.policy.dtype), Need.SAMPLES)
    return weighted_output(lp, weights, metrics={"weights/clipped_frac": clipped})


@objective(
    "reward_conditioned",
    needs={Need.REWARDS, Need.CONDITION},
    source="arXiv:2308.12050 (conditional alignment); OpenRLHF@95ac56d",
)
def reward_conditioned(lp: ResponseLogps) -> ObjectiveOutput:
    """NLL of the samples after prompts that hold their reward, in nats per token.

        L = -Σ_i Σ_t log π(y_it | template(x_i, r_i)) / Σ_i |y_i|, both sums over the global batch

    The loss is plain SFT: the method is in the prompt, where the renderer writes the reward as ``data.condition``
    says. A policy trained so is asked for a high reward (``data.condition.target``) when it answers.

    Args:
        lp: token log-probs of responses to such prompts. Uses ``policy`` (R, T), ``rewards`` and ``samples`` (R,);
            of the rewards only to see that there are some.

    Returns: losses (P,) of zeros; ``sample_token_losses`` (R,), each sample's sum over its tokens; no metrics but
        those every run has.
    Raises: ValueError for samples without rewards.
    Source: Hu et al. 2023, arXiv:2308.12050; the first author's code, OpenRLHF@95ac56d (processor.py).
    """
    on_rows(lp, lp.rewards, Need.REWARDS)  # raises where there are samples and no rewards
    return sample_output(lp, sample_nll(lp), {}, token_mean=True)
