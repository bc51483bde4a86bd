"""Verifier of Python programs by inputs and outputs, in a sandbox that never sees what is expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from prefopt.errors import DataError
from prefopt.recipe.registry import signal
from prefopt.recipe.section import NoEffect
from prefopt.signals.base import Signal, column
from prefopt.signals.contest_cases import (
    Case,
    Compare,
    cases_apart,
    cases_together,
    function_name,
    same_text,
    same_value,
    spread,
)
from prefopt.signals.markdown_code import readings
from prefopt.signals.sandbox import Limits, Program, Promise, run_program
from prefopt.types import Candidates


@dataclass(frozen=True)
class Columns:
    """Where a row says what it asks."""

    inputs: str
    outputs: str | None
    function: str | None
    prefix: str | None


class _PythonIO:
    """Runs every program on every case of its row; see `python_io`."""

    def __init__(
        self,
        columns: Columns,
        *,
        reward: Literal["all", "share"],
        compare: Compare,
        tolerance: float | None,
        max_cases: int | None,
        limits: Limits,
        num_workers: int,
    ) -> None:
        self.columns = columns
        self.reward: Literal["all", "share"] = reward
        self.compare: Compare = compare
        self.tolerance = tolerance
        self.max_cases = max_cases
        self.limits = limits
        self.num_workers = num_workers
        self._counts: Counter[str] = Counter()

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        rows = [self._row(group) for group in groups]
        jobs = [
            (text, before, cases)
            for group, (before, cases) in zip(groups, rows, strict=True)
            for text in group.texts
        ]
        with ThreadPoolExecutor(self.num_workers) as threads:
            verdicts = list(threads.map(lambda job: self._verdicts(*job), jobs))
        self._counts.update(verdict for each in verdicts for verdict in each)
        scores = iter(
            each.count("passed") / len(cases) if self.reward == "share" else float(set(each) == {"passed"})
            for each, (_, _, cases) in zip(verdicts, jobs, strict=True)
        )  # fmt: skip
        return [[next(scores) for _ in group.texts] for group in groups]

    def _row(self, group: Candidates) -> tuple[str, list[Case]]:
        """What stands before the code, and the cases that are tried."""
        prompt, names = group.prompt, self.columns
        before = "" if names.prefix is None else str(column(prompt, names.prefix))
        named = None if names.function is None else column(prompt, names.function)
        inputs = column(prompt, names.inputs)
        outputs = None if names.outputs is None else column(prompt, names.outputs)
        try:
            function = None if named is None else function_name(named)
            if names.outputs is None:
                cases = cases_together(inputs, function)
            else:
                cases = cases_apart(inputs, outputs, function)
        except DataError as error:
            raise DataError(f"prompt {prompt.id}: column {names.inputs!r} {error}") from error
        kept = spread(cases, self.max_cases)
        self._counts["cases_left_out"] += len(cases) - len(kept)
        return before, kept

    def _verdicts(self, text: str, before: str, cases: Sequence[Case]) -> list[str]:
        """How each case ended; where all must pass, none after the first that did not."""
        found = []
        for case in cases:
            found.append(self._verdict(text, before, case))
            if self.reward == "all" and found[-1] != "passed":
                break
        return found

    def _verdict(self, text: str, before: str, case: Case) -> str:
        ways = tuple(readings(text))
        if case.function is not None:
            program = Program(ways, before, call=case.function, arguments=case.arguments)
            outcome = run_program(program, self.limits)
            right = same_value(outcome.value, case.expected, self.tolerance)
        else:
            outcome = run_program(
                Program(ways, before, stdin=case.input), self._limits(case.expected)
            )
            right = same_text(outcome.output, case.expected, self.compare, self.tolerance)
        return outcome.verdict if not outcome.passed or right else "wrong"

    def _limits(self, expected: str) -> Limits:
        """Room for twice what must be printed: a right answer may be large."""
        room = max(self.limits.output_bytes, 2 * len(expected.encode(errors="replace")))
        return replace(self.limits, output_bytes=room)

    def report(self) -> Mapping[str, float]:
        """Cases by how they ended; ``failed`` raised or left with an error."""
        names = ("passed", "wrong", "failed", "timeout", "output", "cases_left_out")
        return {name: float(self._counts[name]) for name in names}

    def close(self) -> None:
        """Nothing to free: every program's process has ended."""


@signal(
    "python_io",
    source="inputs and outputs, as APPS's (arXiv:2105.09938)",
    needs_fields=("inputs", "outputs", "function", "prefix"),
    reads_answer=True,
    no_answer=0.0,
)
def python_io(
    *,
    inputs: str = "inputs",
    outputs: str | None = "outputs",
    function: str | None = None,
    prefix: str | None = None,
    reward: Literal["all", "share"] = "all",
    compare: Compare = "lines",
    tolerance: NonNegativeFloat | None = None,
    max_cases: PositiveInt | None = None,
    timeout_s: PositiveFloat = 10.0,
    memory_mib: PositiveInt = 1024,
    num_workers: Annotated[PositiveInt, NoEffect()] = 2,
    accept_risks: tuple[Promise, ...] = (),
    readable: tuple[str, ...] = (),
) -> Signal:
    """Whether the response's program gives the expected output for the row's inputs, in [0, 1].

    A case is one process: the program reads the input and prints, or a function of it is called. What is expected
    stays outside. A program that raises or leaves with an error is wrong, whatever it printed.

    Args:
        inputs: column with one input or a list of them; with ``outputs=None`` all of a row's cases: APPS's and
            TACO's ``input_output``, CodeContests' ``public_tests``, Codeforces' ``official_tests``,
            LiveCodeBench's ``public_test_cases``, as objects or JSON text.
        outputs: column with as many outputs.
        function: column with the name of a function that is called with the inputs as arguments (or a method of
            a class ``Solution``); a name in the cases themselves (``fn_name``) comes first.
        prefix: column with source put before the code.
        reward: ``all``: 1 if every case is right, else 0; ends at the first that is not. ``share``: of the cases.
        compare: ``lines`` or ``tokens``: white space at the ends of lines, or between words, does not count.
        tolerance: numbers may differ by so much, or by that share of the expected one; None compares texts.
        max_cases: at most so many a row, evenly over their order; the others are counted.
        timeout_s: longest wall and CPU time of one case.
        memory_mib: address space of one process, MiB.
        num_workers: programs run at a time.
        accept_risks: what the sandbox promises and need not hold here; ``prefopt doctor`` shows what does.
        readable: files and directories that a program may read beside Python's libraries.

    Raises: SignalError where code cannot be isolated, naming what is missing.
    """
    limits = Limits(
        wall_s=timeout_s,
        cpu_s=timeout_s,
        memory_bytes=memory_mib << 20,
        accept_risks=accept_risks,
        readable=readable,
    )
    run_program("", limits)
    return _PythonIO(
        Columns(inputs, outputs, function, prefix),
        reward=reward,
        compare=compare,
        tolerance=tolerance,
        max_cases=max_cases,
        limits=limits,
        num_workers=num_workers,
    )
