"""After a push: do the engine and the trainer mean the same weights? No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.errors import EngineError


@dataclass(frozen=True)
class Gap:
    """|engine - trainer| over the tokens of a few sequences, nats a token."""

    mean: float
    max: float


def compare_logps(
    engine_logps: Sequence[Sequence[float]], trainer_logps: Sequence[Sequence[float]]
) -> Gap:
    """How far two sets of token log-probs of the same sequences are apart; NaN where either is not finite.

    Raises: ValueError if they are not of the same sequences, or of none.
    """
    pairs = zip(engine_logps, trainer_logps, strict=True)
    gaps = [abs(e - t) for ours, theirs in pairs for e, t in zip(ours, theirs, strict=True)]
    if not gaps:
        raise ValueError("no tokens to compare")
    if not all(map(math.isfinite, gaps)):
        return Gap(math.nan, math.nan)
    return Gap(sum(gaps) / len(gaps), max(gaps))


def check_gap(gap: Gap, limit: float, version: int) -> None:
    """Raises EngineError if the mean gap is above ``limit`` (nats a token) or not a number.

    The mean, not the maximum: rounding of a rare token's logit shows in the maximum, other weights in both.
    """
    if gap.mean <= limit:  # False for NaN
        return
    raise EngineError(
        f"policy version {version}: the engine's log-probs are {gap.mean:.3g} nats a token from the trainer's "
        f"(mean; {gap.max:.3g} at most), and engine.max_logp_gap = {limit:g}. The engine serves other weights, "
        "or computes in a lower precision. Compare engine.dtype with model.dtype and train.precision; if the "
        "gap is rounding and you accept it, raise engine.max_logp_gap"
    )
