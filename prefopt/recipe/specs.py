"""What a named entry declares of itself: what it needs and gives, and its keys, read off its signature."""

from __future__ import annotations

import enum
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar


class Need(enum.Enum):
    """What an objective needs beyond the policy's own log-probs; checked before anything loads."""

    PAIRS = "pairs"
    REFERENCE = "reference"
    BEHAVIOR = "behavior"
    """The sampler's own log-probs: rows must be rollouts."""
    REWARDS = "rewards"
    ADVANTAGES = "advantages"
    SAMPLES = "samples"
    """Fresh responses of the policy, scored or not."""
    CONDITION = "condition"
    """The row's reward written into its prompt: only rows of a data set are scored before they are rendered."""
    SCORES = "scores"
    """A reward model's scores of the responses (`ResponseScores`), and no log-probs."""
    GROUPS = "groups"
    """All responses to a prompt in one forward: a baseline over the group that depends on the policy."""


@dataclass(frozen=True)
class Spec:
    """A registered function: its name in recipes, and where it comes from."""

    name: str
    fn: Callable[..., Any]
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


AnySpec = TypeVar("AnySpec", bound=Spec)


@dataclass(frozen=True)
class ObjectiveSpec(Spec):
    """A loss: the pure function, what it needs, and where its maths comes from."""

    needs: frozenset[Need]
    needs_when: Mapping[str, Need]
    """Needs that a hyper-parameter switches on when it is not 0."""
    credit: str | None
    """The credit that goes with it where a recipe names none."""


@dataclass(frozen=True)
class CreditSpec(Spec):
    """A rule from scores to training labels, and which labels it gives."""

    gives: frozenset[Need]
    """PAIRS, ADVANTAGES or nothing (SAMPLES come with every rollout)."""
    needs_offline: bool
    """True if it takes the data set's own response as one side."""


@dataclass(frozen=True)
class SignalSpec(Spec):
    """A factory of a `prefopt.signals.base.Signal`."""

    needs_fields: tuple[str, ...]
    """Hyper-parameters that name a column of the prompt data: those columns must be there."""


def needs_with(spec: ObjectiveSpec, params: Mapping[str, Any]) -> frozenset[Need]:
    """What an objective needs with these hyper-parameters, defaults filled in."""
    defaults = {name: default for name, (_, default) in spec.fields.items()}
    on = {need for key, need in spec.needs_when.items() if params.get(key, defaults[key])}
    return spec.needs | on


def reads_samples(needs: frozenset[Need]) -> bool:
    """Does an objective weigh single responses by reward or advantage, whoever sampled them?"""
    labels = {Need.REWARDS, Need.ADVANTAGES}
    return bool(needs & labels) and not needs & {Need.PAIRS, Need.SAMPLES, Need.BEHAVIOR}
