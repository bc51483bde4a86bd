"""Verifier of Python code: the response's program must pass the row's unit tests, in a sandbox."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from pydantic import PositiveFloat, PositiveInt

from prefopt.errors import DataError
from prefopt.recipe.registry import signal
from prefopt.recipe.section import NoEffect
from prefopt.signals.base import Signal, column
from prefopt.signals.markdown_code import readings
from prefopt.signals.sandbox import Limits, Program, Promise, run_program
from prefopt.signals.sandbox_source import only_defines
from prefopt.types import Candidates


@dataclass(frozen=True)
class RowTests:
    """A row's tests, read once."""

    source: str
    imports: tuple[str, ...]


class _PythonTests:
    """Runs programs, a few at a time; see `python_tests`."""

    def __init__(self, tests: str, prefix: str | None, limits: Limits, num_workers: int) -> None:
        self.tests = tests
        self.prefix = prefix
        self.limits = limits
        self.num_workers = num_workers
        self._counts: Counter[str] = Counter()

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        programs = [program for group in groups for program in self._programs(group)]
        with ThreadPoolExecutor(self.num_workers) as threads:
            outcomes = list(threads.map(lambda p: run_program(p, self.limits), programs))
        self._counts.update(outcome.verdict for outcome in outcomes)
        scores = iter(outcomes)
        return [[float(next(scores).passed) for _ in group.texts] for group in groups]

    def _programs(self, group: Candidates) -> list[Program]:
        value = column(group.prompt, self.tests)
        parts = value if isinstance(value, list | tuple) else [value]
        tests = read_tests("\n\n".join(str(part) for part in parts) + "\n")
        if isinstance(tests, str):
            raise DataError(f"prompt {group.prompt.id}: column {self.tests!r}: {tests}")
        before = "" if self.prefix is None else str(column(group.prompt, self.prefix))
        return [
            Program(tuple(readings(text)), before, tests=tests.source, imports=tests.imports)
            for text in group.texts
        ]

    def report(self) -> Mapping[str, float]:
        """Programs by how they ended."""
        return {
            name: float(self._counts[name]) for name in ("passed", "failed", "timeout", "output")
        }

    def close(self) -> None:
        """Nothing to free: every program's process has ended."""


@signal(
    "python_tests",
    source="unit tests, as HumanEval's (arXiv:2107.03374)",
    needs_fields=("tests", "prefix"),
    reads_answer=True,
    no_answer=0.0,
)
def python_tests(
    *,
    tests: str = "tests",
    prefix: str | None = None,
    timeout_s: PositiveFloat = 10.0,
    memory_mib: PositiveInt = 1024,
    num_workers: Annotated[PositiveInt, NoEffect()] = 2,
    accept_risks: tuple[Promise, ...] = (),
    readable: tuple[str, ...] = (),
) -> Signal:
    """1.0 if the response's code followed by the row's tests runs to its end, else 0.0.

    How code comes out of a response is in `prefopt.signals.markdown_code`. The tests reach the process only once
    the code ran, and find the modules they import as these were before; a run of unittest or doctest that failed
    or found nothing is no pass. What the sandbox guarantees, and what not, is in `prefopt.signals.sandbox`; it is
    tried once here. A row whose tests are no Python or run nothing (functions that nobody calls) has no score.

    Args:
        tests: column with Python source that raises where the code is wrong, or a list of such statements.
            HumanEval's ``test`` needs the call appended: ``check(entry_point)``.
        prefix: column with source put before the code (HumanEval's ``prompt``: its imports). Code that is indented
            goes on where it ends.
        timeout_s: longest wall and CPU time of one program.
        memory_mib: address space of one program, MiB.
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
    return _PythonTests(tests, prefix, limits, num_workers)


@lru_cache(maxsize=256)
def read_tests(source: str) -> RowTests | str:
    """Tests with the modules that they import, or what is wrong with them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return (
            f"the tests are no Python ({error}{line}). Mend the row, or drop it from data.prompts"
        )
    if all(map(only_defines, tree.body)):
        return (
            "the tests run nothing, so that every program would pass. What they define must be called: for "
            "HumanEval's `test` append check(entry_point), for unittest unittest.main(), for pytest's functions "
            "a call of each. For programs that read and print there is the signal python_io"
        )
    return RowTests(source, tuple(sorted(_imports(tree))))


def _imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found
