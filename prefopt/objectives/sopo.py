"""SoPo: the data set's response against the worst sample, which counts only while it is bad."""

import torch
from pydantic import PositiveFloat

from prefopt.objectives._terms import log_ratio_sums, logistic_loss, pair_margin, pair_output
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective(
    "sopo",
    needs={Need.PAIRS, Need.REFERENCE, Need.REWARDS},
    credit="sopo",
    source="arXiv:2412.05095 eq. 14",
)
def sopo(
    lp: ResponseLogps,
    *,
    beta: PositiveFloat = 0.1,
    threshold: float = 0.5,
    chosen_weight: PositiveFloat = 1.0,
) -> ObjectiveOutput:
    """Per-pair SoPo loss for language, in nats.

        L = -log σ(β_w h(y_w) - β h(y_l))    if r(y_l) < τ
        L = -log σ(β_w h(y_w))               otherwise: a good sample is not pushed down
        h(y) = Σ_t log π(y_t) - log π_ref(y_t),  β_w = β · chosen_weight

    The paper, on motion diffusion, sets β_w = β (C - S) a sample, with S the cosine similarity of y_w to the
    generated motions under its retrieval model and C = 2. Text has no such embedding at hand, and a cosine
    under an arbitrary encoder would add a model and a scale of its own: here C - S is one constant,
    ``chosen_weight``. 1 is S = 1, the paper's weight of a chosen response like the samples; 2 is S = 0.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``pairs`` (P, 2) and ``rewards`` (R,), of
            which only the rejected rows' are read.
        beta: as in `dpo`.
        threshold: τ, in the units of the reward: a rejected response that reaches it is left alone. 0.5
            fits scores of 0 and 1; set it by the scale of a reward model. (The paper's 0.45 is a cosine.)
        chosen_weight: C - S above, > 0. With 1 and a τ above all rewards the loss is `dpo`.

    Returns: losses (P,), unreduced; metrics as `pair_output`, with rewards β_w h(y_w) and β h(y_l), and
        ``pairs/rejected_used_frac``, 1 where the rejected side is in the loss.
    Raises: ValueError without a reference or rewards; a recipe that lacks them is refused when checked.
    Source: Tan et al. 2024, arXiv:2412.05095, eq. 14.
    """
    if lp.rewards is None:
        raise ValueError("no rewards: declare needs={Need.REWARDS} on the objective")
    scale = lp.policy.new_tensor([beta * chosen_weight, beta])
    rewards = scale * log_ratio_sums(lp)[lp.pairs]  # (P, 2)
    is_bad = lp.rewards[lp.pairs[:, 1]] < threshold  # (P,)
    margin = torch.where(is_bad, pair_margin(rewards), rewards[:, 0])
    metrics = {"pairs/rejected_used_frac": is_bad.to(rewards.dtype)}
    return pair_output(lp, logistic_loss(margin), rewards, metrics=metrics)
