"""What a model thinks is no answer in an evaluation that runs whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.base import Answer
from eval.engines import answer_from, answer_record
from eval.registry import TASKS, get_task
from eval.responses import UNENDED, Answered
from prefopt.cli import main
from prefopt.recipe.thinking import DEFAULT_TAGS
from tests.eval.runs import problems, read_jsonl, write_chat_model, write_jsonl
from tests.unit.tiny_tokenizers import CHATML

OPENED = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")


def test_a_template_that_opens_the_thinking_leaves_a_random_model_without_any_answer(
    tmp_path: Path,
) -> None:
    """It never says </think>. With `thinking: null` its babble is read as it stands; nothing is generated anew."""
    model = write_chat_model(tmp_path / "model", chat=OPENED)
    data = write_jsonl(tmp_path / "problems.jsonl", problems(4))
    arguments = ["--tasks", "gsm8k", f"tasks.gsm8k.data={data}", "tasks.gsm8k.max_new_tokens=4"]
    out = tmp_path / "out"
    assert main(["eval", str(model), *arguments, "--output", str(out)]) == 0
    entry = json.loads((out / "results.json").read_text())["tasks"]["gsm8k"]
    assert entry["counts"][f"num_{UNENDED}"] == 4 and entry["thinking"][0] == [
        "<think>",
        "</think>",
    ]
    assert (
        read_jsonl(out / "gsm8k" / "generations.jsonl")[1]["samples"][0][0]["opened"] == "<think>"
    )

    said = main(["eval", str(model), *arguments, "thinking=null", "--output", str(out)])
    assert said != 0, "rows that were scored otherwise are not mixed with these"
    (out / "gsm8k" / "rows.jsonl").unlink()
    assert main(["eval", str(model), *arguments, "thinking=null", "--output", str(out)]) == 0
    entry = json.loads((out / "results.json").read_text())["tasks"]["gsm8k"]
    assert f"num_{UNENDED}" not in entry["counts"] and entry["thinking"] is None


def test_every_turn_of_every_sample_is_given_to_a_task_as_its_answer() -> None:
    samples = {
        "q": [
            (Answer("<think>a</think>b"), Answer("<think>c")),
            (Answer("d"), Answer("", problem="prompt_too_long")),
        ]
    }
    found = Answered(samples, DEFAULT_TAGS)["q"]
    assert [[each.text for each in turns] for turns in found] == [["b", ""], ["d", ""]]
    assert [[each.problem for each in turns] for turns in found] == [
        [None, UNENDED],
        [None, "prompt_too_long"],
    ]
    assert Answered(samples, None)["q"] == samples["q"]


def test_what_the_prompt_opened_is_stored_with_the_answer() -> None:
    for answer in (Answer("a", 1, opened="<think>"), Answer("a", 1)):
        assert answer_from(answer_record(answer)) == answer


@pytest.mark.parametrize("name", sorted(TASKS))
def test_only_tasks_that_say_so_are_given_whole_responses(name: str) -> None:
    assert get_task(name).whole_responses == (name in {"signals", "diversity"})
