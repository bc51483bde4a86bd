"""Notes on hyper-parameters far from where their papers put them: they run, and they rarely work."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.recipe.checks.rules import Finding, Surroundings, rule
from prefopt.recipe.checks.settings import reads_samples
from prefopt.recipe.schema import Recipe

# beta here multiplies a log-ratio summed over a response: hundreds of nats, not a mean of a few.
SUMMED = {"dpo", "robust_dpo", "ld_dpo", "ld_dpo_policy_only", "dpop", "apo_zero", "apo_down"}


def note(key: str, text: str) -> Finding:
    """A finding that does not stop the run."""
    return Finding(key, text, is_note=True)


@rule("stage", "objective")
def hyper_parameters_suit_their_loss(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    if recipe.objective is None:
        return
    name, beta = recipe.objective.name, recipe.objective.value("beta")
    if beta is None:
        return
    if name == "simpo":
        yield from _simpo(beta, recipe.objective.value("gamma"))
    elif name in SUMMED and beta >= 1:
        yield note(
            "objective.beta",
            f"{name} multiplies a log-ratio summed over the response; published values are 0.01 to "
            "0.5. Values from 2 up belong to SimPO, which multiplies a mean",
        )
    elif name == "ipo_mean" and beta < 0.5:
        yield note(
            "objective.beta",
            f"sets a target of 1/(2 beta) = {0.5 / beta:g} nats a token, out of reach; with the "
            "paper's summed log-ratio (objective.name: ipo) it would be the whole response's",
        )


@rule("stage", "model", "peft", "train", "objective")
def learning_rate_suits_what_is_trained(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    rate = recipe.train.learning_rate
    if recipe.stage != "preference" or recipe.peft is not None:
        return
    if rate >= 1e-5 and not reads_samples(recipe):  # a weighted likelihood is trained as SFT is
        yield note(
            "train.learning_rate",
            "high for full fine-tuning on preferences: published values are 3e-7 to 1e-6, and 1e-5 "
            "made SimPO repeat itself (its authors' README)",
        )


def _simpo(beta: float, gamma: float) -> Iterator[Finding]:
    if beta < 1:
        yield note(
            "objective.beta",
            "SimPO multiplies a mean log-prob, so its beta is larger than DPO's: the paper uses 2 to "
            "10 (arXiv:2405.14734)",
        )
    if gamma > beta:
        yield note(
            "objective.gamma",
            f"gamma/beta = {gamma / beta:g}; the authors search 0 to 1 and start at 0.5",
        )
