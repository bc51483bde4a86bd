"""Tasks side by side: each signal scores the rows that it is for, and no other. Rewards are derived by hand."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from prefopt.recipe.entries import bind
from prefopt.recipe.only_where import Rows
from prefopt.signals.base import per_response
from prefopt.signals.combine import Part, WeightedSignals, build_signals
from prefopt.types import Candidates, Prompt
from tests.signals.cases import candidates
from tests.signals.test_combine import Scripted

MATH = {"name": "final_number", "only_where": "answer"}
GREETS = {"name": "regex", "pattern": "hello", "only_where": {"source": ["chat", "talk"]}}


def reward(*entries: dict[str, Any]) -> WeightedSignals:
    return build_signals([bind("signals", entry) for entry in entries])


def asked(*texts: str, source: str | None = None, **columns: Any) -> Candidates:
    ids = tuple((1,) * len(text) for text in texts)
    prompt = Prompt("row-7", (1,), "Question?", columns, source=source)
    return Candidates(prompt, texts, ids, tuple("cut" in text for text in texts))


def test_a_part_that_is_not_for_a_row_is_absent_and_adds_nothing() -> None:
    """Weight 2 on a right number is 2; the greeting's weight 3; a length penalty of 1 a token on both."""
    short = {"name": "length_penalty", "per_token": 1.0}
    signals = reward({**MATH, "weight": 2.0}, {**GREETS, "weight": 3.0}, short)
    number, talk = signals.score(
        [asked("4", "5", answer="4"), asked("hello", "no", source="chat", answer=None)]
    )
    assert number.parts == {"final_number": (1, 0), "length_penalty": (-1, -1)}
    assert number.rewards == (1.0, -1.0)
    assert talk.parts == {"regex": (1, 0), "length_penalty": (-5, -2)}
    assert talk.rewards == (3.0 - 5.0, -2.0)


def test_a_value_that_replaces_does_so_only_in_its_rows() -> None:
    cut = {"name": "truncation_value", "value": -7.0, "only_where": "answer"}
    number, talk = reward(MATH, GREETS, cut).score(
        [asked("4", "4 cut", answer="4"), asked("hello", "hello cut", source="talk")]
    )
    assert number.rewards == (1.0, -7.0)
    assert talk.rewards == (1.0, 1.0) and "truncation_value" not in talk.parts


def test_a_signal_is_asked_about_its_rows_alone_and_counts_only_them() -> None:
    """A judge costs money. One of its two rows fails: 0.5, whatever the rows of others are."""
    costly = Scripted(lambda g: [float("nan") if t == "x" else 1.0 for t in g.texts])
    signals = WeightedSignals(
        [
            Part("judge", 1.0, costly, Rows({"source": "chat"})),
            Part("other", 1.0, per_response(lambda p, t: 1.0), Rows("answer")),
        ]
    )
    rows = [asked("a", source="chat"), asked("b", answer="1"), asked("x", source="chat")]
    found = signals.score([*rows, asked("c", answer="2")])
    assert costly.calls == [2]
    assert [each.rewards for each in found] == [(1.0,), (1.0,), None, (1.0,)]
    assert signals.report() == {"judge/failed_frac": 0.5, "judge/calls": 1, "other/failed_frac": 0}


def test_a_row_that_no_signal_is_for_fails_by_that_name(caplog: pytest.LogCaptureFixture) -> None:
    signals = reward(MATH, GREETS)
    odd = asked("4", "5", answer="", source="poems")
    found = signals.score([odd, odd, asked("4", answer="4")])
    assert [each.is_unjudged for each in found] == [True, True, False]
    assert found[0].rewards is None and found[0].parts == {}
    said = str(found[0].failure)
    assert said.startswith("no_signal: its columns with a value are none, its source is 'poems'")
    assert "final_number is for rows with 'answer'" in said
    assert "regex is for rows with source = ['chat', 'talk']" in said
    assert caplog.text.count("no signal is for prompt row-7") == 1
    assert signals.report()["final_number/failed_frac"] == 0.0  # it was never asked


def test_a_penalty_on_form_alone_judges_no_row_unless_it_names_it() -> None:
    """Otherwise a task that was forgotten would be trained to be short."""
    short = {"name": "length_penalty", "per_token": 1.0}
    forgotten = asked("poem", source="poems")
    assert reward(MATH, short).score([forgotten])[0].is_unjudged
    assert reward(short).score([forgotten])[0].rewards == (-4.0,)  # it is all there is
    meant = {**short, "only_where": {"source": "poems"}}
    assert reward(MATH, meant).score([forgotten])[0].rewards == (-4.0,)


@pytest.mark.parametrize(
    ("where", "row", "source", "is_for"),
    [
        (None, {}, None, True),
        ("answer", {"answer": "4"}, None, True),
        ("answer", {"answer": 0}, None, True),
        ("answer", {"answer": False}, None, True),
        ("answer", {}, None, False),
        ("answer", {"answer": None}, None, False),  # a table's cell of another task
        ("answer", {"answer": ""}, None, False),  # CSV has no null
        ("tests", {"tests": []}, None, False),
        ("meta.answer", {"meta": {"answer": "4"}}, None, True),
        ("meta.answer", {"meta.answer": "4"}, None, True),
        ("meta.answer", {"meta": None}, None, False),
        ({"task": "math"}, {"task": "math"}, None, True),
        ({"task": "math"}, {"task": "Math"}, None, False),
        ({"task": ["math", "code"]}, {"task": "code"}, None, True),
        ({"level": 1}, {"level": 1.0}, None, True),
        ({"level": 1}, {"level": True}, None, False),
        ({"level": 1}, {"level": "1"}, None, False),
        ({"easy": True}, {"easy": 1}, None, False),
        ({"tests": None}, {"tests": None}, None, True),
        ({"tests": None}, {}, None, True),
        ({"tests": [None, "x"]}, {"tests": "y"}, None, False),
        ({"task": "math", "level": [1, 2]}, {"task": "math", "level": 2}, None, True),
        ({"task": "math", "level": [1, 2]}, {"task": "math", "level": 3}, None, False),
        ({"source": "chat"}, {}, "chat", True),
        ({"source": "chat"}, {}, None, False),
        ({"source": "chat"}, {"source": "gsm8k"}, "chat", False),  # the row's own column says it
        ({"source": "gsm8k"}, {"source": "gsm8k"}, "chat", True),
        ({"source": "chat"}, {"source": None}, "chat", True),
    ],
)  # fmt: skip
def test_which_rows_a_signal_is_for(where: Any, row: Any, source: Any, is_for: bool) -> None:
    assert Rows(where).include(row, source) is is_for


@pytest.mark.parametrize(
    "where", ["", {}, {"task": []}, {"task": {"a": 1}}, 3, ["answer"], {"": 1}, {"x": float("nan")}]
)
def test_what_names_no_rows_is_refused(where: Any) -> None:
    with pytest.raises(ValidationError):
        bind("signals", {"name": "regex", "pattern": "a", "only_where": where})


def test_without_the_key_every_row_is_for_every_signal() -> None:
    entries = {"name": "regex", "pattern": "a"}, {"name": "regex", "pattern": "b"}
    (found,) = reward(*entries).score([candidates("ab", "b")])
    assert found.parts == {"regex": (1, 0), "regex_2": (1, 1)}
