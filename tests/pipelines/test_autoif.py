"""AutoIF: checkers and cases against each other by hand-made votes, all code in the sandbox, pairs by accuracy."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_pipelines
from data_pipelines.checker_votes import Proposal, cross_check, read_proposal, without_fetching
from data_pipelines.pipeline import load_pipeline
from prefopt.recipe.registry import get_signal
from prefopt.signals.checkers import CheckerLimits, accuracy, run_checker
from tests.pipelines.pipelines import build, counts, refused, rows, write_pipeline
from tests.signals.cases import candidates
from tests.signals.test_python_tests import _has_landlock

PRESETS = Path(data_pipelines.__file__).with_name("presets")
GIVEN = str(Path(__file__).with_name("given.py"))
LIMITS = CheckerLimits(timeout_s=60.0)
"""For what answers, as long as that takes on a busy machine."""
HANGING = CheckerLimits(timeout_s=0.5)
"""For what never does."""
Pipeline = Callable[..., Path]

SHORT = "def evaluate(response):\n    return len(response) < 5"
SHORTER = "def evaluate(response):\n    return len(response) <= 4"
UPPER = "def evaluate(response):\n    return response.isupper()"
"""Wrong about the instruction: it asks for short answers."""
CASES = [("a", True), ("ab", True), ("abc", True), ("abcd", True), ("abcde", False),
         ("abcdef", False), ("abcdefg", False), ("hello there", False), ("1234", True),
         ("", True), ("nonsense", True)]  # fmt: skip
"""Eleven; nobody agrees with the last one."""


def answer(source: str, *cases: tuple[str, Any]) -> str:
    """A model's answer, as it is asked for."""
    found = {"func": source, "cases": [{"input": i, "output": o} for i, o in cases]}
    return f"Here you are:\n```json\n{json.dumps(found, indent=2)}\n```\n"


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """``pipeline(rows, {stage}, …, kind=…, keep=…)``."""

    def write(
        given: list[dict[str, Any]],
        *stages: dict[str, Any],
        kind: str = "groups",
        keep: tuple[str, ...] = ("instruction",),
    ) -> Path:
        data = tmp_path / "given.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
        first = {"stage": "given", "path": str(data), "kind": kind, "keep": list(keep)}
        return write_pipeline(tmp_path / "p.yaml", [first, *stages], plugins=[GIVEN], shard_rows=8)

    return write


def answered(id_: str, *answers: str) -> dict[str, Any]:
    """A row as `sample` leaves it after `ask_checkers`."""
    responses = [{"text": text} for text in answers]
    return {"id": id_, "prompt": "ask", "instruction": "Be short.", "responses": responses}


# --- votes ---------------------------------------------------------------------------------------


def test_a_case_needs_one_function_and_a_function_its_share_of_the_kept_cases() -> None:
    """Case 2 has no friend. Of the other three: right in 3, in 1, in 2 (a vote that failed is wrong)."""
    votes = [[True, False, True, True], [False, False, True, False], [True, None, None, True]]
    found = cross_check(votes, [True, True, True, True])
    assert found.cases == (0, 2, 3)
    assert found.accuracies == (1.0, 1 / 3, 2 / 3)
    assert cross_check([[None]], [True]).accuracies == (0.0,)


def test_lines_that_fetch_are_taken_out() -> None:
    source = (
        "import requests\nimport nltk\nnltk.download('punkt')\ndef evaluate(r):\n    return True\n"
    )
    assert without_fetching(source) == "import nltk\ndef evaluate(r):\n    return True"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('```json\n{"func": "f", "cases": []}\n```', Proposal("f", ())),
        ('```json\n{}\n```\nBetter:\n```json\n{"func": "g"}\n```', Proposal("g", ())),
        (
            'Sure: {"func": "f", "cases": [{"input": "a", "output": "True"}]} ok',
            Proposal("f", (("a", True),)),
        ),
        ('{"func": "f\ng", "cases": 3}', Proposal("f\ng", ())),  # a line break inside a string
        (
            '{"func": "f", "cases": [{"input": 3, "output": true}, {"input": "a"}, '
            '{"input": "b", "output": false}]}',
            Proposal("f", (("b", False),)),
        ),
        ('```json\n{"func": "f", "cases": []}', Proposal("f", ())),  # cut, or its end forgotten
        ('~~~JSON\n{"func": "f", "cases": []}\n~~~', Proposal("f", ())),
        ('```json {"func": "f", "cases": []}```', Proposal("f", ())),
        ('```json\n{"func": "a\n```\nb", "cases": []}\n```', Proposal("a\n```\nb", ())),
        ("I cannot do that.", "no_json"),
        ("```json\n{'func': 1}\n```", "broken_json"),
        ('{"function": "f"}', "no_func"),
        ('["func"] {"func": null}', "no_func"),
    ],
)
def test_answers_are_read_or_have_a_reason(text: str, found: Proposal | str) -> None:
    assert read_proposal(text) == found


# --- the sandbox ---------------------------------------------------------------------------------


def test_only_a_truth_value_is_a_vote() -> None:
    def votes(value: str) -> Any:
        return run_checker(f"import numpy\ndef evaluate(r):\n    return {value}", ["x"], LIMITS)

    assert [votes(value) for value in ("True", "1", "numpy.bool_(True)")] == [[True]] * 3
    assert [votes(value) for value in ("False", "0", "0.0")] == [[False]] * 3
    assert [votes(value) for value in ("'true'", "None", "2", "[True]", "1/0")] == [[None]] * 5


def test_a_source_that_does_not_run_or_checks_nothing_is_no_checker() -> None:
    for source in ("def evaluate(r:", "raise ValueError", "x = 1"):
        assert run_checker(source, ["x"], LIMITS) is None
    assert run_checker("while True: pass", ["x"], HANGING) is None


@pytest.mark.parametrize("text", ["```python\n{}```", "Here:\n~~~\n{}", "{}```", "{}"])
def test_a_checker_may_stand_in_a_fence(text: str) -> None:
    source = 'def evaluate(r):\n    """\n    ```\n    evaluate("x")\n    ```\n    """\n    return r == "x"\n'
    assert run_checker(text.format(source), ["x", "y"], LIMITS) == [True, False]


def test_functions_beside_evaluate_are_seen_by_it() -> None:
    source = "def evaluate(r):\n    return double(r) == 'xx'\ndef double(r):\n    return r * 2"
    assert run_checker(source, ["x", "y"], LIMITS) == [True, False]


@pytest.mark.parametrize(
    "hang",
    [
        "while True: pass",
        "try:\n            __import__('time').sleep(9)\n        except: return True",
        "import re; re.match('(x+x+)+y', 'x' * 60)",
        "try:\n            __import__('time').sleep(9)\n        except: __import__('time').sleep(9)",
    ],
)
def test_a_call_that_hangs_is_no_vote_and_the_next_one_is(hang: str) -> None:
    source = f"def evaluate(r):\n    if r == 'hang':\n        {hang}\n    return True"
    assert run_checker(source, ["ok", "hang", "ok"], HANGING) == [True, None, True]


@pytest.mark.parametrize(
    "stay",
    [
        "__import__('os')._exit(0)",
        "while True:\n            try: __import__('time').sleep(9)\n            except: pass",
    ],
)
def test_a_checker_that_leaves_or_cannot_be_stopped_takes_its_further_votes_with_it(
    stay: str,
) -> None:
    source = f"def evaluate(r):\n    if r != 'ok':\n        {stay}\n    return True"
    assert run_checker(source, ["ok", "stay", "ok"], HANGING) == [True, None, None]


def test_what_a_checker_prints_is_no_vote() -> None:
    source = (
        "import os\ndef evaluate(r):\n    print('0 1'); os.write(1, b'0 1\\n')\n    return False"
    )
    assert run_checker(source, ["x"], LIMITS) == [False]


def attempt(deed: str) -> list[bool | None] | None:
    """The vote of a checker that says yes after a deed: None says that the deed failed."""
    return run_checker(f"def evaluate(r):\n    {deed}\n    return True", ["x"], LIMITS)


def test_a_checker_can_neither_call_out_nor_start_nor_end_a_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = server.getsockname()
        assert attempt(f"__import__('socket').create_connection({address!r})") == [None]
        with pytest.raises(TimeoutError):
            server.accept()
    assert attempt("__import__('subprocess').run(['true'])") == [None]
    assert attempt("__import__('os').kill(__import__('os').getppid(), 9)") == [None]
    assert attempt("pass") == [True]


def test_a_checker_cannot_write_here_where_the_kernel_has_landlock(tmp_path: Path) -> None:
    if not _has_landlock():
        pytest.skip("this kernel has no Landlock")
    tmp_path.chmod(0o777)
    assert attempt(f"open({str(tmp_path / 'mine')!r}, 'w').write('x')") == [None]
    assert list(tmp_path.iterdir()) == []


# --- the signal ----------------------------------------------------------------------------------


def test_the_score_is_the_mean_vote_of_those_who_voted() -> None:
    """ "ab": yes, yes, no, and one that raises: 2/3 of the votes, 2/4 of the checkers."""
    sources = [SHORT, [SHORTER, 1.0], UPPER, "def evaluate(r):\n    return 1 / 0"]
    group = candidates("ab", "ABCDEFG", "abcdefg", fields={"checkers": sources})
    signal = get_signal("checkers").fn()
    assert signal.score([group]) == [[2 / 3, 1 / 3, 0.0]]
    assert signal.report() == {"yes": 3.0, "no": 6.0, "failed": 3.0}
    strict = get_signal("checkers").fn(failed="wrong")
    assert strict.score([group]) == [[2 / 4, 1 / 4, 0.0]]


def test_nobody_voting_is_an_accuracy_of_0() -> None:
    assert accuracy([None, None]) == 0.0 == accuracy([])


def test_published_responses_to_a_checker_that_answers_in_words_score_0(shared_data: Path) -> None:
    """AutoIF's sample of 21 prompts: one checker, which returns the words 'true' and 'false' and is no verdict.

    The released code takes int() of what a checker returns, and leaves out what has none: 0 for all 168.
    """
    with gzip.open(shared_data / "misc" / "AutoIF_dpo_query_w_funcs.jsonl.gz", "rt") as lines:
        published = [json.loads(line) for line in lines]
    groups = [
        candidates(*each["gpt-answer"], fields={"checkers": each["eval_func"]})
        for each in published
    ]
    signal = get_signal("checkers").fn()
    assert signal.score(groups) == [[0.0] * 8] * 21
    assert signal.report() == {"yes": 0.0, "no": 0.0, "failed": 168.0}


# --- stages --------------------------------------------------------------------------------------


def test_what_agrees_is_kept_and_the_instruction_is_the_prompt_again(pipeline: Pipeline) -> None:
    """Three functions in five answers, one without JSON; ten cases are kept of eleven.

    UPPER says no to all ten, and four of them ("abcde" and what is longer) expect that: 0.4.
    """
    row = answered(
        "q",
        answer(SHORT, *CASES[:4]),
        answer(SHORTER, *CASES[3:8]),
        answer(UPPER, *CASES[8:]),
        "no JSON today",
        answer(SHORT, CASES[0]),
    )
    folder = build(pipeline([row], {"stage": "checkers"}))
    (found,) = rows(folder / "checkers")
    assert (found["prompt"], found["instruction"]) == ("Be short.", "Be short.")
    assert found["checkers"] == [SHORT, SHORTER]
    assert found["checker_accuracies"] == [1.0, 1.0]
    assert found["checker_cases"] == [list(case) for case in CASES[:-1]]
    assert found["checker_answers"] == {"no_json": 1, "read": 4}
    lenient = build(pipeline([row], {"stage": "checkers", "min_accuracy": 0.4}), "--from", "given")
    assert rows(lenient / "checkers")[0]["checker_accuracies"] == [1.0, 1.0, 0.4]


def test_instructions_without_enough_that_agrees_are_counted(pipeline: Pipeline) -> None:
    fine = [answer(SHORT, *CASES), answer(SHORTER), answer(UPPER)]
    broken = "def evaluate(r:"
    given = [
        answered("fine", *fine),
        answered("functions", answer(SHORT, *CASES), answer(SHORT), answer(broken), answer(UPPER)),
        answered("cases", answer(SHORT, *CASES[:9]), answer(SHORTER, *CASES[:9]), answer(UPPER)),
    ]
    folder = build(pipeline(given, {"stage": "checkers"}))
    assert [row["id"] for row in rows(folder / "checkers")] == ["fine"]
    assert counts(folder, "checkers")["dropped"] == {"too_few_cases": 1, "too_few_functions": 1}


def test_a_function_that_is_never_right_enough_is_out(pipeline: Pipeline) -> None:
    """Three functions, each right about its own five of fifteen cases: 1/3 each."""
    sources = [f"def evaluate(response):\n    return response[0] == {letter!r}" for letter in "abc"]
    cases = [(f"{letter}{n}", True) for letter in "abc" for n in range(5)]
    given = [
        answered("q", *(answer(source, *cases) for source in sources)),
        answered("fine", answer(SHORT, *CASES), answer(SHORTER), answer(UPPER)),
    ]
    folder = build(pipeline(given, {"stage": "checkers"}))
    assert counts(folder, "checkers")["dropped"] == {"no_accurate_function": 1}


def test_from_instructions_to_pairs_with_the_columns_each_stage_makes(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Everything but the sampling: an instruction is asked for; answered, it meets queries."""
    instructions = [{"id": "i", "prompt": [{"role": "user", "content": "Be short."}]}]
    path = pipeline(instructions, {"stage": "ask_checkers"}, kind="prompts", keep=())
    (asked,) = rows(build(path) / "ask_checkers")
    assert asked["instruction"] == "Be short."
    (turn,) = asked["prompt"]
    assert turn["role"] == "user" and "Be short." in turn["content"] and '"func"' in turn["content"]

    answers = [answer(SHORT, *CASES), answer(SHORTER), answer(UPPER)]
    queries = tmp_path / "queries.jsonl"
    texts = [f"What is the capital of country {n}?" for n in range(20)] + ["Too short?", "x" * 400]
    queries.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    stages = [
        {"stage": "checkers"},
        {"stage": "constrain", "queries": str(queries)},
    ]
    given = [{**asked, "responses": [{"text": text} for text in answers]}]
    folder = build(pipeline(given, *stages), "--from", "given")
    found = rows(folder / "constrain")
    assert [row["id"] for row in found] == [f"i#{n}" for n in range(16)]
    assert len({row["query"] for row in found} & set(texts[:20])) == 16
    for row in found:
        assert row["instruction"] in row["prompt"][0]["content"]
        assert row["query"] in row["prompt"][0]["content"]
        assert row["checkers"] == [SHORT, SHORTER]

    sampled = [
        {**row, "responses": [{"text": "yes"}, {"text": "no"}, {"text": "a long answer"}]}
        for row in found[:4]
    ]
    later = [
        {"stage": "score", "signals": [{"name": "checkers"}]},
        {"stage": "accepted_rejected"},
    ]
    path = pipeline(sampled, *later, keep=("checkers", "query", "instruction", "checker_cases"))
    folder = build(path, "--from", "given")
    pairs = rows(folder / "accepted_rejected")
    assert len(pairs) == 2 * 4
    assert {(row["chosen"], row["score_chosen"], row["score_rejected"]) for row in pairs} == {
        ("yes", 1.0, 0.0), ("no", 1.0, 0.0),
    }  # fmt: skip


def test_queries_drawn_are_the_same_whatever_the_shard(pipeline: Pipeline, tmp_path: Path) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text(
        "".join(f'{{"prompt": "Query number {n} of them all"}}\n' for n in range(50))
    )
    given = [{"id": f"i{n}", "prompt": "Be short."} for n in range(5)]
    stage = {"stage": "constrain", "queries": str(queries), "per_instruction": 3}
    path = pipeline(given, stage, kind="prompts", keep=())
    one = rows(build(path) / "constrain")
    assert one == rows(build(path, "--from", "given", "shard_rows=2") / "constrain")
    assert len({row["query"] for row in one}) > 3  # drawn anew for each instruction


def test_too_few_queries_are_an_error_with_their_number(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"prompt": "A query of more than twenty characters"}\n' * 3)
    stage = {"stage": "constrain", "queries": str(queries), "per_instruction": 3}
    given = [{"id": "i", "prompt": "Be short."}]
    told = refused(capsys, pipeline(given, stage, kind="prompts", keep=()), code=1)
    assert "has 1 distinct queries" in told and "per_instruction = 3" in told


def test_published_accuracies_give_the_pairs_of_the_published_rule(
    pipeline: Pipeline, shared_data: Path
) -> None:
    """AutoIF's sample of scored responses, by the rule: >= 0.5 against 0, up to two of each, all combinations.

    Counted by hand over the 20 rows: 3 accept all, 14 reject all, and three have one distinct accepted response
    (in one of them it was sampled twice), which meets two rejected ones each.
    """
    file = shared_data / "misc" / "AutoIF_dpo_query_eval_score_results.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        published = [json.loads(line) for line in lines]
    given = [
        {
            "id": f"q{number}",
            "prompt": each["query"],
            "responses": [{"text": text, "score": score} for text, score in each["response"]],
        }
        for number, each in enumerate(published)
    ]
    folder = build(pipeline(given, {"stage": "accepted_rejected"}, keep=()))
    pairs = rows(folder / "accepted_rejected")
    assert len(pairs) == 6
    assert counts(folder, "accepted_rejected")["dropped"] == {
        "none_accepted": 14,
        "none_rejected": 3,
    }
    accepted = {text for each in published for text, score in each["response"] if score >= 0.5}
    assert all(row["chosen"] in accepted and row["rejected"] not in accepted for row in pairs)
    assert len({(row["chosen"], row["rejected"]) for row in pairs}) == 6


def test_what_lies_between_and_equal_texts_are_in_no_pair(pipeline: Pipeline) -> None:
    scores = [("a", 1.0), ("a", 1.0), ("b", 0.5), ("c", 0.4), ("d", 0.0), ("e", 0.1), ("f", None)]
    row = {"id": "q", "prompt": "p", "responses": [{"text": t, "score": s} for t, s in scores]}
    folder = build(pipeline([row], {"stage": "accepted_rejected", "per_side": 5}, keep=()))
    found = [(pair["chosen"], pair["rejected"]) for pair in rows(folder / "accepted_rejected")]
    assert found == [("a", "d"), ("b", "d")]


def test_the_preset_is_a_sound_pipeline_once_it_has_its_files() -> None:
    pipeline = load_pipeline(PRESETS / "autoif.yaml")
    assert [each.spec.name for each in pipeline.stages] == [
        "prompts", "ask_checkers", "sample", "checkers", "constrain", "sample", "score", "accepted_rejected",
    ]  # fmt: skip


@pytest.mark.parametrize("body", ["[" * 5000, '{"func": "x\\ud83d", "cases": []}', "9" * 5000])
def test_an_answer_that_no_file_can_hold_is_broken_json(body: str) -> None:
    assert read_proposal(f"```json\n{body}\n```") == "broken_json"
