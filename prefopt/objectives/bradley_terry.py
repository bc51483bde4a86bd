"""Reward models: the Bradley-Terry likelihood of which response was preferred."""

from prefopt.objectives._terms import logistic_loss, pair_margin, reward_metrics
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseScores


@objective(
    "reward_model",
    needs={Need.PAIRS, Need.SCORES},
    needs_when={"margin_weight": Need.REWARDS},
    of_stage=True,
    source="arXiv:2203.02155, eq. 1; with a margin arXiv:2307.09288, eq. 2",
)
def bradley_terry(seen: ResponseScores, *, margin_weight: float = 0.0) -> ObjectiveOutput:
    """Per-pair Bradley-Terry loss of scores, in nats.

        L = -log σ( r(y_w) - r(y_l) - w m )

    Args:
        seen: uses ``scores`` (R,) and ``pairs`` (P, 2); with a weight also ``rewards`` (R,).
        margin_weight: w, on the margin m = reward of the chosen minus reward of the rejected response in the data.
            0: none. 1: Llama 2's loss, where m says how much better the annotators found the chosen one.

    Returns: losses (P,), fp32, unreduced; metrics ``rewards/chosen|rejected|margin|accuracy`` (P,) of the scores,
        the data's margin left out.
    Raises: ValueError for a weight and no rewards.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1; Touvron et al. 2023, arXiv:2307.09288, eq. 2. As TRL's
        RewardTrainer, whose ``margin`` column is m.
    """
    pairs = seen.scores[seen.pairs]  # (P, 2)
    margin = pair_margin(pairs)
    if margin_weight:
        if seen.rewards is None:
            raise ValueError("no margins: the data has neither columns.margin nor scores")
        margin = margin - margin_weight * pair_margin(seen.rewards[seen.pairs])
    return ObjectiveOutput(logistic_loss(margin), reward_metrics(pairs.detach()))
