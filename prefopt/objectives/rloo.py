"""RLOO: REINFORCE with a leave-one-out baseline, the whole response one action. An online baseline."""

from pydantic import NonNegativeFloat, PositiveFloat

from prefopt.objectives._samples import (
    clipped_surrogate,
    importance_ratio,
    is_clipped,
    minus_others,
    on_rows,
    on_tokens,
    sample_output,
)
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective(
    "rloo",
    needs={Need.SAMPLES, Need.ADVANTAGES, Need.BEHAVIOR, Need.GROUPS},
    needs_when={"beta": Need.REFERENCE},
    credit="leave_one_out",
    source="arXiv:2402.14740; clipped sequence ratio: arXiv:2410.18252",
)
def rloo(
    lp: ResponseLogps,
    *,
    epsilon_low: PositiveFloat = 0.2,
    epsilon_high: PositiveFloat = 0.2,
    beta: NonNegativeFloat = 0.05,
) -> ObjectiveOutput:
    """Per-response RLOO loss, with the KL to the reference inside the reward.

        L_i = -min(ρ_i A'_i, clip(ρ_i, 1-ε_low, 1+ε_high) A'_i),  ρ_i = π(y_i) / π_sampler(y_i)
        A'_i = R_i - mean_{j≠i} R_j,  R_i = r_i - β Σ_t [log π_sampler(y_t) - log π_ref(y_t)]

    The credit has already taken the baseline of r. The baseline is linear, so the KL's is taken here and
    added: A'_i = A_i - β (kl_i - mean_{j≠i} kl_j). No gradient goes through A'. kl is that of the policy
    that sampled, fixed from then on, as in TRL and async_rlhf; it can be negative for one response.

    A group whose scores are all equal is skipped by the credit and then has no KL term either; its
    ``keep_degenerate`` keeps it.

    Args:
        lp: token log-probs. Uses ``policy``, ``behavior`` (R, T), ``advantages``, ``samples`` and
            ``group`` (R,), and with β > 0 ``reference`` (R, T).
        epsilon_low: lower clip of the sequence ratio, > 0; 1 or more never clips. One ratio a response:
            it moves with every token, so it clips much sooner than GRPO's.
        epsilon_high: upper clip of the sequence ratio, > 0.
        beta: weight of the KL in the reward, >= 0; 0 needs no reference. Default as in TRL.

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metrics ``ratio/mean`` (the sequence
        ratio), ``ratio/clipped_frac`` (1 or 0 a response) and, with β > 0, ``rewards/kl_penalty`` (β kl).
    Raises: ValueError for samples without log-probs of their sampler, advantages, groups or (β > 0) a
        reference.
    Source: Ahmadian et al. 2024, arXiv:2402.14740; Noukhovitch et al. 2024, arXiv:2410.18252 ("proximal
        RLOO"); the same as TRL's RLOOTrainer.
    """
    behavior = on_tokens(lp, lp.behavior, Need.BEHAVIOR)
    log_ratio = (on_tokens(lp, lp.policy, Need.SAMPLES) - behavior).sum(-1)  # (R,)
    ratios = importance_ratio(log_ratio)
    advantages = on_rows(lp, lp.advantages, Need.ADVANTAGES)
    metrics = {"ratio/mean": on_rows(lp, ratios, Need.SAMPLES)}
    if beta > 0:
        reference = on_tokens(lp, lp.reference, Need.REFERENCE)
        penalty = beta * (behavior - reference).sum(-1)  # (R,)
        advantages = advantages - minus_others(lp, penalty)
        metrics["rewards/kl_penalty"] = penalty
    clipped = is_clipped(ratios, advantages, epsilon_low, epsilon_high)
    metrics["ratio/clipped_frac"] = clipped.to(ratios.dtype)
    return sample_output(
        lp, clipped_surrogate(ratios, advantages, epsilon_low, epsilon_high), metrics
    )
