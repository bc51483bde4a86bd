"""Fields that hold a named entry of a registry: validated by its signature once, bound, and dumped as written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from prefopt.errors import suggest
from prefopt.recipe.only_where import OnlyWhere
from prefopt.recipe.other_tools import value_hint
from prefopt.recipe.plugin_code import why_unknown
from prefopt.recipe.registry import REGISTRIES, Bound, BoundCredit, BoundObjective, BoundSignal
from prefopt.recipe.specs import Spec
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags, Thinking, names_a_mark

MISSING_NAME, UNKNOWN_NAME = "missing_name", "unknown_name"
"""Types of the errors about an entry's ``name``; their message is a whole sentence."""

_BOUND: Mapping[str, type[Bound[Any]]] = {
    "objective": BoundObjective,
    "credit": BoundCredit,
    "signals": BoundSignal,
}
# What a recipe may say of an entry beside its own hyper-parameters.
_SHARED_KEYS: Mapping[str, Mapping[str, Any]] = {
    "signals": {"weight": (float, 1.0), "only_where": (OnlyWhere | None, None)}
}
_OF_ANSWERS: Mapping[str, Any] = {"thinking": (Thinking, DEFAULT_TAGS)}
"""Further keys of a signal that reads answers."""


@dataclass(frozen=True)
class Entry:
    """Marks a field as an entry of a registry: ``Annotated[BoundSignal, Entry("signals")]``.

    Args:
        section: a key of `prefopt.recipe.registry.REGISTRIES`.
    """

    section: str

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        del source, handler
        return core_schema.no_info_plain_validator_function(
            lambda value: bind(self.section, value),
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda bound: dict(bound.given)
            ),
        )

    def parameters(self, raw: Any) -> type[BaseModel] | None:
        """The keys of the entry that ``raw`` names, beside ``name``; None where it names none."""
        name = raw.get("name") if isinstance(raw, Mapping) else None
        registry = REGISTRIES[self.section]
        if not isinstance(name, str) or name not in registry.names():
            return None
        return _parameters(self.section, registry.declared(name).fn, name)

    def having(self, key: str) -> list[str]:
        """The names of the entries that have this key."""
        registry = REGISTRIES[self.section]
        specs = [registry.declared(name) for name in sorted(registry.names())]
        return [
            spec.name
            for spec in specs
            if key in spec.fields or key in _shared_keys(self.section, spec)
        ]


def parameters(spec: Spec, shared: Mapping[str, Any] | None = None) -> type[BaseModel]:
    """The pydantic model of an entry's hyper-parameters, made from its keyword-only signature.

    Args:
        spec: of the entry.
        shared: further keys, as ``{name: (type, default)}``.
    """
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    fields: Any = {**(shared or {}), **spec.fields}
    return create_model(f"{spec.name}_hyperparameters", __config__=config, **fields)


@functools.cache  # by the function too, which a plugin may register in another's place
def _parameters(section: str, fn: Callable[..., Any], name: str) -> type[BaseModel]:
    del fn
    spec = REGISTRIES[section].declared(name)
    return parameters(spec, _shared_keys(section, spec))


def bind(section: str, value: Any) -> Any:
    """The entry that a mapping of ``name`` and keys names, validated; a bound one is returned as it is.

    Raises: ValidationError with a location in the entry, or pydantic's error for something else than a mapping.
    """
    if isinstance(value, Bound):
        return value
    if not isinstance(value, Mapping):
        raise PydanticKnownError("dict_type")
    schema = Entry(section).parameters(value)
    if schema is None:
        raise _no_such_name(section, value.get("name"))
    given = {key: each for key, each in value.items() if key != "name"}
    found = schema.model_validate(given)
    spec = REGISTRIES[section].declared(value["name"])
    shared = _shared_keys(section, spec)
    # A signal that also declares a shared key is given it: a judge thinks, too.
    params = {key: getattr(found, key) for key in given if key not in shared or key in spec.fields}
    if "thinking" in shared:
        _refuse_marks(params, getattr(found, "thinking"))  # noqa: B009 - the model is made at run time
    return _BOUND[section](spec, params, dict(value))


def _shared_keys(section: str, spec: Spec) -> Mapping[str, Any]:
    shared = _SHARED_KEYS.get(section, {})
    return {**shared, **_OF_ANSWERS} if getattr(spec, "reads_answer", False) else shared


def _refuse_marks(params: Mapping[str, Any], tags: Tags) -> None:
    """Raises: ValidationError for a key that looks for a mark of the thinking, which is cut off before."""
    for key, value in params.items():
        mark = names_a_mark(value, tags) if isinstance(value, str) else None
        if mark is not None:
            message = (
                f"looks for {mark}, and thinking is taken off before a response is read: it would never be there. "
                "Set thinking: null in this entry to read whole responses, or name other marks"
            )
            raise _refused(key, value, "thinking_mark", message)


def _no_such_name(section: str, name: Any) -> ValidationError:
    known = REGISTRIES[section].names()
    listed = f"Known: {', '.join(sorted(known))}."
    kind = UNKNOWN_NAME
    if name is None:
        kind, message = MISSING_NAME, f"is missing. {listed}"
    elif (elsewhere := value_hint(section, "name", name)) is not None:
        message = f"{elsewhere}. {listed}"
    elif isinstance(name, list | tuple | Mapping):
        message = f"must be one name. {listed}"
    else:
        message = f"unknown; {suggest(str(name), known)}{why_unknown()}"
    return _refused("name", name, kind, message)


def _refused(key: str, value: Any, kind: str, message: str) -> ValidationError:
    error = PydanticCustomError(kind, "{message}", {"message": message})  # type: ignore[arg-type]
    return ValidationError.from_exception_data(
        "entry", [{"type": error, "loc": (key,), "input": value}]
    )
