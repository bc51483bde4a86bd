"""Names of stages and where they live; the fields of a stage's class are the schema of its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from data_pipelines.base import StageSettings
from data_pipelines.rows import RowKind
from prefopt.recipe.specs import Registry, Spec

# name -> module that defines it. A module is imported only when one of its stages is looked up.
STAGES: dict[str, str] = {
    "prompts": "data_pipelines.stages.prompts",
    "rated": "data_pipelines.stages.rated",
    "sample": "data_pipelines.stages.sample",
    "score": "data_pipelines.stages.score",
    "pair": "data_pipelines.stages.pair",
    "filter": "data_pipelines.stages.filter",
    "order": "data_pipelines.stages.order",
    "advantage": "data_pipelines.stages.advantage",
    "threshold": "data_pipelines.stages.threshold",
    "value": "data_pipelines.stages.value",
    "mix": "data_pipelines.stages.mix",
    "battle": "data_pipelines.stages.battle",
    "elo": "data_pipelines.stages.elo",
    "winners": "data_pipelines.stages.winners",
    "ask_checkers": "data_pipelines.stages.checkers",
    "checkers": "data_pipelines.stages.checkers",
    "constrain": "data_pipelines.stages.constrain",
    "accepted_rejected": "data_pipelines.stages.constrain",
    "tree": "data_pipelines.stages.tree",
    "step_advantage": "data_pipelines.stages.step_advantage",
    "pareto": "data_pipelines.stages.pareto",
}

Works = Literal["map", "whole"]


@dataclass(frozen=True)
class StageSpec(Spec):
    """A stage: its settings class, what it reads and gives."""

    works: Works
    """``map``: shard by shard, many workers. ``whole``: sees all rows, one worker."""
    reads: frozenset[RowKind]
    """Kinds of rows it takes; empty for a stage that reads files and so comes first."""
    gives: RowKind | Literal["same", "either"]
    """Kind of its output; ``either``: its settings say (``gives_kind``)."""

    @property
    def settings(self) -> type[StageSettings]:
        settings: Any = self.fn
        return settings

    @property
    def fields(self) -> dict[str, tuple[Any, Any]]:
        return {
            name: (field.annotation, ... if field.is_required() else field.default)
            for name, field in self.settings.model_fields.items()
        }


_STAGES: Registry[StageSpec] = Registry("stages.N.stage", STAGES)
_Class = TypeVar("_Class", bound=type[StageSettings])


def stage(
    name: str,
    *,
    works: Works,
    reads: set[RowKind] | frozenset[RowKind] = frozenset(),
    gives: RowKind | Literal["same", "either"] = "same",
    source: str,
) -> Callable[[_Class], _Class]:
    """Registers a settings class with ``open`` (``map``) or ``run`` (``whole``) as a stage.

    Args:
        name: what pipelines call it.
        works: whether shards are independent.
        reads: kinds of rows it takes; none for a stage that starts a pipeline.
        gives: kind of its output.
        source: paper or tool it follows.
    """

    def register(cls: _Class) -> _Class:
        _STAGES.add(StageSpec(name, cls, source, works, frozenset(reads), gives))
        return cls

    return register


def get_stage(name: str) -> StageSpec:
    """The registered stage; ConfigError naming the nearest known one."""
    return _STAGES.get(name)


def stage_names() -> set[str]:
    """Every name ``stage`` accepts."""
    return _STAGES.names()
