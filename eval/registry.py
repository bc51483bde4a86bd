"""Tasks: names, where they live, and a task from its options; a keyword-only signature is the schema of these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from prefopt.errors import ConfigError
from prefopt.recipe.entries import parameters
from prefopt.recipe.load import validated
from prefopt.recipe.specs import Registry, Spec
from prefopt.recipe.yaml_file import Document

Kind = Literal["generate", "judge", "model", "harness"]

# name -> module that defines it. A module is imported only when one of its tasks is looked up.
TASKS: dict[str, str] = {
    "alpaca_eval2": "eval.tasks.alpaca_eval2",
    "arena_hard": "eval.tasks.arena_hard",
    "arena_hard_v2": "eval.tasks.arena_hard",
    "mt_bench": "eval.tasks.mt_bench",
    "win_rate": "eval.tasks.win_rate",
    "ifeval": "eval.tasks.ifeval",
    "gsm8k": "eval.tasks.gsm8k",
    "math": "eval.tasks.math",
    "humaneval": "eval.tasks.humaneval",
    "signals": "eval.tasks.signals",
    "llmbar": "eval.tasks.llmbar",
    "reward_bench": "eval.tasks.reward_bench",
    "pair_accuracy": "eval.tasks.pair_accuracy",
    "diversity": "eval.tasks.diversity",
    "kl": "eval.tasks.kl",
}


@dataclass(frozen=True)
class TaskSpec(Spec):
    """A benchmark: the factory whose keyword-only arguments are its options, and what its numbers mean."""

    version: str
    """Ours; raised with every change that may change a number. Results of two versions are not compared."""
    kind: Kind
    headline: str
    """The metric people quote."""
    data: str
    """Where its examples come from by default, in words: a hub data set, or ``an option``."""
    direction: Literal["higher", "lower", "none"]
    """Which headline is better; ``none`` for one that only describes (KL, length)."""
    whole_responses: bool = False
    """True: it is given responses with their thinking, and decides itself what of them it reads."""


_TASKS: Registry[TaskSpec] = Registry("--tasks", TASKS)

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def task(
    name: str,
    *,
    version: str,
    kind: Kind,
    headline: str,
    source: str,
    data: str,
    direction: Literal["higher", "lower", "none"] = "higher",
    whole_responses: bool = False,
) -> Callable[[_Fn], _Fn]:
    """Registers a factory ``(*, options) -> Task``.

    Args:
        name: what ``--tasks`` calls it.
        version: raised with every change that may change a number.
        kind: ``generate``: the model answers, a program scores. ``judge``: a judge scores. ``model``: log-probs
            or rewards. ``harness``: lm-evaluation-harness.
        headline: the metric people quote.
        source: paper or repository.
        data: where its examples come from.
        direction: which headline is better.
        whole_responses: it is given what a model thinks as well.
    """

    def register(fn: _Fn) -> _Fn:
        spec = TaskSpec(name, fn, source, version, kind, headline, data, direction, whole_responses)
        _TASKS.add(spec)
        return fn

    return register


def get_task(name: str) -> TaskSpec:
    """The registered task; ConfigError naming the nearest known one."""
    return _TASKS.get(name)


def task_names() -> set[str]:
    """Every name ``--tasks`` accepts, without lm-evaluation-harness's (``lm_eval:…``)."""
    return _TASKS.names()


def make_task(
    name: str, options: Mapping[str, Any] | None = None, document: Document | None = None
) -> Any:
    """The task with its options bound; nothing is loaded yet.

    Raises: ConfigError for an unknown name (naming the nearest), or options that do not fit, all at once.
    """
    spec = get_task(name)
    problems = option_problems(spec, options or {}, document)
    if problems:
        raise ConfigError(problems)
    return spec.fn(**(options or {}))


def option_problems(
    spec: TaskSpec, options: Mapping[str, Any], document: Document | None = None
) -> list[str]:
    """What is wrong with a task's options, a sentence each."""
    place = ("tasks", spec.name)
    return list(validated(parameters(spec), dict(options), document, place=place).problems)


def has_option(name: str, option: str) -> bool:
    """Does the task take this option?"""
    return option in inspect.signature(get_task(name).fn).parameters
