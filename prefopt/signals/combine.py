"""Weighted sums of signals: every part kept, every failure counted, no signal able to crash a run."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.errors import SignalError
from prefopt.recipe.registry import BoundSignal
from prefopt.recipe.schema import Recipe
from prefopt.signals.answers import shown_answers
from prefopt.signals.base import Replacing, Reporting, Signal
from prefopt.types import Candidates

logger = logging.getLogger(__name__)

PartScores = list[float] | str
"""The scores of one group by one signal, or why there are none."""


@dataclass(frozen=True)
class Scored:
    """What the signals say of one group."""

    rewards: tuple[float, ...] | None
    """The weighted sum, one a response, all finite; None for a group that failed."""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Unweighted scores by part name; of a failed group, those that were computed."""
    failure: str | None = None
    """``part: reason``, None for a group that did not fail."""

    @property
    def failed(self) -> bool:
        return self.failure is not None


@dataclass(frozen=True)
class Part:
    """One signal of the sum."""

    name: str
    weight: float
    signal: Signal


class WeightedSignals:
    """The reward of a recipe: Σ weight · signal, over its ``signals``.

    A signal that throws, or scores a response NaN or infinite, drops that group and no other: where it
    throws for a whole batch, every group is tried alone. `SignalError` (a model or endpoint that is not
    there) passes, as does KeyboardInterrupt. How many failures are too many is the caller's to say.
    Not safe for calls from several threads at once.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self._failures: Counter[str] = Counter()
        self._scored: Counter[str] = Counter()
        self._warned: set[tuple[str, str]] = set()

    def score(self, groups: Sequence[Candidates]) -> list[Scored]:
        """One `Scored` a group, in order. Later signals are not asked about a group that failed earlier.

        Raises: SignalError from a signal that cannot go on.
        """
        found: list[dict[str, list[float]]] = [{} for _ in groups]
        failures: list[str | None] = [None] * len(groups)
        for part in self.parts:
            alive = [index for index, failure in enumerate(failures) if failure is None]
            scores = self._part([groups[index] for index in alive], part)
            for index, values in zip(alive, scores, strict=True):
                failures[index] = self._file(part, values, found[index])
        return [
            self._scored_group(group, parts, failure)
            for group, parts, failure in zip(groups, found, failures, strict=True)
        ]

    def report(self) -> dict[str, float]:
        """Counters by ``<part>/<name>``: each part's own, and ``failed_frac`` of the groups it saw."""
        result = {}
        for part in self.parts:
            seen = self._scored[part.name]
            result[f"{part.name}/failed_frac"] = self._failures[part.name] / seen if seen else 0.0
            if isinstance(part.signal, Reporting):
                own = part.signal.report()
                result |= {f"{part.name}/{name}": value for name, value in own.items()}
        return result

    def close(self) -> None:
        """Closes every signal; may be called twice."""
        for part in self.parts:
            part.signal.close()

    def _part(self, groups: list[Candidates], part: Part) -> list[PartScores]:
        """Scores of ``groups`` by one signal, or the reason for each that has none."""
        if not groups:
            return []
        self._scored[part.name] += len(groups)
        try:
            return _checked(part.signal.score(groups), groups)
        except SignalError:
            raise
        except Exception as error:  # a user's function may raise anything; the run must go on
            reason = _reason(error)
            logger.debug("signal %s raised", part.name, exc_info=True)
        if len(groups) == 1:
            return [reason]
        alone: list[PartScores] = []
        for group in groups:
            try:
                alone += _checked(part.signal.score([group]), [group])
            except SignalError:
                raise
            except Exception as error:  # as above
                alone.append(_reason(error))
        return alone

    def _file(self, part: Part, values: PartScores, parts: dict[str, list[float]]) -> str | None:
        """Keeps a part's scores of one group, and returns why the group failed, if it did."""
        if isinstance(values, str):
            reason = values
        else:
            parts[part.name] = values
            bad = [index for index, value in enumerate(values) if not math.isfinite(value)]
            if not bad:
                return None
            first = f"response {bad[0]} is {values[bad[0]]}"
            reason = f"not finite: {len(bad)} of {len(values)} scores ({first})"
        self._failures[part.name] += 1
        kind = (part.name, reason.split(":")[0])
        if kind not in self._warned:  # once a kind: a run may drop a few groups at every step
            self._warned.add(kind)
            logger.warning("signal %s: a group is dropped: %s", part.name, reason)
        return f"{part.name}: {reason}"

    def _scored_group(
        self, group: Candidates, parts: dict[str, list[float]], failure: str | None
    ) -> Scored:
        kept = {name: tuple(values) for name, values in parts.items()}
        if failure is not None:
            return Scored(None, kept, failure)
        rewards = [0.0] * len(group.texts)
        replaced = [False] * len(group.texts)
        # Replacing parts last: what they replace is the whole sum, wherever the recipe lists them.
        for part in sorted(self.parts, key=lambda part: isinstance(part.signal, Replacing)):
            signal = part.signal
            where = signal.replaces(group) if isinstance(signal, Replacing) else None
            for index, value in enumerate(parts[part.name]):
                if where is None:
                    rewards[index] += part.weight * value
                elif where[index]:  # a second replacement adds to the first
                    rewards[index] = part.weight * value + rewards[index] * replaced[index]
                    replaced[index] = True
        return Scored(tuple(rewards), kept)


def build_signals(entries: Sequence[BoundSignal]) -> WeightedSignals:
    """The reward of a recipe's ``signals``.

    Loads whatever the signals need. Two signals of one name become the parts ``name`` and ``name_2``.
    Raises: SignalError or ModelError for a signal that cannot be set up.
    """
    used: Counter[str] = Counter()
    parts: list[Part] = []
    with (
        contextlib.ExitStack() as undo
    ):  # a signal that fails must not leave the models before it loaded
        for entry in entries:
            signal = shown_answers(entry, entry.fn(**entry.params))
            undo.callback(signal.close)
            used[entry.name] += 1
            number = used[entry.name]
            name = entry.name if number == 1 else f"{entry.name}_{number}"
            parts.append(Part(name, entry.weight, signal))
        undo.pop_all()
    return WeightedSignals(parts)


def _checked(scores: Any, groups: Sequence[Candidates]) -> list[PartScores]:
    """``scores`` as floats, one list a group; a list of the wrong length is the reason for its group."""
    if len(scores) != len(groups):
        raise ValueError(f"returned {len(scores)} lists for {len(groups)} groups")
    result: list[PartScores] = []
    for values, group in zip(scores, groups, strict=True):
        if len(values) == len(group.texts):
            result.append([float(value) for value in values])
        else:
            result.append(f"returned {len(values)} scores for {len(group.texts)} responses")
    return result


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def prompt_fields(recipe: Recipe) -> list[str]:
    """The prompt columns that the recipe's signals read."""
    return list(dict.fromkeys(name for signal in recipe.signals for name in signal.columns))
