"""Arena Learning: who met whom, what the judge said in both orders, who learns from it, who rates how high."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_pipelines
from data_pipelines.battles import parse_ratings
from data_pipelines.stages.elo import rate_models
from eval.bradley_terry import fit_newton, player_columns, win_rate
from tests.pipelines.pipelines import build, counts, made, refused, rows, write_pipeline
from tests.recipes.commands import prefopt
from tests.signals.chat_server import Answer, ChatServer, chat_server

PRESETS = Path(data_pipelines.__file__).with_name("presets")
GIVEN = str(Path(__file__).with_name("given.py"))
Pipeline = Callable[..., Path]
_SHOWN = re.compile(r"<answer_a>\n(.*?)\n</answer_a>.*<answer_b>\n(.*?)\n</answer_b>", re.DOTALL)


def biased_judge(body: dict[str, Any]) -> Answer:
    """Rates an answer by the number in it, and whatever it sees first a point higher; "mute" silences it."""
    request = body["messages"][0]["content"]
    shown = _SHOWN.search(request)
    assert shown is not None
    if "mute" in shown.group(0):
        return Answer("I would rather not say.")
    first, second = (float(re.sub(r"[^\d.]", "", text)) for text in shown.groups())
    said = f"[[A: 1]]? No: [[A: {first + 1}]], and then [[B: {second}]]"
    return Answer(said, delay_s=0.05 if "Request slow" in request else 0.0)


@pytest.fixture
def judge() -> Iterator[ChatServer]:
    with chat_server(biased_judge) as server:
        yield server


def group(id_: str, **answers: str | list[str]) -> dict[str, Any]:
    """A row with each model's answer or answers."""
    responses = [
        {"text": text, "model": model, "tokens": 3}
        for model, texts in answers.items()
        for text in ([texts] if isinstance(texts, str) else texts)
    ]
    return {"id": id_, "prompt": f"Request {id_}", "responses": responses, "topic": "t"}


@pytest.fixture
def pipeline(tmp_path: Path, judge: ChatServer) -> Pipeline:
    """``pipeline(rows, {keys of battle}, {stage: …}, …)``, asking the judge through a cache of its own."""

    def write(
        given: list[dict[str, Any]], battle: dict[str, Any], *later: dict[str, Any], name: str = "p"
    ) -> Path:
        data = tmp_path / "given.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
        asked = {"base_url": judge.base_url, "model": "j", "cache_dir": str(tmp_path / "cache")}
        stages = [
            {"stage": "given", "path": str(data), "kind": "groups"},
            {"stage": "battle", "judge": {**asked, **battle.pop("judge", {})}, **battle},
            *later,
        ]
        return write_pipeline(tmp_path / f"{name}.yaml", stages, plugins=[GIVEN], shard_rows=2)

    return write


def test_both_orders_are_asked_and_their_mean_undoes_the_bias_to_the_first(
    pipeline: Pipeline, judge: ChatServer
) -> None:
    """8 against 5 with a point for being first: 9-5 as shown, 8-6 the other way round; means 8.5 and 5.5."""
    folder = build(pipeline([group("q", ours="an 8", theirs="a 5")], {}))
    (row,) = rows(folder / "battle")
    (battle,) = row["battles"]
    assert battle["ratings"] == [[9.0, 5.0], [8.0, 6.0]]
    assert (battle["model_a"], battle["model_b"], battle["points"]) == ("ours", "theirs", 1.0)
    assert row["responses"][battle["a"]]["text"] == "an 8"
    shown = [_SHOWN.search(each["messages"][0]["content"]) for each in judge.requests]
    assert {match.groups() for match in shown if match} == {("an 8", "a 5"), ("a 5", "an 8")}
    assert all("Request q" in each["messages"][0]["content"] for each in judge.requests)


def test_equal_means_tie_and_equal_texts_tie_unasked(pipeline: Pipeline, judge: ChatServer) -> None:
    given = [group("equal", ours="a 5", theirs="the 5"), group("same", ours="a 5", theirs="a 5")]
    folder = build(pipeline(given, {}))
    equal, same = (row["battles"][0] for row in rows(folder / "battle"))
    assert (equal["points"], equal["ratings"]) == (0.5, [[6.0, 5.0], [5.0, 6.0]])
    assert (same["points"], same["ratings"]) == (0.5, [])
    assert len(judge.requests) == 2


def test_an_unreadable_answer_is_asked_for_again_and_then_has_no_result(
    pipeline: Pipeline, judge: ChatServer
) -> None:
    given = [
        group("none", ours="a 5", theirs="mute 7"),
        group("some", ours="a 5", theirs="mute 7", third="a 9"),
    ]
    elo = {"stage": "elo", "anchor": "ours"}
    folder = build(pipeline(given, {"max_asks": 2, "target": "ours"}, elo))
    assert counts(folder, "battle")["dropped"] == {"unreadable": 1}
    (row,) = rows(folder / "battle")
    assert [battle["points"] for battle in row["battles"]] == [None, 0.0]
    report = json.loads((folder / "manifest" / "elo" / "done.json").read_text())["report"]
    assert report["unreadable"] == 1
    assert report["models"].keys() == {"ours", "third"}
    # each of the two texts in both orders, twice: the second time with a reminder; and the readable battle
    assert len(judge.requests) == 2 * 2 * 2 + 2
    reminders = [body for body in judge.requests if len(body["messages"]) == 3]
    assert len(reminders) == 4 and "two ratings" in reminders[0]["messages"][2]["content"]


def test_a_target_meets_everybody_and_the_others_do_not_meet(pipeline: Pipeline) -> None:
    given = [group("q", one="a 1", ours=["a 2", "a 3"], two="a 4")]
    (row,) = rows(build(pipeline(given, {"target": "ours"})) / "battle")
    assert [(each["a"], each["b"]) for each in row["battles"]] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    (row,) = rows(build(pipeline(given, {}, name="all")) / "battle")
    assert [(each["a"], each["b"]) for each in row["battles"]] == [
        (0, 1), (0, 2), (0, 3), (1, 3), (2, 3),
    ]  # fmt: skip


def test_rows_that_cannot_battle_are_counted_by_reason(pipeline: Pipeline) -> None:
    unnamed = group("u", ours="a 5", theirs="a 6")
    del unnamed["responses"][1]["model"]
    given = [
        group("alone", ours=["a 5", "a 6"]), group("absent", theirs="a 5", third="a 6"), unnamed,
        group("fine", ours="a 5", theirs="a 6"),
    ]  # fmt: skip
    folder = build(pipeline(given, {"target": "ours"}))
    assert counts(folder, "battle")["dropped"] == {
        "fewer_than_two_models": 1, "no_target": 1, "unnamed_response": 1,
    }  # fmt: skip


BATTLED = [
    group("won", ours="a 8", one="a 4", two="a 7"),
    group("lost", ours="a 3", one="a 5", two="a 7"),
    group("close", ours="a 5", one="a 6", two="a 6.5"),
]


def test_pairs_are_battles_of_the_target_decided_by_the_gap(pipeline: Pipeline) -> None:
    """Gaps of the target: won +4 +1, lost -2 -4, close -1 -1.5. At least 2: one pair, two pairs, none."""
    winners = {"stage": "winners", "gives": "pairs", "min_gap": 2.0, "target": "ours"}
    folder = build(pipeline(BATTLED, {}, winners))
    found = [(row["id"], row["chosen"], row["rejected"]) for row in rows(folder / "winners")]
    assert found == [
        ("won", "a 8", "a 4"),
        ("lost#0", "a 5", "a 3"),
        ("lost#1", "a 7", "a 3"),
    ]
    assert counts(folder, "winners")["dropped"] == {"undecided": 1}
    first = rows(folder / "winners")[0]
    assert (first["score_chosen"], first["score_rejected"]) == (8.5, 4.5)
    assert first["info_chosen"]["model"] == "ours" and first["topic"] == "t"
    assert "battles" not in first


def test_all_pairs_take_the_opponents_battles_too(pipeline: Pipeline) -> None:
    """won also has 7 over 4, lost also 7 over 5."""
    winners = {"stage": "winners", "gives": "pairs", "min_gap": 2.0, "all_pairs": True}
    folder = build(pipeline(BATTLED, {}, winners))
    found = {(row["chosen"], row["rejected"]) for row in rows(folder / "winners")}
    assert found == {("a 8", "a 4"), ("a 7", "a 4"), ("a 5", "a 3"), ("a 7", "a 3"), ("a 7", "a 5")}


def test_sft_samples_are_the_best_winners_answers_where_the_target_lost(pipeline: Pipeline) -> None:
    winners = {"stage": "winners", "gives": "sft", "min_gap": 3.0, "target": "ours"}
    folder = build(pipeline(BATTLED, {}, winners))
    (row,) = rows(folder / "winners")
    assert (row["id"], row["response"], row["model"]) == ("lost", "a 7", "two")
    assert (row["reward"], row["advantage"]) == (7.5, 4.0)
    assert counts(folder, "winners")["dropped"] == {"unbeaten": 1, "undecided": 1}
    everybody = {**winners, "all_pairs": True}
    folder = build(pipeline(BATTLED, {}, everybody, name="all"))
    assert [(row["id"], row["response"]) for row in rows(folder / "winners")] == [
        ("won", "a 7"),  # over "a 4": the opponents' battles count, the target's own answers do not
        ("lost", "a 7"),
    ]


def test_samples_train_as_sft_rows(pipeline: Pipeline) -> None:
    from prefopt.data.formats import canonical, resolve
    from prefopt.data.rows import Row
    from prefopt.data.sources import open_source
    from prefopt.recipe.schema import ColumnMap, SourceSection

    winners = {"stage": "winners", "gives": "sft", "min_gap": 3.0, "target": "ours"}
    folder = build(pipeline(BATTLED, {}, winners))
    section = SourceSection(path=str(folder / "winners"), columns=ColumnMap(chosen="response"))
    (raw,) = open_source(section).rows()
    row = canonical(raw, resolve(section, raw, pairs=False))
    assert isinstance(row, Row)
    assert (row.prompt, row.responses) == ("Request lost", ("a 7",))


def test_the_same_battles_are_not_paid_for_twice(pipeline: Pipeline, judge: ChatServer) -> None:
    build(pipeline(BATTLED, {}))
    asked = len(judge.requests)
    assert asked == 3 * 3 * 2
    build(pipeline(BATTLED, {"judge": {"concurrency": 1}}, name="again"))
    assert len(judge.requests) == asked


def test_where_the_judge_is_does_not_make_a_stage_another_but_who_it_is_does(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipeline(BATTLED, {})
    build(path)
    build(path, "stages.battle.judge.concurrency=2")
    text = refused(capsys, path, "stages.battle.judge.model=k")
    assert 'settings.judge.model was "j" and is now "k"' in text


def test_the_target_must_be_named_where_it_counts(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    for gives in ("sft", "pairs"):
        winners = {"stage": "winners", "gives": gives, "min_gap": 2.0}
        assert "winners.target is missing" in refused(capsys, pipeline(BATTLED, {}, winners))


@pytest.mark.parametrize(
    ("text", "ratings"),
    [
        ("[[A: 7]] [[B: 9]]", (7.0, 9.0)),
        ("[[b:9.5]], [[a : 1]]", (1.0, 9.5)),
        ("for example [[A: 1]] [[B: 1]] … so [[A: 10]] [[B: 2]]", (10.0, 2.0)),
        ("[[A: 7]]", None),
        ("[[A: 0]] [[B: 5]]", None),
        ("[[A: 11]] [[B: 5]]", None),
        ("7 9", None),
    ],
)
def test_ratings_are_read_or_not(text: str, ratings: tuple[float, float] | None) -> None:
    assert parse_ratings(text) == ratings


# --- Elo -----------------------------------------------------------------------------------------


def test_elo_is_in_the_manifest_and_is_bradley_terrys(pipeline: Pipeline) -> None:
    """ours wins 2, loses 1 and ties 1 of 4: win rate 5/8, Elo 400 log10(5/3) = 88.74 above the anchor."""
    given = [
        group("1", ours="a 8", base="a 4"),
        group("2", ours="a 8", base="a 5"),
        group("3", ours="a 2", base="a 5"),
        group("4", ours="a 5", base="the 5"),
    ]
    folder = build(pipeline(given, {}, {"stage": "elo", "anchor": "base", "anchor_elo": 900.0}))
    manifest = json.loads((folder / "manifest.json").read_text())
    (report,) = [each["report"] for each in manifest["stages"] if each["id"] == "elo"]
    ours, base = report["models"]["ours"], report["models"]["base"]
    assert (ours["wins"], ours["losses"], ours["ties"]) == (2, 1, 1)
    assert ours["mle"] == pytest.approx(900 + 400 * math.log10(5 / 3), abs=1e-6)
    assert win_rate(2, 1, 1) == pytest.approx(1 / (1 + 10 ** ((900 - ours["mle"]) / 400)))
    assert base["elo"] == base["low"] == base["high"] == base["mle"] == 900
    assert ours["low"] <= ours["elo"] <= ours["high"]
    assert rows(folder / "elo") == rows(folder / "battle")


def test_elo_of_published_battles_gives_the_published_scores_and_intervals(
    shared_data: Path,
) -> None:
    """Arena-Hard v0.1 by gpt-4o: a score is the win rate that the rating predicts against the baseline.

    Scores to the two decimals published. The 2.5 % point of 100 draws with a deviation of 1.2 points has a
    standard error of 0.32 (√(0.025 · 0.975 / 100) over the density there), and two such points are compared: three
    standard errors of their difference are 1.4. A median's standard error is 0.15.
    """
    arena = shared_data / "arena_hard"
    results: Counter[tuple[str, str, float]] = Counter()
    with gzip.open(arena / "battles_gpt4o_judge_20240806.jsonl.gz", "rt") as lines:
        for line in lines:
            found = json.loads(line)
            points = {"model_a": 1.0, "model_b": 0.0, "tie": 0.5}[found["winner"]]
            results[(found["model_a"], found["model_b"], points)] += 1
    report = rate_models(results, "gpt-4-0314", 1000.0, 100)
    expected = json.loads((arena / "expected.json").read_text())["battles_gpt4o_judge_20240806"]
    assert len(expected) > 10
    for model, numbers in expected.items():
        ours, published = report["models"][model], numbers["published"]
        assert 100 * _predicted(ours["mle"]) == pytest.approx(published["score"], abs=0.0051)
        for end, key in (("low", "rating_q025"), ("high", "rating_q975")):
            assert 100 * _predicted(ours[end]) == pytest.approx(published[key], abs=1.4), model
        assert 100 * _predicted(ours["elo"]) == pytest.approx(published["score"], abs=0.6)


def _predicted(elo: float) -> float:
    return 1 / (1 + 10 ** ((1000 - elo) / 400))


def test_elo_of_a_round_robin_is_the_fit_of_the_same_battles_one_by_one() -> None:
    """Counted battles, sorted, against a design matrix with a row a battle in the order of the draw."""
    rng = np.random.default_rng(3)
    first = rng.integers(0, 4, 300)
    second = (first + rng.integers(1, 4, 300)) % 4
    points = rng.choice([0.0, 0.5, 1.0], 300)
    names = ["delta", "alpha", "bravo", "carol"]
    results = Counter(
        (names[a], names[b], float(p)) for a, b, p in zip(first, second, points, strict=True)
    )
    report = rate_models(results, "bravo", 1000.0, 5)
    fit = fit_newton(player_columns(first, second, 4), points, np.ones(300))
    for index, name in enumerate(names):
        elo = 1000 + 400 / math.log(10) * (fit[index] - fit[2])
        assert report["models"][name]["mle"] == pytest.approx(elo, abs=1e-6)


def test_models_that_no_chain_of_battles_links_to_the_anchor_are_not_rated() -> None:
    results = {("a", "b", 1.0): 3, ("b", "a", 1.0): 1, ("c", "d", 1.0): 2}
    report = rate_models(results, "a", 1000.0, 10)
    assert report["models"].keys() == {"a", "b"} and report["unrated"] == ["c", "d"]


def test_an_anchor_that_fought_no_battle_is_refused_with_those_who_did(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pipeline(BATTLED, {}, {"stage": "elo", "anchor": "llama"})
    assert "elo.anchor = 'llama'" in (text := refused(capsys, path, code=1))
    assert "one, ours, two" in text


def test_the_preset_is_a_sound_pipeline() -> None:
    from data_pipelines.pipeline import load_pipeline

    pipeline = load_pipeline(PRESETS / "arena_learning.yaml")
    assert [each.spec.name for each in pipeline.stages][-3:] == ["battle", "elo", "winners"]
    changes = ("gives=sft", "min_gap=3.0", "target=target")
    sft = load_pipeline(
        PRESETS / "arena_learning.yaml", [f"stages.winners.{change}" for change in changes]
    )
    assert str(sft.stages[-1].gives) == "samples"


def test_a_kill_amid_the_battles_costs_no_request_twice(
    pipeline: Pipeline, judge: ChatServer, tmp_path: Path
) -> None:
    """Killed after its third row of eight, in shards of two; then the same files as an undisturbed build's."""
    given = [group(f"slow{n}", ours=f"a {n % 5 + 1}", theirs=f"the {n % 3 + 2}") for n in range(8)]
    path = pipeline(given, {"judge": {"concurrency": 1}}, {"stage": "elo", "anchor": "ours"})
    with prefopt("data", "build", str(path), log=tmp_path / "log") as command:
        command.wait_until(lambda: len(judge.requests) >= 6, "the third row")
        command.send(signal.SIGKILL)
        command.wait()
    folder = build(path)
    questions = Counter(body["messages"][0]["content"] for body in judge.requests)
    assert len(questions) == 2 * 8
    # at most the one that was under way when it died is asked again
    assert sum(questions.values()) <= 2 * 8 + 1
    whole = made(folder)
    shutil.rmtree(folder)
    assert made(build(path)) == whole
