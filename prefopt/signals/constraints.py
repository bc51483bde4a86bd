"""Verifier of instruction constraints: word counts, keywords, language, case, JSON, bullets, start and end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from prefopt.errors import ConfigError, DataError, SignalError
from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, column, per_response
from prefopt.signals.instructions import Instruction, instruction
from prefopt.types import Prompt


@signal(
    "constraints",
    source="IFEval, arXiv:2311.07911",
    needs_fields=("constraints",),
    reads_answer=True,
    no_answer=0.0,
)
def constraints(
    *, constraints: str = "constraints", reward: Literal["all", "share"] = "all"
) -> Signal:
    """Whether a response follows the constraints of its prompt, in [0, 1]. An empty response follows none.

    Args:
        constraints: column with a list of ``{type, args}``. ``type`` is an IFEval instruction id, such as
            ``length_constraints:number_words``, and ``args`` its arguments, such as ``{num_words: 300,
            relation: at least}``; `prefopt.signals.constraint_checks` has them all. Those on language and
            case need langdetect (``prefopt[eval]``).
        reward: ``all``: 1.0 if every constraint is followed (IFEval's prompt level, strict), else 0.0.
            ``share``: the share that is followed.
    """

    def score(prompt: Prompt, text: str) -> float:
        try:
            results = [item.follows(text) for item in _parsed(prompt, constraints)]
        except ConfigError as error:  # not a prompt's fault: dropping its group would hide it
            raise SignalError(f"prompt {prompt.id}: {constraints}: {error.problems[0]}") from error
        return float(all(results)) if reward == "all" else sum(results) / len(results)

    return per_response(score)


def _parsed(prompt: Prompt, name: str) -> list[Instruction]:
    """The prompt's constraints; DataError for one that nobody can check."""
    items = column(prompt, name)
    if not isinstance(items, list | tuple) or not items:
        raise DataError(f"prompt {prompt.id}: {name}: must be a non-empty list of {{type, args}}")
    parsed = []
    for number, item in enumerate(items):
        if not isinstance(item, Mapping) or "type" not in item:
            raise DataError(
                f"prompt {prompt.id}: {name}.{number}: must be {{type, args}}, got {item!r}"
            )
        try:
            parsed.append(instruction(str(item["type"]), item.get("args")))
        except ValueError as error:
            raise DataError(f"prompt {prompt.id}: {name}.{number}: {error}") from error
    return parsed
