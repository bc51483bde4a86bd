"""Arena-Hard: published scores from published battles and judgments, and judged runs over real HTTP."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.base import Answer, Conversation, Example, Row
from eval.judging import Asked, judge_all, judgments, open_judge
from eval.registry import make_task
from eval.score import score_file
from eval.settings import JudgeSection
from eval.store import Store
from eval.tasks.arena_hard import last_label, only_label
from prefopt.errors import ConfigError, DataError
from tests.signals import chat_server
from tests.signals.chat_server import ChatServer

BATTLES = ("battles_official_gpt4-1106-preview_judge", "battles_gpt4o_judge_20240806")
RAW = "raw_judgments_Llama-3-Base-8B-TR_KTO-Alpha_0.6"


@pytest.fixture(scope="session")
def arena(shared_data: Path) -> Path:
    return shared_data / "arena_hard"


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def judged(question: str, *labels: str | None, **more: Any) -> dict[str, Any]:
    games = [{"score": label, "judgment": f"So: [[{label}]]"} for label in labels]
    return {"question_id": question, "model": "m", "games": games, **more}


def score(path: Path, name: str = "arena_hard", **options: Any) -> dict[str, Any]:
    return score_file(name, path, options)


@pytest.mark.parametrize("name", BATTLES)
def test_published_battles_give_the_published_scores_and_intervals(arena: Path, name: str) -> None:
    expected = json.loads((arena / "expected.json").read_text())[name]
    found = score(arena / f"{name}.jsonl.gz")["models"]
    assert set(found) == set(expected)
    for model, numbers in expected.items():
        ours, published, counts = found[model], numbers["published"], numbers["recomputed"]
        assert ours["score"] == pytest.approx(published["score"], abs=0.01), model
        assert ours["n_weighted"] == counts["n_weighted"], model
        assert ours["n_questions"] == counts["n_questions"], model
        low, high = ours["score_interval"]
        assert low == pytest.approx(published["rating_q025"], abs=0.7), model
        assert high == pytest.approx(published["rating_q975"], abs=0.7), model


def test_questions_without_a_row_are_counted(arena: Path) -> None:
    found = score(arena / f"{BATTLES[1]}.jsonl.gz")["models"]
    assert found["gpt-4o-mini"]["notes"][0].startswith("1 of 500 questions have no row")
    assert "notes" not in found["gpt-4o"]


@pytest.mark.parametrize("texts_only", [False, True], ids=["stored labels", "labels read again"])
def test_raw_judgments_give_the_published_score(
    arena: Path, tmp_path: Path, texts_only: bool
) -> None:
    expected = json.loads((arena / "expected.json").read_text())[RAW]
    path = arena / f"{RAW}.jsonl.gz"
    if texts_only:
        rows = rows_of(path)
        for row in rows:
            row["games"] = [{"judgment": game["judgment"]} for game in row["games"]]
        path = write(tmp_path / "texts.jsonl", rows)
    found = score(path)
    assert found["score"] == pytest.approx(expected["score"], abs=0.01)
    assert found["n"] == expected["rows"]
    assert found["n_weighted"] == expected["n_weighted"]
    assert found["n_questions"] == expected["n_questions"]
    assert found["n_unparsed_games"] == expected["score_labels"]["None"]
    assert not any("stored label" in note for note in found["notes"])


def test_every_published_label_is_read_in_its_text(arena: Path) -> None:
    games = [game for row in rows_of(arena / f"{RAW}.jsonl.gz") for game in row["games"]]
    expected = json.loads((arena / "expected.json").read_text())[RAW]["score_labels"]
    assert Counter(str(only_label(game["judgment"])) for game in games) == expected


@pytest.mark.parametrize("name", [BATTLES[0], RAW])
def test_shuffled_rows_give_the_same_numbers(arena: Path, tmp_path: Path, name: str) -> None:
    rows = rows_of(arena / f"{name}.jsonl.gz")
    straight = score(write(tmp_path / "rows.jsonl", rows))
    random.Random(0).shuffle(rows)
    (tmp_path / "shuffled").mkdir()
    shuffled = score(write(tmp_path / "shuffled" / "rows.jsonl", rows))
    assert json.dumps(shuffled, sort_keys=True) == json.dumps(straight, sort_keys=True)


def test_labels_count_for_the_side_that_the_game_gave_the_model(tmp_path: Path) -> None:
    """Game 1 gives the model B, game 2 A. q1: B>>A = 3 wins, A=B = a tie. q2: A>B = a loss, A>>B = 3 wins.

    6 wins, 1 loss, 1 tie of 8 battles: 6.5/8 = 81.25. Unweighted it would be (1 + 0.5 + 0 + 1)/4 = 62.5.
    """
    path = write(tmp_path / "j.jsonl", [judged("q1", "B>>A", "A=B"), judged("q2", "A>B", "A>>B")])
    found = score(path)
    assert (found["score"], found["n_weighted"], found["model"]) == (81.25, 8, "m")
    first, second = make_task("arena_hard").read(path)["m"]
    assert first.values["score"] == 3.5 / 4
    assert second.values["score"] == 3 / 4
    assert (second.details["wins"], second.details["losses"]) == (3, 1)


def test_the_standard_error_treats_a_question_as_one_observation(tmp_path: Path) -> None:
    """m = 0.8125; residuals 3.5 - 3.25 and 3 - 3.25; sqrt(2 · 2 · 0.25²)/8 = 0.0625."""
    path = write(tmp_path / "j.jsonl", [judged("q1", "B>>A", "A=B"), judged("q2", "A>B", "A>>B")])
    assert score(path)["score_standard_error"] == pytest.approx(6.25)


def test_games_without_a_label_that_counts_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        judged("q1", "B>A", None),
        judged("q2", "A<B", "A>B"),  # not one of the five labels
        judged("q3", None, None),
        {**judged("q4"), "games": [None, {"score": "A>B", "judgment": None}]},
        {**judged("q5"), "games": [{"score": "A>B", "judgment": "[[A>B]]"}]},
    ]
    found = score(write(tmp_path / "j.jsonl", rows))
    assert found["score"] == 75.0  # wins in q1, q2 and q4, a loss in q5
    assert (found["n"], found["n_questions"], found["n_weighted"]) == (5, 4, 4)
    assert (found["n_unparsed_games"], found["num_no_verdict"]) == (6, 5)


def test_stored_labels_that_their_text_does_not_hold_are_said(tmp_path: Path) -> None:
    rows = [judged("q1", "B>A", "A>B")]
    rows[0]["games"][0]["judgment"] = "[[A>B]] or rather [[B>A]]"
    assert any(
        "1 games have a stored label" in note
        for note in score(write(tmp_path / "j.jsonl", rows))["notes"]
    )


def test_the_same_question_judged_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    rows = [judged("q1", "A>B", "A>B"), judged("q2", "A>B", "A>B"), judged("q1", "B>A", "A=B")]
    with pytest.raises(DataError, match=r"j\.jsonl:3: a second judgment .*j\.jsonl:1"):
        score(write(tmp_path / "j.jsonl", rows))


def battle(question: str, winner: str, model: str = "m") -> dict[str, Any]:
    return {
        "question_id": question,
        "model_a": "gpt-4-0314",
        "model_b": model,
        "winner": winner,
    }


def test_repeated_battles_are_weights_not_duplicates(tmp_path: Path) -> None:
    rows = [battle("q1", "model_b")] * 3 + [battle("q1", "tie"), battle("q2", "model_a")]
    found = score(write(tmp_path / "b.jsonl", rows))
    assert (found["score"], found["n_weighted"], found["n_questions"]) == (70.0, 5, 2)


def test_battles_that_no_two_games_give_are_refused_with_their_lines(tmp_path: Path) -> None:
    rows = [battle("q1", "model_b"), battle("q1", "model_a")] * 2
    with pytest.raises(DataError, match=r"b\.jsonl:1: .*2 wins, 2 losses.*lines 1, 2, 3, 4"):
        score(write(tmp_path / "b.jsonl", rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (battle("q1", "modelb"), "winner = 'modelb': must be one of"),
        (
            {**battle("q1", "tie"), "model_a": "gpt-4"},
            "one of the two must be the baseline 'gpt-4-0314'",
        ),
        ({"question_id": "q1", "answer": "x"}, "neither judgments .* nor battles"),
        ({**judged("q1"), "games": "A>B"}, "games must be a list of 2"),
        ({"model": "m", "games": []}, "'question_id' or 'uid' is missing"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"b\.jsonl:1: .*{message}"):
        score(write(tmp_path / "b.jsonl", [row]))


def test_another_baseline_can_be_named(tmp_path: Path) -> None:
    rows = [{"question_id": "q1", "model_a": "m", "model_b": "base", "winner": "model_a"}]
    found = score(write(tmp_path / "b.jsonl", rows), baseline_model="base")
    assert (found["score"], found["model"]) == (100.0, "m")


def test_rows_are_aligned_with_the_question_file_by_key(arena: Path, tmp_path: Path) -> None:
    data = str(arena / "question.jsonl.gz")
    found = score(arena / f"{RAW}.jsonl.gz", data=data)
    assert (found["n"], found["num_missing"]) == (500, 500 - 193)
    with pytest.raises(DataError, match=r"1 of 1 questions are not in tasks.arena_hard.data"):
        score(write(tmp_path / "j.jsonl", [judged("other", "A>B", "A>B")]), data=data)


# What the published code (lm-sys/arena-hard-auto@efc012e) printed on these files; 100 times better converged it
# differs by 0.003.
PUBLISHED_STYLE = {
    "alone": {"gpt-3.5-turbo-0125": 22.5015, "gpt-4-0613": 37.3076},
    "together": {"gpt-3.5-turbo-0125": 22.9214, "gpt-4-0613": 37.1074},
}


@pytest.mark.parametrize("fit", PUBLISHED_STYLE)
def test_style_controlled_scores_are_those_of_the_published_code(arena: Path, fit: str) -> None:
    path = arena / f"{BATTLES[0]}.jsonl.gz"
    options: dict[str, Any] = {"style_control": True, "answers": str(arena / "model_answer")}
    if fit == "together":
        options["style_battles"] = str(path)
    found = score(path, **options)["models"]
    for model, expected in PUBLISHED_STYLE[fit].items():
        assert found[model]["score_style_controlled"] == pytest.approx(expected, abs=0.01)
        low, high = found[model]["score_style_controlled_interval"]
        assert low < expected < high
        alone = any("this model's battles alone" in note for note in found[model].get("notes", ()))
        assert alone == (fit == "alone")


def test_style_control_says_what_it_lacks(arena: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl", [battle("q1", "tie")])
    with pytest.raises(ConfigError, match=r"tasks.arena_hard.answers is missing"):
        score(path, style_control=True)
    with pytest.raises(DataError, match="no judged question has both answers"):
        score(path, style_control=True, answers=str(arena / "model_answer"))
    with pytest.raises(ConfigError, match="style_battles: would be ignored"):
        score(path, style_battles=str(path))


def answer_rows(answers: dict[str, str | None], model: str) -> list[dict[str, Any]]:
    return [
        {
            "uid": key,
            "model": model,
            "messages": [{"role": "assistant", "content": {"answer": text}}],
        }
        for key, text in answers.items()
    ]


def test_battles_without_a_text_are_left_out_of_style_control_and_counted(tmp_path: Path) -> None:
    keys = [f"q{number}" for number in range(20)]
    labels = ["B>A", "A>B", "B>A", "A=B"] * 5
    path = write(
        tmp_path / "j.jsonl",
        [judged(k, label, "A>B") for k, label in zip(keys, labels, strict=True)],
    )
    texts = {key: "word " * (number + 1) for number, key in enumerate(keys)}
    (tmp_path / "answers").mkdir()
    write(tmp_path / "answers" / "m.jsonl", answer_rows(dict(list(texts.items())[:15]), "m"))
    write(
        tmp_path / "answers" / "base.jsonl",
        answer_rows(dict.fromkeys(keys, "a word"), "gpt-4-0314"),
    )
    options = {
        "style_control": True,
        "style_length": "characters",
        "answers": str(tmp_path / "answers"),
    }
    found = score(path, **options)
    assert any("5 judged questions lack an answer's text" in note for note in found["notes"])
    write(tmp_path / "answers" / "again.jsonl", answer_rows({"q0": "x"}, "m"))
    with pytest.raises(DataError, match="a second answer of m on question 'q0'"):
        score(path, **options)


# --- v2


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("First [[A>B]], no: [[b>>a]]", "B>>A"),
        ("My verdict: [A=B]", "A=B"),
        ("[A>B], or properly [[B>A]]", "B>A"),
        ("none [at] all", None),
    ],
)
def test_v2_reads_the_last_label_and_forgives_brackets_and_case(
    text: str, label: str | None
) -> None:
    assert last_label(text) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [("[[A>B]] … [[A>B]]", "A>B"), ("[[A>B]] … [[B>A]]", None), ("[A>B]", None), ("", None)],
)
def test_v01_wants_one_label_only(text: str, label: str | None) -> None:
    assert only_label(text) == label


def test_v2_drops_a_question_with_one_unread_game_and_reads_turned_labels(tmp_path: Path) -> None:
    """q1: B<<A in game 2 is A>>B, 3 wins; B>A in game 1 a win. q2: dropped. q3: two losses. 4 of 6."""
    rows = [
        {**judged("x", "B>A", "B<<A"), "uid": "q1"},
        {**judged("x", None, "A>>B"), "uid": "q2"},
        {**judged("x", "A>B", "A<B"), "uid": "q3"},
    ]
    for row in rows:
        del row["question_id"]
        row["category"] = "hard_prompt"
        row["games"] = [g | {"judgment": {"answer": g["judgment"]}} for g in row["games"]]
    found = score(write(tmp_path / "j.jsonl", rows), "arena_hard_v2")
    assert found["score"] == pytest.approx(100 * 4 / 6)
    assert (found["n"], found["n_questions"], found["n_weighted"]) == (3, 2, 6)
    assert (found["n_unparsed_games"], found["num_no_verdict"]) == (1, 1)


def test_v2_reports_its_categories_apart(tmp_path: Path) -> None:
    rows = [
        judged("q1", "B>A", "A>B", category="hard_prompt"),
        judged("q2", "A>B", "B>A", category="creative_writing"),
        judged("q3", "A=B", "A=B", category="creative_writing"),
    ]
    found = score(write(tmp_path / "j.jsonl", rows), "arena_hard_v2")
    assert (found["score"], found["creative_writing"]) == (100.0, 25.0)
    assert found["groups"] == {"hard_prompt": {"score": 100.0}, "creative_writing": {"score": 25.0}}
    only = score(write(tmp_path / "k.jsonl", rows[1:]), "arena_hard_v2")
    assert only["score"] == 25.0
    assert any("score is that of creative_writing" in note for note in only["notes"])


def test_v2_intervals_hold_ninety_percent(tmp_path: Path) -> None:
    """100 wins of 200: 50 ± 1.645 · sqrt(0.25/200) = 50 ± 5.8 (95 % would be ± 6.9)."""
    rows = [judged(f"q{number}", "B>A", "B>A") for number in range(100)]
    low, high = score(write(tmp_path / "j.jsonl", rows), "arena_hard_v2")["score_interval"]
    assert (low, high) == (pytest.approx(44.2, abs=0.4), pytest.approx(55.8, abs=0.4))


def test_v2_controls_style_per_category_with_published_metadata(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows, ours, base = [], [], []
    for number in range(120):
        key, longer = f"q{number}", rng.random() < 0.5
        rows.append({**judged("", *(("B>A", "A>B") if longer else ("A>B", "B>A"))), "uid": key})
        rows[-1] |= {"category": "hard_prompt", "question_id": None}
        for found, model, length in (
            (ours, "m", 400 if longer else 200),
            (base, "o3-mini-2025-01-31", 300),
        ):
            metadata = {
                "token_len": length + rng.randrange(50),
                "header_count": {"h1": rng.randrange(3)},
            }
            metadata |= {
                "list_count": {"ordered": rng.randrange(9)},
                "bold_count": {"**": rng.randrange(5)},
            }
            found += [row | {"metadata": metadata} for row in answer_rows({key: "text"}, model)]
    # noise, or length would decide everything
    for row in rows[::5]:
        row["games"] = judged("", "A=B", "A=B")["games"]
    path = write(tmp_path / "j.jsonl", rows)
    (tmp_path / "answers").mkdir()
    write(tmp_path / "answers" / "m.jsonl", ours)
    write(tmp_path / "answers" / "base.jsonl", base)
    found = score(path, "arena_hard_v2", style_control=True, answers=str(tmp_path / "answers"))
    weights = found["groups"]["score: style coefficients"]
    assert weights["length"] > 3 * max(abs(weights[each]) for each in ("headers", "lists", "bold"))


# --- judged runs

QUESTIONS = {"q1": "Write {answer_2} in C", "q2": "Why?", "q3": "How?"}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    questions = [
        {"question_id": key, "turns": [{"content": text}]} for key, text in QUESTIONS.items()
    ]
    answers = [
        {
            "question_id": key,
            "model_id": "gpt-4-0314",
            "choices": [{"turns": [{"content": f"baseline on {key}", "token_len": 3}]}],
        }
        for key in QUESTIONS
    ]
    return {
        "data": str(write(tmp_path / "question.jsonl", questions)),
        "baseline_data": str(write(tmp_path / "gpt-4-0314.jsonl", answers)),
    }


def run(
    task: Any,
    samples: dict[str, Conversation],
    answer: Callable[[dict[str, Any]], chat_server.Answer],
    folder: Path,
) -> tuple[list[Row], ChatServer]:
    """Questions, judgments and rows, over HTTP, as the runner does it."""
    examples: Sequence[Example] = task.examples()
    baseline = task.baseline_answers(examples)
    with chat_server.chat_server(answer) as server:
        section = JudgeSection(
            base_url=server.base_url, model="judge", cache_dir=str(folder / "cache"), concurrency=1
        )
        client = open_judge(section, task.judge_sampling)
        questions = {e.key: task.questions(e, [samples[e.key]], baseline[e.key]) for e in examples}
        asked = [Asked(key, question) for key, each in questions.items() for question in each]
        with Store(folder / "judgments.jsonl", {}) as store:
            judge_all(task, asked, client, store, label="test")
            rows = [
                task.row(e, [samples[e.key]], judgments(store, e.key, questions[e.key]))
                for e in examples
            ]
    return rows, server


def said(text: str) -> Callable[[dict[str, Any]], chat_server.Answer]:
    return lambda _: chat_server.Answer(text)


def ours(**texts: str) -> dict[str, Conversation]:
    return {key: (Answer(texts.get(key, f"model on {key}")),) for key in QUESTIONS}


def test_both_orders_are_asked_and_told_apart(files: dict[str, str], tmp_path: Path) -> None:
    """A judge who always prefers the model, wherever it stands, gives it everything."""

    def prefers_the_model(body: dict[str, Any]) -> chat_server.Answer:
        prompt = body["messages"][1]["content"]
        first = prompt.index("model on") < prompt.index("baseline on")
        return chat_server.Answer("[[A>B]]" if first else "[[B>A]]")

    task = make_task("arena_hard", files)
    rows, server = run(task, ours(), prefers_the_model, tmp_path)
    assert task.summarise(rows).metrics["score"].value == 100
    assert rows[0].details["games"] == ["B>A", "A>B"]
    body = server.requests[0]
    assert (body["temperature"], body["max_tokens"], len(server.requests)) == (0, 4096, 6)
    assert "Write {answer_2} in C" in body["messages"][1]["content"]  # braces of a question stay


def test_a_judge_who_likes_the_first_answer_gives_half(
    files: dict[str, str], tmp_path: Path
) -> None:
    task = make_task("arena_hard", files)
    rows, _ = run(task, ours(), said("[[A>>B]]"), tmp_path)
    summary = task.summarise(rows)
    assert summary.metrics["score"].value == 50
    assert summary.counts["n_weighted"] == 18


def test_a_judgment_without_a_label_is_asked_to_finish_once(
    files: dict[str, str], tmp_path: Path
) -> None:
    """q1 finishes when asked; q2 never does; q3's two labels are no reason to ask, as published."""

    def judge(body: dict[str, Any]) -> chat_server.Answer:
        prompt = body["messages"][1]["content"]
        if "on q1" in prompt:
            return chat_server.Answer("[[A=B]]" if len(body["messages"]) > 2 else "Well, ")
        return chat_server.Answer("hmm" if "on q2" in prompt else "[[A>B]] or [[B>A]]")

    task = make_task("arena_hard", files)
    rows, server = run(task, ours(), judge, tmp_path)
    follow_ups = [body["messages"] for body in server.requests if len(body["messages"]) > 2]
    assert [len(messages) for messages in follow_ups] == [4] * 4  # two games of q1, two of q2
    assert follow_ups[0][2] == {"role": "assistant", "content": "Well, "}
    summary = task.summarise(rows)
    assert (summary.counts["n_questions"], summary.counts["n_unparsed_games"]) == (1, 4)
    assert summary.counts["num_no_verdict"] == 2


def test_refusals_and_missing_answers_are_counted(files: dict[str, str], tmp_path: Path) -> None:
    def judge(body: dict[str, Any]) -> chat_server.Answer:
        refuses = "on q1" in body["messages"][1]["content"]
        return chat_server.Answer(status=400) if refuses else chat_server.Answer("[[A>B]]")

    samples = ours() | {"q2": (Answer("", problem="null_response"),)}
    task = make_task("arena_hard", files)
    rows, _ = run(task, samples, judge, tmp_path)
    counts = task.summarise(rows).counts
    assert (counts["num_judge_refused"], counts["num_null_response"]) == (1, 1)
    assert (counts["n"], counts["n_questions"]) == (3, 2)


def test_style_is_measured_on_both_sides_of_a_run(files: dict[str, str], tmp_path: Path) -> None:
    options = {**files, "style_control": True, "style_length": "characters"}
    task = make_task("arena_hard", options)
    rows, _ = run(task, ours(q1="# long\n- answer"), said("[[A>B]]"), tmp_path)
    assert rows[0].details["style"] == {"model": [15, 1, 1, 0], "baseline": [14, 0, 0, 0]}
    assert "score_equal_style" in task.summarise(rows).metrics


def test_a_template_file_replaces_ours_and_says_so(
    arena: Path, files: dict[str, str], tmp_path: Path
) -> None:
    own = make_task("arena_hard", files).template
    path = str(arena / "judge_config.yaml")
    task = make_task("arena_hard", {**files, "template": path})
    assert (own.origin, task.template.origin) == ("prefopt", "judge_config.yaml")
    assert own.sha256 != task.template.sha256
    _, server = run(task, ours(), said("[[A=B]]"), tmp_path)
    system, user = (message["content"] for message in server.requests[0]["messages"])
    assert system.startswith("Please act as an impartial judge")
    assert "Assistant A's Answer|>\nbaseline on q1\n<|The End" in user


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "system_prompt: x\nprompt_template: 'only {question_1}'",
            "must hold {question_1}, {answer_1}",
        ),
        ("prompt_template: x", "needs system_prompt"),
        ("- x", "must be a mapping"),
        ("a: [", "line 1: not valid YAML"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_task("arena_hard", {"template": str(path)})


def test_creative_writing_has_its_own_baseline_and_instructions(tmp_path: Path) -> None:
    questions = [
        {"uid": "h", "category": "hard_prompt", "prompt": "Prove it."},
        {"uid": "c", "category": "creative_writing", "prompt": "Sing it."},
    ]
    answers = answer_rows({"h": "o3 on h", "c": "o3 on c"}, "o3-mini-2025-01-31")
    answers += answer_rows({"h": "gemini on h", "c": "gemini on c"}, "gemini-2.0-flash-001")
    options = {
        "data": str(write(tmp_path / "q.jsonl", questions)),
        "baseline_data": str(write(tmp_path / "a.jsonl", answers)),
    }
    task = make_task("arena_hard_v2", options)
    samples: dict[str, Conversation] = {key: (Answer(f"model on {key}"),) for key in "hc"}
    rows, server = run(task, samples, said("no label"), tmp_path)
    texts = [[m["content"] for m in body["messages"]] for body in server.requests]
    assert len(texts) == 4  # v2 asks once
    assert "o3 on h" in texts[0][1]
    assert "gemini on c" in texts[2][1]
    assert "pieces of writing" in texts[2][0]
    assert "pieces of writing" not in texts[0][0]
    with pytest.raises(DataError, match="no game has a verdict"):
        task.summarise(rows)


def test_the_published_questions_are_the_examples(arena: Path) -> None:
    task = make_task("arena_hard", {"data": str(arena / "question.jsonl.gz")})
    examples = task.examples()
    published = rows_of(arena / "question.jsonl.gz")
    assert [(e.key, e.prompt[0]["content"]) for e in examples] == [
        (row["question_id"], row["turns"][0]["content"]) for row in published
    ]
    decoding = task.decoding(examples[0])
    assert (decoding.temperature, decoding.max_new_tokens) == (0, 4096)


def test_published_baseline_answers_are_matched_by_key(arena: Path) -> None:
    data, folder = arena / "question.jsonl.gz", arena / "model_answer"
    task = make_task("arena_hard", {"data": str(data), "baseline_data": str(folder)})
    examples = task.examples()
    found = task.baseline_answers(examples)
    published = {row["question_id"]: row for row in rows_of(folder / "gpt-4-0314.jsonl.gz")}
    for key in (examples[0].key, examples[-1].key):
        assert found[key][0][0].text == published[key]["choices"][0]["turns"][0]["content"]


def test_a_baseline_that_is_not_whole_is_refused(files: dict[str, str], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(files["baseline_data"]).read_text().splitlines()]
    partial = {**files, "baseline_data": str(write(tmp_path / "partial.jsonl", rows[:1]))}
    task = make_task("arena_hard", partial)
    with pytest.raises(DataError, match=r"gpt-4-0314 has no answer to 2 of 3 questions, e.g. 'q2'"):
        task.baseline_answers(task.examples())
    rows[2]["choices"][0]["turns"][0]["content"] = None
    null = {**files, "baseline_data": str(write(tmp_path / "null.jsonl", rows))}
    with pytest.raises(DataError, match=r"no answer to 1 of 3 questions, e.g. 'q3'"):
        make_task("arena_hard", null).baseline_answers(task.examples())
    for row in rows:
        row["model_id"] = "other"
    foreign = {**files, "baseline_data": str(write(tmp_path / "foreign.jsonl", rows))}
    with pytest.raises(DataError, match="holds answers of other, not of the baseline gpt-4-0314"):
        make_task("arena_hard", foreign).baseline_answers(task.examples())


def test_without_a_network_the_option_to_set_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"Give a file: tasks.arena_hard.data=PATH"):
        make_task("arena_hard").examples()
