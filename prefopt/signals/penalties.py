"""Penalties on form: length, repetition, a missing end. Scores are <= 0, so weights stay positive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal
from prefopt.types import Candidates

Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class _LengthPenalty:
    per_token: float
    free_tokens: int
    max_penalty: float | None

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        return [[self._one(len(ids)) for ids in group.ids] for group in groups]

    def _one(self, num_tokens: int) -> float:
        penalty = self.per_token * max(0, num_tokens - self.free_tokens)
        return -penalty if self.max_penalty is None else -min(penalty, self.max_penalty)

    def close(self) -> None:
        """Nothing to free."""


@signal("length_penalty", source="linear in tokens; this project's", of_form=True)
def length_penalty(
    *,
    per_token: PositiveFloat = 0.001,
    free_tokens: NonNegativeInt = 0,
    max_penalty: PositiveFloat | None = None,
) -> Signal:
    """Minus a price for every token beyond an allowance: ``-min(max_penalty, per_token · max(0, n - free))``.

    Args:
        per_token: price of a token, in the units of the reward.
        free_tokens: tokens that cost nothing. The end token counts as one of n.
        max_penalty: the most a response can lose; without it the penalty has no floor.
    """
    return _LengthPenalty(per_token, free_tokens, max_penalty)


@dataclass(frozen=True)
class _RepetitionPenalty:
    ngram: int
    free_frac: float

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        return [
            [-max(0.0, repeated_frac(ids, self.ngram) - self.free_frac) for ids in group.ids]
            for group in groups
        ]

    def close(self) -> None:
        """Nothing to free."""


@signal(
    "repetition_penalty",
    source="share of repeated n-grams (Welleck et al., arXiv:1908.04319)",
    of_form=True,
)
def repetition_penalty(*, ngram: PositiveInt = 4, free_frac: Fraction = 0.0) -> Signal:
    """Minus the share of token n-grams that occurred before: ``-max(0, 1 - distinct / all - free_frac)``.

    Args:
        ngram: n, in tokens. A response shorter than n scores 0.
        free_frac: share of repeats that costs nothing; ordinary prose repeats a few 4-grams.

    Source: seq-rep-n of Welleck et al. 2019, arXiv:1908.04319, section 6.1.
    """
    return _RepetitionPenalty(ngram, free_frac)


def repeated_frac(ids: Sequence[int], ngram: int) -> float:
    """``1 - distinct n-grams / n-grams``, in [0, 1); 0 for a sequence shorter than n."""
    grams = [tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@dataclass(frozen=True)
class _TruncationPenalty:
    penalty: float

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        return [[-self.penalty if cut else 0.0 for cut in group.truncated] for group in groups]

    def close(self) -> None:
        """Nothing to free."""


@signal("truncation_penalty", source="DR-PO, arXiv:2404.08495: -1 for a missing EOS", of_form=True)
def truncation_penalty(*, penalty: PositiveFloat = 1.0) -> Signal:
    """``-penalty`` for a response without an end token, 0 for one that ended; added to the other signals.

    Args:
        penalty: 1 in DR-PO and in TRL's ``missing_eos_penalty`` for TL;DR.
    """
    return _TruncationPenalty(penalty)


@dataclass(frozen=True)
class _TruncationValue:
    value: float

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        return [[self.value if cut else 0.0 for cut in group.truncated] for group in groups]

    def replaces(self, group: Candidates) -> tuple[bool, ...]:
        return group.truncated

    def close(self) -> None:
        """Nothing to free."""


@signal(
    "truncation_value", source="async_rlhf, arXiv:2410.18252: penalty_reward_value", of_form=True
)
def truncation_value(*, value: float = -1.0) -> Signal:
    """The whole reward of a response without an end token: takes the place of the weighted sum.

    Whatever a reward model says of half an answer then does not matter. Responses that ended are left as
    they are. The recipe's ``weight`` multiplies ``value``.

    Args:
        value: reward of a truncated response; below what any finished response gets.

    Source: Noukhovitch et al. 2024, arXiv:2410.18252, ``non_eos_penalty`` with ``penalty_reward_value``.
    """
    return _TruncationValue(value)
