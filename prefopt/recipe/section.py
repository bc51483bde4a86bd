"""What every section of a recipe is made of: the base class, the types that several share, and marks. No torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
FlipProbability = Annotated[float, Field(ge=0, lt=0.5)]
"""Share of pairs whose label is taken to be wrong."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""Bytes that the usual file systems take."""


def _path(text: str) -> str:
    """``text`` with its ~ written out. Raises: for what no file system can look up."""
    found = os.path.expanduser(text)
    if not found:
        raise PydanticCustomError("path", "must be a path, and is empty")
    if found.startswith("~"):
        raise PydanticCustomError("path", "must be a path: this machine has no user of that name")
    longest = max(len(os.fsencode(part)) for part in found.split("/"))
    if longest > _LONGEST_NAME or len(os.fsencode(found)) > _LONGEST_PATH:
        raise PydanticCustomError("path", "must be a path: no file has a name that long")
    return found


# A hub id has no ~, so one type serves for what may be either.
PathText = Annotated[str, AfterValidator(_path)]


@dataclass(frozen=True)
class Newer:
    """Marks a key that is left out of a dump at its default, so that settings from before it hash as they did."""


class Section(BaseModel):
    """Base of every section: immutable, strict types, unknown keys refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = dump(self)
        for key, field in type(self).model_fields.items():
            if key in values and any(isinstance(mark, Newer) for mark in field.metadata):
                default = field.get_default(call_default_factory=True)
                if getattr(self, key) == default:
                    del values[key]
        return values


@dataclass(frozen=True)
class NoEffect:
    """Marks a key that says where, or how patiently, and not what: it may change between a kill and a resume."""

    on: Literal["run", "rows", "both"] = "both"
    """What it has no effect on: what training computes, the rows that a pipeline stage makes, or both."""


@dataclass(frozen=True)
class ByName:
    """Marks a union of sections as a choice: the key ``name`` says which one, and so which other keys there are.

    Where ``name`` is left out, it is the first one. Written as ``Annotated[A | B, ByName()]``.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        members = {choice_name(member): member for member in get_args(source)}

        def chosen(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if isinstance(value, BaseModel):
                return validate(value)
            name = value.get("name", next(iter(members))) if isinstance(value, dict) else None
            if isinstance(value, dict) and (not isinstance(name, str) or name not in members):
                raise _not_a_choice(name, list(members))
            return members[name or next(iter(members))].model_validate(value)

        return core_schema.no_info_wrap_validator_function(chosen, handler(source))


def choice_name(member: type[BaseModel]) -> str:
    """The name that chooses this section among those of its union."""
    return get_args(member.model_fields["name"].annotation)[0]


def _not_a_choice(name: Any, known: list[str]) -> ValidationError:
    quoted = [repr(each) for each in known]
    expected = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
    detail: Any = {
        "type": "literal_error",
        "loc": ("name",),
        "input": name,
        "ctx": {"expected": expected},
    }
    return ValidationError.from_exception_data("choice", [detail])
