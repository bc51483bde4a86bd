"""Advantages of single steps: a tree small enough to work out by hand, and rows that train as they stand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.step_tree import grow, split_steps, step_advantages
from prefopt.data.options import AS_RENDERED
from prefopt.data.render import Renderer
from tests.pipelines.pipelines import build, refused, rows, write_pipeline
from tests.unit.tiny_tokenizers import TokenizerFactory

GIVEN = str(Path(__file__).with_name("given.py"))
PROMPT = "Half of 8, and 1?\n"
SOLUTIONS = [
    ("Half of 8 is 4.\nSo 4 + 1 = 5.\nA: 5", 1.0),
    ("Half of 8 is 4.\nSo 4 + 1 = 5.\nA: 5", 1.0),
    ("Half of 8 is 4.\nSo 4 + 1 = 6.\nA: 6", 0.0),
    ("Half of 8 is 4.\nSo 4 + 1 = 5.\nA: 4", 0.0),
    ("Half of 8 is 2.\nA: 3", 0.0),
]
"""Values: [4.] 1/2, [2.] 0, their mean 1/4; below [4.]: [=5.] 2/3, [=6.] 0, mean 1/3; below [=5.]: [A: 5] 1 (two
solutions, one action), [A: 4] 0, mean 1/2. So A: ±1/4, ±1/3, ±1/2."""


def pipeline(tmp_path: Path, found: list[dict[str, Any]], **keys: Any) -> Path:
    data = tmp_path / "given.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in found))
    first = {"stage": "given", "path": str(data), "kind": "groups"}
    return write_pipeline(
        tmp_path / "p.yaml", [first, {"stage": "step_advantage", **keys}], plugins=[GIVEN]
    )


def group(prompt: Any = PROMPT) -> dict[str, Any]:
    responses = [{"text": text, "score": score} for text, score in SOLUTIONS]
    return {"id": "q", "prompt": prompt, "responses": responses, "answer": "5"}


def test_every_step_has_its_value_less_the_mean_of_its_siblings(tmp_path: Path) -> None:
    folder = build(pipeline(tmp_path, [group()]))
    found = rows(folder / "step_advantage")
    four, five = "Half of 8 is 4.\n", "So 4 + 1 = 5.\n"
    assert [(r["prompt"], r["response"], r["ended"]) for r in found] == [
        (PROMPT, four, False),
        (PROMPT, "Half of 8 is 2.\n", False),
        (PROMPT + four, five, False),
        (PROMPT + four, "So 4 + 1 = 6.\n", False),
        (PROMPT + four + five, "A: 5", True),
        (PROMPT + four + five, "A: 4", True),
    ]
    advantages = [1 / 4, -1 / 4, 1 / 3, -1 / 3, 1 / 2, -1 / 2]
    assert [r["advantage"] for r in found] == pytest.approx(advantages)
    assert [r["reward"] for r in found] == pytest.approx([1 / 2, 0, 2 / 3, 0, 1, 0])
    assert all(r["advantage"] == pytest.approx(r["reward"] - r["value"]) for r in found)
    assert all(r["answer"] == "5" for r in found)
    assert [r["step_state"]["num_leaves"] for r in found] == [4, 1, 3, 1, 2, 1]
    report = json.loads((folder / "manifest/step_advantage/done.json").read_text())["report"]
    assert report == {"steps": {"steps": 6, "states": 3, "negative_frac": 0.5}}


def test_states_of_a_small_gap_and_steps_with_few_solutions_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gaps 1/2, 2/3 and 1; two solutions or more stand behind [4.], [=5.] and [A: 5] only: no siblings."""
    found = rows(build(pipeline(tmp_path, [group()], min_gap=0.6)) / "step_advantage")
    assert {row["step_state"]["shared_steps"] for row in found} == {1, 2}
    other = tmp_path / "other"
    other.mkdir()
    said = refused(capsys, pipeline(other, [group()], min_leaves=2), code=1)
    assert "1 no_gap" in said


def test_a_gap_of_exactly_the_least_is_kept() -> None:
    """0.6 against 0.5, of ten solutions each, is a hair below 0.1 in floating point."""
    outcomes = [1.0] * 6 + [0.0] * 4 + [1.0] * 5 + [0.0] * 5
    root = grow([["a"]] * 10 + [["b"]] * 10)
    (state,) = step_advantages(root, outcomes, min_gap=0.1, min_leaves=1)
    assert state.advantages == pytest.approx((0.05, -0.05))


def test_advantages_are_those_of_a_brute_force_and_sum_to_nothing() -> None:
    """Random solutions over three letters; every state worked out from the solutions that begin with it."""
    rng = random.Random(2)
    for _ in range(60):
        texts = [
            "".join(f"{rng.choice('xyz')}\n" for _ in range(rng.randint(1, 4))) for _ in range(9)
        ]
        outcomes = [float(rng.random() < 0.5) for _ in texts]
        root = grow([split_steps(text, "\n") for text in texts])
        found = step_advantages(root, outcomes, min_gap=0.1, min_leaves=1)
        states = {state.prefix.text: state for state in found}
        for state in found:
            assert sum(state.advantages) == pytest.approx(0)
        prefixes = {text[:end] for text in texts for end in range(0, len(text) + 1, 2)}
        for prefix in prefixes:
            worth = {}
            for step in "xyz":
                begins = [
                    o
                    for t, o in zip(texts, outcomes, strict=True)
                    if t.startswith(f"{prefix}{step}\n")
                ]
                if begins:
                    worth[f"{prefix}{step}\n"] = sum(begins) / len(begins)
            wide = len(worth) > 1 and max(worth.values()) - min(worth.values()) > 0.1 - 1e-9
            assert (prefix in states) == wide
            if wide:
                mean = sum(worth.values()) / len(worth)
                state = states[prefix]
                ours = {a.text: adv for a, adv in zip(state.actions, state.advantages, strict=True)}
                assert ours == pytest.approx({text: each - mean for text, each in worth.items()})


def test_dialogues_become_text_whose_ids_are_the_dialogues(
    tmp_path: Path, tiny_tokenizer: TokenizerFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompt and steps of a solution, put together, render to what the dialogue renders to."""
    chat = [{"role": "user", "content": PROMPT}]
    assert "its prompt is a dialogue" in refused(capsys, pipeline(tmp_path, [group(chat)]), code=1)
    tokenizer = tiny_tokenizer(chat="chatml")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = pipeline(tmp_path, [group(chat)], tokenizer=str(tmp_path / "tokenizer"))
    found = rows(build(path, "--from", "step_advantage") / "step_advantage")
    whole = Renderer(tokenizer).render(chat, {"role": "assistant", "content": SOLUTIONS[0][0]})
    last = next(row for row in found if row["response"].startswith("A: 5"))
    assert last["ended"] and last["response"] == "A: 5<|im_end|>"
    prompt, response = Renderer(tokenizer).render(last["prompt"], last["response"], AS_RENDERED)
    assert prompt + response == whole[0] + whole[1]
    first = found[0]
    assert not first["ended"] and first["response"] == "Half of 8 is 4.\n"
    assert last["prompt"].startswith(first["prompt"] + first["response"])


def test_steps_train_as_they_stand_and_only_the_last_ends(
    tmp_path: Path, tiny_tokenizer: TokenizerFactory
) -> None:
    """Read by a recipe's data section: the advantage of each row, no end token behind a step that goes on."""
    from prefopt.data import load_data
    from prefopt.data.samples import SampleNeeds
    from prefopt.recipe.schema import ColumnMap, DataSection, SourceSection

    folder = build(pipeline(tmp_path, [group()])) / "step_advantage"
    source = SourceSection(
        path=str(folder), format="text", columns=ColumnMap(ended="ended", id="id")
    )
    data = DataSection(train=(source,), cache_dir=str(tmp_path / "cache"))
    tokenizer = tiny_tokenizer()
    train = load_data(data, tokenizer, samples=SampleNeeds(advantage=True)).train
    assert train is not None and len(train) == 6
    for row, found in zip(rows(folder), (train.group(i) for i in range(6)), strict=True):
        (response,) = found.responses
        assert (found.id, response.advantage) == (row["id"], pytest.approx(row["advantage"]))
        assert (response.ids[-1] == tokenizer.eos_token_id) == row["ended"]
        assert tokenizer.decode(response.ids, skip_special_tokens=True) == row["response"]
