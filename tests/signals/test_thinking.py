"""What stands inside a model's thinking is no answer, for every verifier, judge and evaluation."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from eval.score import score_file
from prefopt.cli import main
from prefopt.data.render import Renderer
from prefopt.errors import ConfigError
from prefopt.recipe.entries import bind
from prefopt.recipe.registry import SIGNALS, get_signal
from prefopt.recipe.thinking import ThinkingTags, mark_at_end, tags_of
from prefopt.signals.combine import build_signals
from prefopt.signals.thinking import answer_of
from tests.pipelines.pipelines import build, rows, write_pipeline
from tests.signals.cases import candidates
from tests.signals.chat_server import Answer, chat_server
from tests.signals.readings import require_in_page, table
from tests.unit.tiny_tokenizers import make_tokenizer

READ = [
    ("42", "42"),
    ("<think>7?</think>42", "42"),
    ("<think>7?</think> 42 <think>surely?</think> Yes.", " 42  Yes."),
    ("7? No.</think>42", "42"),
    ("<think>7?</think>8?</think>42", "42"),
    ("<think><think>7?</think>42", "42"),
    ("<think>a <think>7?</think> b</think>42", "42"),
    ("<think>7?", None),
    ("<think>7?</think>42 <think>or 8", None),
    ("<think></think>42", "42"),
    ("<think>7?</think>", ""),
    ("<THINK>7?</Think>42", "42"),
    ("<thinking>7?</thinking>42", "42"),
    ("<thought>7?</thought>42", "42"),
    ("<reasoning>7?</reasoning>42", "42"),
    ("[THINK]7?[/THINK]42", "42"),
    ("<|begin_of_thought|>7?<|end_of_thought|>42", "42"),
    ("<seed:think>7?</seed:think>42", "42"),
    ("◁think▷7?◁/think▷42", "42"),
    ("<think>a <reasoning>7?</think>42", "42"),
    ('text.split("</think>")', 'text.split("</think>")'),
    ("Write `<think>` first.", "Write `<think>` first."),
    ("I think 42", "I think 42"),
]


@pytest.mark.parametrize(("text", "answer"), READ)
def test_the_answer_is_what_stands_outside_the_thinking(text: str, answer: str | None) -> None:
    assert answer_of(text) == answer


def test_the_page_says_what_is_read_as_an_answer() -> None:
    require_in_page("thinking", table(("response", "its answer"), READ))


def test_after_a_prompt_that_opens_the_thinking_only_an_end_begins_an_answer() -> None:
    assert answer_of("7?</think>42", opened="<think>") == "42"
    assert answer_of("Maybe 42", opened="<think>") is None
    assert answer_of("<think>7?</think>42", opened="<think>") == "42"
    assert answer_of("42", opened="</think>") == "42"


@pytest.mark.parametrize(
    ("rendered", "mark"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>"),
        ("<think>\n\n</think>\n\n", "</think>"),
        ("Answer within <think> tags.", ""),
        ("is 3 < 4?", ""),
        ("", ""),
    ],
)
def test_the_mark_at_the_end_of_a_rendered_prompt_is_found(rendered: str, mark: str) -> None:
    assert mark_at_end(rendered) == mark


def test_a_template_that_opens_the_thinking_is_seen_in_the_rendered_ids() -> None:
    opens = "{% if add_generation_prompt %}<think>\n{% endif %}"
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}" + opens
    renderer = Renderer(make_tokenizer(template))
    ids = renderer.prompt_ids([{"role": "user", "content": "Hi"}])
    assert renderer.opened_by(ids) == "<think>"


def test_own_marks_replace_the_usual_ones_and_null_reads_everything() -> None:
    own = tags_of(["[R]", "[/R]"])
    assert answer_of("[R]7?[/R]42", own) == "42"
    assert answer_of("<think>7?</think>42", own) == "<think>7?</think>42"
    assert answer_of("<think>7?", None) == "<think>7?"
    both = tags_of([["[R]", "[/R]"], ["<think>", "</think>"]])
    assert answer_of("[R]7?[/R]4<think>8</think>2", both) == "42"
    assert tags_of(None) is None and answer_of("<a>x</a>y", ThinkingTags("<a>", "</a>")) == "y"


@pytest.mark.parametrize(
    "value", ["<think>", [], ["<think>"], ["<t>", "<t>"], ["", "</t>"], [["<t>"]], {"a": 1}, 3]
)
def test_marks_that_are_no_pair_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r'must be \["<think>", "</think>"\]'):
        tags_of(value)


# What makes each verifier say 1: its column, and a right response. A new verifier needs a row.
RIGHT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "math": ({"num_workers": 1}, {"answer": "42"}, "\\boxed{42}"),
    "final_number": ({}, {"answer": "42"}, "42"),
    "exact_match": ({}, {"answer": "42"}, "42"),
    "multiple_choice": ({}, {"answer": "B"}, "(B)"),
    "regex": ({"pattern": "42"}, {}, "42"),
    "constraints": (
        {},
        {"constraints": [{"type": "keywords:existence", "args": {"keywords": ["rain"]}}]},
        "rain",
    ),
    "python_tests": ({}, {"tests": "assert f() == 1"}, "```python\ndef f(): return 1\n```"),
    "checkers": ({}, {"checkers": ["def evaluate(r): return 'rain' in r"]}, "rain"),
}


def test_every_signal_that_reads_answers_is_tried_here() -> None:
    reading = {name for name in SIGNALS if get_signal(name).reads_answer}
    known = {*RIGHT, "judge"}
    assert known <= reading, "a verifier of the list reads whole responses"
    assert {n for n in reading - known if get_signal(n).no_answer is None} == set()


@pytest.mark.parametrize("name", RIGHT)
def test_a_guess_inside_the_thinking_is_no_answer_of_any_verifier(name: str) -> None:
    keys, columns, right = RIGHT[name]
    group = candidates(
        f"<think>{right}</think> none",
        f"<think>none</think> {right}",
        f"<think>{right}",
        f"{right}</think> none",
        right,
        fields=columns,
    )
    signals = build_signals([bind("signals", {"name": name, **keys})])
    (found,) = signals.score([group])
    assert found.rewards == (0.0, 1.0, 0.0, 0.0, 1.0)
    assert signals.report()[f"{name}/no_answer"] == 1
    signals.close()


def test_null_reads_whole_responses_in_one_entry_and_not_in_the_next() -> None:
    entries = [
        {"name": "regex", "pattern": "(?s)<think>.+</think>", "thinking": None},
        {"name": "regex", "pattern": "cat"},
    ]
    signals = build_signals([bind("signals", each) for each in entries])
    (found,) = signals.score([candidates("<think>cat</think> dog", "<think>dog</think> cat")])
    assert found.parts == {"regex": (1.0, 1.0), "regex_2": (0.0, 1.0)}


def test_a_gold_answer_that_cannot_be_read_is_not_a_wrong_answer_of_one_that_thinks() -> None:
    signals = build_signals([bind("signals", {"name": "final_number"})])
    (found,) = signals.score([candidates("<think>4", "4", fields={"answer": "four"})])
    assert found.failed and all(map(math.isnan, found.parts["final_number"]))


def test_a_prompt_that_opened_the_thinking_is_told_by_response() -> None:
    from dataclasses import replace

    group = replace(candidates("42", "42", fields={"answer": "42"}), opened=("<think>", ""))
    (found,) = build_signals([bind("signals", {"name": "final_number"})]).score([group])
    assert found.rewards == (0.0, 1.0)


def test_a_judge_sees_answers_and_nothing_of_one_that_never_left_its_thinking(
    tmp_path: Path,
) -> None:
    seen: list[str] = []

    def judge(body: dict[str, Any]) -> Answer:
        text = body["messages"][0]["content"]
        seen.append(text)
        first = re.search(r"<answer_a>\n(.*?)\n</answer_a>", text, re.S)
        assert first is not None
        return Answer("[[B]]" if not first[1] else "[[A]]")

    with chat_server(judge) as server:
        entry = {
            "name": "judge",
            "base_url": server.base_url,
            "model": "m",
            "cache_dir": str(tmp_path),
        }
        signals = build_signals([bind("signals", entry)])
        (found,) = signals.score([candidates("<think>secret</think>yes", "<think>secret")])
    assert found.rewards == (1.0, 0.0)
    assert len(seen) == 2 and not any("secret" in text for text in seen)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"name": "regex", "pattern": r"<think>.*</think>"}, r"pattern.*looks for <think>.*thinking: null"),
        ({"name": "exact_match", "extract": r"\[/THINK\](.*)"}, r"extract.*looks for \[/THINK\]"),
        ({"name": "final_number", "thinking": "<think>"}, r'thinking.*must be \["<think>"'),
        ({"name": "length_penalty", "thinking": None}, r"thinking.*belongs to .*'math' or 'multiple_choice'"),
    ],
)  # fmt: skip
def test_a_setting_of_thinking_that_cannot_be_meant_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entry: dict[str, Any], said: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "answer": "1", "r": [{"text": "1"}]}\n')
    path = _pipeline(tmp_path, entry)
    assert main(["data", "build", str(path)]) != 0
    assert re.search(said, capsys.readouterr().err)


def test_a_pipeline_scores_answers_with_the_usual_marks_and_with_its_own(tmp_path: Path) -> None:
    texts = ["<think>1</think> 2", "<think>2</think> 1", "<think>1", "<plan>2</plan> 1"]
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"prompt": "p", "answer": "1", "r": [{"text": t} for t in texts]})
    )
    path = _pipeline(
        tmp_path,
        {"name": "regex", "pattern": "^ ?1$"},
        {"name": "regex", "pattern": "^ ?1$", "thinking": ["<plan>", "</plan>"]},
    )
    (row,) = rows(build(path) / "score")
    assert [each["scores"]["regex"] for each in row["responses"]] == [0, 1, 0, 0]
    assert [each["scores"]["regex_2"] for each in row["responses"]] == [0, 0, 0, 1]


@pytest.mark.parametrize(("options", "right"), [({}, 1), ({"thinking": None}, 3)])
def test_files_to_score_are_read_without_their_thinking(
    tmp_path: Path, options: dict[str, Any], right: int
) -> None:
    texts = ["<think>8</think>#### 7", "<think>#### 7", "<think>8? no.</think>#### 7</think>"]
    path = tmp_path / "r.jsonl"
    lines = [{"question": str(n), "answer": "#### 7", "response": t} for n, t in enumerate(texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = score_file("gsm8k", path, options)
    assert result["n_correct"] == right
    assert result.get("num_unended_thinking", 0) == (0 if options else 1)


def test_marks_where_a_file_has_judgments_and_no_responses_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="thinking = None: would be ignored"):
        score_file("mt_bench", tmp_path / "r.jsonl", {"thinking": None})


def _pipeline(folder: Path, *signals: dict[str, Any]) -> Path:
    rated = {
        "stage": "rated",
        "sources": [{"path": str(folder / "rows.jsonl"), "format": "text"}],
        "responses": {"column": "r"},
        "keep": ["answer"],
    }
    return write_pipeline(folder / "p.yaml", [rated, {"stage": "score", "signals": list(signals)}])
