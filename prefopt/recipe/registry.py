"""Names of objectives, signals and credits, where they live and what they need; torch-free until one is called.

Adding one is a function, one line in its table here and one row of reference values in its test. The
keyword-only signature of the function *is* its YAML schema.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from prefopt.recipe.declared import is_declaration
from prefopt.recipe.only_where import Rows
from prefopt.recipe.specs import AnySpec, Registry, Spec
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags, tags_of


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
    reads_answer: bool = field(default=False, kw_only=True)
    """True: it is shown what a response says outside its thinking; False: the whole response."""
    no_answer: float | None = field(default=None, kw_only=True)
    """Its score of a response that never leaves its thinking; None: whatever it says of an empty one."""
    of_form: bool = field(default=False, kw_only=True)
    """True if it says how an answer is written (length, repetition, its end) and not whether it is good."""


@dataclass(frozen=True)
class Bound(Generic[AnySpec]):
    """A named entry of a recipe, validated: what it names, and its hyper-parameters."""

    spec: AnySpec = field(compare=False)
    """As declared: `fn` may have no body; call `Bound.fn`."""
    params: Mapping[str, Any] = field(compare=False)
    """The hyper-parameters that were given, as the signature has them."""
    given: Mapping[str, Any]
    """``name`` and keys as they were written: what run.json and hashes of settings hold."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def fn(self) -> Callable[..., Any]:
        """The registered function itself; its module is imported now."""
        raise NotImplementedError

    def value(self, key: str) -> Any:
        """A hyper-parameter as it will be used: the given one, else the default; None for one it does not have."""
        _, default = self.spec.fields.get(key, (None, None))
        return self.params.get(key, default)


@dataclass(frozen=True)
class BoundObjective(Bound[ObjectiveSpec]):
    """An objective with its hyper-parameters filled in: what the trainer calls."""

    @property
    def fn(self) -> Callable[..., Any]:
        fn = self.spec.fn
        return get_objective(self.name).fn if is_declaration(fn) else fn

    def __call__(self, lp: Any) -> Any:
        return self.fn(lp, **self.params)

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs with these hyper-parameters."""
        return needs_with(self.spec, self.params)

    @property
    def needs_reference(self) -> bool:
        return Need.REFERENCE in self.needs

    @property
    def reads_samples(self) -> bool:
        return reads_samples(self.needs)

    @property
    def reads_scores(self) -> bool:
        return Need.SCORES in self.needs


@dataclass(frozen=True)
class BoundCredit(Bound[CreditSpec]):
    """A credit rule with its hyper-parameters filled in."""

    @property
    def fn(self) -> Callable[..., Any]:
        return get_credit(self.name).fn

    def __call__(self, scores: Any) -> Any:
        return self.fn(scores, **self.params)


@dataclass(frozen=True)
class BoundSignal(Bound[SignalSpec]):
    """A signal with its hyper-parameters filled in; nothing is loaded before `fn` is called."""

    @property
    def fn(self) -> Callable[..., Any]:
        return get_signal(self.name).fn

    @property
    def weight(self) -> float:
        """Of its score in the reward."""
        return float(self.given.get("weight", 1.0))

    @property
    def thinking(self) -> Tags:
        """The marks of the thinking that it is not shown; None: it reads whole responses."""
        if not self.spec.reads_answer:
            return None
        return tags_of(self.given["thinking"]) if "thinking" in self.given else DEFAULT_TAGS

    @property
    def rows(self) -> Rows:
        """The rows that it scores."""
        return Rows(self.given.get("only_where"), self.spec.of_form)

    @property
    def columns(self) -> list[str]:
        """The columns of the prompt data that it reads in the rows that it is for."""
        found = [self.value(key) for key in self.spec.needs_fields]
        return [name for name in found if isinstance(name, str)]


def needs_with(spec: ObjectiveSpec, params: Mapping[str, Any]) -> frozenset[Need]:
    """What an objective needs with these hyper-parameters, defaults filled in."""
    defaults = {name: default for name, (_, default) in spec.fields.items()}
    on = {need for key, need in spec.needs_when.items() if params.get(key, defaults[key])}
    return spec.needs | on


def reads_samples(needs: frozenset[Need]) -> bool:
    """Does an objective weigh single responses by reward or advantage, whoever sampled them?"""
    labels = {Need.REWARDS, Need.ADVANTAGES}
    return bool(needs & labels) and not needs & {Need.PAIRS, Need.SAMPLES, Need.BEHAVIOR}


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
    "grpo": "prefopt.objectives.grpo",
    "dr_grpo": "prefopt.objectives.grpo",
    "rloo": "prefopt.objectives.rloo",
    "hypo": "prefopt.objectives.hypo",
    "sopo": "prefopt.objectives.sopo",
    "filtered_nll": "prefopt.objectives.reward_weighted",
    "rwr": "prefopt.objectives.reward_weighted",
    "reward_conditioned": "prefopt.objectives.reward_weighted",
    "wbc": "prefopt.objectives.lol",
    "r_gold": "prefopt.objectives.lol",
    "r_lol": "prefopt.objectives.lol",
    "a_lol": "prefopt.objectives.lol",
    "a_lol_ref_free": "prefopt.objectives.lol",
    "a_lol_seq": "prefopt.objectives.lol",
    "a_lol_kl": "prefopt.objectives.lol",
    "direct_advantage": "prefopt.objectives.direct_advantage",
}
# The stages whose recipes have no objective section, and the modules of their objectives.
STAGES: dict[str, str] = {
    "sft": "prefopt.objectives.sft",
    "reward_model": "prefopt.objectives.bradley_terry",
}
CREDITS: dict[str, str] = {
    "best_worst": "prefopt.credit.pairs",
    "best_random": "prefopt.credit.pairs",
    "first_right_wrong": "prefopt.credit.pairs",
    "all_pairs": "prefopt.credit.pairs",
    "sopo": "prefopt.credit.pairs",
    "group_mean": "prefopt.credit.advantages",
    "group_mean_std": "prefopt.credit.advantages",
    "leave_one_out": "prefopt.credit.advantages",
    "none": "prefopt.credit.advantages",
}
SIGNALS: dict[str, str] = {
    "math": "prefopt.signals.math",
    "final_number": "prefopt.signals.math",
    "exact_match": "prefopt.signals.matching",
    "multiple_choice": "prefopt.signals.matching",
    "regex": "prefopt.signals.matching",
    "constraints": "prefopt.signals.constraints",
    "python_tests": "prefopt.signals.python_tests",
    "python_io": "prefopt.signals.python_io",
    "checkers": "prefopt.signals.checkers",
    "reward_model": "prefopt.signals.reward_model",
    "judge": "prefopt.signals.judge",
    "implicit_reward": "prefopt.signals.implicit_reward",
    "length_penalty": "prefopt.signals.penalties",
    "repetition_penalty": "prefopt.signals.penalties",
    "truncation_penalty": "prefopt.signals.penalties",
    "truncation_value": "prefopt.signals.penalties",
}

_OBJECTIVES: Registry[ObjectiveSpec] = Registry("objective.name", OBJECTIVES, "objective")
_STAGES: Registry[ObjectiveSpec] = Registry("stage", STAGES, "objective")
_CREDITS: Registry[CreditSpec] = Registry("credit.name", CREDITS, "credit")
_SIGNALS: Registry[SignalSpec] = Registry("signals.N.name", SIGNALS, "signal")
REGISTRIES: Mapping[str, Registry[Any]] = {
    "objective": _OBJECTIVES,
    "credit": _CREDITS,
    "signals": _SIGNALS,
}
"""By the recipe section that names their entries."""

_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def objective(
    name: str,
    *,
    needs: set[Need] | frozenset[Need] = frozenset(),
    source: str,
    needs_when: Mapping[str, Need] | None = None,
    credit: str | None = None,
    of_stage: bool = False,
) -> Callable[[_Fn], _Fn]:
    """Registers a pure function ``(ResponseLogps, *, hyper-parameters) -> ObjectiveOutput``.

    Args:
        name: the name recipes use in ``objective.name``.
        needs: inputs to provide; an objective without ``Need.REFERENCE`` never costs a reference pass.
        source: paper and equation.
        needs_when: needs that a hyper-parameter switches on when it is not 0, e.g. a KL weight.
        credit: the credit used on rollouts where the recipe names none.
        of_stage: ``name`` is that of a stage, which trains with nothing else.

    Returns: the function itself, unchanged.
    Raises: ValueError if another function already has that name.
    """

    def register(fn: _Fn) -> _Fn:
        when = dict(needs_when or {})
        specs = _STAGES if of_stage else _OBJECTIVES
        specs.add(ObjectiveSpec(name, fn, source, frozenset(needs), when, credit))
        return fn

    return register


def credit(
    name: str, *, gives: set[Need] | frozenset[Need], source: str, needs_offline: bool = False
) -> Callable[[_Fn], _Fn]:
    """Registers a pure function ``(GroupScores, *, hyper-parameters) -> Labels`` (`prefopt.credit.base`)."""

    def register(fn: _Fn) -> _Fn:
        _CREDITS.add(CreditSpec(name, fn, source, frozenset(gives), needs_offline))
        return fn

    return register


def signal(
    name: str,
    *,
    source: str,
    needs_fields: tuple[str, ...] = (),
    reads_answer: bool = False,
    no_answer: float | None = None,
    of_form: bool = False,
) -> Callable[[_Fn], _Fn]:
    """Registers a factory ``(*, hyper-parameters) -> Signal`` (`prefopt.signals.base`).

    Args:
        name: the name recipes use in ``signals.N.name``.
        source: what it follows.
        needs_fields: hyper-parameters that name columns of the prompt data.
        reads_answer: it judges what a response says after its thinking, and is shown that alone; its entry in a
            recipe then has the key ``thinking``.
        no_answer: its score of a response that never leaves its thinking; None: what it says of an empty one.
        of_form: it says how an answer is written and not whether it is good, so that alone it judges no row.
    """

    def register(fn: _Fn) -> _Fn:
        spec = SignalSpec(
            name,
            fn,
            source,
            tuple(needs_fields),
            reads_answer=reads_answer,
            no_answer=no_answer,
            of_form=of_form,
        )
        _SIGNALS.add(spec)
        return fn

    return register


def get_objective(name: str) -> ObjectiveSpec:
    """Returns the registered objective; raises ConfigError naming the nearest known one."""
    return _OBJECTIVES.get(name)


def get_credit(name: str) -> CreditSpec:
    """Returns the registered credit; raises ConfigError naming the nearest known one."""
    return _CREDITS.get(name)


def get_signal(name: str) -> SignalSpec:
    """Returns the registered signal; raises ConfigError naming the nearest known one."""
    return _SIGNALS.get(name)


def bind_objective(section: Mapping[str, Any]) -> BoundObjective:
    """The objective that code names itself, as a sound ``objective`` section would."""
    params = {key: value for key, value in section.items() if key != "name"}
    return BoundObjective(_OBJECTIVES.declared(section["name"]), params, section)


def stage_objective(stage: str, **params: Any) -> BoundObjective:
    """What a stage without an ``objective`` section trains with."""
    return BoundObjective(_STAGES.get(stage), params, {"name": stage, **params})


def objective_names() -> set[str]:
    """Every name ``objective.name`` accepts: the built-in table and whatever user code registered."""
    return _OBJECTIVES.names()


def objective_keys() -> set[str]:
    """Every hyper-parameter of some objective."""
    return {key for name in objective_names() for key in _OBJECTIVES.declared(name).fields}
