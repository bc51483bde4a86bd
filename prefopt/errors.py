"""Errors that explain themselves: what was set, what is required, why, what to do."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import Any

from prefopt.shown import redacted, visible


class PrefoptError(Exception):
    """Base of every error this project raises on purpose; the command line prints it without a traceback."""

    def __str__(self) -> str:
        """The message, which can be written anywhere: it quotes files, servers and settings of others."""
        return visible(redacted(super().__str__()))


class ConfigError(PrefoptError):
    """One or more problems of a recipe, all reported at once.

    Args:
        problems: one self-contained sentence (or two) each, starting with ``section.key = value``.
        source: the file the recipe came from, shown once as a heading.
    """

    def __init__(self, problems: str | Iterable[str], *, source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        head = f"{source}: " if source else ""
        count = len(self.problems)
        title = f"{head}{count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([title, *(f"  - {problem}" for problem in self.problems)]))

    def __reduce__(self) -> tuple[Any, ...]:  # for another process to raise it again
        return functools.partial(type(self), source=self.source), (self.problems,)


class DataError(PrefoptError):
    """A data file that cannot be read as what the recipe says it is; names file and line."""


class InUseError(DataError):
    """A directory that another run, build or evaluation works in; found by every process of a launch alike."""


class ModelError(PrefoptError):
    """A model, tokenizer or adapter that cannot be loaded or does not fit the recipe."""


class TrainingError(PrefoptError):
    """A run that must stop: non-finite loss, wrong reference, a checkpoint that cannot be written."""


class EngineError(TrainingError):
    """An engine that does not start, does not answer in time, or serves other weights than it was given."""


class SignalError(TrainingError):
    """A signal that cannot score: a model or endpoint that is not there, too many failed groups."""


def in_words(error: BaseException) -> str:
    """The error as another process is told of it: its message, or, for one of a library, its class as well."""
    return str(error) if isinstance(error, PrefoptError) else f"{type(error).__name__}: {error}"


def suggest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns ``did you mean 'x'? Known: …`` for an unknown ``name``, nearest names first.

    Args:
        cutoff: difflib's ratio below which no name is suggested. A wrong one misleads: at
            0.5 ``delta`` is ``beta``.
    """
    names = sorted(known)
    spelt = {each.lower(): each for each in names}
    near = [
        spelt[each] for each in difflib.get_close_matches(name.lower(), spelt, n=3, cutoff=cutoff)
    ]
    # difflib ranks 'dpop' nearer to 'dop' than 'dpo'; swapped letters are the likelier slip.
    near.sort(key=lambda candidate: sorted(candidate) != sorted(name))
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names)}."
