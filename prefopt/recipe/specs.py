"""Functions by name: the module that defines one is imported when it is looked up, its signature is its schema."""

from __future__ import annotations

import functools
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from prefopt.errors import ConfigError, suggest
from prefopt.recipe.declared import is_declaration, run_declaration
from prefopt.recipe.plugin_code import why_unknown


@dataclass(frozen=True)
class Spec:
    """A registered function: its name in recipes, and where it comes from."""

    name: str
    fn: Callable[..., Any]
    source: str

    @property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """Hyper-parameters as ``{name: (annotation, default)}``, from the keyword-only signature."""
        return dict(_fields(self.fn))


@functools.cache  # asked of every entry for one wrong key
def _fields(fn: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    hints = typing.get_type_hints(fn, include_extras=True)
    keywords = [
        p
        for p in inspect.signature(fn).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    required = inspect.Parameter.empty
    return {p.name: (hints[p.name], ... if p.default is required else p.default) for p in keywords}


AnySpec = TypeVar("AnySpec", bound=Spec)


class Registry(Generic[AnySpec]):
    """Specs by name: those of a table, imported when first looked up, and those user code registers.

    Args:
        key: the recipe key that holds the name, for error messages.
        table: name -> module that defines it.
        decorator: what registers its entries, where `declared` may read them without importing them.
    """

    def __init__(self, key: str, table: Mapping[str, str], decorator: str | None = None) -> None:
        self.key = key
        self.table = table
        self.decorator = decorator
        self._specs: dict[str, AnySpec] = {}
        self._declared: dict[str, AnySpec] = {}

    def add(self, spec: AnySpec) -> None:
        """Registers ``spec``; ValueError if another function already has its name."""
        if is_declaration(spec.fn):
            self._declared[spec.name] = spec
            return
        known = self._specs.get(spec.name)
        mine = (spec.fn.__module__, spec.fn.__qualname__)
        if known is not None and (known.fn.__module__, known.fn.__qualname__) != mine:
            raise ValueError(
                f"{self.key} {spec.name!r} is already defined in {known.fn.__module__}"
            )
        self._specs[spec.name] = spec

    def get(self, name: str) -> AnySpec:
        """The spec of that name; ConfigError naming the nearest known one."""
        if name not in self._specs and name in self.table:
            importlib.import_module(self.table[name])
        if name not in self._specs:
            raise ConfigError(
                f"{self.key} = {name!r}: unknown; {suggest(name, self.names())}{why_unknown()}"
            )
        return self._specs[name]

    def declared(self, name: str) -> AnySpec:
        """As `get`, but of an entry of the table only what its module declares is read: its ``fn`` has no body."""
        unread = name not in self._specs and name not in self._declared
        if unread and self.decorator is not None and name in self.table:
            run_declaration(self.table[name], name, self.decorator)
        found = self._specs.get(name) or self._declared.get(name)
        return self.get(name) if found is None else found

    def names(self) -> set[str]:
        """Every name a recipe may use: the built-in table and whatever user code registered."""
        return set(self.table) | set(self._specs)
