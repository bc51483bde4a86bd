"""Every shape pairs come in becomes the same canonical row; what does not fit is counted or named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefopt.data.formats import canonical, resolve
from prefopt.data.readers import RawRow
from prefopt.data.rows import Refused, Reject, Row
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import ColumnMap, SourceSection


def msg(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER, YES, NO = msg("user", "Is it?"), msg("assistant", "Yes."), msg("assistant", "No.")
FIRST = [msg("user", "Hi"), msg("assistant", "Hello")]


def read(data: dict[str, Any], *, pairs: bool = True, **settings: Any) -> Row | Refused:
    columns = ColumnMap(**settings.pop("columns", {}))
    raw = RawRow("f.jsonl", 7, data)
    section = SourceSection(path="f.jsonl", columns=columns, **settings)
    return canonical(raw, resolve(section, raw, pairs=pairs))


def sides(chosen: Any, rejected: Any, **more: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected, **more}


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        (sides(json.dumps([YES]), json.dumps([NO]), prompt=json.dumps([USER])), {}),
        (sides(json.dumps([USER, YES]), json.dumps([USER, NO]), prompt="Is it?"), {}),
        (sides(json.dumps([YES]), json.dumps([NO]), prompt=[USER]), {}),  # the prompt is a list
        # as pandas writes numpy's arrays into CSV: no commas between messages
        (sides("Yes.", "No.", prompt=f"[{FIRST[0]}\n {FIRST[1]}]"), {"format": "chat"}),
        (sides(json.dumps({"from": "gpt", "value": "Yes."}), "No.", prompt="Is it?"), {}),
    ],
    ids=["json", "dialogues", "one column", "numpy", "sharegpt"],
)
def test_messages_written_out_as_text_are_named(columns: Any, settings: dict[str, Any]) -> None:
    """Else brackets, quotes and roles are what the policy learns to say."""
    with pytest.raises(
        DataError, match=r"f.jsonl:7: column '\w+' holds a list of messages written out as text"
    ):
        read(columns, **settings)


def test_text_that_is_json_is_text() -> None:
    for text in ('{"role": "editor"}', "[1, 2]", '{"city": "Oslo"}', "['role', 'content']"):
        assert isinstance(read(sides(text, "No.", prompt="Is it?"), format="chat"), Row)
    written = json.dumps([USER])
    assert isinstance(read(sides("Yes.", "No.", prompt=written), format="text"), Row)


def test_a_prompt_that_is_answered_already_is_a_reject() -> None:
    """TRL continues that turn, others begin a second one in a row: nobody is to guess."""
    refused = read(sides([YES], [NO], prompt=FIRST))
    assert isinstance(refused, Refused) and refused.reason == Reject.PROMPT_ANSWERED
    assert read(sides([*FIRST, USER, YES], [*FIRST, USER, NO], prompt=[*FIRST, USER])) == TWO_TURNS


ONE_TURN = Row([USER], (YES, NO), (None, None))
TWO_TURNS = Row([*FIRST, USER], (YES, NO), (None, None))

SAME_PAIR = {
    "message lists": (sides([YES], [NO], prompt=[USER]), {}),
    "single messages": (sides(YES, NO, prompt=[USER]), {}),
    "strings as turns": (sides("Yes.", "No.", prompt="Is it?"), {"format": "chat"}),
    "message prompt, string sides": (sides("Yes.", "No.", prompt=[USER]), {}),
    "dialogues that repeat a string prompt": (sides([USER, YES], [USER, NO], prompt="Is it?"), {}),
    "the same, prompt padded": (sides([USER, YES], [USER, NO], prompt=" Is it?\n"), {}),
    "implicit prompt": (sides([USER, YES], [USER, NO]), {}),
    "implicit prompt, said so": (
        sides([USER, YES], [USER, NO], prompt="unused"),
        {"columns": {"prompt": None}},
    ),
    "hh": (
        sides("\n\nHuman: Is it?\n\nAssistant: Yes.", "\n\nHuman: Is it?\n\nAssistant: No."),
        {},
    ),
    "hh with prompt column": (
        sides(" Yes.", " No.", prompt="\n\nHuman: Is it?\n\nAssistant:"),
        {"format": "hh"},
    ),
    "sharegpt": (
        sides(
            {"from": "gpt", "value": "Yes."},
            {"from": "gpt", "value": "No."},
            conversations=[{"from": "human", "value": "Is it?"}],
        ),
        {},
    ),
    "text parts, nulls from Parquet": (
        sides(
            [{**YES, "content": [{"type": "text", "text": "Yes."}], "tool_calls": None}],
            [{**NO, "tool_calls": None}],
            prompt=[{**USER, "tool_calls": None}],
        ),
        {},
    ),
    "other columns, dotted": (
        {"q": {"text": "Is it?"}, "a.good": "Yes.", "bad": "No."},
        {"format": "chat", "columns": {"prompt": "q.text", "chosen": "a.good", "rejected": "bad"}},
    ),
}


@pytest.mark.parametrize("shape", SAME_PAIR)
def test_every_shape_of_one_pair_becomes_the_same_row(shape: str) -> None:
    data, settings = SAME_PAIR[shape]
    assert read(data, **settings) == ONE_TURN


TWO_TURN_PAIR = {
    "implicit": sides([*FIRST, USER, YES], [*FIRST, USER, NO]),
    "string prompt is the first turn": sides([*FIRST, USER, YES], [*FIRST, USER, NO], prompt="Hi"),
    "continuation": sides([FIRST[1], USER, YES], [FIRST[1], USER, NO], prompt=[FIRST[0]]),
    "hh": sides(
        "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it?\n\nAssistant: Yes.",
        "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it?\n\nAssistant: No.",
    ),
}


@pytest.mark.parametrize("shape", TWO_TURN_PAIR)
def test_the_prompt_is_everything_before_the_last_turn(shape: str) -> None:
    assert read(TWO_TURN_PAIR[shape]) == TWO_TURNS


def test_plain_strings_are_text_unless_told_otherwise() -> None:
    assert read(sides("a", "b", prompt="p")) == Row("p", ("a", "b"), (None, None))


def test_a_system_column_goes_before_the_prompt_and_an_empty_one_does_not() -> None:
    data = sides("Yes.", "No.", prompt="Is it?", sys="Be brief.")
    settings = {"format": "chat", "columns": {"system": "sys"}}
    assert read(data, **settings) == Row(
        [msg("system", "Be brief."), USER], (YES, NO), (None, None)
    )
    assert read({**data, "sys": ""}, **settings) == ONE_TURN


def test_scores_come_from_dotted_columns_and_csv_strings() -> None:
    data = sides("a", "b", prompt="p", metadata={"good": 8.5, "bad": "7"})
    columns = {"score_chosen": "metadata.good", "score_rejected": "metadata.bad"}
    assert read(data, columns=columns) == Row("p", ("a", "b"), (8.5, 7.0))


def test_sft_reads_chosen_alone() -> None:
    assert read({"prompt": "p", "chosen": "c"}, pairs=False) == Row("p", ("c",), (None,))


@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_sft_rows_may_hold_it_all_in_one_dialogue(name: str) -> None:
    assert read({name: [*FIRST, USER, YES]}, pairs=False) == Row([*FIRST, USER], (YES,), (None,))


REFUSED = {
    Reject.EMPTY_PROMPT: sides("a", "b", prompt=" \n"),
    Reject.EMPTY_CHOSEN: sides("", "b", prompt="p"),
    Reject.EMPTY_REJECTED: sides("a", None, prompt="p"),
    Reject.IDENTICAL: sides([USER, YES], [USER, YES]),
    Reject.PROMPTS_DIFFER: sides([USER, YES], [msg("user", "Is it not?"), NO]),
    Reject.NOT_ASSISTANT: sides([USER, YES], [USER]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_row_that_must_not_be_trained_on_is_refused(reason: Reject) -> None:
    result = read(REFUSED[reason])
    assert isinstance(result, Refused)
    assert result.reason == reason


def test_a_dialogue_that_contradicts_its_prompt_column_is_refused() -> None:
    result = read(sides([USER, YES], [USER, NO], prompt="Something else?"))
    assert isinstance(result, Refused)
    assert result.reason == Reject.PROMPTS_DIFFER


def test_ties_are_refused_only_on_request_and_only_where_both_scores_exist() -> None:
    columns = {"score_chosen": "s", "score_rejected": "t"}
    tie = sides("a", "b", prompt="p", s=3, t=3)
    assert isinstance(read(tie, columns=columns), Row)
    assert isinstance(read({**tie, "s": None, "t": None}, columns=columns, drop_ties=True), Row)
    result = read(tie, columns=columns, drop_ties=True)
    assert isinstance(result, Refused)
    assert result.reason == Reject.TIE


def test_a_missing_column_names_file_row_and_the_nearest_columns_first() -> None:
    data = {"prompt": "p", "zzz": 1, "chosen_response": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"f\.jsonl:7: no column 'chosen'; it has chosen_response,"):
        read(data)


def test_text_without_a_prompt_column_names_the_columns_there_are() -> None:
    with pytest.raises(DataError, match="no column 'prompt'; it has"):
        read(sides("a", "b", question="p"))


WRONG = {
    "a number for text": (sides(3, "b", prompt="p"), {"format": "text"}, "chosen.*int 3"),
    "messages for text": (
        sides("a", "b", prompt=[USER]),
        {"format": "text"},
        "prompt.*format: chat",
    ),
    "a message without role": (sides([{"content": "x"}], [NO], prompt=[USER]), {}, "needs role"),
    "from/value as chat": (
        sides([{"from": "gpt", "value": "x"}], "b", prompt="p"),
        {"format": "chat"},
        "format: sharegpt",
    ),
    "an unknown speaker": (
        sides({"from": "narrator", "value": "x"}, "b", conversations=[]),
        {},
        "narrator.*known",
    ),
    "an image": (
        sides("a", "b", prompt=[{"role": "user", "content": [{"type": "image"}]}]),
        {},
        "only text is supported",
    ),
    "a score that is no number": (
        sides("a", "b", prompt="p", s="high"),
        {"columns": {"score_chosen": "s"}},
        "'high'.*finite number",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_the_wrong_kind_is_a_data_error_with_row_and_column(case: str) -> None:
    data, settings, message = WRONG[case]
    with pytest.raises(DataError, match=rf"f\.jsonl:7: column .*{message}"):
        read(data, **settings)


CONTRADICTIONS = {
    "pairs without a rejected column": ({"columns": {"rejected": None}}, True),
    "ties without scores": ({"drop_ties": True}, True),
    "a system column with text": ({"columns": {"system": "s"}, "format": "text"}, True),
    "text without prompt column": ({"columns": {"prompt": None}, "format": "text"}, True),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_a_config_error(case: str) -> None:
    settings, pairs = CONTRADICTIONS[case]
    with pytest.raises(ConfigError):
        read(sides("a", "b", prompt="p", s="x"), pairs=pairs, **dict(settings))
