"""Step pairs: trees and labels small enough to work out by hand, and prompts that render as the dialogue does."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data_pipelines
from data_pipelines.base import Dropped
from data_pipelines.cut_turns import cut_turn
from data_pipelines.step_tree import (
    grow,
    pareto_pairs,
    sibling_pairs,
    split_steps,
    step_scores,
    value,
)
from prefopt.data.options import AS_RENDERED
from prefopt.data.render import Renderer
from tests.pipelines.pipelines import build, counts, refused, rows, write_pipeline
from tests.unit.tiny_tokenizers import TokenizerFactory

PRESETS = Path(data_pipelines.__file__).with_name("presets")
GIVEN = str(Path(__file__).with_name("given.py"))
Pipeline = Callable[..., Path]

SOLUTIONS = [
    ("Half of 8 is 4.\nSo 4 + 1 = 5.\nA: 5", 1.0),
    ("Half of 8 is 4.\nSo 4 + 1 = 6.\nA: 6", 0.0),
    ("Half of 8 is 4.\nSo 4 + 1 = 5.\nA: 4", 0.0),
    ("Half of 8 is 2.\nA: 3", 0.0),
]
"""Values: [4.] 1/3, [2.] 0; below [4.]: [=5.] 1/2, [=6.] 0; below [=5.]: [A: 5] 1, [A: 4] 0. One pair each."""
PROMPT = "Half of 8, and 1?\n"


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """``pipeline(rows, stage, keep=…)``."""

    def write(
        given: list[dict[str, Any]], stage: dict[str, Any], keep: tuple[str, ...] = ()
    ) -> Path:
        data = tmp_path / "given.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
        first = {"stage": "given", "path": str(data), "kind": "groups", "keep": list(keep)}
        return write_pipeline(tmp_path / "p.yaml", [first, stage], plugins=[GIVEN])

    return write


def group(id_: str = "q", prompt: Any = PROMPT, **columns: Any) -> dict[str, Any]:
    responses = [{"text": text, "score": score, "model": "m"} for text, score in SOLUTIONS]
    return {"id": id_, "prompt": prompt, "responses": responses, **columns}


# --- the tree ------------------------------------------------------------------------------------


def test_steps_put_together_are_the_solution_to_the_letter() -> None:
    assert split_steps("a\n\nb\n c", "\n") == ["a\n\n", "b\n", " c"]
    assert split_steps("", "\n") == []
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choice("ab\n .") for _ in range(rng.randint(0, 12)))
        separator = rng.choice(["\n", "\n\n", ". "])
        steps = split_steps(text, separator)
        assert "".join(steps) == text and all(steps)


def test_values_are_means_over_the_solutions_that_pass_through() -> None:
    outcomes = [outcome for _, outcome in SOLUTIONS]
    root = grow([split_steps(text, "\n") for text, _ in SOLUTIONS])
    assert value(root, outcomes) == 1 / 4
    four = root.children["Half of 8 is 4.\n"]
    assert value(four, outcomes) == 1 / 3
    assert value(four.children["So 4 + 1 = 5.\n"], outcomes) == 1 / 2


def test_sibling_pairs_are_those_of_a_brute_force_over_all_prefixes() -> None:
    """Random solutions over two letters, some equal, some the beginning of another."""
    rng = random.Random(1)
    for _ in range(50):
        solutions = [
            tuple(rng.choice("xy") for _ in range(rng.randint(0, 4)))
            for _ in range(rng.randint(2, 7))
        ]
        outcomes = [rng.choice([0.0, 0.5, 1.0]) for _ in solutions]
        min_gap = rng.choice([0.0, 0.25])
        found = sibling_pairs(grow(solutions), outcomes, min_gap=min_gap, min_leaves=1)
        ours = {(pair.prefix.text, pair.chosen.text, pair.rejected.text) for pair in found}
        expected = set()
        for length in range(4):
            for prefix in itertools.product("xy", repeat=length):
                worth = {}
                for step in "xy":
                    begins = [
                        outcome
                        for steps, outcome in zip(solutions, outcomes, strict=True)
                        if steps[: length + 1] == (*prefix, step)
                    ]
                    if begins:
                        worth[step] = sum(begins) / len(begins)
                for one, other in itertools.permutations(worth, 2):
                    if worth[one] - worth[other] > min_gap:
                        start = "".join(prefix)
                        expected.add((start, start + one, start + other))
        assert ours == expected and len(found) == len(expected)


def test_pairs_share_their_beginning_and_each_side_goes_on_to_an_end(pipeline: Pipeline) -> None:
    folder = build(pipeline([group()], {"stage": "tree"}))
    found = rows(folder / "tree")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in found] == [
        (PROMPT, SOLUTIONS[0][0], SOLUTIONS[3][0]),
        (PROMPT + "Half of 8 is 4.\n", "So 4 + 1 = 5.\nA: 5", "So 4 + 1 = 6.\nA: 6"),
        (PROMPT + "Half of 8 is 4.\nSo 4 + 1 = 5.\n", "A: 5", "A: 4"),
    ]
    assert [(row["score_chosen"], row["score_rejected"]) for row in found] == [
        (1 / 3, 0.0), (1 / 2, 0.0), (1.0, 0.0),
    ]  # fmt: skip
    assert found[1]["info_chosen"] == {"model": "m", "outcome": 1.0, "num_leaves": 2}
    assert [row["step_pair"]["shared_steps"] for row in found] == [0, 1, 2]


def test_a_gap_must_be_exceeded(pipeline: Pipeline) -> None:
    """Of the gaps 1/3, 1/2 and 1."""
    path = pipeline([group()], {"stage": "tree", "min_gap": 0.5})
    assert [row["chosen"] for row in rows(build(path) / "tree")] == ["A: 5"]


def test_both_values_may_need_more_than_one_solution(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pair has a side that a single solution stands behind."""
    path = pipeline([group()], {"stage": "tree", "min_leaves": 2})
    assert "not one row is left of 1 (1 no_gap)" in refused(capsys, path, code=1)


def test_complete_pairs_join_unless_the_tree_has_them(pipeline: Pipeline) -> None:
    """Best solution 0, worst solution 1 (the first of three); the root's own pair is 0 against 3."""
    folder = build(pipeline([group()], {"stage": "tree", "complete": True}))
    found = rows(folder / "tree")
    assert len(found) == 4
    last = found[-1]
    assert (last["prompt"], last["chosen"], last["rejected"]) == (
        PROMPT, SOLUTIONS[0][0], SOLUTIONS[1][0],
    )  # fmt: skip
    assert last["step_pair"] == {"kind": "complete", "shared_steps": 0}
    assert (last["score_chosen"], last["score_rejected"]) == (1.0, 0.0)


def test_rows_without_a_pair_are_counted(pipeline: Pipeline) -> None:
    flat = group("flat")
    for response in flat["responses"]:
        response["score"] = 1.0
    few = group("few")
    for response in few["responses"][1:]:
        del response["score"]
    folder = build(pipeline([group(), flat, few], {"stage": "tree", "max_pairs": 2}))
    assert counts(folder, "tree")["dropped"] == {"no_gap": 1, "fewer_than_two_scored": 1}
    assert len(rows(folder / "tree")) == 2


# --- dialogues -----------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Half of 8, and 1?"},
]


@pytest.mark.parametrize("chat", ["chatml", "llama3", "zephyr", "plain"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_a_cut_dialogue_has_the_ids_of_the_dialogue_and_ends_its_prompt_at_the_cut(
    tiny_tokenizer: TokenizerFactory, chat: str, add_bos: bool
) -> None:
    """The generation prompt's ids, then the shared steps' alone, then the rest with the turn's own end."""
    tokenizer = tiny_tokenizer(chat=chat, add_bos=add_bos)
    renderer = Renderer(tokenizer)
    response, shared = SOLUTIONS[0][0], "Half of 8 is 4.\n"
    cut = cut_turn(CHAT, response, shared, renderer, "q")
    assert not isinstance(cut, Dropped), cut
    prompt_ids, response_ids = renderer.render(cut.prompt, cut.response, AS_RENDERED)
    whole = renderer.render(CHAT, {"role": "assistant", "content": response})
    assert prompt_ids + response_ids == whole[0] + whole[1]
    opened = whole[0]
    assert prompt_ids[: len(opened)] == opened
    assert tokenizer.decode(prompt_ids[len(opened) :]) == shared
    assert tokenizer.decode(response_ids).startswith("So 4 + 1 = 5.\nA: 5")


def test_a_template_whose_prompt_is_no_beginning_of_its_turn_is_refused(
    tiny_tokenizer: TokenizerFactory,
) -> None:
    renderer = Renderer(tiny_tokenizer(chat="thinking"))
    found = cut_turn(CHAT, SOLUTIONS[0][0], "Half of 8 is 4.\n", renderer, "q")
    assert isinstance(found, Dropped) and found.reason == "template_changes_text"
    alternating = Renderer(tiny_tokenizer(chat="alternating"))
    found = cut_turn(CHAT, SOLUTIONS[0][0], "Half of 8 is 4.\n", alternating, "q")
    assert isinstance(found, Dropped) and found.reason == "template_refused"


def test_a_dialogue_that_ends_with_an_assistant_turn_would_be_closed_there(
    tiny_tokenizer: TokenizerFactory,
) -> None:
    """Why a cut dialogue becomes text: as messages, the shared steps are a finished turn before another one."""
    tokenizer = tiny_tokenizer(chat="chatml")
    begun = [*CHAT, {"role": "assistant", "content": "Half of 8 is 4.\n"}]
    text = tokenizer.decode(Renderer(tokenizer).prompt_ids(begun))
    assert text.endswith("Half of 8 is 4.\n<|im_end|>\n<|im_start|>assistant\n")


def test_dialogues_need_the_tokenizer_and_then_train_as_text(
    pipeline: Pipeline,
    tiny_tokenizer: TokenizerFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from prefopt.data.formats import canonical, resolve
    from prefopt.data.sources import open_source
    from prefopt.recipe.schema import SourceSection

    given = [group(prompt=CHAT)]
    told = refused(capsys, pipeline(given, {"stage": "tree"}), code=1)
    assert "its prompt is a dialogue" in told and "tree.tokenizer" in told
    tokenizer = tiny_tokenizer(chat="chatml")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = pipeline(given, {"stage": "tree", "tokenizer": str(tmp_path / "tokenizer")})
    folder = build(path, "--from", "tree")
    assert [row["prompt"].endswith("assistant\n") for row in rows(folder / "tree")] == [
        True, False, False,
    ]  # fmt: skip
    raws = list(open_source(SourceSection(path=str(folder / "tree"))).rows())
    section = SourceSection(path="x", control_tokens=("all",))
    reading = resolve(section, raws[0], pairs=True)
    assert reading.format == "text"
    renderer = Renderer(tokenizer)
    for raw in raws:
        row: Any = canonical(raw, reading)
        for response in row.responses:
            ids = renderer.render(row.prompt, response, row.options)[1]
            assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
            assert tokenizer.eos_token_id not in ids[:-1]


# --- SPARE ---------------------------------------------------------------------------------------


def test_labels_score_one_or_minus_one_and_the_last_step_is_the_outcome() -> None:
    assert step_scores(["CORRECT", "INCORRECT", "CORRECT"], 3, right=False) == (1, -1, -1)
    assert step_scores(["INCORRECT"], 1, right=True) == (1,)
    assert step_scores(["CORRECT", None, "correct "], 4, right=True) == (1, -1, 1, 1)
    graded = [{"student_step": 2, "label": "CORRECT"}, {"student_step": 1, "label": "UNSURE"}]
    assert step_scores(graded, 3, right=False) == (-1, 1, -1)
    assert step_scores(["CORRECT"] * 3, 2, right=True) is None
    assert step_scores([{"student_step": 3, "label": "CORRECT"}], 2, right=True) is None


def test_dominance_is_strict_in_both_numbers() -> None:
    points = [(1.0, 0.5), (1.0, 0.2), (-1.0, 0.5), (-1.0, 0.4), (1.0, -0.5)]
    assert pareto_pairs(points) == [(0, 3)]
    assert pareto_pairs([*points, (1.0, 1.0)]) == [(0, 3), (5, 2), (5, 3)]


LABELS = [
    ["CORRECT", "CORRECT", "CORRECT"],
    ["CORRECT", "INCORRECT", None],
    ["CORRECT", "CORRECT", "CORRECT"],
    [],
]
"""Means with the outcome as the last step: 1; (1 -1 -1)/3; (1 +1 -1)/3; (-1 -1)/2. Only the first is right."""


def test_right_solutions_with_better_steps_win(pipeline: Pipeline) -> None:
    given = [group(step_labels=LABELS)]
    folder = build(pipeline(given, {"stage": "pareto"}, keep=("step_labels",)))
    found = rows(folder / "pareto")
    assert [(row["chosen"], row["rejected"]) for row in found] == [
        (SOLUTIONS[0][0], SOLUTIONS[number][0]) for number in (1, 2, 3)
    ]
    assert [row["score_rejected"] for row in found] == pytest.approx([-1 / 3, 1 / 3, -1])
    assert found[1]["info_rejected"]["step_scores"] == [1.0, 1.0, -1.0]
    assert "step_labels" not in found[0]


def test_a_reference_wins_where_nobody_solved_it(pipeline: Pipeline) -> None:
    never = group(step_labels=LABELS, gold="It is 5.\nA: 5")
    never["responses"][0]["score"] = 0.0
    keys = {"stage": "pareto", "max_pairs": 2}
    path = pipeline([never, group("ok", step_labels=LABELS, gold="A: 5")], keys, ("step_labels",))
    folder = build(path)
    assert counts(folder, "pareto")["dropped"] == {"no_dominance": 1}
    path = pipeline([never], {**keys, "reference": "gold"}, ("step_labels", "gold"))
    found = rows(build(path, "--from", "given") / "pareto")
    assert len(found) == 2  # of four, drawn
    assert all(row["chosen"] == "It is 5.\nA: 5" and row["score_chosen"] == 1 for row in found)
    assert found[0]["info_chosen"]["offline"] is True


def test_labels_that_do_not_fit_are_counted(pipeline: Pipeline) -> None:
    given = [
        group("few", step_labels=LABELS[:3]),
        group("long", step_labels=[*LABELS[:3], ["CORRECT"] * 3]),
        group("none"),
        group("fine", step_labels=LABELS),
    ]
    folder = build(pipeline(given, {"stage": "pareto"}, ("step_labels",)))
    assert counts(folder, "pareto")["dropped"] == {"labels_do_not_fit": 2, "no_labels": 1}


def test_the_preset_is_a_sound_pipeline() -> None:
    from data_pipelines.pipeline import load_pipeline

    pipeline = load_pipeline(PRESETS / "step_pairs.yaml")
    assert [each.spec.name for each in pipeline.stages] == [
        "prompts", "sample", "score", "filter", "tree", "order",
    ]  # fmt: skip
