"""What every signal does: scores for the responses to a prompt. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, runtime_checkable

from prefopt.errors import DataError, SignalError
from prefopt.recipe.only_where import value_at
from prefopt.types import Candidates, Prompt


class Signal(Protocol):
    """Scores groups of responses; higher is better.

    ``score`` gets many groups at once so that a model can batch them, and returns for each group one
    finite float a response. A response that cannot be scored is NaN: its group is dropped and counted.
    """

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]: ...

    def close(self) -> None:
        """Frees models and processes. May be called twice."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A signal that also counts: time-outs, unparsable answers, tokens spent, position bias."""

    def report(self) -> Mapping[str, float]:
        """Counters and rates since construction, by short name."""
        ...


@runtime_checkable
class Replacing(Protocol):
    """A signal whose score, where it says so, takes the place of the weighted sum of all signals."""

    def replaces(self, group: Candidates) -> tuple[bool, ...]:
        """For each response, True where the score replaces instead of adding."""
        ...


class UnknownIds(Sequence[int]):
    """Stands for token ids that nobody has made: whoever reads them is told so.

    Args:
        why: what is said, and what to do about it.

    Raises: SignalError on any access. An empty tuple would score instead: no length, no repetition. Any other
        error would drop group after group.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def _refuse(self, *_: Any) -> NoReturn:
        raise SignalError(self._why)

    __len__ = __iter__ = __getitem__ = __contains__ = _refuse  # type: ignore[assignment]


@dataclass(frozen=True)
class PerResponse:
    """A signal that looks at one response at a time; see `per_response`."""

    fn: Callable[[Prompt, str], float]

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        return [[float(self.fn(group.prompt, text)) for text in group.texts] for group in groups]

    def close(self) -> None:
        """Nothing to free."""


def per_response(fn: Callable[[Prompt, str], float]) -> Signal:
    """A signal from a function ``(prompt, text) -> float``; the short way to one of your own.

    In a file that the recipe lists under ``plugins``::

        @signal("has_greeting", source="ours")
        def has_greeting(*, word: str = "hello") -> Signal:
            return per_response(lambda prompt, text: float(word in text.lower()))
    """
    return PerResponse(fn)


def column(prompt: Prompt, name: str) -> Any:
    """The value of a column of the prompt's row; a dot descends (``metadata.answer``).

    Raises: DataError naming the row and the columns it has. The group is then dropped and counted.
    """
    value = value_at(prompt.fields, name)
    if value is None:
        known = ", ".join(map(str, prompt.fields)) or "none"
        raise DataError(
            f"prompt {prompt.id}: column {name!r} is missing or empty; its columns: {known}. Name the "
            "column in the signal's key, give the signal only_where for the rows that have it, or drop the others "
            "from data.prompts"
        )
    return value
