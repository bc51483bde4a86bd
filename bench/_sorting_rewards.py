"""A graded reward for the quickstart's task, and training data of which a share is bad. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from recipes.quickstart.task import NUM_DIGITS, Problem


def reward(prompt: str, response: str) -> float:
    """1 for the right answer, less 1/8 for every digit to insert, delete or replace, 0 at least.

    Graded, as a reward model's are: a careless answer, which drops two digits, still earns 0.75.
    """
    answer = "".join(sorted(prompt.rstrip(":")))
    return max(0.0, 1 - edit_distance(response, answer) / NUM_DIGITS)


def edit_distance(one: str, other: str) -> int:
    """Least insertions, deletions and replacements between two texts (Levenshtein)."""
    above = list(range(len(other) + 1))
    for row, char in enumerate(one, start=1):
        line = [row]
        for column, target in enumerate(other, start=1):
            replaced = above[column - 1] + (char != target)
            line.append(min(replaced, above[column] + 1, line[-1] + 1))
        above = line
    return above[-1]


def bad_answer(problem: Problem) -> str:
    """The careless answer; where no digit occurs twice it is right, and two digits trade places instead."""
    if problem.careless_answer != problem.answer:
        return problem.careless_answer
    return problem.answer[1] + problem.answer[0] + problem.answer[2:]


def train_rows(
    problems: Iterable[Problem], *, bad_frac: float, num_responses: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of ``num_responses`` responses, each bad with probability ``bad_frac``, with their rewards.

    A response that is bad at one share is bad at every larger one.
    """
    draw = random.Random(seed)
    found = []
    for problem in problems:
        bad = [draw.random() < bad_frac for _ in range(num_responses)]
        texts = [bad_answer(problem) if each else problem.answer for each in bad]
        responses = [{"text": text, "reward": reward(problem.prompt, text)} for text in texts]
        found.append({"id": problem.prompt, "prompt": problem.prompt, "responses": responses})
    return found


def pair_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A pair for every row of two responses with different rewards."""
    found = []
    for row in rows:
        worse, better = sorted(row["responses"], key=lambda each: each["reward"])
        if better["reward"] > worse["reward"]:
            sides = {"chosen": better["text"], "rejected": worse["text"]}
            found.append({"id": row["id"], "prompt": row["prompt"], **sides})
    return found
