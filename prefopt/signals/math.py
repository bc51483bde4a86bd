"""Verifiers of mathematical answers: math-verify for expressions, and the plain number GSM8K ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import PositiveFloat, PositiveInt

from prefopt.recipe.registry import signal
from prefopt.recipe.section import NoEffect
from prefopt.signals.base import Signal, column, per_response
from prefopt.signals.line_workers import LineWorkers, WorkerDied, WorkerTimeout
from prefopt.signals.numbers import extract_number, gold_number, is_right_number
from prefopt.types import Candidates, Prompt

__all__ = ["extract_number", "final_number", "math"]


class _Math:
    """Asks the worker processes; see `math`."""

    def __init__(self, answer: str, timeout_s: float, num_workers: int) -> None:
        self.answer = answer
        self.timeout_s = timeout_s
        self._workers = LineWorkers("prefopt.signals.math_worker", num_workers)
        self._counts = {"responses": 0, "timeouts": 0, "crashes": 0}

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        messages = [
            (str(column(group.prompt, self.answer)), text, self.timeout_s)
            for group in groups
            for text in group.texts
        ]
        # Three steps (parse, parse, compare) stop themselves; the parent's own deadline is for those that
        # hang where no signal handler runs.
        answers = iter(self._workers.ask_all(messages, 3 * self.timeout_s + 1))
        return [[self._value(next(answers)) for _ in group.texts] for group in groups]

    def _value(self, answer: float | str | Exception | None) -> float:
        self._counts["responses"] += 1
        self._counts["timeouts"] += answer == "timeout" or isinstance(answer, WorkerTimeout)
        self._counts["crashes"] += isinstance(answer, WorkerDied)
        if isinstance(answer, Exception | str):
            return 0.0  # the response made it hang or die: not a right answer
        return float("nan") if answer is None else answer

    def report(self) -> Mapping[str, float]:
        return dict(self._counts)

    def close(self) -> None:
        self._workers.close()


@signal(
    "math",
    source="math-verify, the reward of arXiv:2506.21495 on verifiable prompts",
    needs_fields=("answer",),
    reads_answer=True,
    no_answer=0.0,
)
def math(
    *,
    answer: str = "answer",
    timeout_s: PositiveFloat = 5.0,
    num_workers: Annotated[PositiveInt, NoEffect()] = 2,
) -> Signal:
    r"""1.0 if math-verify finds the response's last answer equal to the gold one, else 0.0.

    The response's answer is what stands in its last ``\boxed{}``, LaTeX environment or number. A response
    that exhausts time or memory is wrong (and counted); a gold answer that cannot be parsed is NaN.

    Args:
        answer: column with the gold answer: LaTeX with or without ``$``, or a number.
        timeout_s: longest time for each of parsing gold, parsing response, comparing.
        num_workers: processes that verify; each holds sympy (about 100 MB) and starts when first needed.
    """
    return _Math(answer, timeout_s, num_workers)


@signal(
    "final_number",
    source="GSM8K, github.com/openai/grade-school-math: exact match of the last number",
    needs_fields=("answer",),
    reads_answer=True,
    no_answer=0.0,
)
def final_number(*, answer: str = "answer") -> Signal:
    r"""1.0 if the response's final number equals the gold one, else 0.0; for GSM8K-like problems.

    The final number is the first after the last marker (``####``, ``A:``, ``\boxed{``, ``answer is``,
    ``answer:``), or without a marker the last of the text; `prefopt.signals.numbers` says what a number is.
    Compared exactly, as decimals: 70,000 = 70000.0 = $70000. A gold answer that is no decimal number is NaN.

    Args:
        answer: column with the gold answer: a number, or a solution that ends with one.
    """

    def score(prompt: Prompt, text: str) -> float:
        gold = gold_number(str(column(prompt, answer)))
        return float("nan") if gold is None else float(is_right_number(text, gold))

    return per_response(score)
