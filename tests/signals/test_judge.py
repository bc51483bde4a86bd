"""Judges: real HTTP with odd judges, and LLMBar's published judgments read again."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import DataError, SignalError
from prefopt.recipe.registry import get_signal
from prefopt.signals.base import Signal
from prefopt.signals.judge import conversation, fill
from prefopt.signals.verdicts import (
    Verdict,
    joint_outcome,
    order_stats,
    parse_rating,
    parse_verdict,
    win_fractions,
)
from tests.signals.cases import candidates
from tests.signals.chat_server import Answer, chat_server

LLMBAR = [
    f"{subset}__{judge}"
    for subset in ("Natural", "Neighbor", "GPTOut")
    for judge in (
        "GPT-4_Vanilla",
        "GPT-4_Vanilla_NoRules",
        "ChatGPT_Vanilla_NoRules",
        "LLaMA2_Vanilla_NoRules",
        "Falcon_Vanilla_NoRules",
        "PaLM2_Vanilla_NoRules",
    )
]


@pytest.fixture
def judge(tmp_path: Path) -> Callable[..., Signal]:
    def make(base_url: str, **keys: Any) -> Signal:
        defaults = {"model": "m", "cache_dir": str(tmp_path / "cache"), "deadline_s": 120.0}
        return get_signal("judge").fn(base_url=base_url, **{**defaults, **keys})

    return make


def shown(body: dict) -> tuple[str, str]:
    """The two answers a judge was shown, in order."""
    content = body["messages"][0]["content"]
    found = re.search(
        r"<answer_a>\n(.*)\n</answer_a>.*<answer_b>\n(.*)\n</answer_b>", content, re.S
    )
    assert found is not None
    return found.group(1), found.group(2)


def longest_wins(body: dict) -> Answer:
    first, second = map(len, shown(body))
    letter = "A" if first > second else "B" if second > first else "C"
    return Answer(f"[[A]] would be hasty. Verdict: [[{letter}]]")


def test_scores_are_win_fractions_of_a_round_robin_in_both_orders(
    judge: Callable[..., Signal],
) -> None:
    """Lengths 1 3 2 2: 'bbb' beats all (3/3), 'a' loses to all (0), each 2 wins, loses and ties (1.5/3)."""
    with chat_server(longest_wins) as server:
        signal = judge(server.base_url)
        assert signal.score([candidates("a", "bbb", "cc", "dd")]) == [[0.0, 1.0, 0.5, 0.5]]
        report = signal.report()  # type: ignore[attr-defined]
    assert len(server.requests) == 12
    assert (report["pairs"], report["consistency_rate"], report["position_bias"]) == (6, 1.0, 0.0)
    assert report["prompt_tokens"] == 120 and report["unparsed"] == 0


def test_a_judge_that_always_takes_the_first_gives_ties_and_full_bias(
    judge: Callable[..., Signal],
) -> None:
    with chat_server(lambda body: Answer("[[A]]")) as server:
        signal = judge(server.base_url)
        assert signal.score([candidates("a", "b", "c")]) == [[0.5, 0.5, 0.5]]
        report = signal.report()  # type: ignore[attr-defined]
    assert (report["consistency_rate"], report["position_bias"]) == (0.0, 1.0)


def test_equal_responses_tie_unasked(judge: Callable[..., Signal]) -> None:
    with chat_server(longest_wins) as server:
        assert judge(server.base_url).score([candidates("a", "a", "bb")]) == [[0.25, 0.25, 1.0]]
    assert len(server.requests) == 2  # "a" against "bb", once in each order, serves both of them


def test_a_judge_that_talks_nonsense_is_asked_again_then_gives_nan(
    judge: Callable[..., Signal],
) -> None:
    with chat_server(lambda body: Answer("Both have merit.", finish_reason="length")) as server:
        signal = judge(server.base_url, max_asks=3)
        found = signal.score([candidates("a", "b")])[0]
        report = signal.report()  # type: ignore[attr-defined]
    assert all(map(math.isnan, found))
    assert len(server.requests) == 6
    assert (report["unparsed"], report["cut"], report["gave_up"]) == (6, 6, 2)
    assert math.isnan(report["position_bias"])


CUT = "<think>Could be [[B]] or [[2]], let me go on and"


@pytest.mark.parametrize(
    ("text", "finish", "score"),
    [
        (CUT, "length", None),
        (CUT, "stop", None),
        ("I lean to [[2]] so far, but", "length", None),
        ("<think>Could be [[2]].</think>\nFinal: [[9]]", "stop", 9.0),
        ("Could be [[2]].</think>Final: [[9]]", "stop", 9.0),
        ("<think>All but [[2]].</think>", "stop", None),
    ],
)
def test_what_a_judge_thinks_or_is_cut_in_is_no_verdict(
    judge: Callable[..., Signal], text: str, finish: str, score: float | None
) -> None:
    """Asked again (without its thoughts), then NaN and counted as cut where it was."""
    with chat_server(lambda body: Answer(text, finish_reason=finish)) as server:
        signal = judge(server.base_url, mode="pointwise", max_asks=2)
        [[found]] = signal.score([candidates("a")])
        report = signal.report()  # type: ignore[attr-defined]
    assert found == score if score else math.isnan(found)
    assert len(server.requests) == (1 if score else 2)
    assert report["gave_up_cut"] == (finish == "length")
    assert not any("Could be" in str(body["messages"]) for body in server.requests)


def test_reasoning_in_a_field_of_its_own_is_no_verdict(judge: Callable[..., Signal]) -> None:
    message = {
        "role": "assistant",
        "content": None,
        "reasoning_content": "[[2]]",
        "reasoning": "[[2]]",
    }
    raw = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    with chat_server(lambda body: Answer(raw=raw.encode())) as server:
        [[found]] = judge(server.base_url, mode="pointwise").score([candidates("a")])
    assert math.isnan(found)


def test_a_judge_that_is_reminded_is_counted_once(judge: Callable[..., Signal]) -> None:
    def answer(body: dict) -> Answer:
        if len(body["messages"]) == 1:
            return Answer("Hmm.")
        assert [m["role"] for m in body["messages"]] == ["user", "assistant", "user"]
        assert (
            body["messages"][1]["content"] == "Hmm." and "[[C]]" in body["messages"][2]["content"]
        )
        return longest_wins(body)

    with chat_server(answer) as server:
        signal = judge(server.base_url)
        assert signal.score([candidates("a", "bb")]) == [[0.0, 1.0]]
        report = signal.report()  # type: ignore[attr-defined]
    assert (report["answers"], report["unparsed"], report["gave_up"]) == (4, 2, 0)


def test_a_second_run_asks_nothing(judge: Callable[..., Signal]) -> None:
    group = candidates("a", "bbb", "cc")
    with chat_server(longest_wins) as server:
        first = judge(server.base_url).score([group])
        again = judge(server.base_url)
        assert again.score([group]) == first
        assert again.report()["cached"] == 6  # type: ignore[attr-defined]
    assert len(server.requests) == 6


def test_a_judge_that_fails_for_a_while_costs_time_only(judge: Callable[..., Signal]) -> None:
    seen: list[str] = []

    def answer(body: dict) -> Answer:
        seen.append("x")
        return Answer(status=429) if len(seen) <= 2 else longest_wins(body)

    with chat_server(answer) as server:
        assert judge(server.base_url).score([candidates("a", "bb")]) == [[0.0, 1.0]]


def test_a_judge_that_stays_away_stops_the_run(judge: Callable[..., Signal]) -> None:
    with chat_server(lambda body: Answer(status=503)) as server, pytest.raises(SignalError):
        judge(server.base_url, deadline_s=0.5).score([candidates("a", "bb")])


def test_a_request_that_is_refused_is_nan_for_its_responses(judge: Callable[..., Signal]) -> None:
    def answer(body: dict) -> Answer:
        return Answer(status=400) if "xxxx" in str(body) else longest_wins(body)

    with chat_server(answer) as server:
        good, bad = judge(server.base_url).score([candidates("a", "bb"), candidates("a", "xxxx")])
    assert good == [0.0, 1.0] and all(map(math.isnan, bad))


def test_pointwise_ratings_are_the_scores(judge: Callable[..., Signal]) -> None:
    def answer(body: dict) -> Answer:
        text = re.search(r"<answer>\n(.*)\n</answer>", body["messages"][0]["content"], re.S)
        assert text is not None
        return Answer(f"Fine. [[{len(text.group(1))}]]")

    with chat_server(answer) as server:
        signal = judge(server.base_url, mode="pointwise", max_asks=1)
        found = signal.score([candidates("a", "bbb"), candidates("c" * 11)])
    assert found[0] == [1.0, 3.0] and math.isnan(found[1][0])  # 11 is not on the scale


def test_cost_is_the_tokens_times_the_prices(judge: Callable[..., Signal]) -> None:
    """4 requests of 10 + 5 tokens at 1 and 2 dollars a million: 4 · (10 · 1 + 5 · 2) / 10^6."""
    with chat_server(lambda body: Answer("[[5]]")) as server:
        signal = judge(
            server.base_url,
            mode="pointwise",
            usd_per_million_prompt_tokens=1.0,
            usd_per_million_completion_tokens=2.0,
        )
        signal.score([candidates("a", "b", "c", "d")])
        assert signal.report()["usd"] == pytest.approx(80e-6)  # type: ignore[attr-defined]


def test_sampling_goes_into_the_request_and_null_leaves_a_field_out(
    judge: Callable[..., Signal],
) -> None:
    with chat_server(longest_wins) as server:
        keys = {"temperature": None, "max_tokens": None, "sampling": {"max_completion_tokens": 9}}
        judge(server.base_url, **keys).score([candidates("a", "bb")])
    assert server.requests[0].keys() == {"model", "messages", "max_completion_tokens"}


def test_a_template_of_the_users_own_is_filled_once(
    judge: Callable[..., Signal], tmp_path: Path
) -> None:
    path = tmp_path / "template.txt"
    path.write_text("Q={prompt}\n1={response_a}\n2={response_b}\n{json: true}")
    with chat_server(lambda body: Answer("[[A]]")) as server:
        judge(server.base_url, template=str(path)).score([candidates("{response_b}", "{prompt}")])
    contents = {request["messages"][0]["content"] for request in server.requests}
    assert "Q=Question?\n1={response_b}\n2={prompt}\n{json: true}" in contents


def test_a_template_without_a_placeholder_is_refused(
    judge: Callable[..., Signal], tmp_path: Path
) -> None:
    path = tmp_path / "template.txt"
    path.write_text("{prompt} {response_a}")
    with pytest.raises(SignalError, match=r"needs \{prompt\}|needs \{response_b\}"):
        judge("http://localhost:1/v1", template=str(path))


def test_one_response_cannot_be_compared(judge: Callable[..., Signal]) -> None:
    with pytest.raises(DataError, match="samples_per_prompt"):
        judge("http://localhost:1/v1").score([candidates("a")])


def test_the_judge_reads_a_dialogue_with_its_roles() -> None:
    turns = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"})
    assert conversation(candidates("x", prompt=turns).prompt) == "[user]\nHi\n\n[assistant]\nYes?"
    assert conversation(candidates("x", prompt=turns[:1]).prompt) == "Hi"
    assert fill("{a}{b}", {"a": "{b}", "b": "1"}) == "{b}1"


# --- verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLMBAR)
def test_llmbar_judgments_give_the_published_accuracy_and_consistency(
    shared_data: Path, name: str
) -> None:
    folder = shared_data / "llmbar"
    expected = json.loads((folder / "expected.json").read_text())[name]
    with gzip.open(folder / "judgments" / f"{name}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    pairs = [
        (parse_verdict(row["completion"][0]), parse_verdict(row["completion_swapped"][0]))
        for row in rows
    ]
    gold: list[Verdict] = ["A" if row["label"] == 1 else "B" for row in rows]
    swapped = {"A": "B", "B": "A"}
    right = [p[0] == g for p, g in zip(pairs, gold, strict=True)]
    right_swapped = [p[1] == swapped[g] for p, g in zip(pairs, gold, strict=True)]
    assert len(rows) == expected["n"]
    assert sum(right) == expected["correct_original_order"]
    assert sum(right_swapped) == expected["correct_swapped_order"]
    assert 50 * (sum(right) + sum(right_swapped)) / len(rows) == pytest.approx(
        expected["accuracy_average"], abs=1e-4
    )
    outcomes = [joint_outcome(*pair) for pair in pairs]
    wins = [o == (1.0 if g == "A" else 0.0) for o, g in zip(outcomes, gold, strict=True)]
    assert sum(wins) == expected["correct_both"]
    stats = order_stats(pairs)
    assert stats.num_consistent == expected["consistent"]


def test_position_bias_of_a_published_judge_is_counted_from_its_winners(shared_data: Path) -> None:
    """The file's own winners: the response shown first 37 times of 47, and 35 times when swapped."""
    path = shared_data / "llmbar" / "judgments" / "GPTOut__ChatGPT_Vanilla_NoRules.jsonl.gz"
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    pairs = [
        (parse_verdict(r["completion"][0]), parse_verdict(r["completion_swapped"][0])) for r in rows
    ]
    stats = order_stats(pairs)
    assert (stats.num_first, stats.num_second) == (72, 22)
    assert stats.position_bias == pytest.approx(50 / 94)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("[[A]]", "A"),
        ("Not [[A]] but [[B]]", "B"),
        ("so: [[c]]", "C"),
        ("[[tie]]", "C"),
        ("Output (a)", "A"),
        ("Output (b) is better than Output (a)... thus Output (b).", "B"),
        ("Output (b) is better.\n\nOutput (a) is not.", "B"),
        ("Output (b)\n\nIt is correct, and Output (a) is not.", "B"),
        ("Output (a) is terse. Output (b) is not. Therefore, Output (a) is better.", "A"),
        ("I compared the texts of Output (a) and Output (b).", None),
        ("Verdict: [[B]]. ([[A]] if answer A is better, [[B]] if answer B is better.)", "B"),
        ("I end with one of [[A]], [[B]], [[C]].", None),
        ("My choice is [[A]], of [[A]]/[[B]]/[[C]].", "A"),
        ("**[[A]]**\n\nKey: [[A]] = first, [[C]] = tie", "A"),
        ("[[A]] if pressed.", "A"),
        ("[A]", None),
        ("Answer A is better", None),
        ("", None),
    ],
)
def test_verdicts_are_read_from_the_end(text: str, verdict: str | None) -> None:
    assert parse_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("[[7]]", 7),
        ("[[4]] (the form was, for example: [[5]])", 4),
        ("[[3]] no, [[8.5]]", 8.5),
        ("[[0]]", None),
        ("[[11]]", None),
        ("7", None),
    ],
)
def test_ratings_are_read_from_the_end_and_bounded(text: str, rating: float | None) -> None:
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    ("first", "swapped", "points"),
    [
        ("A", "B", 1.0),
        ("B", "A", 0.0),
        ("C", "C", 0.5),
        ("A", "A", 0.5),
        ("A", "C", 0.5),
        ("C", "A", 0.5),
        ("A", None, None),
        (None, None, None),
    ],
)
def test_orders_that_disagree_are_a_tie(first: Any, swapped: Any, points: float | None) -> None:
    assert joint_outcome(first, swapped) == points


def test_a_missing_game_is_nan_for_its_two_players_only() -> None:
    found = win_fractions(3, {(0, 1): 1.0, (0, 2): None, (1, 2): 0.5})
    assert found[1] == 0.25 and math.isnan(found[0]) and math.isnan(found[2])
