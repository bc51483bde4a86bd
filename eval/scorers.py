"""Scores of both sides of a pair: by log-prob, implicit reward, reward model, judge, or the data's own columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from eval.base import Example, Row
from eval.models import Models, asked
from eval.preference_data import response_text
from prefopt.errors import ConfigError, suggest
from prefopt.recipe.registry import get_signal
from prefopt.recipe.schema import ModelSection
from prefopt.signals.base import Reporting, Signal
from prefopt.types import Candidates, Prompt

logger = logging.getLogger("prefopt.eval")

By = Literal[
    "auto", "logp", "mean_logp", "implicit_reward", "reward_model", "judge", "score_columns"
]
NOT_SCORED, MISSING_SCORE = "not_scored", "missing_score"

_FROM_MODEL = {"path", "revision", "tokenizer", "chat_template", "dtype", "trust_remote_code"}
_OF_REWARD_MODEL = _FROM_MODEL | {"device"}
_OF_JUDGE = {"mode", "template"}


@dataclass(frozen=True)
class Scoring:
    """How the two sides of a pair are scored."""

    task: str
    """For error messages."""
    by: By = "auto"
    beta: float = 0.1
    average: bool = False
    max_length_tokens: int | None = None
    judge_mode: Literal["pairwise", "pointwise"] = "pairwise"
    judge_template: str | None = None
    reward_model: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError for a key that the reward_model signal lacks, or that MODEL decides."""
        known = set(get_signal("reward_model").fields) - _OF_REWARD_MODEL
        unknown = sorted(set(self.reward_model or {}) - known)
        if unknown:
            raise ConfigError(
                f"tasks.{self.task}.reward_model.{name}: unknown; {suggest(name, known)}"
                for name in unknown
            )


@dataclass(frozen=True)
class Scored:
    """What one pair came to: two scores, or why there are none."""

    chosen: float | None = None
    rejected: float | None = None
    problem: str | None = None


class PairScorer(Protocol):
    """Scores pairs; higher is better. ``by`` names what the scores are."""

    by: str

    def score(self, pairs: Sequence[Example]) -> list[Scored]: ...

    def close(self) -> None: ...


def open_scorer(models: Models, scoring: Scoring) -> PairScorer:
    """Loads what ``scoring`` needs; ``auto`` goes by what MODEL is.

    Raises: ConfigError for a reference, judge or reward model that is needed and not there; ModelError,
        SignalError if it cannot be loaded.
    """
    by = resolve_by(models, scoring.by)
    if by == "score_columns":
        return ColumnScorer()
    if by == "judge":
        return SignalScorer(by, _judge(models, scoring))
    if by == "reward_model":
        return SignalScorer(by, _reward_model(models, scoring))
    from eval.logps import load_policies

    reference = by == "implicit_reward"
    return LogpScorer(by, load_policies(models, task=scoring.task, reference=reference), scoring)


def resolve_by(models: Models, by: By) -> str:
    """``auto``: a sequence classifier is a reward model; a policy with a reference has implicit rewards;
    any other policy is asked for its mean log-prob."""
    if by != "auto":
        return by
    if is_reward_model(models.policy):
        return "reward_model"
    from eval.logps import has_reference

    return "implicit_reward" if has_reference(models) else "mean_logp"


def is_reward_model(section: ModelSection) -> bool:
    """Is it saved as a sequence classifier, or as an adapter of one?"""
    from prefopt.model.source import resolve_source
    from prefopt.storage.model_files import read_adapter_config, read_model_config

    source = resolve_source(section.path, section.revision)
    if source.adapters:
        settings = read_adapter_config(source.adapters[-1])
        return settings.get("task_type") == "SEQ_CLS"
    config = read_model_config(source.directory)
    return any("SequenceClassification" in name for name in config.get("architectures") or ())


def pair_row(example: Example, scored: Scored, by: str, details: Mapping[str, Any]) -> Row:
    """The row of one pair: right if the chosen side scores strictly higher, as in RewardBench."""
    chosen, rejected = scored.chosen, scored.rejected
    if chosen is None or rejected is None:
        values = {"accuracy": None, "margin": None, "chosen": chosen, "rejected": rejected}
        return Row(example.key, values, {"by": by, **details}, scored.problem or NOT_SCORED)
    values = {
        "accuracy": float(chosen > rejected),
        "margin": chosen - rejected,
        "chosen": chosen,
        "rejected": rejected,
    }
    return Row(example.key, values, {"by": by, **details})


class ColumnScorer:
    """The scores that the data has."""

    by = "score_columns"

    def score(self, pairs: Sequence[Example]) -> list[Scored]:
        found = []
        for pair in pairs:
            chosen, rejected = pair.fields["scores"]
            missing = chosen is None or rejected is None
            found.append(Scored(chosen, rejected, MISSING_SCORE if missing else None))
        return found

    def close(self) -> None:
        """Nothing to free."""


class SignalScorer:
    """A signal of `prefopt.signals`: both sides of a pair are the two responses of one group."""

    def __init__(self, by: str, signal: Signal) -> None:
        self.by = by
        self.signal = signal

    def score(self, pairs: Sequence[Example]) -> list[Scored]:
        return score_accepted(pairs, self._score)

    def _score(self, pairs: Sequence[Example]) -> list[Scored]:
        groups = [_candidates(pair) for pair in pairs]
        return [_finite(*values) for values in self.signal.score(groups)]

    def close(self) -> None:
        if isinstance(self.signal, Reporting):
            logger.info(
                "%s: %s",
                self.by,
                ", ".join(f"{name} {value:g}" for name, value in self.signal.report().items()),
            )
        self.signal.close()


class LogpScorer:
    """Log-probs of MODEL, or their ratio to a reference's, times β.

    Args:
        by: ``logp`` (sum over tokens), ``mean_logp``, or ``implicit_reward`` (log-ratio).
        policies: what `eval.logps.load_policies` loaded.
    """

    def __init__(self, by: str, policies: Any, scoring: Scoring) -> None:
        self.by = by
        self.policies: Any = policies
        self.beta = scoring.beta
        self.average = scoring.average or by == "mean_logp"
        self.limit = scoring.max_length_tokens or policies.context or 10**9

    def score(self, pairs: Sequence[Example]) -> list[Scored]:
        return score_accepted(pairs, self._score)

    def close(self) -> None:
        self.policies = None

    def _score(self, pairs: Sequence[Example]) -> list[Scored]:
        from prefopt.data.rows import Refused
        from prefopt.types import Group, Response

        rendered = self._rendered(pairs)
        kept = [(i, each) for i, each in enumerate(rendered) if not isinstance(each, Refused)]
        groups = [
            Group(pairs[i].key, each.prompt_ids, tuple(map(Response, each.responses)))
            for i, each in kept
        ]
        results = [
            Scored(problem=str(each.reason)) if isinstance(each, Refused) else Scored()
            for each in rendered
        ]
        for (index, _), values in zip(kept, self._values(groups), strict=True):
            results[index] = _finite(*values)
        return results

    def _rendered(self, pairs: Sequence[Example]) -> list[Any]:
        """Token ids of each pair, or why they must not be scored: as training would say."""
        from prefopt.data.chunks import Limits, check
        from prefopt.data.render import Request

        requests = []
        for pair in pairs:
            sides = tuple(_message(pair.fields[name]) for name in ("chosen", "rejected"))
            prompt = asked(pair.prompt, self.policies.condition)
            requests.append(Request(prompt, sides, options=pair.options))
        limits = Limits(self.limit)
        return [check(each, limits) for each in self.policies.renderer.render_batch(requests)]

    def _values(self, groups: Sequence[Any]) -> list[list[float]]:
        """β Σ_t log π, or β Σ_t [log π - log π_ref]; divided by the number of tokens under ``average``."""
        policy = self.policies.token_logps(groups)
        sums = [[side.sum(dtype="float64") for side in sides] for sides in policy]
        if self.by == "implicit_reward":
            reference = self.policies.token_logps(groups, of_reference=True)
            sums = [
                [mine - side.sum(dtype="float64") for mine, side in zip(row, sides, strict=True)]
                for row, sides in zip(sums, reference, strict=True)
            ]
        return [
            [
                self.beta * float(total) / (len(side) if self.average else 1)
                for total, side in zip(row, sides, strict=True)
            ]
            for row, sides in zip(sums, policy, strict=True)
        ]


def score_accepted(
    pairs: Sequence[Example], score: Callable[[Sequence[Example]], list[Scored]]
) -> list[Scored]:
    """``score`` of the pairs that the data did not refuse; the reason for the others."""
    accepted = [pair for pair in pairs if not pair.fields.get("refused")]
    found = iter(score(accepted) if accepted else [])
    return [
        Scored(problem=pair.fields["refused"]) if pair.fields.get("refused") else next(found)
        for pair in pairs
    ]


def _finite(chosen: float, rejected: float) -> Scored:
    if math.isfinite(chosen) and math.isfinite(rejected):
        return Scored(float(chosen), float(rejected))
    return Scored(problem=NOT_SCORED)


def _candidates(pair: Example) -> Candidates:
    content = pair.prompt if isinstance(pair.prompt, str) else tuple(map(dict, pair.prompt))
    texts = tuple(response_text(pair.fields[name]) for name in ("chosen", "rejected"))
    prompt = Prompt(pair.key, (), content, given=pair.options.given)
    return Candidates(prompt, texts, ((), ()), (False, False))


def _message(response: Any) -> Any:
    return response if isinstance(response, str) else dict(response)


def _reward_model(models: Models, scoring: Scoring) -> Signal:
    policy = models.policy
    ignored = [name for name in ("quantization",) if getattr(policy, name) is not None]
    if ignored:
        raise ConfigError(
            f"model.{ignored[0]} = {getattr(policy, ignored[0])!r}: reward models are loaded whole; leave it out"
        )
    keys = {name: getattr(policy, name) for name in _FROM_MODEL}
    options = {**keys, "device": models.device, **(scoring.reward_model or {})}
    if scoring.max_length_tokens is not None:
        options["max_length_tokens"] = scoring.max_length_tokens
    return get_signal("reward_model").fn(**options)


def _judge(models: Models, scoring: Scoring) -> Signal:
    section = models.judge
    if section is None:
        raise ConfigError(
            f"judge.base_url is missing: tasks.{scoring.task}.by = judge asks a judge. Set "
            "judge.base_url=http://…/v1 and judge.model=NAME"
        )
    keys = {name: value for name, value in section.model_dump().items() if value is not None}
    keys["thinking"] = section.thinking  # as it is, null too: a dump has lists
    assert not keys.keys() & _OF_JUDGE
    options = {**keys, "mode": scoring.judge_mode, "template": scoring.judge_template}
    return get_signal("judge").fn(**options)
