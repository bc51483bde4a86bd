"""Engines by name: the table, what one is asked to serve, and how it is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from prefopt.engines.base import Engine
from prefopt.recipe.schema import EngineSection, ModelSection, PeftSection
from prefopt.recipe.specs import Registry, Spec

if TYPE_CHECKING:
    from prefopt.model.load import LoadedPolicy

# name -> module that registers its factory. A module is imported only when its engine is started.
ENGINES: dict[str, str] = {
    "hf": "prefopt.engines.process",
    "vllm": "prefopt.engines.vllm.local",
    "vllm_server": "prefopt.engines.vllm.server",
}
_ENGINES: Registry[Spec] = Registry("engine.name", ENGINES)


@dataclass(frozen=True)
class InTraining:
    """The policy of a run, which the engine's weights follow."""

    policy: LoadedPolicy
    """As loaded; an engine that holds weights generates with its very modules."""
    peft: PeftSection | None
    seed: int
    """``train.seed``: an engine that loads the policy itself draws the same new adapter."""
    separate_process: bool = False
    """Run beside training, in a process of its own, where the engine could run in this one."""
    share_trainable: bool = False
    """Generate with the weights in training, so that there is nothing to push."""


@dataclass(frozen=True)
class Task:
    """What an engine is to serve, and where."""

    model: ModelSection
    pad_id: int
    """Any token id; padding is masked."""
    max_model_len: int
    """Longest prompt + response in tokens, where the section sets none; a saved policy's own context bounds it."""
    device: str
    """Torch device, where the section sets none."""
    log_dir: Path
    """Where processes and servers write what they have to say."""
    training: InTraining | None = None
    """None: the policy as it lies on disk, which is version 0. Nothing is merged."""


class Started(NamedTuple):
    """An engine, and the longest prompt + response it takes (None: no limit known)."""

    engine: Engine
    context: int | None


_Fn = TypeVar("_Fn", bound=Callable[..., Started])


def engine(name: str, *, source: str) -> Callable[[_Fn], _Fn]:
    """Registers a factory ``(section, task) -> Started``, of the engine's section in `prefopt.recipe.choices`."""

    def register(fn: _Fn) -> _Fn:
        _ENGINES.add(Spec(name, fn, source))
        return fn

    return register


def start_engine(section: EngineSection, task: Task) -> Started:
    """The engine that a section names. One of a run in training starts when it is first used.

    Raises: ConfigError for a policy that it cannot serve, or a package that is not installed; ModelError for
        files that are not there; EngineError if it does not start, or for weights in training that are sharded.
    """
    factory: Any = _ENGINES.get(section.name).fn
    return factory(section, task)
