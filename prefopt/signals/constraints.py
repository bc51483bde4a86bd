"""Verifier of instruction constraints: word counts, keywords, case, JSON, bullets, start and end phrases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from prefopt.errors import DataError
from prefopt.registry import signal
from prefopt.signals.base import Prompt, Signal, column, per_response
from prefopt.signals.constraint_checks import CHECKS, argument_problem


@signal("constraints", source="IFEval, arXiv:2311.07911", needs_fields=("constraints",))
def constraints(
    *, constraints: str = "constraints", reward: Literal["all", "share"] = "all"
) -> Signal:
    """Whether a response follows the constraints of its prompt, in [0, 1]. An empty response follows none.

    Args:
        constraints: column with a list of ``{type, args}``. ``type`` is an IFEval instruction id, such as
            ``length_constraints:number_words``, and ``args`` its arguments, such as ``{num_words: 300,
            relation: at least}``; `prefopt.signals.constraint_checks` has them all.
        reward: ``all``: 1.0 if every constraint is followed (IFEval's prompt level, strict), else 0.0.
            ``share``: the share that is followed.
    """

    def score(prompt: Prompt, text: str) -> float:
        results = [follows(text, *item) for item in _parsed(prompt, constraints)]
        return float(all(results)) if reward == "all" else sum(results) / len(results)

    return per_response(score)


def follows(text: str, type: str, args: Mapping[str, Any]) -> bool:
    """Whether ``text`` follows one constraint, IFEval's strict reading."""
    return bool(text.strip()) and CHECKS[type](text, **args)


def _parsed(prompt: Prompt, name: str) -> list[tuple[str, dict[str, Any]]]:
    """The prompt's constraints as ``(type, args)``; DataError for one that nobody can check."""
    items = column(prompt, name)
    if not isinstance(items, list | tuple) or not items:
        raise DataError(f"prompt {prompt.id}: {name}: must be a non-empty list of {{type, args}}")
    parsed = []
    for number, item in enumerate(items):
        if not isinstance(item, Mapping) or "type" not in item:
            raise DataError(
                f"prompt {prompt.id}: {name}.{number}: must be {{type, args}}, got {item!r}"
            )
        # columnar files fill the arguments an instruction lacks with nulls
        args = {key: value for key, value in (item.get("args") or {}).items() if value is not None}
        problem = argument_problem(str(item["type"]), args)
        if problem:
            raise DataError(f"prompt {prompt.id}: {name}.{number}: {problem}")
        parsed.append((str(item["type"]), args))
    return parsed
