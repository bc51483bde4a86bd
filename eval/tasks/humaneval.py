"""HumanEval: Python functions from docstrings, right if their unit tests pass. Run in the sandbox only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from eval.base import Answer, Conversations, Decoding, Example, Judgments, Row, Summary
from eval.registry import task
from eval.responses import answered, model_of, response_of
from eval.sources import benchmark_rows, file_rows, keyed, require
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags
from prefopt.signals.markdown_code import readings
from prefopt.signals.python_tests import read_tests
from prefopt.signals.sandbox import Limits, Program, Promise, run_program, source_program

INSTRUCTION = (
    "Complete this Python function. Answer with one Python code block that holds the whole function and "
    "whatever it needs."
)
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends, unless indented: Chen et al. 2021, section 3.2."""

_MODULE = "solution"
"""Its ``__name__``: human-eval runs programs in a module that is not the main one, so that what stands under
``if __name__ == "__main__"`` is not run."""

Mode = Literal["chat", "complete"]


@task(
    "humaneval",
    version="2",
    kind="generate",
    headline="pass@1",
    source="Chen et al. 2021, arXiv:2107.03374; unbiased pass@k, 3 s a program",
    data="hub openai/openai_humaneval, test",
)
def humaneval(
    *,
    data: str | None = None,
    mode: Mode = "chat",
    samples: PositiveInt = 1,
    k: Sequence[PositiveInt] = (1,),
    max_new_tokens: PositiveInt = 1024,
    timeout_s: PositiveFloat = 3.0,
    num_workers: PositiveInt = 2,
    accept_risks: tuple[Promise, ...] = (),
) -> HumanEval:
    r"""pass@k in percent over the 164 problems; pass@1 is always among them.

    One sample is greedy; several are drawn at temperature 0.8 with top-p 0.95: section 3.3 of the paper finds
    0.2 best for pass@1 and 0.8 for pass@100, so set ``decoding.temperature=0.2`` for pass@1 from many.

    Args:
        data: file with columns ``task_id``, ``prompt``, ``entry_point`` and ``test`` in place of the hub's.
        mode: ``chat``: an instruction (ours); the Python of the answer is run after the problem's prompt, or as
            the function's body where it does not define it. ``complete``: the prompt alone, cut at the paper's
            stop sequences; for base models.
        samples: answers to each problem.
        k: at most ``samples`` each.
        max_new_tokens: longest answer.
        timeout_s: longest wall and CPU time of one program.
        num_workers: programs run at a time.
        accept_risks: what the sandbox promises and need not hold here; ``prefopt doctor`` shows what does.
    """
    too_large = [each for each in k if each > samples]
    if too_large:
        raise ConfigError(
            f"tasks.humaneval.k = {list(k)}: pass@{too_large[0]} cannot be estimated from {samples} answers to a "
            f"problem. Set tasks.humaneval.samples={max(k)} or more"
        )
    limits = Limits(wall_s=timeout_s, cpu_s=timeout_s, accept_risks=accept_risks)
    return HumanEval(data, mode, _preset(samples, max_new_tokens), k, limits, num_workers)


def _preset(samples: int, max_new_tokens: int) -> Decoding:
    if samples == 1:
        return Decoding(max_new_tokens)
    return Decoding(max_new_tokens, temperature=0.8, top_p=0.95, num_samples=samples)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that of k answers drawn from n without replacement, c of them right, one is right.

        1 - C(n-c, k) / C(n, k) = 1 - Π_{j=n-c+1..n} (1 - k/j)

    Raises: ValueError for k > n, of which there is no estimate.
    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1 and figure 3.
    """
    if k > n:
        raise ValueError(f"pass@{k} of {n} answers")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


class HumanEval:
    """See `humaneval`."""

    def __init__(
        self,
        data: str | None,
        mode: Mode,
        preset: Decoding,
        k: Sequence[int],
        limits: Limits,
        num_workers: int,
    ) -> None:
        self.data = data
        self.mode: Mode = mode
        self.preset = preset
        self.k = sorted({1, *k})
        self.limits = limits
        self.num_workers = num_workers

    def examples(self) -> list[Example]:
        rows = benchmark_rows(
            "tasks.humaneval.data", self.data, hub="openai/openai_humaneval", split="test"
        )
        found = keyed(rows, lambda data: data.get("task_id"), "problem", "task_id")
        return [_example(key, row, self.mode) for key, row in found.items()]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        answers = [conversation[0] for conversation in samples]
        program = chat_program if self.mode == "chat" else _cut_program
        programs = [None if each.problem else program(example, each.text) for each in answers]
        return self._row(example.key, answers, self._run(programs))

    def summarise(self, rows: Sequence[Row]) -> Summary:
        ran = [row for row in rows if row.details["verdicts"]]
        if not ran:
            raise DataError("humaneval: no problem has an answer")
        verdicts = sum((Counter(row.details["verdicts"]) for row in ran), Counter())
        counts = {
            "n": len(rows),
            "n_samples": verdicts.total(),
            "n_passed": verdicts["passed"],
            **{f"num_{name}": verdicts[name] for name in sorted(verdicts) if name != "passed"},
            **problem_counts(row for row in rows if not row.details["verdicts"]),
        }
        metrics = {f"pass@{k}": mean_metric(values_of(ran, f"pass@{k}"), 100) for k in self.k}
        missing = len(rows) - len(ran)
        note = f"{missing} of {len(rows)} problems have no answer: the numbers are of the other {len(ran)}"
        return Summary(metrics, counts, notes=(note,) if missing else ())

    def read(self, path: Path, thinking: Tags = DEFAULT_TAGS) -> dict[str, list[Row]]:
        """human-eval's samples: rows ``{task_id, completion}``, any number a problem; problems come from ``data``.

        A completion is run as it is, right after its prompt; a ``response`` in its place as a chat answer.
        """
        examples = {example.key: example for example in self.examples()}
        files: dict[str, dict[str, list[RawRow]]] = {}
        for raw in file_rows(path):
            key = str(require(raw, "task_id"))
            if key not in examples:
                raise DataError(
                    f"{raw.where}: task_id = {key!r}: no such problem; there are {len(examples)}, such as "
                    f"{next(iter(examples))!r}"
                )
            files.setdefault(model_of(raw), {}).setdefault(key, []).append(raw)
        return {model: self._read(examples, rows, thinking) for model, rows in files.items()}

    def _read(
        self, examples: Mapping[str, Example], raws: Mapping[str, list[RawRow]], thinking: Tags
    ) -> list[Row]:
        """One model's rows; all programs share the workers, so that one slow problem holds up no other."""
        answers = {
            key: [_published(examples[key], raw, thinking) for raw in rows]
            for key, rows in raws.items()
        }
        verdicts = iter(self._run([program for each in answers.values() for _, program in each]))
        ran = {
            key: self._row(key, [answer for answer, _ in each], [next(verdicts) for _ in each])
            for key, each in answers.items()
        }
        return [ran.get(key) or self._row(key, [], []) for key in examples]

    def _run(self, programs: Sequence[Program | None]) -> list[str | None]:
        """How each program ended; None for none."""

        def run(program: Program | None) -> str | None:
            return None if program is None else run_program(program, self.limits).verdict

        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(run, programs))

    def _row(self, key: str, answers: Sequence[Answer], verdicts: Sequence[str | None]) -> Row:
        names = Counter(
            verdict or answer.problem for verdict, answer in zip(verdicts, answers, strict=True)
        )
        n, c = names.total(), names["passed"]
        if n == 0:
            return Row(
                key, dict.fromkeys(f"pass@{k}" for k in self.k), {"verdicts": {}}, "no_answer"
            )
        if n < self.k[-1]:
            raise DataError(
                f"humaneval: {key} has {n} answers: pass@{self.k[-1]} needs at least as many of every "
                "problem. Lower tasks.humaneval.k"
            )
        values = {f"pass@{k}": pass_at_k(n, c, k) for k in self.k}
        problem = next((answer.problem for answer in answers if answer.problem), None)
        return Row(key, values, {"verdicts": dict(names)}, problem)


def chat_program(example: Example, text: str) -> Program:
    """The program of a chat model's answer: the prompt (its imports and helpers), then the answer's code.

    Code that does not define the function, by whatever statement, is taken for its body.
    """
    fields = example.fields
    program = Program(
        tuple(readings(text)), before=fields["prompt"], entry_point=fields["entry_point"]
    )
    return _tested(example, program)


def completion_program(example: Example, completion: str) -> Program:
    """The program of a completion: right after the prompt, as human-eval runs it."""
    return _tested(example, source_program(example.fields["prompt"] + completion))


def _cut_program(example: Example, text: str) -> Program:
    ends = [place for stop in STOPS if (place := text.find(stop)) >= 0]
    return completion_program(example, text[: min(ends, default=len(text))])


def _tested(example: Example, program: Program) -> Program:
    tests = read_tests(f"{example.fields['test']}\ncheck({example.fields['entry_point']})\n")
    if isinstance(tests, str):
        raise DataError(f"humaneval: {example.key}: {tests}")
    return replace(program, module=_MODULE, tests=tests.source, imports=tests.imports)


def _published(example: Example, raw: RawRow, thinking: Tags) -> tuple[Answer, Program | None]:
    """An answer of a file and its program; which column it is in says what it is."""
    name, program = "completion", completion_program
    if name not in raw.data and "response" in raw.data:
        name, program = "response", chat_program
    answer = answered(response_of(raw, name), thinking)
    return answer, None if answer.problem else program(example, answer.text)


def _example(key: str, row: RawRow, mode: Mode) -> Example:
    names = ("prompt", "entry_point", "test")
    fields = {name: str(require(row, name)) for name in names}
    if mode == "complete":
        return Example(key, fields["prompt"], fields)
    content = f"{INSTRUCTION}\n\n```python\n{fields['prompt']}```"
    return Example(key, ({"role": "user", "content": content},), fields)
