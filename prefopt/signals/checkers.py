"""Verifier by functions that come with the row: Python checkers of a response, run in the sandbox alone.

The functions are model-written (AutoIF), so nothing of them is ever compiled in this process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import PositiveFloat, PositiveInt

from prefopt.errors import DataError
from prefopt.recipe.registry import signal
from prefopt.recipe.section import NoEffect
from prefopt.signals.base import Signal, column
from prefopt.signals.markdown_code import readings
from prefopt.signals.sandbox import Limits, Promise, run_program
from prefopt.types import Candidates

Vote: TypeAlias = bool | None
"""What a checker says of a text; None if it raised, ran too long, or gave neither true nor false."""

_HARNESS = """
def _check(sources, texts, timeout_s):
    import os, signal
    out, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)  # what a checker prints is no vote

    class Late(BaseException):
        pass

    late = []

    def ring(*_):
        late.append(True)
        raise Late

    def timed(fn, *arguments):
        del late[:]
        # again and again: a checker's own `except:` may swallow the first one
        signal.setitimer(signal.ITIMER_REAL, timeout_s, 0.1)
        try:
            value = fn(*arguments)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return None if late else value

    def say(what):
        os.write(out, f"{what}\\n".encode())

    signal.signal(signal.SIGALRM, ring)
    names = {"__name__": "checker"}

    def code():
        for source in sources:  # the ways in which a text may hold it: the first that is Python
            try:
                found = compile(source, "<checker>", "exec")
            except (SyntaxError, ValueError):
                continue
            if "evaluate" in source:
                return found

    try:
        timed(lambda: exec(code(), names))
        evaluate = names["evaluate"]
    except BaseException:
        return say("unusable")
    say("usable")
    for number, text in enumerate(texts):
        try:
            vote = {True: 1, False: 0}.get(timed(evaluate, text))  # 1, 1.0 and numpy.True_ are True, "yes" is not
        except BaseException:
            vote = None
        say(f"{number} {vote}")
"""
_VOTES: dict[str, Vote] = {"1": True, "0": False, "None": None}


@dataclass(frozen=True)
class CheckerLimits:
    """What one call of a checker may use."""

    timeout_s: float = 5.0
    memory_bytes: int = 1 << 30
    accept_risks: tuple[Promise, ...] = ()
    """As in `prefopt.signals.sandbox.Limits`."""
    readable: tuple[str, ...] = ()
    """As in `prefopt.signals.sandbox.Limits`."""

    def for_calls(self, count: int) -> Limits:
        """The limits of a program that makes so many calls."""
        whole_s = self.timeout_s * count + 1.0
        return Limits(
            whole_s,
            whole_s,
            self.memory_bytes,
            output_bytes=(1 << 16) + 64 * count,
            accept_risks=self.accept_risks,
            readable=self.readable,
        )


def run_checker(source: str, texts: Sequence[str], limits: CheckerLimits) -> list[Vote] | None:
    """What the function ``evaluate`` of ``source`` says of each text, in one sandbox.

    A call that cannot be interrupted takes the rest of its texts with it: their votes are None.

    Args:
        source: Python that defines ``evaluate(response) -> bool``, in a Markdown fence or bare.
        texts: responses.
        limits: of each call.

    Returns: a vote a text; None if the source does not run or defines no ``evaluate``.
    Raises: SignalError where code cannot be isolated.
    """
    ways = ["\n\n".join(each for each, _ in reading) for reading in readings(source)]
    orders = f"_check({ways!r}, {list(texts)!r}, {limits.timeout_s!r})\n"
    outcome = run_program(_HARNESS + orders, limits.for_calls(len(texts) + 1))
    votes = read_votes(outcome.output, len(texts))
    if votes and outcome.meddled:  # it is ended there, amid its votes
        return [None for _ in texts]
    return votes


def read_votes(said: str, num_texts: int) -> list[Vote] | None:
    """The votes in what the harness wrote: ``usable``, then ``number vote`` for each text in order.

    There is no secret in the process that could be found: a checker may write here itself, and a vote that it
    writes is its vote as one that it returns. But the harness writes too, so what is out of order, or no vote,
    says that another did; then none of it counts. Votes that are missing at the end are None.

    Returns: a vote a text; None without ``usable``.
    """
    first, *lines = said.split("\n")[:-1] or [""]  # a line without an end is none
    if first != "usable":
        return None
    votes: list[Vote] = []
    none: list[Vote] = [None] * num_texts
    for number, line in enumerate(lines):
        place, _, vote = line.partition(" ")
        if number >= num_texts or place != str(number) or vote not in _VOTES:
            return none
        votes.append(_VOTES[vote])
    return votes + none[len(votes) :]


def run_checkers(
    jobs: Sequence[tuple[str, Sequence[str]]], limits: CheckerLimits, num_workers: int
) -> list[list[Vote] | None]:
    """`run_checker` of each (source, texts), ``num_workers`` at a time, in order."""
    if not jobs:
        return []
    with ThreadPoolExecutor(num_workers) as threads:
        return list(threads.map(lambda job: run_checker(job[0], job[1], limits), jobs))


def accuracy(votes: Sequence[Vote], *, failed: Literal["left_out", "wrong"] = "left_out") -> float:
    """Share of checkers that accept a response, in [0, 1]; 0 if none of them voted.

    Args:
        votes: of the checkers of one response.
        failed: whether a checker without a vote is left out of the mean, or counts as a no.
    """
    counted = [bool(vote) for vote in votes if vote is not None or failed == "wrong"]
    return sum(counted) / len(counted) if counted else 0.0


class _Checkers:
    """Runs every checker of a row over its responses; see `checkers`."""

    def __init__(
        self,
        column_name: str,
        failed: Literal["left_out", "wrong"],
        limits: CheckerLimits,
        num_workers: int,
    ) -> None:
        self.column = column_name
        self.failed: Literal["left_out", "wrong"] = failed
        self.limits = limits
        self.num_workers = num_workers
        self._counts: Counter[str] = Counter()

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        sources = [self._sources(group) for group in groups]
        jobs = [
            (source, group.texts)
            for group, found in zip(groups, sources, strict=True)
            for source in found
        ]
        results = iter(run_checkers(jobs, self.limits, self.num_workers))
        return [
            self._accuracies(group, [next(results) for _ in found])
            for group, found in zip(groups, sources, strict=True)
        ]

    def _sources(self, group: Candidates) -> list[str]:
        value = column(group.prompt, self.column)
        # AutoIF's files have [source, accuracy] for each
        items: list[Any] = [
            item[0] if isinstance(item, list) and item else item for item in _listed(value)
        ]
        if not items or not all(isinstance(item, str) for item in items):
            raise DataError(
                f"prompt {group.prompt.id}: column {self.column!r} must hold a list of Python sources that "
                "define evaluate(response), each a string or [string, accuracy]"
            )
        return items

    def _accuracies(self, group: Candidates, results: Sequence[list[Vote] | None]) -> list[float]:
        unusable: list[Vote] = [None] * len(group.texts)
        votes = [unusable if result is None else result for result in results]
        for each in votes:
            self._counts.update({True: "yes", False: "no", None: "failed"}[vote] for vote in each)
        return [accuracy(each, failed=self.failed) for each in zip(*votes, strict=True)]

    def report(self) -> Mapping[str, float]:
        """Votes by kind; ``failed`` raised, ran too long, or gave no truth value."""
        return {name: float(self._counts[name]) for name in ("yes", "no", "failed")}

    def close(self) -> None:
        """Nothing to free: every checker's process has ended."""


@signal(
    "checkers",
    source="AutoIF (arXiv:2406.13542): execution feedback",
    needs_fields=("checkers",),
    reads_answer=True,
    no_answer=0.0,
)
def checkers(
    *,
    checkers: str = "checkers",
    failed: Literal["left_out", "wrong"] = "left_out",
    timeout_s: PositiveFloat = 5.0,
    memory_mib: PositiveInt = 1024,
    num_workers: Annotated[PositiveInt, NoEffect()] = 2,
    accept_risks: tuple[Promise, ...] = (),
    readable: tuple[str, ...] = (),
) -> Signal:
    """The share of the row's checker functions that accept the response, in [0, 1].

    Each checker is Python source that defines ``evaluate(response)`` and says True or False (1 and 0 pass for
    them, the string "true" does not). They run in the sandbox of `prefopt.signals.sandbox`, which is tried
    once here. A response that no checker could judge scores 0.

    Args:
        checkers: column with a list of sources, or of [source, accuracy].
        failed: a checker that raises, runs too long or says neither is ``left_out`` of the mean, as in the
            released code of AutoIF, or ``wrong``.
        timeout_s: longest wall time of one call.
        memory_mib: address space of one checker, MiB.
        num_workers: checkers run at a time.
        accept_risks: what the sandbox promises and need not hold here; ``prefopt doctor`` shows what does.
        readable: files and directories that a checker may read beside Python's libraries.

    Raises: SignalError where code cannot be isolated, naming what is missing.
    """
    limits = CheckerLimits(timeout_s, memory_mib << 20, accept_risks, readable)
    run_program("", limits.for_calls(0))
    return _Checkers(checkers, failed, limits, num_workers)


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]
