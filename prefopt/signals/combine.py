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
from prefopt.recipe.only_where import Rows, nobody_judges
from prefopt.recipe.registry import BoundSignal
from prefopt.recipe.scored_rows import part_names
from prefopt.shown import redacted
from prefopt.signals.answers import shown_answers
from prefopt.signals.base import Replacing, Reporting, Signal
from prefopt.types import Candidates

logger = logging.getLogger(__name__)

NO_SIGNAL = "no_signal"
"""Begins the failure of a group that no signal is for."""

PartScores = list[float] | str
"""The scores of one group by one signal, or why there are none."""


@dataclass(frozen=True)
class Scored:
    """What the signals say of one group."""

    rewards: tuple[float, ...] | None
    """The weighted sum, one a response, all finite; None for a group that failed."""
    parts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Unweighted scores by part name, of the signals that are for this row; of a failed group, those that were
    computed."""
    failure: str | None = None
    """``part: reason``, or ``no_signal: reason``; None for a group that did not fail."""

    @property
    def failed(self) -> bool:
        return self.failure is not None

    @property
    def is_unjudged(self) -> bool:
        """It failed because no signal is for it."""
        return self.failure is not None and self.failure.startswith(f"{NO_SIGNAL}: ")


@dataclass(frozen=True)
class Part:
    """One signal of the sum."""

    name: str
    weight: float
    signal: Signal
    rows: Rows = field(default_factory=Rows)
    """Those that it is for: it is asked about no other, and counts nothing of them."""

    def is_for(self, group: Candidates) -> bool:
        return self.rows.include(group.prompt.fields, group.prompt.source)


class WeightedSignals:
    """The reward of a recipe: Σ weight · signal, over those of its ``signals`` that are for the row.

    A signal that throws, or scores a response NaN or infinite, drops that group and no other: where it
    throws for a whole batch, every group is tried alone. `SignalError` (a model or endpoint that is not
    there) passes, as does KeyboardInterrupt. A group
    that no signal judges (`nobody_judges`) fails too. How many failures are too many is the caller's to say.
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
        failures = [*map(self._unjudged, groups)]
        for part in self.parts:
            alive = [
                index
                for index, (failure, group) in enumerate(zip(failures, groups, strict=True))
                if failure is None and part.is_for(group)
            ]
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

    def _unjudged(self, group: Candidates) -> str | None:
        """Why the group fails before any signal is asked: none is for it."""
        prompt = group.prompt
        why = nobody_judges(
            {part.name: part.rows for part in self.parts}, prompt.fields, prompt.source
        )
        if why is None:
            return None
        self._warn(NO_SIGNAL, NO_SIGNAL, f"no signal is for prompt {prompt.id}: {why}")
        return f"{NO_SIGNAL}: {why}"

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
        self._warn(part.name, reason.split(":")[0], f"signal {part.name}: {reason}")
        return f"{part.name}: {reason}"

    def _warn(self, name: str, kind: str, what: str) -> None:
        """Once a kind: a run may drop a few groups at every step."""
        if (name, kind) not in self._warned:
            self._warned.add((name, kind))
            logger.warning("a group is dropped: %s", what)

    def _scored_group(
        self, group: Candidates, parts: dict[str, list[float]], failure: str | None
    ) -> Scored:
        kept = {name: tuple(values) for name, values in parts.items()}
        if failure is not None:
            return Scored(None, kept, failure)
        rewards = [0.0] * len(group.texts)
        replaced = [False] * len(group.texts)
        # Replacing parts last: what they replace is the whole sum, wherever the recipe lists them.
        mine = [part for part in self.parts if part.name in parts]
        for part in sorted(mine, key=lambda part: isinstance(part.signal, Replacing)):
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
    parts: list[Part] = []
    with (
        contextlib.ExitStack() as undo
    ):  # a signal that fails must not leave the models before it loaded
        for entry, name in zip(entries, part_names(entries), strict=True):
            signal = shown_answers(entry, entry.fn(**entry.params))
            undo.callback(signal.close)
            parts.append(Part(name, entry.weight, signal, entry.rows))
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
    return redacted(f"{type(error).__name__}: {str(error).strip()[:300]}")
