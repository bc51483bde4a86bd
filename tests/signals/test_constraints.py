"""Instruction constraints by hand; IFEval's official verdicts are in ``tests/eval/test_ifeval.py``."""

from __future__ import annotations

import json
import re
import sys
import time
from typing import Any

import pytest

from prefopt.errors import ConfigError, DataError, SignalError
from prefopt.recipe.registry import get_signal
from prefopt.signals.constraint_checks import CHECKS
from prefopt.signals.instructions import instruction, loose_variants
from prefopt.signals.language import detect_language, detector_factory
from prefopt.signals.sentences import split_sentences
from tests.signals.cases import scores
from tests.signals.readings import require_in_page, table

ENGLISH = "The quick brown fox jumps over the lazy dog and then it goes home to sleep."
FRENCH = "Le renard brun saute par-dessus le chien paresseux et puis il rentre dormir."

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("length_constraints:number_words", {"num_words": 3}, "one two three", "one two"),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "one two",
        "one two three",
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2}, "One. Two!", "One, two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        "a\n\nso, b",
        "so\n\nb",
    ),
    ("keywords:existence", {"keywords": ["rice", "pot"]}, "Rice in a pot", "rice"),
    ("keywords:forbidden_words", {"forbidden_words": ["rice"]}, "ricecake", "some Rice"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2}, "a A", "a b"),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2}, "zZ", "z"),
    ("language:response_language", {"language": "fr"}, FRENCH, ENGLISH),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), FRENCH.lower()),
    ("change_case:capital_word_frequency", {"capital_frequency": 2}, "A BIG dog", "A big dog"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2}, "DON'T go", "DO/IT go"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', '{"a": 1'),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n- b\n- c"),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and *b*",
        "*a* only",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "PART", "num_sections": 2},
        "PART 1\na\nPART 2\nb",
        "PART 1\na",
    ),
    ("detectable_format:title", {}, "<<Rice>>\nBoil.", "# Rice"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "Dear [name]", "Dear you"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP.S. hi", "Bye"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, "say hi\nhi", "hi"),
    ("combination:two_responses", {}, "a ****** b", "a ****** a"),
    ("startend:end_checker", {"end_phrase": "So be it."}, "Yes. so be it.", "So be it. No"),
    ("startend:start_checker", {"start_phrase": "Dear"}, "dear you", "Oh dear"),
    ("startend:quotation", {}, '"all of it"', '"some" of it'),
]


@pytest.mark.parametrize(("type", "args", "good", "bad"), CASES)
def test_each_constraint_tells_a_text_that_follows_from_one_that_does_not(
    type: str, args: dict[str, Any], good: str, bad: str
) -> None:
    item = instruction(type, args)
    assert item.follows(good) and not item.follows(bad)


def test_every_constraint_has_a_case_and_a_line_on_the_page() -> None:
    assert {case[0] for case in CASES} == set(CHECKS)
    rows = [(type, json.dumps(args), good, bad) for type, args, good, bad in CASES]
    require_in_page("constraints", table(("type", "args", "follows", "does not"), rows))


# (id, arguments, text, followed): where a plain reading of the instruction would say otherwise, or a check
# could be written more simply and wrongly. All verdicts are those of IFEval's published checker.
EDGES: list[tuple[str, dict[str, Any], str, bool]] = [
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold**\n* a", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 3}, "\n\n  * a\n\n - b\n---", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "**bold**", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a\nb*", False),
    ("detectable_format:title", {}, "<<a\nb>>", False),
    ("detectable_format:title", {}, "<< >>", False),
    ("detectable_format:title", {}, "see <<< Rice >>> here", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[[a] b] [c", False),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[] [\n] [b]", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "bye p. p. s. hi", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "bye P.S hi", False),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1Day2",
        True,
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\n***\nb", False),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "it"},
        '"it\'s" so',
        True,
    ),
    ("combination:two_responses", {}, "****** a ****** b ******", True),
    ("combination:two_responses", {}, "a ****** ****** b", False),
    ("keywords:existence", {"keywords": ["c++"]}, "I like C++.", True),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2}, "#a #b", True),
    ("startend:end_checker", {"end_phrase": "Bye."}, 'So, "bye."\n', True),
    ("change_case:english_lowercase", {}, "日本語", False),
    ("language:response_language", {"language": "fr"}, "12 34", True),
]


@pytest.mark.parametrize(("type", "args", "text", "followed"), EDGES)
def test_edges_are_read_as_published(
    type: str, args: dict[str, Any], text: str, followed: bool
) -> None:
    assert instruction(type, args).follows(text) is followed


def test_an_empty_text_follows_nothing_not_even_what_forbids() -> None:
    for id, args in (
        ("punctuation:no_comma", {}),
        ("keywords:forbidden_words", {"forbidden_words": ["a"]}),
    ):
        assert instruction(id, args).follows("b")
        assert not instruction(id, args).follows(" \n")


def test_loose_variants_are_the_eight_of_the_paper() -> None:
    assert loose_variants("Sure:\n*a*\nb\nBye") == (
        "Sure:\n*a*\nb\nBye",
        "*a*\nb\nBye",
        "Sure:\n*a*\nb",
        "*a*\nb",
        "Sure:\na\nb\nBye",
        "a\nb\nBye",
        "Sure:\na\nb",
        "a\nb",
    )
    assert loose_variants("one line") == ("one line", "")


@pytest.mark.parametrize(
    ("id", "args", "text"),
    [
        ("punctuation:no_comma", {}, "Sure, here:\nno comma"),
        ("startend:end_checker", {"end_phrase": "Done."}, "Well.\nDone.\nAnything else?"),
        ("detectable_format:json_format", {}, "Here:\n{}\nBye"),
        ("startend:quotation", {}, '**"a"**'),
    ],
)
def test_loose_forgives_a_first_line_a_last_line_and_asterisks(
    id: str, args: dict[str, Any], text: str
) -> None:
    item = instruction(id, args)
    assert item.follows_loosely(text) and not item.follows(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Dr. Smith paid 3.50 dollars, i.e. little. He left! Why? J. Doe knows.", 4),
        ("The U.S. Army, Inc. and co. met at 5 p.m. on www.example.com. It was fun", 2),
        ("It ended at 5 p.m. Then we left.", 2),
        ("no capitals here. none there either.", 2),
        ('Really?! Yes... (Quite.) He said "no." Fine.', 5),
        ("<p>One.</p><p>Two.</p>", 3),
        ("1. one thing. 2. another.", 4),
        ("Visit the site (www.example.co.uk) or use an app. It is free.", 2),
        ('He said "go." Then he left. "Why?" she asked.', 4),
        ("In the 1950s. Later it changed.", 2),
        ("No end mark", 1),
        ("", 0),
    ],
)
def test_sentences_by_rule(text: str, count: int) -> None:
    assert len(split_sentences(text)) == count


def test_sentences_hold_the_whole_text_in_order() -> None:
    assert split_sentences(" One.  Two!\nthree ") == ["One.", "Two!", "three"]


UNITS = [" ", "\n", "a", "<", "[", "*", "-", ".", "'", "etc. ", "* ", "a@", "A,", "http://", "{"]


@pytest.mark.parametrize(("type", "args"), [case[:2] for case in CASES])
def test_no_check_is_quadratic_in_the_response(type: str, args: dict[str, Any]) -> None:
    """200,000 characters of what a pattern may start at but never ends: quadratic, that is minutes.

    Measured against 500 plain passes over the same characters, in the process's own time.
    """
    item = instruction(type, args)
    item.follows("load what it needs")
    texts = ["x" + unit * (200_000 // len(unit)) + "y" for unit in UNITS]
    start = time.process_time()
    for text in texts:
        item.follows(text)
    taken = time.process_time() - start
    start = time.process_time()
    for text in texts:
        re.findall(r"\w|\W", text)
    assert taken < 500 * (time.process_time() - start)


def test_language_is_the_same_every_time_and_leaves_other_users_of_the_detector_alone() -> None:
    from langdetect import DetectorFactory

    before = DetectorFactory.seed
    mixed = "le chat the cat el gato die Katze"
    assert len({detect_language(mixed) for _ in range(20)}) == 1
    assert DetectorFactory.seed is before


@pytest.fixture
def no_langdetect(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("langdetect", "langdetect.detector_factory"):
        monkeypatch.setitem(sys.modules, name, None)
    detector_factory.cache_clear()
    yield
    detector_factory.cache_clear()


@pytest.mark.parametrize(
    "item",
    [
        {"type": "language:response_language", "args": {"language": "fr"}},
        {"type": "change_case:english_capital"},
        {"type": "change_case:english_lowercase"},
    ],
)
def test_without_langdetect_what_needs_it_stops_the_run(
    item: dict[str, Any], no_langdetect: None
) -> None:
    with pytest.raises(ConfigError, match=r"prefopt\[eval\]"):
        instruction(item["type"], item.get("args")).follows(
            "TEXT" if "capital" in item["type"] else "text"
        )
    with pytest.raises(SignalError, match=r"row-7.*prefopt\[eval\]"):
        scores(get_signal("constraints").fn(), "TEXT", "text", constraints=[item])


def test_reward_is_all_or_the_share() -> None:
    items = [
        {"type": "punctuation:no_comma", "args": None},
        {
            "type": "length_constraints:number_words",
            "args": {"num_words": 2, "relation": "at least", "keywords": None},
        },
    ]
    factory = get_signal("constraints").fn
    assert scores(factory(), "one two", "one", "", constraints=items) == [1, 0, 0]
    assert scores(factory(reward="share"), "one two", "one", "", constraints=items) == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "non-empty list"),
        ("no commas", "non-empty list"),
        ([{"args": {}}], r"constraints\.0"),
        ([{"type": "punctuation:no_coma"}], "unknown constraint 'punctuation:no_coma'"),
        ([{"type": "keywords:existence", "args": {"words": ["a"]}}], "keywords: Field required"),
        ([{"type": "keywords:existence", "args": {"words": ["a"]}}], "words: Extra inputs"),
        (
            [{"type": "length_constraints:number_words", "args": {"num_words": -1}}],
            "greater than or equal to 0",
        ),
        (
            [
                {
                    "type": "length_constraints:number_words",
                    "args": {"num_words": 5, "relation": "at most"},
                }
            ],
            "'at least' or 'less than'",
        ),
        (
            [{"type": "keywords:letter_frequency", "args": {"letter": "ab", "let_frequency": 1}}],
            "letter",
        ),
    ],
)
def test_constraints_that_nobody_can_check_name_the_row(items: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)row-7.*{message}"):
        scores(get_signal("constraints").fn(), "text", constraints=items)
