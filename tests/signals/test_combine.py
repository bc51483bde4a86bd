"""Weighted sums: parts kept apart, failures contained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from prefopt.errors import SignalError
from prefopt.recipe.entries import bind
from prefopt.recipe.registry import get_signal, signal
from prefopt.signals.base import Signal, per_response
from prefopt.signals.combine import Part, WeightedSignals, build_signals
from prefopt.types import Candidates, Prompt
from tests.signals.cases import candidates


class Scripted:
    """A signal that does what a function says, and counts how it was asked."""

    def __init__(self, fn: Callable[[Candidates], list[float]]) -> None:
        self.fn = fn
        self.calls: list[int] = []
        self.closed = 0

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        self.calls.append(len(groups))
        return [self.fn(group) for group in groups]

    def report(self) -> dict[str, float]:
        return {"calls": len(self.calls)}

    def close(self) -> None:
        self.closed += 1


def length(prompt: Prompt, text: str) -> float:
    return float(len(text))


def weighted(*parts: tuple[str, float, Any]) -> WeightedSignals:
    return WeightedSignals([Part(*part) for part in parts])


def test_reward_is_the_weighted_sum_and_parts_stay_unweighted() -> None:
    reward = weighted(
        ("length", 2.0, per_response(length)), ("one", -1.0, per_response(lambda p, t: 1.0))
    )
    (scored,) = reward.score([candidates("a", "bbb")])
    assert scored.rewards == (1.0, 5.0)
    assert scored.parts == {"length": (1.0, 3.0), "one": (1.0, 1.0)}
    assert not scored.failed


def test_two_signals_of_one_name_are_two_parts() -> None:
    entries = (
        {"name": "regex", "pattern": "a"},
        {"name": "length_penalty", "per_token": 1.0, "weight": 0.5},
        {"name": "regex", "pattern": "b", "weight": 3.0},
    )
    reward = build_signals([bind("signals", entry) for entry in entries])
    (scored,) = reward.score([candidates("ab", "b")])
    assert scored.parts == {"regex": (1, 0), "length_penalty": (-2, -1), "regex_2": (1, 1)}
    assert scored.rewards == (1 - 1 + 3, 0 - 0.5 + 3)
    reward.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_drops_its_group_only(bad: float) -> None:
    reward = weighted(("odd", 1.0, Scripted(lambda g: [bad if t == "x" else 1.0 for t in g.texts])))
    first, second = reward.score([candidates("x", "y"), candidates("y", "y")])
    assert first.rewards is None and "odd: not finite: 1 of 2" in (first.failure or "")
    assert second.rewards == (1.0, 1.0)
    assert reward.report()["odd/failed_frac"] == 0.5


def test_a_signal_that_throws_drops_the_groups_it_throws_for() -> None:
    def fn(group: Candidates) -> list[float]:
        if "bad" in group.texts:
            raise ZeroDivisionError("no answer to divide by")
        return [1.0] * len(group.texts)

    scripted = Scripted(fn)
    reward = weighted(("user", 1.0, scripted))
    groups = [candidates("ok"), candidates("bad"), candidates("ok")]
    found = reward.score(groups)
    assert [scored.rewards for scored in found] == [(1.0,), None, (1.0,)]
    assert found[1].failure == "user: ZeroDivisionError: no answer to divide by"
    assert scripted.calls == [3, 1, 1, 1]  # together, then each alone


def test_a_group_that_failed_is_not_sent_to_later_signals() -> None:
    """A judge costs money: nothing is asked about a group that is dropped anyway."""
    costly = Scripted(lambda g: [0.0] * len(g.texts))
    reward = weighted(
        ("verifier", 1.0, per_response(lambda p, t: math.nan if t == "x" else 1.0)),
        ("judge", 1.0, costly),
    )
    reward.score([candidates("x"), candidates("y"), candidates("x")])
    assert costly.calls == [1]
    reward.score([candidates("x")])
    assert costly.calls == [1]


@pytest.mark.parametrize("returned", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_wrong_number_of_scores_is_a_failure_and_never_shifts_them(returned: list[float]) -> None:
    reward = weighted(("short", 1.0, Scripted(lambda g: returned)))
    (scored,) = reward.score([candidates("a", "b")])
    assert scored.failed and f"{len(returned)} scores for 2" in (scored.failure or "")


@pytest.mark.parametrize("error", [SignalError("the judge is gone"), KeyboardInterrupt()])
def test_errors_that_must_stop_a_run_pass(error: BaseException) -> None:
    def fn(group: Candidates) -> list[float]:
        raise error

    with pytest.raises(type(error)):
        weighted(("judge", 1.0, Scripted(fn))).score([candidates("a"), candidates("b")])


def test_truncation_value_takes_the_place_of_the_whole_sum_wherever_it_is_listed() -> None:
    reward = weighted(
        ("truncation_value", 2.0, get_signal("truncation_value").fn(value=-3.0)),
        ("length", 1.0, per_response(length)),
    )
    (scored,) = reward.score([candidates("aaaa", "bb", truncated=(True, False))])
    assert scored.rewards == (-6.0, 2.0)


def test_report_holds_each_parts_own_counters() -> None:
    reward = weighted(("scripted", 1.0, Scripted(lambda g: [0.0])))
    reward.score([candidates("a")])
    assert reward.report() == {"scripted/failed_frac": 0.0, "scripted/calls": 1}


def test_signals_set_up_before_one_that_fails_are_closed() -> None:
    made: list[Scripted] = []

    @signal("test_scripted", source="this test")
    def scripted() -> Signal:
        made.append(Scripted(lambda g: [0.0]))
        return made[0]

    @signal("test_broken", source="this test")
    def broken() -> Signal:
        raise SignalError("cannot be set up")

    entries = [bind("signals", {"name": name}) for name in ("test_scripted", "test_broken")]
    with pytest.raises(SignalError, match="cannot be set up"):
        build_signals(entries)
    assert made[0].closed == 1


def test_a_function_of_prompt_and_text_is_a_signal() -> None:
    found = per_response(lambda prompt, text: len(text) + prompt.fields["bonus"])
    assert found.score([candidates("a", "bb", fields={"bonus": 1})]) == [[2.0, 3.0]]
