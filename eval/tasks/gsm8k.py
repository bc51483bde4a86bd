"""GSM8K: grade-school word problems, right if the final number is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from eval.base import Conversation, Decoding, Example, Judgment, Row, Summary
from eval.registry import task
from eval.sources import benchmark_rows, file_rows, require, text_key
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.data.readers import RawRow
from prefopt.errors import DataError
from prefopt.signals.math import extract_number

INSTRUCTION = "Solve the problem step by step. End with the answer as a plain number after ####."


@task(
    "gsm8k",
    version="1",
    kind="generate",
    headline="accuracy",
    source="Cobbe et al. 2021, arXiv:2110.14168; exact match of the final number, greedy",
    data="hub openai/gsm8k, test",
)
def gsm8k(*, data: str | None = None, max_new_tokens: PositiveInt = 1024) -> Gsm8k:
    """Accuracy in percent on the 1,319 test problems, zero-shot with an instruction to end in ``#### n``.

    The final number is the first after the last marker (``####``, ``A:``, ``\\boxed{``, ``answer is``), else
    the last of the text, compared as decimals: what `prefopt signals final_number` does.

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
        return [_example(row) for row in rows]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def row(
        self,
        example: Example,
        samples: Sequence[Conversation],
        judgments: Mapping[str, Judgment],
    ) -> Row:
        answer = samples[0][0]
        return _row(example.key, str(example.fields["answer"]), answer.text, answer.problem)

    def summarise(self, rows: Sequence[Row]) -> Summary:
        right = values_of(rows, "accuracy")
        if not right:
            raise DataError("gsm8k: no row has an answer to score")
        counts = {"n": len(rows), "n_correct": int(sum(right)), **problem_counts(rows)}
        return Summary({"accuracy": mean_metric(right, 100)}, counts)

    def read(self, path: Path) -> dict[str, list[Row]]:
        """OpenAI's file of model solutions (a column a model), or rows with ``response`` and ``answer``."""
        found: dict[str, list[Row]] = {}
        for raw in file_rows(path):
            gold = str(require(raw, "ground_truth", "answer"))
            key = text_key(str(require(raw, "question", "prompt", "key")))
            for model, response in _responses(raw).items():
                problem = "null_response" if response is None else None
                found.setdefault(model, []).append(_row(key, gold, response or "", problem))
        return found


def _example(row: RawRow) -> Example:
    question = str(require(row, "question"))
    prompt = ({"role": "user", "content": f"{question}\n\n{INSTRUCTION}"},)
    return Example(text_key(question), prompt, {"answer": str(require(row, "answer"))})


def _row(key: str, gold: str, response: str, problem: str | None) -> Row:
    """Right or wrong; a response that is not there is wrong, and counted."""
    expected, given = extract_number(gold), extract_number(response)
    if expected is None:
        raise DataError(f"gsm8k: the gold answer of {key} holds no number: {gold[-80:]!r}")
    if problem is None and given is None:
        problem = "no_number"
    return Row(key, {"accuracy": float(given == expected)}, problem=problem)


def _responses(raw: RawRow) -> dict[str, str | None]:
    if "response" in raw.data:
        return {str(raw.data.get("model") or ""): raw.data["response"]}
    found: dict[str, Any] = {
        name: value for name, value in raw.data.items() if isinstance(value, Mapping)
    }
    if not found:
        raise DataError(
            f"{raw.where}: neither a 'response' column nor one with {{solution: …}} a model"
        )
    return {name: value.get("solution") for name, value in found.items()}
