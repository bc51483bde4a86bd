"""IFEval's instructions with their arguments: checked once, then asked of many responses, strictly or loosely."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from prefopt.signals.constraint_checks import CHECKS
from prefopt.signals.sentences import Splitter, split_sentences

SENTENCES = "length_constraints:number_sentences"


@dataclass(frozen=True)
class Instruction:
    """One verifiable instruction; make it with `instruction`, which checks it."""

    id: str
    """IFEval's: ``length_constraints:number_words``."""
    arguments: Mapping[str, Any]

    @property
    def family(self) -> str:
        """What stands before the colon."""
        return self.id.split(":")[0]

    def follows(self, text: str, split: Splitter = split_sentences) -> bool:
        """Whether ``text`` follows it, IFEval's strict reading; an empty text follows nothing.

        Raises: ConfigError if its check asks for the language and langdetect is not installed.
        """
        how = {"split": split} if self.id == SENTENCES else {}
        return bool(text.strip()) and CHECKS[self.id](text, **self.arguments, **how)

    def follows_loosely(self, text: str, split: Splitter = split_sentences) -> bool:
        """Whether any of `loose_variants` follows it. Raises: as `follows`."""
        return any(self.follows(variant, split) for variant in loose_variants(text))


def instruction(id: str, arguments: Mapping[str, Any] | None) -> Instruction:
    """The instruction, its arguments checked; those that are None are dropped (columnar files fill with nulls).

    Raises: ValueError in words: unknown id, missing, unknown or wrong arguments.
    """
    if id not in CHECKS:
        raise ValueError(f"unknown constraint {id!r}. Known: {', '.join(sorted(CHECKS))}")
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    try:
        model = _arguments(id).model_validate(given)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ValueError(f"{id}: arguments {given}: {'; '.join(problems)}") from error
    return Instruction(id, model.model_dump())


def loose_variants(text: str) -> tuple[str, ...]:
    """The response as it is; without its first, its last, or both lines; and each of these without ``*``.

    Eight at most, each once. Source: IFEval, arXiv:2311.07911, section 2.2 (loose accuracy).
    """
    lines = text.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    variants = [text, *cut]
    return tuple(dict.fromkeys([*variants, *(variant.replace("*", "") for variant in variants)]))


@functools.cache
def _arguments(id: str) -> type[BaseModel]:
    """The schema of a check's arguments: its signature after the text, keyword-only settings aside."""
    hints = typing.get_type_hints(CHECKS[id], include_extras=True)
    parameters = list(inspect.signature(CHECKS[id]).parameters.values())[1:]
    fields: Any = {
        each.name: (hints[each.name], ... if each.default is each.empty else each.default)
        for each in parameters
        if each.kind is not inspect.Parameter.KEYWORD_ONLY
    }
    return create_model(id, __config__=ConfigDict(extra="forbid"), **fields)
