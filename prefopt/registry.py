"""Names of objectives, where they live and what they need; torch-free until one is looked up.

Adding an objective is a function, one line in ``OBJECTIVES`` and one row of reference values in
``tests/unit/test_objectives.py``. The keyword-only signature of the function *is* its YAML schema.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prefopt.errors import ConfigError, suggest


class Need(enum.Enum):
    """What an objective needs beyond the policy's own log-probs; checked before anything loads."""

    PAIRS = "pairs"
    REFERENCE = "reference"
    BEHAVIOR = "behavior"
    REWARDS = "rewards"
    ADVANTAGES = "advantages"


@dataclass(frozen=True)
class ObjectiveSpec:
    """A registered objective: the pure function, what it needs, and where its maths comes from."""

    name: str
    fn: Callable[..., Any]
    needs: frozenset[Need]
    source: str

    @property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        """Hyper-parameters as ``{name: (annotation, default)}``, from the keyword-only signature."""
        hints = typing.get_type_hints(self.fn, include_extras=True)
        parameters = inspect.signature(self.fn).parameters.values()
        keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        required = inspect.Parameter.empty
        return {
            p.name: (hints[p.name], ... if p.default is required else p.default) for p in keywords
        }


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its hyper-parameters filled in: what the trainer calls."""

    spec: ObjectiveSpec
    params: Mapping[str, Any]

    def __call__(self, lp: Any) -> Any:
        return self.spec.fn(lp, **self.params)

    @property
    def needs_reference(self) -> bool:
        return Need.REFERENCE in self.spec.needs


# name -> module that defines it. A module is imported only when one of its objectives is looked up.
OBJECTIVES: dict[str, str] = {
    "dpo": "prefopt.objectives.dpo",
    "robust_dpo": "prefopt.objectives.dpo",
    "ld_dpo": "prefopt.objectives.dpo",
    "ld_dpo_policy_only": "prefopt.objectives.dpo",
    "dpop": "prefopt.objectives.dpo",
    "ipo": "prefopt.objectives.ipo",
    "ipo_mean": "prefopt.objectives.ipo",
    "hinge": "prefopt.objectives.hinge",
    "apo_zero": "prefopt.objectives.apo",
    "apo_down": "prefopt.objectives.apo",
    "simpo": "prefopt.objectives.simpo",
    "orpo": "prefopt.objectives.orpo",
    "cpo": "prefopt.objectives.cpo",
    "nll": "prefopt.objectives.nll",
}

_SPECS: dict[str, ObjectiveSpec] = {}


def objective(
    name: str, *, needs: set[Need] | frozenset[Need] = frozenset(), source: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a pure function ``(ResponseLogps, *, hyper-parameters) -> ObjectiveOutput``.

    Args:
        name: the name recipes use in ``objective.name``.
        needs: inputs to provide; an objective without ``Need.REFERENCE`` never costs a reference pass.
        source: paper and equation.

    Returns: the function itself, unchanged.
    Raises: ValueError if another function already has that name.
    """

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        known = _SPECS.get(name)
        if known is not None and (known.fn.__module__, known.fn.__qualname__) != (
            fn.__module__,
            fn.__qualname__,
        ):
            raise ValueError(f"objective {name!r} is already defined in {known.fn.__module__}")
        _SPECS[name] = ObjectiveSpec(name, fn, frozenset(needs), source)
        return fn

    return register


def get_objective(name: str) -> ObjectiveSpec:
    """Returns the registered objective; raises ConfigError naming the nearest known one."""
    if name not in _SPECS and name in OBJECTIVES:
        importlib.import_module(OBJECTIVES[name])
    if name not in _SPECS:
        raise ConfigError(f"objective.name = {name!r}: unknown; {suggest(name, objective_names())}")
    return _SPECS[name]


def bind_objective(section: Mapping[str, Any]) -> BoundObjective:
    """The objective of a recipe's ``objective`` section (already validated) with its hyper-parameters."""
    params = {key: value for key, value in section.items() if key != "name"}
    return BoundObjective(get_objective(section["name"]), params)


def objective_names() -> set[str]:
    """Every name ``objective.name`` accepts: the built-in table and whatever user code registered."""
    return set(OBJECTIVES) | set(_SPECS)
