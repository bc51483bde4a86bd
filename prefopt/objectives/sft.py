"""Supervised fine-tuning: the likelihood of the responses of a data set."""

from prefopt.objectives._samples import sample_nll, sample_output
from prefopt.recipe.registry import objective
from prefopt.types import ObjectiveOutput, ResponseLogps


@objective("sft", of_stage=True, source="maximum likelihood; TRL's SFTTrainer on completions")
def sft(lp: ResponseLogps) -> ObjectiveOutput:
    """NLL of every response that stands by itself, in nats per token.

        L = -Σ_i Σ_t log π(y_it | x_i, y_i<t) / Σ_i |y_i|, both sums over the global batch

    Args:
        lp: token log-probs. Uses ``policy`` (R, T) and ``samples`` (R,); ignores labels and ``reference``.

    Returns: losses (P,) of zeros; ``sample_token_losses`` (R,), each response's sum over its tokens.
    Raises: nothing.
    Source: maximum likelihood; the numbers of TRL's SFTTrainer on prompts with completions, which counts the
        tokens of the global batch too. `nll` is the same on the chosen sides of pairs.
    """
    return sample_output(lp, sample_nll(lp), {}, token_mean=True)
