"""Signals that judge answers: what they are shown of each response, and what one without an answer scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from prefopt.recipe.registry import BoundSignal
from prefopt.recipe.thinking import Tags
from prefopt.signals.base import Replacing, Reporting, Signal
from prefopt.signals.thinking import answer_of
from prefopt.types import Candidates


class OfAnswers:
    """A signal that is shown what responses say outside their thinking; see `shown_answers`.

    Args:
        signal: what scores.
        tags: the marks of the thinking.
        no_answer: the score of a response that never leaves it; None: that of an empty response.
    """

    def __init__(self, signal: Signal, tags: Tags, no_answer: float | None) -> None:
        self.signal = signal
        self.tags = tags
        self.no_answer = no_answer
        self._num_without = 0

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        answers = [self._answers(group) for group in groups]
        shown = [
            replace(group, texts=tuple(text or "" for text in texts))
            for group, texts in zip(groups, answers, strict=True)
        ]
        found = self.signal.score(shown)
        self._num_without += sum(text is None for texts in answers for text in texts)
        if self.no_answer is None or [*map(len, found)] != [*map(len, answers)]:
            return found  # a wrong number of scores is whoever asked's to refuse
        return [
            # A row that cannot be scored (its gold answer is unreadable) is no wrong answer of the response's.
            [
                self.no_answer if text is None and math.isfinite(score) else score
                for text, score in zip(texts, scores, strict=True)
            ]
            for texts, scores in zip(answers, found, strict=True)
        ]

    def report(self) -> Mapping[str, float]:
        """The signal's own counters, and how many responses never left their thinking."""
        own = self.signal.report() if isinstance(self.signal, Reporting) else {}
        return {**own, "no_answer": self._num_without}

    def close(self) -> None:
        self.signal.close()

    def _answers(self, group: Candidates) -> list[str | None]:
        opened = group.opened or ("",) * len(group.texts)
        return [
            answer_of(text, self.tags, mark) for text, mark in zip(group.texts, opened, strict=True)
        ]


class _ReplacingOfAnswers(OfAnswers):
    """One whose signal may take the place of the weighted sum."""

    def replaces(self, group: Candidates) -> tuple[bool, ...]:
        assert isinstance(self.signal, Replacing)
        return self.signal.replaces(group)


def shown_answers(entry: BoundSignal, signal: Signal) -> Signal:
    """The signal of an entry, shown answers alone where it reads these and ``thinking`` is not null."""
    if entry.thinking is None:
        return signal
    kind = _ReplacingOfAnswers if isinstance(signal, Replacing) else OfAnswers
    return kind(signal, entry.thinking, entry.spec.no_answer)
