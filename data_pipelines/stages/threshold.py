"""From scored responses to the samples above a threshold: ReST's filter, and ReST-EM's."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, user_fields
from data_pipelines.stages.pair import is_scored
from data_pipelines.thresholds import Array, ThresholdRule, by_prompt, thresholds
from prefopt.errors import DataError
from prefopt.recipe.yaml_file import Document, KeyPath

RULES = ("above", "percentile", "gamma")
"""Keys of which a threshold has one."""
_KEPT, _BELOW, _BEYOND = range(3)
_REASONS = {_BELOW: "below_threshold", _BEYOND: "beyond_max_per_prompt"}


@stage(
    "threshold",
    works="whole",
    reads={RowKind.GROUPS, RowKind.SAMPLES},
    gives=RowKind.SAMPLES,
    source="ReST (arXiv:2308.08998), its filter F and its thresholds; ReST-EM (arXiv:2312.06585)",
)
class Threshold(StageSettings):
    """Keeps the samples whose reward is above a threshold, one row each; the others are dropped and counted.

    Set one of `above`, `percentile` and `gamma`. A prompt that comes in several rows is one prompt. A
    threshold that keeps nothing is an error that names the best reward. The record's `report` says how many
    samples and prompts are left, how many of them are the data set's own (`offline: true`, as `rated` marks
    them), and the rewards before and after. Memory: about 25 bytes a sample and 100 a prompt.
    """

    above: float | None = None
    """Reward that must be exceeded: R > τ, as the paper has it. `null` keeps everything."""
    percentile: Annotated[float, Field(ge=0, le=100)] | None = None
    """The threshold is this percentile of the rewards (numpy's `linear` definition)."""
    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    """The threshold is γ·max + (1 - γ)·mean of the rewards."""
    over: Literal["prompt", "all"] = "prompt"
    """Whose rewards `percentile` and `gamma` are of: each prompt's own, so that hard prompts keep something, or
    all of them."""
    keep_equal: bool = False
    """Also keep a reward equal to the threshold. With few different rewards (right or wrong) the strict rule of
    the paper keeps nothing of a prompt whose answers are all equally good."""
    max_per_prompt: PositiveInt | None = None
    """Keep at most so many samples of a prompt, drawn at random (ReST-EM: 10)."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        given = [key for key in RULES if key in self.model_fields_set]
        found = []
        if len(given) != 1:
            have = " and ".join(given) or "none"
            found.append(
                f"{document.origin(path)}threshold: needs one of {', '.join(RULES)}, and has {have}"
            )
        for key in given:
            if key != "above" and getattr(self, key) is None:
                found.append(
                    f"{document.origin((*path, key))}threshold.{key} = null: must be a number; to keep "
                    "everything, write above: null"
                )
        if "over" in self.model_fields_set and given == ["above"]:
            found.append(
                f"{document.origin((*path, 'over'))}threshold.over: would be ignored: a fixed threshold is the "
                "same for all; leave it out"
            )
        return found

    @property
    def rule(self) -> ThresholdRule:
        return ThresholdRule(self.above, self.percentile, self.gamma, self.over == "all")

    def code(self) -> tuple[Any, ...]:
        return (thresholds,)

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        table = _read(place)
        if not table.rewards:
            raise DataError(f"stage {place.id!r}: not one sample has a reward; score them first")
        verdicts, limits = self._judge(table, place)
        place.report["threshold"] = _report(self.rule, table, verdicts, limits)
        judged = iter(verdicts.tolist())
        for sample in _samples(place):
            verdict = _KEPT if isinstance(sample, Dropped) else next(judged)
            if verdict == _KEPT:
                yield sample
            else:
                assert isinstance(sample, dict)
                yield Dropped(_REASONS[verdict], f"reward {sample['reward']:g}", sample["id"])

    def _judge(self, table: _Table, place: Place) -> tuple[Array, Array]:
        """(N,) int8 what becomes of each sample, and (N,) the threshold it met."""
        rewards, prompts = np.array(table.rewards), np.array(table.prompts)
        limits = thresholds(rewards, prompts, self.rule)
        passed = rewards >= limits if self.keep_equal else rewards > limits
        if not passed.any():
            raise DataError(
                f"stage {place.id!r}: {self.rule.name} keeps none of {len(rewards):,} samples: their rewards go "
                f"up to {rewards.max():g}, their mean is {rewards.mean():g}. Lower the threshold, sample more, or "
                "set keep_equal: true where the best reward is the threshold itself"
            )
        verdicts = np.where(passed, _KEPT, _BELOW).astype(np.int8)
        if self.max_per_prompt is not None:
            for members in by_prompt(prompts):
                self._cap(members[passed[members]], verdicts, table, place)
        return verdicts, limits

    def _cap(self, passed: Array, verdicts: Array, table: _Table, place: Place) -> None:
        """Marks all but a draw of ``max_per_prompt`` of one prompt's samples that passed."""
        assert self.max_per_prompt is not None
        beyond = len(passed) - self.max_per_prompt
        if beyond > 0:
            key = table.keys[table.prompts[int(passed[0])]]
            out = place.rng(f"cap {key}").sample(range(len(passed)), beyond)
            verdicts[passed[out]] = _BEYOND


@dataclass
class _Table:
    """All samples' numbers, in order."""

    rewards: array[float] = field(default_factory=lambda: array("d"))
    prompts: array[int] = field(default_factory=lambda: array("q"))
    """Number of each sample's prompt."""
    offline: array[int] = field(default_factory=lambda: array("b"))
    """1 where the response is the data set's own."""
    keys: list[int] = field(default_factory=list)
    """Hash of each prompt."""


def _read(place: Place) -> _Table:
    table = _Table()
    numbers: dict[int, int] = {}
    for sample in _samples(place):
        if isinstance(sample, Dropped):
            continue
        key = _hash(sample["prompt"])
        if key not in numbers:
            numbers[key] = len(numbers)
            table.keys.append(key)
        table.rewards.append(sample["reward"])
        table.prompts.append(numbers[key])
        table.offline.append(sample.get("source") == "data")
    return table


def _samples(place: Place) -> Iterator[Row | Dropped]:
    """Every sample that comes in; of a group, each response. Dropped for one without a finite reward."""
    assert place.input is not None
    for row in place.input.rows():
        if place.reads is RowKind.SAMPLES:
            scored = is_scored({"score": row["reward"]})
            yield row if scored else Dropped("unscored", id=row["id"])
            continue
        for number, response in enumerate(row["responses"]):
            id_ = f"{row['id']}#{number}"
            if not is_scored(response):
                yield Dropped("unscored", id=id_)
                continue
            sample: Row = {"id": id_, "prompt": row["prompt"], "response": response["text"]}
            sample["reward"] = float(response["score"])
            if "ended" in response:  # as `advantage`
                sample["ended"] = response["ended"]
            who = "data" if response.get("offline") else response.get("model", "policy")
            yield sample | user_fields(row) | {"source": who}


def _report(rule: ThresholdRule, table: _Table, verdicts: Array, limits: Array) -> dict[str, Any]:
    """What the threshold came to. Rewards are rounded: they are for people."""
    rewards, kept = np.array(table.rewards), verdicts == _KEPT
    prompts = np.array(table.prompts)
    bounds = {name: _rounded(fn(limits)) for name, fn in (("from", np.min), ("to", np.max))}
    return {
        "rule": rule.name,
        "threshold": bounds if np.isfinite(limits).all() else None,
        "samples": len(rewards),
        "above_threshold": int((verdicts != _BELOW).sum()),
        "kept": int(kept.sum()),
        "kept_of_data": int(np.array(table.offline)[kept].sum()),
        "prompts": len(table.keys),
        "prompts_kept": len(np.unique(prompts[kept])),
        "reward": {"mean": _rounded(rewards.mean()), "best": _rounded(rewards.max())},
        "reward_kept": {"mean": _rounded(rewards[kept].mean())},
    }


def _rounded(value: Any) -> float:
    return round(float(value), 6)


def _hash(prompt: Any) -> int:
    """64 bits: among a million prompts two different ones fall together with a chance of one in 10^7."""
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=True)
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True
    )
