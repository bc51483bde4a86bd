"""The quickstart task: sort the digits of a number, generated here and checked by Python's ``sorted``.

A prompt is ``"83051703:"`` and the only right response is ``"00133578"``. Half of the demonstrations are
careless and write a repeated digit once (``"013578"``). Supervised fine-tuning imitates what it is shown,
flaws included, and has no way to know which half is meant. Pairs have: a program checks the policy's own
answers, and preference training moves it to the behaviour it already has and should prefer.

Why sorting: accuracy rises with every step, on any machine and seed. (Adding three-digit numbers, tried
first, stays at 0 for hundreds of steps and then jumps to nearly 1; when depends on the seed.)
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

NUM_DIGITS = 8
ALPHABET = "0123456789:"

_PROMPT = re.compile(r"([0-9]+):")


@dataclass(frozen=True, order=True)
class Problem:
    """One number to sort, as a string of digits; leading zeros count."""

    digits: str

    @property
    def prompt(self) -> str:
        return f"{self.digits}:"

    @property
    def answer(self) -> str:
        """All digits, in rising order."""
        return "".join(sorted(self.digits))

    @property
    def careless_answer(self) -> str:
        """What a careless demonstrator writes: every digit once, however often it occurs."""
        return "".join(sorted(set(self.digits)))


@dataclass(frozen=True)
class Splits:
    """Problems of the three uses; no problem is in two of them, or twice in one."""

    sft: tuple[Problem, ...]
    """Shown with their answers, to make the base policy."""
    preference: tuple[Problem, ...]
    """Answered by the policy itself; its right and wrong answers become the training pairs."""
    held_out: tuple[Problem, ...]
    """Never trained on: every number of the final table is measured here."""


def make_splits(*, num_sft: int, num_preference: int, num_held_out: int, seed: int) -> Splits:
    """Returns disjoint splits, drawn without replacement from all numbers of `NUM_DIGITS` digits."""
    total = num_sft + num_preference + num_held_out
    numbers = random.Random(seed).sample(range(10**NUM_DIGITS), total)
    problems = [Problem(f"{number:0{NUM_DIGITS}d}") for number in numbers]
    first_held_out = num_sft + num_preference
    return Splits(
        sft=tuple(problems[:num_sft]),
        preference=tuple(problems[num_sft:first_held_out]),
        held_out=tuple(problems[first_held_out:]),
    )


def score_group(prompt: str, responses: Sequence[str]) -> list[float]:
    """Returns 1.0 for each response that is exactly the prompt's digits in rising order, else 0.0.

    Raises: ValueError for a prompt that is not digits and a colon.
    """
    answer = _answer(prompt)
    return [float(response == answer) for response in responses]


def share_in_place(prompt: str, response: str) -> float:
    """Returns the share of places that hold the right digit, 0 to 1: `score_group`, but by degrees.

    Places are those of the right answer, or of the response where it is longer.
    Raises: ValueError as `score_group`.
    """
    places = [right == digit for right, digit in zip_longest(_answer(prompt), response)]
    return sum(places) / len(places)


def _answer(prompt: str) -> str:
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"prompt {prompt!r}: must be digits followed by a colon")
    return "".join(sorted(match[1]))
