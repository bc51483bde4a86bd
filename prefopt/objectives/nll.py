"""NLL of the chosen responses: SFT on the pairs' better side, as a baseline in the same trainer."""

from prefopt.objectives._terms import chosen_nll, per_chosen_token
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective("nll", needs={Need.PAIRS}, source="maximum likelihood; the SFT term of arXiv:2401.08417")
def nll(lp: ResponseLogps) -> ObjectiveOutput:
    """Token-mean NLL of the chosen responses, in nats per token; the rejected ones are not used.

        L = -Σ log π(y_w) / Σ |y_w|, both sums over the global batch

    Args:
        lp: token log-probs. Uses ``policy`` (R, T) and ``pairs`` (P, 2); ignores ``reference``.

    Returns: losses (P,) of zeros (there is no per-pair term); ``token_losses`` (P,), each pair's sum over
        its chosen tokens; metric ``nll/chosen``. No rewards: nothing is compared.
    Raises: nothing.
    Source: maximum likelihood; the same numbers as TRL's SFTTrainer on completions, and as the NLL term
        of `cpo`.
    """
    token_losses = chosen_nll(lp)
    metrics = {"nll/chosen": per_chosen_token(lp, token_losses.detach())}
    return ObjectiveOutput(lp.policy.new_zeros(len(lp.pairs)), metrics, token_losses)
