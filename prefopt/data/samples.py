"""Weighted samples: rows of one response with a reward or an advantage, their rewards normalised, their prompts
conditioned. A pair with two scores can be read as two samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from prefopt.data.formats import Reading, canonical, require_last_turn, resolve
from prefopt.data.readers import RawRow
from prefopt.data.render import conditioned
from prefopt.data.rows import Labels, Refused, Row, column, has_column, score, shown
from prefopt.data.sources import first_rows, open_source
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.registry import Need
from prefopt.recipe.schema import ConditionSection, DataSection, SourceSection


@dataclass(frozen=True)
class SampleNeeds:
    """What a run reads of sample rows beside prompt and response."""

    reward: bool = False
    advantage: bool = False
    condition: ConditionSection | None = None
    """The reward goes into the prompt."""

    @classmethod
    def of(cls, needs: frozenset[Need], data: DataSection) -> SampleNeeds:
        """Of an objective with these needs, on this data, drawn as it says."""
        condition = (data.condition or ConditionSection()) if Need.CONDITION in needs else None
        drawn_by = data.sampling.name
        return cls(
            Need.REWARDS in needs or drawn_by == "reward",
            Need.ADVANTAGES in needs or drawn_by == "advantage",
            condition,
        )


@dataclass(frozen=True)
class Scaling:
    """What becomes of a reward: numbers taken from the training rows, the same for every process and row."""

    name: str = "none"
    mean: float = 0.0
    std: float = 1.0
    prompts: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of ``z_score_per_prompt``: mean and standard deviation by prompt."""

    def __call__(self, reward: float, prompt: Any) -> float:
        if self.name == "sigmoid":
            return 0.5 * (1 + math.tanh(reward / 2))  # σ(r), without an overflow
        if self.name == "none":
            return reward
        mean, std = self.prompts[prompt_key(prompt)] if self.prompts else (self.mean, self.std)
        # Equal rewards are all at the mean, and have no deviation to divide by.
        return (reward - mean) / std if std > 0 else 0.0

    @property
    def digest(self) -> str:
        """Changes whenever a scaled reward would."""
        return blake2b(repr(self).encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For the run's record."""
        if self.name == "z_score":
            return {"name": self.name, "mean": self.mean, "std": self.std}
        if self.name == "z_score_per_prompt":
            flat = sum(std == 0 for _, std in self.prompts.values())
            return {"name": self.name, "prompts": len(self.prompts), "without_spread": flat}
        return {"name": self.name}


@dataclass(frozen=True)
class SampleReader:
    """Makes a canonical row of one response a sample: label, scaling, condition. Pickles."""

    scaling: Scaling
    template: str | None = None

    def __call__(self, raw: RawRow, row: Row, labels: Labels) -> Row:
        """Raises: DataError naming file, row and column where a label is missing or no finite number."""
        (reward,) = row.scores
        if reward is None and labels.needs_reward:
            raise DataError(_missing(raw, labels.reward or "reward", "reward"))
        advantage = score(raw, labels.advantage)
        if advantage is None and labels.needs_advantage:
            raise DataError(_missing(raw, labels.advantage or "advantage", "advantage"))
        if reward is not None:
            reward = self.scaling(reward, row.prompt)
        sample = replace(
            row, scores=(reward,), advantage=advantage, ended=_ended(raw, labels.ended, row)
        )
        if self.template is None or reward is None:
            return sample
        prompt = conditioned(row.prompt, self.template, reward)
        return replace(sample, prompt=prompt, source_prompt=row.prompt)


def resolve_samples(
    section: SourceSection, first: RawRow, needs: SampleNeeds
) -> tuple[Reading, ...]:
    """The reading of a source of samples, or the two of a source of pairs whose sides have scores.

    Raises: ConfigError for settings that contradict each other; DataError for a missing column.
    """
    require_last_turn(section, "a sample's label is of its last turn: leave it out")
    columns = section.columns
    if section.drop_ties:
        raise ConfigError(
            f"data: {section.path}: drop_ties = true: has no meaning for samples, which are weighed one by one; "
            "leave it out"
        )
    if has_column(first.data, columns.response) or "response" in columns.model_fields_set:
        return (_reading(section, first, needs, columns.response, columns.reward, ""),)
    sides = {"chosen": columns.score_chosen, "rejected": columns.score_rejected}
    if columns.rejected is None or not has_column(first.data, columns.chosen):
        column(first, columns.response)  # raises, naming the columns there are
    if None in sides.values():
        raise ConfigError(
            f"data: {section.path}: its rows are pairs, and a sample needs a reward: name the scores of both "
            "sides with columns.score_chosen and columns.score_rejected, or the columns of samples with "
            "columns.response and columns.reward"
        )
    if needs.advantage:
        raise DataError(
            f"data: {section.path}: its rows are pairs, which have scores and no advantages; make samples of them "
            "first, with the pipeline stage `advantage`"
        )
    names = {"chosen": columns.chosen, "rejected": columns.rejected}
    return tuple(
        _reading(section, first, needs, str(names[side]), str(scored), side)
        for side, scored in sides.items()
    )


def _reading(
    section: SourceSection, first: RawRow, needs: SampleNeeds, response: str, reward: str, side: str
) -> Reading:
    columns, labels = section.columns, {}
    for name, path, needed in (
        ("reward", reward, needs.reward),
        ("advantage", columns.advantage, needs.advantage),
    ):
        of_pair = bool(side)  # a pair has two scores and no advantage
        wanted = needed or name in columns.model_fields_set or (of_pair and name == "reward")
        if wanted:
            column(first, path)  # raises, naming the columns there are
        is_there = wanted or (has_column(first.data, path) and not of_pair)
        labels[name] = path if is_there else None
    changes = {"chosen": response, "rejected": None, "score_rejected": None}
    alone = columns.model_copy(update={**changes, "score_chosen": labels["reward"]})
    reading = resolve(section.model_copy(update={"columns": alone}), first, pairs=False)
    found = Labels(
        **labels,
        ended=columns.ended,
        needs_reward=needs.reward,
        needs_advantage=needs.advantage,
        side=side,
    )
    return replace(reading, labels=found)


def scaling_of(data: DataSection, needs: SampleNeeds) -> dict[str, Scaling]:
    """How the rewards of the training rows and of the held-out rows are scaled: ``{"train": …, "eval": …}``.

    A z-score reads every training row once before any is tokenised, rows included that are refused later. The
    held-out rows have the mean and standard deviation of the training rows; per prompt, those of their own prompt.
    Raises: DataError as reading the rows does.
    """
    name = data.normalize_rewards
    if name in ("none", "sigmoid"):
        return dict.fromkeys(("train", "eval"), Scaling(name))
    found = list(_rewards(data.train, needs))
    if name == "z_score":
        mean, std = _moments([reward for _, reward in found])
        return dict.fromkeys(("train", "eval"), Scaling(name, mean, std))
    train = Scaling(name, prompts=_by_prompt(found))
    if not data.eval:
        return {"train": train, "eval": train}
    return {"train": train, "eval": Scaling(name, prompts=_by_prompt(_rewards(data.eval, needs)))}


def _rewards(sections: Sequence[SourceSection], needs: SampleNeeds) -> Iterable[tuple[str, float]]:
    """The prompt's key and the reward of every sample of ``sections`` that has one."""
    for section in sections:
        source = open_source(section)
        first = next(first_rows(source, 1), None)
        readings = () if first is None else resolve_samples(section, first, needs)
        for raw in first_rows(source, section.max_rows):
            for reading in readings:
                row = canonical(raw, reading)
                if not isinstance(row, Refused) and row.scores[0] is not None:
                    yield prompt_key(row.prompt), row.scores[0]


def _by_prompt(found: Iterable[tuple[str, float]]) -> dict[str, tuple[float, float]]:
    rewards: dict[str, list[float]] = {}
    for key, reward in found:
        rewards.setdefault(key, []).append(reward)
    return {key: _moments(values) for key, values in rewards.items()}


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over n - 1, as the paper's code; 0 for a single value."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    if len(set(values)) == 1:
        return mean, 0.0  # not the rounding of equal numbers
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def target_problem(target: float, lowest: float, highest: float) -> str | None:
    """What is odd about a target reward, given the range of the rewards that were trained on."""
    if lowest <= target <= highest:
        return None
    return (
        f"the target reward {target:g} is outside the rewards trained on, {lowest:g} to {highest:g}: the policy "
        "has seen no such prompt and must extrapolate"
    )


def prompt_key(prompt: Any) -> str:
    """A hash of a prompt's text or messages."""
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _ended(raw: RawRow, name: str | None, row: Row) -> bool:
    if name is None:
        return True
    value = column(raw, name)
    if not isinstance(value, bool):
        raise DataError(
            f"{raw.where}: column {name!r} = {shown(value)}: whether a response ended is true or false"
        )
    if not value and not isinstance(row.prompt, str):
        raise DataError(
            f"{raw.where}: column {name!r} = false: a chat template ends every turn; a response that stops "
            "within its turn needs format: text (the pipeline stage `tree` renders dialogues to text)"
        )
    return value


def _missing(raw: RawRow, name: str, what: str) -> str:
    return (
        f"{raw.where}: column {name!r} is empty: every sample is weighed or drawn by its {what}. Score the "
        "row (`prefopt data`, stages score and advantage), or leave it out"
    )
