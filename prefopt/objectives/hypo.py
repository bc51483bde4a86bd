"""HyPO: DPO on the data set's pairs, and the reverse KL to the reference on fresh samples."""

from dataclasses import replace

from pydantic import NonNegativeFloat, PositiveFloat

from prefopt.objectives._samples import minus_others, on_rows, sampled_tokens
from prefopt.objectives._terms import (
    log_ratio_sums,
    logistic_loss,
    pair_margin,
    pair_output,
    response_sums,
)
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective(
    "hypo",
    needs={Need.PAIRS, Need.REFERENCE, Need.SAMPLES, Need.GROUPS},
    credit="none",
    source="arXiv:2406.01462",
)
def hypo(
    lp: ResponseLogps, *, beta: PositiveFloat = 0.1, kl_weight: NonNegativeFloat = 0.01
) -> ObjectiveOutput:
    """Per-pair DPO loss and per-sample KL loss, in nats.

        L_pair = -log σ(β h)                                                  as `dpo`, on offline pairs
        L_sample = λ [ sg(k_i) + sg(w_i) (log π(y_i) - sg(log π(y_i))) ]      on fresh samples y_i
        k_i = Σ_t log π(y_t) - log π_ref(y_t),  w_i = k_i - mean_{j≠i} k_j;  w_i = k_i for a lone sample

    The value of L_sample is λ times the usual estimate of KL(π ‖ π_ref); its gradient λ w_i ∇log π(y_i) has
    the exact reverse-KL gradient as its expectation over samples of π, with the leave-one-out baseline only
    lowering the variance. Samples carry no score: no reward model, no verifier.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``pairs`` (P, 2), ``samples`` and
            ``group`` (R,). ``policy`` is at the sampling temperature on samples; another one biases the KL.
        beta: as in `dpo`.
        kl_weight: λ, >= 0; 0 is `dpo`. The default is this project's and not tuned: the paper's values
            were not to be had. Compare ``loss/samples`` with ``loss/pairs``.

    Returns: losses (P,) and metrics as `pair_output`; ``sample_losses`` (R,). The KL is logged by the
        trainer as ``kl/reference``.
    Raises: ValueError without a reference, or for samples without groups.
    Source: Song et al. 2024, arXiv:2406.01462. Written from its abstract and the policy-gradient theorem;
        the authors' code was not available to compare with.
    """
    log_ratios = log_ratio_sums(lp)  # (R,)
    rewards = beta * log_ratios[lp.pairs]  # (P, 2)
    output = pair_output(lp, logistic_loss(pair_margin(rewards)), rewards)
    kl = on_rows(lp, log_ratios.detach(), Need.SAMPLES)
    logps = response_sums(lp.policy, sampled_tokens(lp))
    losses = kl_weight * (kl + minus_others(lp, kl) * (logps - logps.detach()))
    return replace(output, sample_losses=losses)
