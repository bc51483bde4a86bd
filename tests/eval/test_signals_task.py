"""The signals task: means by hand, prompts of every shape, and what cannot be scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.base import Answer, Example, Row
from eval.registry import make_task
from prefopt.errors import ConfigError, DataError, SignalError
from tests.eval.runs import write_jsonl
from tests.signals.chat_server import Answer as Reply
from tests.signals.chat_server import chat_server

SUMS = [
    {"prompt": "1 + 2?", "answer": "3", "kind": "small"},
    {"prompt": "20 + 30?", "answer": "50", "kind": "large"},
]
NUMBER = {"name": "final_number"}


def _task(tmp_path: Path, rows: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    data = str(write_jsonl(tmp_path / "prompts.jsonl", rows))
    return make_task("signals", {"data": data, "signals": [NUMBER], **options})


def _answer(text: str, *, ended: bool = True, ids: tuple[int, ...] | None = None) -> Answer:
    return Answer(text, None if ids is None else len(ids), ended, ids)


def _row(task: Any, example: Example, *answers: Answer) -> Row:
    return task.row(example, [(answer,) for answer in answers], {})


def test_reward_is_the_weighted_mean_and_every_prompt_counts_once(tmp_path: Path) -> None:
    """2 · [right] - 0.5 · tokens: prompt one has 1.0, -1.5 (mean -0.25), prompt two has 1.5.

    Mean 0.625 over prompts; standard error of (-0.25, 1.5) is 1.75 / 2 = 0.875.
    """
    penalty = {"name": "length_penalty", "weight": 1.0, "per_token": 0.5}
    task = _task(tmp_path, SUMS, signals=[{**NUMBER, "weight": 2.0}, penalty], samples=2)
    first, second = task.examples()
    rows = [
        _row(task, first, _answer("3", ids=(5, 6)), _answer("4", ids=(5, 6, 7), ended=False)),
        _row(task, second, _answer("50", ids=(5,))),
    ]
    assert rows[0].values["reward"] == pytest.approx((1.0 - 1.5) / 2)
    summary = task.summarise(rows)
    assert summary.metrics["reward"].value == pytest.approx(0.625)
    assert summary.metrics["reward"].stderr == pytest.approx(0.875)
    assert summary.metrics["signals/final_number"].value == pytest.approx(0.75)
    assert summary.metrics["signals/length_penalty"].value == pytest.approx(-(1.25 + 0.5) / 2)
    assert summary.metrics["length_tokens"].value == pytest.approx((2.5 + 1) / 2)
    assert summary.metrics["ended"].value == pytest.approx(75)
    assert summary.counts == {"n": 2, "n_scored": 2}


def test_prompt_that_a_signal_cannot_score_is_left_out_counted_and_said(tmp_path: Path) -> None:
    rows = [{**SUMS[0], "answer": "none"}, SUMS[1]]  # no number: the gold answer cannot be read
    task = _task(tmp_path, rows)
    scored = [_row(task, example, _answer("50")) for example in task.examples()]
    summary = task.summarise(scored)
    assert summary.metrics["reward"].value == 1.0
    assert summary.counts == {"n": 2, "n_scored": 1, "num_signal_failed": 1}
    assert "1 prompts left out: final_number: not finite" in summary.notes[0]


def test_prompt_without_an_answer_is_not_scored_but_counted(tmp_path: Path) -> None:
    task = _task(tmp_path, SUMS)
    first, second = task.examples()
    rows = [
        _row(task, first, Answer("", problem="prompt_too_long")),
        _row(task, second, _answer("50")),
    ]
    assert task.summarise(rows).counts == {"n": 2, "n_scored": 1, "num_prompt_too_long": 1}


def test_nothing_scored_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    task = _task(tmp_path, [{**SUMS[0], "answer": "none"}])
    rows = [_row(task, task.examples()[0], _answer("3"))]
    with pytest.raises(DataError, match="no prompt of 1 has a reward: 1 × final_number"):
        task.summarise(rows)


def test_signal_that_reads_ids_is_refused_for_answers_without_them(tmp_path: Path) -> None:
    task = _task(tmp_path, SUMS, signals=[{"name": "repetition_penalty"}])
    with pytest.raises(
        SignalError, match="reads the token ids of an answer that came without them"
    ):
        _row(task, task.examples()[0], _answer("3"))


def test_signal_that_reads_the_prompts_ids_is_refused_at_once(tmp_path: Path) -> None:
    section = {"name": "implicit_reward", "path": "some/model"}
    with pytest.raises(
        ConfigError, match=r"signals\.0\.name = 'implicit_reward': .* pair_accuracy"
    ):
        _task(tmp_path, SUMS, signals=[section])


def test_plugin_that_reads_the_prompts_ids_is_refused_when_it_does(tmp_path: Path) -> None:
    (tmp_path / "prompt_length.py").write_text(
        "from prefopt.recipe.registry import signal\n"
        "class _Length:\n"
        "    def score(self, groups):\n"
        "        return [[float(len(g.prompt.ids)) for _ in g.texts] for g in groups]\n"
        "    def close(self): pass\n"
        '@signal("prompt_length", source="this test")\n'
        "def prompt_length(): return _Length()\n"
    )
    task = _task(
        tmp_path,
        SUMS,
        signals=[{"name": "prompt_length"}],
        plugins=[str(tmp_path / "prompt_length.py")],
    )
    with pytest.raises(SignalError, match="reads the token ids of the prompt"):
        _row(task, task.examples()[0], _answer("3", ids=(1,)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signals": []}, r"tasks\.signals\.signals is empty"),
        ({"signals": [{"name": "final_numbre"}]}, "did you mean 'final_number'"),
        ({"signals": [{"name": "math", "timeout": 3.0}]}, r"signals\.0\.timeout: unknown key"),
        ({"signals": [{"name": "math", "timeout_s": -1.0}]}, r"signals\.0\.timeout_s = -1\.0"),
        ({"signals": [{"weight": 1.0}]}, r"signals\.0\.name is missing"),
        ({"plugins": ["nowhere.py"]}, r"tasks\.signals\.plugins = 'nowhere\.py': no such"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _task(tmp_path, SUMS, **options)


def test_missing_column_of_a_signal_is_refused_with_the_line(tmp_path: Path) -> None:
    task = _task(tmp_path, [SUMS[0], {"prompt": "2 + 2?"}])
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: no column 'answer'"):
        task.examples()


def test_empty_prompt_is_refused_with_its_line(tmp_path: Path) -> None:
    task = _task(tmp_path, [SUMS[0], {"prompt": " ", "answer": "3"}])
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: no prompt to answer: empty_prompt"):
        task.examples()


def test_repeated_row_is_refused_and_an_id_column_names_examples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: a second row"):
        _task(tmp_path, [SUMS[0], SUMS[0]]).examples()
    rows = [{**SUMS[0], "id": "a"}, {**SUMS[0], "id": "b"}]
    assert [each.key for each in _task(tmp_path, rows, id="id").examples()] == ["a", "b"]


def test_prompts_are_read_as_a_recipe_reads_them(tmp_path: Path) -> None:
    """Strings stay text unless ``format: chat`` makes turns; message lists lose the answer they end with."""
    text = _task(tmp_path, SUMS).examples()[0]
    assert text.prompt == "1 + 2?" and text.fields == {"answer": "3", "kind": "small"}
    chat = _task(tmp_path, SUMS, format="chat", system="kind").examples()[0]
    assert chat.prompt == (
        {"role": "system", "content": "small"},
        {"role": "user", "content": "1 + 2?"},
    )
    turns = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "3"}]
    row = {"messages": turns, "answer": "3"}
    assert _task(tmp_path, [row]).examples()[0].prompt == (turns[0],)


def test_judge_rates_the_answers_of_a_model(tmp_path: Path) -> None:
    """[[4]] for one answer and [[9]] for the other: mean 6.5."""

    def rate(request: dict[str, Any]) -> Reply:
        return Reply("[[9]]" if "I think" in request["messages"][-1]["content"] else "[[4]]")

    with chat_server(rate) as server:
        judge = {"name": "judge", "mode": "pointwise", "base_url": server.base_url, "model": "m"}
        section = {**judge, "cache_dir": str(tmp_path / "cache")}
        task = _task(tmp_path, SUMS, signals=[section], samples=2)
        row = _row(task, task.examples()[0], _answer("3, I think"), _answer("3"))
        task.close()
    assert row.values["reward"] == 6.5
    with pytest.raises(
        ConfigError, match=r"signals\.0\.mode = 'pairwise': .* 0\.5 for every model"
    ):
        _task(tmp_path, SUMS, signals=[{**judge, "mode": "pairwise"}])


def test_tasks_side_by_side_have_means_over_their_own_rows(tmp_path: Path) -> None:
    """One of two sums is right: 0.5. The one greeting greets: 1. The mean over the three prompts is 2/3."""
    rows = [*SUMS, {"prompt": "Hi!", "answer": None, "kind": "talk"}, {"prompt": "Rhyme!"}]
    signals = [
        {**NUMBER, "only_where": "answer"},
        {"name": "regex", "pattern": "hello", "only_where": {"kind": "talk"}},
    ]
    task = _task(tmp_path, rows, signals=signals)
    texts = ("3", "51", "hello", "moon")
    found = [_row(task, e, _answer(t)) for e, t in zip(task.examples(), texts, strict=True)]
    assert set(found[2].values) & {"signals/final_number", "signals/regex"} == {"signals/regex"}
    summary = task.summarise(found)
    assert summary.metrics["signals/final_number"].value == pytest.approx(0.5)
    assert summary.metrics["signals/regex"].value == pytest.approx(1.0)
    assert summary.metrics["reward"].value == pytest.approx(2 / 3)
    assert summary.counts == {"n": 4, "n_scored": 3, "num_no_signal": 1}
    assert "no signal" in summary.notes[0] or "no_signal" in summary.notes[0]


def test_the_data_files_name_is_its_source(tmp_path: Path) -> None:
    here = [{**NUMBER, "only_where": {"source": "prompts"}}]
    task = _task(tmp_path, SUMS, signals=here)
    found = [_row(task, example, _answer("3")) for example in task.examples()]
    assert [row.values["reward"] for row in found] == [1.0, 0.0]
