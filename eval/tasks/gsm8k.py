"""GSM8K: grade-school word problems, right if the final number is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import PositiveInt

from eval.base import Answer, Conversations, Decoding, Example, Judgments, Row, Summary
from eval.registry import task
from eval.responses import answer_of, answered, model_of, response_of, response_rows
from eval.sources import benchmark_rows, keyed, require, text_key
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.data.readers import RawRow
from prefopt.errors import DataError
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags
from prefopt.signals.numbers import extract_number, gold_number

INSTRUCTION = "Solve the problem step by step. End with the answer as a plain number after ####."
_PROBLEM = ("question", "prompt", "key")
"""Columns that a file of answers may name its problems by."""


@task(
    "gsm8k",
    version="2",
    kind="generate",
    headline="accuracy",
    source="Cobbe et al. 2021, arXiv:2110.14168; exact match of the final number, greedy",
    data="hub openai/gsm8k, test",
)
def gsm8k(*, data: str | None = None, max_new_tokens: PositiveInt = 1024) -> Gsm8k:
    """Accuracy in percent on the 1,319 test problems, zero-shot with an instruction to end in ``#### n``.

    The final number is the first after the last marker (``####``, ``A:``, ``\\boxed{``, ``answer is``), else
    the last of the text, compared exactly as decimals: what `prefopt signals final_number` does.

    Args:
        data: file with columns ``question`` and ``answer`` in place of the hub's.
        max_new_tokens: longest answer.
    """
    return Gsm8k(data, max_new_tokens)


class Gsm8k:
    """See `gsm8k`."""

    def __init__(self, data: str | None, max_new_tokens: int) -> None:
        self.data = data
        self.preset = Decoding(max_new_tokens)

    def examples(self) -> list[Example]:
        rows = benchmark_rows(
            "tasks.gsm8k.data", self.data, hub="openai/gsm8k", subset="main", split="test"
        )
        found = keyed(rows, lambda data: data.get("question"), "problem", "question")
        return [_example(row) for row in found.values()]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        return _row(example.key, str(example.fields["answer"]), samples[0][0])

    def summarise(self, rows: Sequence[Row]) -> Summary:
        right = values_of(rows, "accuracy")
        if not right:
            raise DataError("gsm8k: no row has an answer to score")
        counts = {"n": len(rows), "n_correct": int(sum(right)), **problem_counts(rows)}
        return Summary({"accuracy": mean_metric(right, 100)}, counts)

    def read(self, path: Path, thinking: Tags = DEFAULT_TAGS) -> dict[str, list[Row]]:
        """OpenAI's file of model solutions (a column a model), or rows with ``response`` and ``answer``.

        lm-evaluation-harness's samples are such rows.
        """
        found: dict[str, list[Row]] = {}
        for raw in response_rows(path, *_PROBLEM):
            gold = str(require(raw, "ground_truth", "answer"))
            key = text_key(str(require(raw, *_PROBLEM)))
            for model, response in _responses(raw).items():
                row = _row(key, gold, answered(response, thinking))
                found.setdefault(model, []).append(row)
        return found


def _example(row: RawRow) -> Example:
    question = str(require(row, "question"))
    prompt = ({"role": "user", "content": f"{question}\n\n{INSTRUCTION}"},)
    return Example(text_key(question), prompt, {"answer": str(require(row, "answer"))})


def _row(key: str, gold: str, answer: Answer) -> Row:
    """Right or wrong; a response that is not there is wrong, and counted."""
    expected = gold_number(gold)
    if expected is None:
        raise DataError(f"gsm8k: the gold answer of {key} is no decimal number: {gold[-80:]!r}")
    given = extract_number(answer.text, decimal_comma=expected.decimal_comma)
    problem = answer.problem or ("no_number" if given is None else None)
    return Row(key, {"accuracy": float(given == expected.value)}, problem=problem)


def _responses(raw: RawRow) -> dict[str, Answer]:
    """Answers by model."""
    if "response" in raw.data:
        return {model_of(raw): response_of(raw)}
    found = {name: value for name, value in raw.data.items() if isinstance(value, Mapping)}
    if not found:
        raise DataError(
            f"{raw.where}: neither a 'response' column nor one with {{solution: …}} a model"
        )
    return {
        name: answer_of(value.get("solution"), f"{raw.where}: {name}.solution")
        for name, value in found.items()
    }
