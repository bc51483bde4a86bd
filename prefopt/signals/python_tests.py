"""Verifier of Python code: the response's program must pass the row's unit tests, in a sandbox."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from pydantic import PositiveFloat, PositiveInt

from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, column
from prefopt.signals.sandbox import Limits, run_program
from prefopt.types import Candidates

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


class _PythonTests:
    """Runs programs, a few at a time; see `python_tests`."""

    def __init__(self, tests: str, prefix: str | None, limits: Limits, num_workers: int) -> None:
        self.tests = tests
        self.prefix = prefix
        self.limits = limits
        self.num_workers = num_workers
        self._counts: Counter[str] = Counter()

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        programs = [self._program(group, text) for group in groups for text in group.texts]
        with ThreadPoolExecutor(self.num_workers) as threads:
            outcomes = list(threads.map(lambda p: run_program(p, self.limits), programs))
        self._counts.update(outcome.verdict for outcome in outcomes)
        scores = iter(outcomes)
        return [[float(next(scores).passed) for _ in group.texts] for group in groups]

    def _program(self, group: Candidates, text: str) -> str:
        tests = column(group.prompt, self.tests)
        parts = [] if self.prefix is None else [str(column(group.prompt, self.prefix))]
        parts.append(extract_code(text))
        parts += [str(test) for test in tests] if isinstance(tests, list | tuple) else [str(tests)]
        return "\n\n".join(parts) + "\n"

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
    num_workers: PositiveInt = 2,
) -> Signal:
    """1.0 if the response's code followed by the row's tests runs to its end, else 0.0.

    The code is the last Python fence of the response, else its last fence, else all of it. What the sandbox
    guarantees, and what not, is in `prefopt.signals.sandbox`; it is tried once here.

    Args:
        tests: column with Python source that raises where the code is wrong, or a list of such statements.
            HumanEval's ``test`` needs the call appended: ``check(entry_point)``.
        prefix: column with source put before the code (HumanEval's ``prompt``: its imports).
        timeout_s: longest wall and CPU time of one program.
        memory_mib: address space of one program, MiB.
        num_workers: programs run at a time.

    Raises: SignalError where code cannot be isolated (no Linux seccomp).
    """
    limits = Limits(wall_s=timeout_s, cpu_s=timeout_s, memory_bytes=memory_mib << 20)
    run_program("", limits)
    return _PythonTests(tests, prefix, limits, num_workers)


def extract_code(text: str) -> str:
    """The last fence marked as Python, else the last fence, else the whole text. Indented fences too."""
    fences = _FENCE.findall(text)
    marked = [code for language, code in fences if language.lower() in {"python", "py", "python3"}]
    if not fences:
        return text
    return textwrap.dedent(marked[-1] if marked else fences[-1][1])
