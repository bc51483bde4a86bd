"""MT-Bench: published averages from published judgments, and rated runs over real HTTP."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from eval.base import Answer, Conversation, Example, Row
from eval.judging import Asked, judge_all, judgments, open_judge
from eval.registry import make_task
from eval.score import score_file
from eval.settings import JudgeSection
from eval.store import Store
from eval.tasks._mt_bench_rows import read_rating
from prefopt.errors import ConfigError, DataError
from tests.signals import chat_server
from tests.signals.chat_server import ChatServer

FILES = (
    "judgments_mamba_dpo_ep1",
    "judgments_vicuna_medusa",
    "judgments_llama2_7b_chat_with_failures",
)
SIMPO_REFERENCES = "reference_answer_gpt-4-1106-preview_SimPO_fixed.jsonl"


@pytest.fixture(scope="session")
def mt_bench(shared_data: Path) -> Path:
    return shared_data / "mt_bench"


def rows_of(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def judgment(question: int, turn: int, score: float | None, **more: Any) -> dict[str, Any]:
    text = "no rating here" if score in (-1, None) else f"Rating: [[{score}]]"
    row = {"question_id": question, "model": "m", "turn": turn, "score": score, "judgment": text}
    return row | more


def score(path: Path, **options: Any) -> dict[str, Any]:
    return score_file("mt_bench", path, options)


@pytest.mark.parametrize("name", FILES)
def test_published_judgments_give_the_published_averages(mt_bench: Path, name: str) -> None:
    expected = json.loads((mt_bench / "expected.json").read_text())[name]
    found = score(mt_bench / f"{name}.jsonl.gz")["models"]
    assert set(found) == set(expected)
    for model, numbers in expected.items():
        ours = found[model]
        for key in ("first_turn", "second_turn", "average"):
            assert ours[key] == pytest.approx(numbers[key], abs=5.1e-5), (model, key)
        for key in ("n_valid", "n_failed_minus1"):
            assert ours[key] == numbers[key], (model, key)
        if numbers["published_average"] is not None:
            assert ours["average"] == pytest.approx(numbers["published_average"], abs=5e-3)
        assert "notes" not in ours  # every stored score is the one in its text


@pytest.mark.parametrize("name", FILES)
def test_every_published_score_is_read_in_its_text(mt_bench: Path, name: str) -> None:
    for row in rows_of(mt_bench / f"{name}.jsonl.gz"):
        assert (read_rating(row["judgment"]) or -1) == row["score"], row["question_id"]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[8.5]] and later [[3]]", 8.5),
        ("first [3], then [[9]]", 9.0),
        ("Rating: [6]", 6.0),
        ("[[nine]]", None),
        ("7/10", None),
    ],
)
def test_ratings_are_the_first_in_double_else_single_brackets(
    text: str, rating: float | None
) -> None:
    assert read_rating(text) == rating


def test_shuffled_rows_give_the_same_numbers(mt_bench: Path, tmp_path: Path) -> None:
    rows = rows_of(mt_bench / f"{FILES[2]}.jsonl.gz")
    straight = score(write(tmp_path / "rows.jsonl", rows))
    random.Random(0).shuffle(rows)
    (tmp_path / "shuffled").mkdir()
    shuffled = score(write(tmp_path / "shuffled" / "rows.jsonl", rows))
    assert json.dumps(shuffled, sort_keys=True) == json.dumps(straight, sort_keys=True)


def test_averages_weigh_ratings_and_errors_cluster_by_question(tmp_path: Path) -> None:
    """Ratings {1, 3} and {5}: mean 3 (not (2 + 5)/2), error sqrt(2 · (2² + 2²))/3 = 4/3."""
    rows = [judgment(81, 1, 1), judgment(81, 2, 3), judgment(91, 1, 5), judgment(91, 2, -1)]
    found = score(write(tmp_path / "j.jsonl", rows))
    assert found["average"] == 3
    assert found["average_standard_error"] == pytest.approx(4 / 3)
    assert (found["first_turn"], found["second_turn"]) == (3, 3)
    assert (found["n"], found["n_valid"], found["n_failed_minus1"]) == (2, 3, 1)
    assert found["groups"] == {"roleplay": {"average": 5.0}, "writing": {"average": 2.0}}
    assert found["notes"] == ["156 of 160 turns have no judgment: the mean is that of the others"]


def test_null_scores_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [judgment(81, 1, 4), judgment(81, 2, None, judgment=None)]
    found = score(write(tmp_path / "j.jsonl", rows))
    assert (found["average"], found["n_valid"], found["n_null_score"]) == (4, 1, 1)
    assert found["n_failed_minus1"] == 0
    with pytest.raises(DataError, match="no answer has a rating"):
        score(write(tmp_path / "k.jsonl", rows[1:]))


def test_stored_scores_that_their_text_does_not_hold_are_said(tmp_path: Path) -> None:
    rows = [judgment(81, 1, 4, judgment="[[5]]"), judgment(81, 2, -1, judgment="[[5]]")]
    found = score(write(tmp_path / "j.jsonl", rows))
    assert found["average"] == 4  # as published: the stored one
    assert any(note.startswith("2 stored scores are not the rating") for note in found["notes"])


def test_ratings_out_of_range_count_as_published_and_are_said(tmp_path: Path) -> None:
    found = score(write(tmp_path / "j.jsonl", [judgment(81, 1, 100), judgment(81, 2, 10)]))
    assert found["average"] == 55
    assert "1 ratings are outside 1 to 10; they count, as published" in found["notes"]


def test_a_turn_judged_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    rows = [judgment(81, 1, 4), judgment(81, 2, 4), judgment(81, 1, 5)]
    with pytest.raises(DataError, match=r"j\.jsonl:3: a second judgment .*j\.jsonl:1"):
        score(write(tmp_path / "j.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (judgment(81, 3, 4), "turn = 3: must be 1 or 2"),
        ({"question_id": 81, "turn": 1, "g1_winner": "tie"}, "column 'score' is missing"),
        (judgment(81, 1, 4) | {"score": "4"}, "score = '4': must be a number"),
        ({"turn": 1, "score": 4}, "'question_id' is missing"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"j\.jsonl:1: .*{message}"):
        score(write(tmp_path / "j.jsonl", [row]))


def test_categories_of_published_ids_are_those_of_the_question_file(mt_bench: Path) -> None:
    """Without a question file, categories come from the known numbering."""
    path, data = mt_bench / f"{FILES[0]}.jsonl.gz", str(mt_bench / "question.jsonl")
    assert score(path) == score(path, data=data)
    assert len(score(path)["models"]["mamba_0_5_dpo_ep1"]["groups"]) == 8


def test_questions_that_are_not_in_the_question_file_are_refused(
    mt_bench: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "j.jsonl", [judgment(200, 1, 4)])
    assert "groups" not in score(path)
    with pytest.raises(DataError, match=r"question 200 is not in tasks\.mt_bench\.data"):
        score(path, data=str(mt_bench / "question.jsonl"))


# --- rated runs


@pytest.fixture
def options(mt_bench: Path) -> dict[str, str]:
    return {
        "data": str(mt_bench / "question.jsonl"),
        "reference": str(mt_bench / SIMPO_REFERENCES),
    }


def test_examples_are_the_published_questions_with_their_temperatures(
    options: dict[str, str],
) -> None:
    task = make_task("mt_bench", options)
    examples = task.examples()
    published = rows_of(Path(options["data"]))
    assert [(e.key, e.prompt[0]["content"], *e.further_turns) for e in examples] == [
        (str(row["question_id"]), *row["turns"]) for row in published
    ]
    found = Counter(
        (e.fields["category"], task.decoding(e).temperature, task.decoding(e).max_new_tokens)
        for e in examples
    )
    cold = ("reasoning", "math", "coding", "extraction")
    warm = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    assert found == {
        (name, t, 1024): 10 for name, t in {**dict.fromkeys(cold, 0.0), **warm}.items()
    }


def test_a_missing_reference_is_found_before_anything_is_generated(
    options: dict[str, str], tmp_path: Path
) -> None:
    partial = write(tmp_path / "ref.jsonl", rows_of(Path(options["reference"]))[1:])
    with pytest.raises(
        ConfigError, match=r"1 questions of math, reasoning or coding .* e\.g\. 101"
    ):
        make_task("mt_bench", {**options, "reference": str(partial)}).examples()
    with pytest.raises(ConfigError, match="30 questions"):
        make_task("mt_bench", {"data": options["data"]}).examples()


def run(
    task: Any,
    samples: dict[str, Conversation],
    answer: Callable[[dict[str, Any]], chat_server.Answer],
    folder: Path,
) -> tuple[list[Row], ChatServer]:
    """Questions, judgments and rows of these examples, over HTTP, as the runner does it."""
    examples: list[Example] = [each for each in task.examples() if each.key in samples]
    with chat_server.chat_server(answer) as server:
        section = JudgeSection(
            base_url=server.base_url, model="judge", cache_dir=str(folder / "cache"), concurrency=1
        )
        client = open_judge(section, task.judge_sampling)
        questions = {e.key: task.questions(e, [samples[e.key]], None) for e in examples}
        asked = [Asked(key, question) for key, each in questions.items() for question in each]
        with Store(folder / "judgments.jsonl", {}) as store:
            judge_all(task, asked, client, store, label="test")
            rows = [
                task.row(e, [samples[e.key]], judgments(store, e.key, questions[e.key]))
                for e in examples
            ]
    return rows, server


ANSWERS: dict[str, Conversation] = {
    "81": (Answer("aloha {question_2}"), Answer("again aloha")),
    "101": (Answer("second place"), Answer("impossible")),
}


def test_each_turn_is_rated_once_with_what_it_needs(
    options: dict[str, str], tmp_path: Path
) -> None:
    """The published prompts, filled as in the published judgments of the same questions."""

    def judge(body: dict[str, Any]) -> chat_server.Answer:
        second = "Assistant A:\n" in body["messages"][1]["content"]
        return chat_server.Answer("Rating: [[4]]" if second else "Rating: [[9]]")

    prompts = Path(options["data"]).with_name("judge_prompts.jsonl")
    task = make_task("mt_bench", {**options, "template": str(prompts)})
    assert task.template.origin == "judge_prompts.jsonl"
    rows, server = run(task, ANSWERS, judge, tmp_path)
    values = [dict(row.values) for row in rows]
    assert values == [{"average": 6.5, "first_turn": 9.0, "second_turn": 4.0}] * 2
    assert (server.requests[0]["temperature"], server.requests[0]["max_tokens"]) == (0, 2048)
    texts = [[m["content"] for m in body["messages"]] for body in server.requests]
    assert len(texts) == 4
    assert texts[0][0] == "You are a helpful assistant."
    assert "[The Start of Assistant's Answer]\naloha {question_2}\n" in texts[0][1]
    assert "### Assistant A:\naloha {question_2}\n\n### User:\nRewrite your" in texts[1][1]
    reference = json.loads(Path(options["reference"]).read_text().splitlines()[0])
    first, second = reference["choices"][0]["turns"]
    assert f"[The Start of Reference Answer]\n{first}\n[The End" in texts[2][1]
    assert f"### Reference answer:\n{second}\n\n<|The End" in texts[3][1]
    assert "Reference" not in texts[0][1] + texts[1][1]


def test_prompts_are_filled_exactly_as_in_published_judgments(
    mt_bench: Path, options: dict[str, str]
) -> None:
    """A published judge prompt holds question and answers; put back in, they give the same text."""
    prompts = str(mt_bench / "judge_prompts.jsonl")
    task = make_task("mt_bench", {**options, "template": prompts})
    examples = {example.key: example for example in task.examples()}
    checked = 0
    for row in rows_of(mt_bench / f"{FILES[2]}.jsonl.gz"):
        if row["judge"][1] != "single-v1-multi-turn" or row["question_id"] > 90:
            continue
        body = row["user_prompt"].split("### Assistant A:\n")
        first = body[1].split("\n\n### User:\n")[0]
        second = body[2].removesuffix("\n\n<|The End of Assistant A's Conversation with User|>")
        conversation = (Answer(first), Answer(second))
        asked = task.questions(examples[str(row["question_id"])], [conversation], None)[1]
        assert asked.messages[1]["content"] == row["user_prompt"]
        checked += 1
    assert checked == 20


def test_our_own_prompts_hold_questions_answers_and_references(
    options: dict[str, str], tmp_path: Path
) -> None:
    task = make_task("mt_bench", options)
    assert task.template.origin == "prefopt"
    _, server = run(task, ANSWERS, lambda _: chat_server.Answer("[[5]]"), tmp_path)
    texts = [body["messages"][1]["content"] for body in server.requests]
    reference = json.loads(Path(options["reference"]).read_text().splitlines()[0])
    first, second = reference["choices"][0]["turns"]
    assert [first in text for text in texts] == [False, False, True, True]
    assert [second in text for text in texts] == [False, False, False, True]
    assert ["again aloha" in text for text in texts] == [False, True, False, False]
    assert ["aloha {question_2}" in text for text in texts] == [True, True, False, False]
    assert all("[[5]]" in body["messages"][0]["content"] for body in server.requests)


def test_unread_refused_and_missing_answers_are_counted(
    options: dict[str, str], tmp_path: Path
) -> None:
    """81: turn 2 has no rating, and is asked once. 82: both refused. 83: the answers are not there."""

    def judge(body: dict[str, Any]) -> chat_server.Answer:
        text = body["messages"][1]["content"]
        if "refused" in text:
            return chat_server.Answer(status=400)
        return chat_server.Answer("good" if "again" in text else "Rating: [[1]]")

    nothing = Answer("", problem="null_response")
    samples = {
        "81": ANSWERS["81"],
        "82": (Answer("refused"), Answer("refused")),
        "83": (nothing, nothing),
    }
    task = make_task("mt_bench", options)
    rows, server = run(task, samples, judge, tmp_path)
    assert len(server.requests) == 6
    counts = task.summarise(rows).counts
    assert (counts["n"], counts["n_valid"], counts["n_failed_minus1"]) == (3, 3, 1)
    assert counts["n_judge_refused"] == 2
    assert (
        counts["num_null_response"] == counts["num_judge_refused"] == counts["num_no_rating"] == 1
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "has no prompt named single-v1;"),
        ({"prompt_template": "only {question}"}, "the prompt single-v1 lacks {answer}"),
    ],
)
def test_a_template_that_cannot_work_is_refused(
    mt_bench: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    rows = rows_of(mt_bench / "judge_prompts.jsonl")
    for row in rows:
        if row["name"] == "single-v1":
            row |= change
    path = write(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        make_task("mt_bench", {"template": str(path)})


def test_a_question_must_have_one_or_two_turns(tmp_path: Path) -> None:
    row = {"question_id": 1, "category": "writing", "turns": ["a", "b", "c"]}
    path = write(tmp_path / "q.jsonl", [row])
    with pytest.raises(DataError, match=r"q\.jsonl:1: turns must be a list of one or two texts"):
        make_task("mt_bench", {"data": str(path)}).examples()


def test_a_question_of_one_turn_is_rated_once(tmp_path: Path) -> None:
    row = {"question_id": 1, "category": "cooking", "turns": ["Boil an egg."]}
    task = make_task("mt_bench", {"data": str(write(tmp_path / "q.jsonl", [row]))})
    rows, server = run(
        task, {"1": (Answer("Boil."),)}, lambda _: chat_server.Answer("[[8]]"), tmp_path
    )
    summary = task.summarise(rows)
    assert len(server.requests) == 1
    assert set(summary.metrics) == {"average", "first_turn"}
    assert (summary.metrics["average"].value, summary.notes) == (8, ())
    assert task.decoding(task.examples()[0]).temperature == 0.7


def test_a_model_judged_twice_is_no_reason_not_to_score_another(tmp_path: Path) -> None:
    """Two judges' files joined: that model has no number, the others have theirs, and the error says so."""
    both = [{"model": "twice", "turn": turn, "question_id": 81, "score": 3} for turn in (1, 2)]
    rows = [*both, {**both[0], "judge": "another"}, {**both[0], "model": "other", "score": 9}]
    path = write(tmp_path / "j.jsonl", rows)
    assert score_file("mt_bench", path, {}, model="other")["average"] == 9
    with pytest.raises(DataError, match=r"j\.jsonl:3: .*j\.jsonl:1 .*: --model other$"):
        score_file("mt_bench", path, {})
    with pytest.raises(DataError, match=r"j\.jsonl:3: a second judgment of twice"):
        score_file("mt_bench", path, {}, model="twice")
