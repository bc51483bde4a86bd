"""Direct Advantage Policy Optimisation: regress the log-ratio of a step onto its advantage."""

from pydantic import PositiveFloat

from prefopt.objectives._samples import on_rows, on_tokens, sample_output
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective(
    "direct_advantage",
    needs={Need.ADVANTAGES, Need.REFERENCE},
    credit="group_mean",
    source="arXiv:2412.18279 (there called DAPO; not the DAPO of arXiv:2503.14476)",
)
def direct_advantage(lp: ResponseLogps, *, beta: PositiveFloat = 0.01) -> ObjectiveOutput:
    """Per-step squared error of the log-ratio against advantage / β, in nats².

        L = ½ (A/β - Σ_t [log π(a_t|s) - log π_ref(a_t|s)])²

    s is the prompt with the steps so far, the action a the next step: rows whose prompt holds the state and whose
    response is the step, which does not end the solution (``columns.ended``). A = V(s·a) - mean_j V(s·a_j) over
    the candidate steps of a state. Negative advantages teach as positive ones do; nothing is clipped. The paper
    keeps the actions of a state in one batch; here rows are shuffled, which gives the same sum over an epoch.

    Args:
        lp: token log-probs. Uses ``policy``, ``reference`` (R, T), ``advantages`` and ``samples`` (R,).
        beta: β, > 0: an advantage of 1 asks for a log-ratio of 1/β nats. 0.01 or 0.02 in the paper.

    Returns: losses (P,) of zeros; ``sample_losses`` (R,); sample metric ``log_ratio/target``, A/β.
    Raises: ValueError for samples without advantages or a reference.
    Source: Liu et al. 2024, arXiv:2412.18279. No official code was found.
    """
    log_ratio = on_tokens(lp, lp.policy, Need.SAMPLES) - on_tokens(lp, lp.reference, Need.REFERENCE)
    target = on_rows(lp, lp.advantages, Need.ADVANTAGES) / beta
    losses = 0.5 * (target - log_ratio.sum(-1)) ** 2
    return sample_output(lp, losses, {"log_ratio/target": target.to(losses.dtype)})
