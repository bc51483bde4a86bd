r"""MATH-500: competition problems, right if math-verify finds the boxed answer equal to the gold one."""

from __future__ import annotations

import math as maths
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from eval.base import Answer, Conversations, Decoding, Example, Judgments, Row, Summary
from eval.registry import task
from eval.responses import answered, model_of, response_of, response_rows
from eval.sources import benchmark_rows, keyed, require, text_key
from eval.statistics import group_means, mean_metric, problem_counts, values_of
from prefopt.data.readers import RawRow
from prefopt.errors import DataError
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags
from prefopt.signals.math import math as math_verify
from prefopt.types import Candidates, Prompt

INSTRUCTION = "Reason step by step, and put the final answer in \\boxed{}."
_GROUPS = ("level", "subject")
_KEY, _PROBLEM = ("unique_id", "id", "key"), ("problem", "question", "prompt")


@task(
    "math",
    version="2",
    kind="generate",
    headline="accuracy",
    source="MATH-500: Lightman et al. 2023, arXiv:2305.20050, from Hendrycks et al. 2021; scored by math-verify",
    data="hub HuggingFaceH4/MATH-500, test",
)
def math(
    *,
    data: str | None = None,
    max_new_tokens: PositiveInt = 2048,
    timeout_s: PositiveFloat = 5.0,
) -> Math500:
    r"""Accuracy in percent, zero-shot and greedy, with an instruction to put the answer in ``\boxed{}``.

    Answers are compared by the ``math`` signal: math-verify in a process of its own, so that an expression
    that never ends costs ``timeout_s``, is wrong, and is counted (``num_timeout``). A gold answer that cannot
    be parsed is left out and counted. The instruction is ours; 2,048 tokens is what HuggingFaceH4's published
    MATH-500 completions were cut at.

    Args:
        data: file with columns ``problem`` and ``answer``, and perhaps ``level``, ``subject``, ``unique_id``.
        max_new_tokens: longest answer.
        timeout_s: longest time for each of parsing gold, parsing answer, comparing.
    """
    return Math500(data, max_new_tokens, timeout_s)


class Math500:
    """See `math`. Holds one process, started with the first answer, until `close`."""

    def __init__(self, data: str | None, max_new_tokens: int, timeout_s: float) -> None:
        self.data = data
        self.preset = Decoding(max_new_tokens)
        # One answer is asked at a time, so that a time-out is the answer's own: a second process would idle.
        self._verifier: Any = math_verify(timeout_s=timeout_s, num_workers=1)

    def examples(self) -> list[Example]:
        rows = benchmark_rows(
            "tasks.math.data", self.data, hub="HuggingFaceH4/MATH-500", split="test"
        )
        return [
            _example(key, row)
            for key, row in keyed(rows, _key, "problem", *_KEY, *_PROBLEM).items()
        ]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        return self._row(example.key, example.fields, samples[0][0])

    def summarise(self, rows: Sequence[Row]) -> Summary:
        right = values_of(rows, "accuracy")
        if not right:
            raise DataError("math: no row has an answer that could be scored")
        counts = {"n": len(rows), "n_correct": int(sum(right)), **problem_counts(rows)}
        groups = {
            name: values
            for by in _GROUPS
            for name, values in group_means(rows, by, "accuracy", 100).items()
        }
        return Summary({"accuracy": mean_metric(right, 100)}, counts, groups)

    def read(self, path: Path, thinking: Tags = DEFAULT_TAGS) -> dict[str, list[Row]]:
        """Rows with ``response`` and ``answer``, or a ``solution`` that boxes it; and ``model`` for several."""
        found: dict[str, list[Row]] = {}
        try:
            for raw in response_rows(path, *_KEY, *_PROBLEM):
                fields = {**raw.data, "answer": require(raw, "answer", "solution")}
                row = self._row(str(_key(raw.data)), fields, answered(response_of(raw), thinking))
                found.setdefault(model_of(raw), []).append(row)
        finally:
            self.close()
        return found

    def close(self) -> None:
        self._verifier.close()

    def _row(self, key: str, fields: Mapping[str, Any], answer: Answer) -> Row:
        details = {name: str(fields[name]) for name in _GROUPS if fields.get(name) is not None}
        if answer.problem is not None:
            return Row(key, {"accuracy": 0.0}, details, answer.problem)
        right, problem = self._verify(key, str(fields["answer"]), answer.text)
        return Row(key, {"accuracy": right}, details, problem)

    def _verify(self, key: str, gold: str, text: str) -> tuple[float | None, str | None]:
        """1.0, 0.0 or None for a gold answer that cannot be read; and what went wrong."""
        before = self._verifier.report()
        group = Candidates(Prompt(key, (), "", {"answer": gold}), (text,), ((),), (False,))
        right = self._verifier.score([group])[0][0]
        if maths.isnan(right):
            return None, "gold_unreadable"
        after = self._verifier.report()
        problem = next(
            (name for name in ("timeouts", "crashes") if after[name] > before[name]), None
        )
        return right, problem and {"timeouts": "timeout", "crashes": "crash"}[problem]


def _key(data: Mapping[str, Any]) -> str | None:
    """The problem's id, else a hash of its text."""
    for name in _KEY:
        if data.get(name) not in (None, ""):
            return str(data[name])
    text = next((data[name] for name in _PROBLEM if data.get(name)), None)
    return None if text is None else text_key(str(text))


def _example(key: str, row: RawRow) -> Example:
    prompt = ({"role": "user", "content": f"{require(row, 'problem')}\n\n{INSTRUCTION}"},)
    fields = {name: row.data[name] for name in _GROUPS if row.data.get(name) is not None}
    return Example(key, prompt, {**fields, "answer": str(require(row, "answer"))})
