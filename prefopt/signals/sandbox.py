"""Runs model-written Python in a process that can hurt nobody: what holds, and what does not.

Promised on Linux (x86_64, arm64), with root's rights or without, and tried in the child before each program
(`prefopt.signals.sandbox_promises` is the list; ``prefopt doctor`` shows it):

- ``limits``: wall and CPU time, memory, size and number of open files, amount of output; ``threads``;
- ``network``: no socket but a connected pair within the program;
- ``new_processes``: no fork, no other program;
- ``other_processes``: none is signalled, read, written, traced or set, the parent included;
- ``reads``: its own directory and Python's libraries, nothing else: no keys, no data, no source of the run. An
  empty environment, no descriptor of the parent;
- ``changes``: nothing outside its directory; owner, times, attributes and locks of no file at all (but for the
  record locks that SQLite takes, exclusive ones on its own files only), modes only of its own and only where it
  is a user of its own;
- ``privileges``: none, root's neither; no namespace, no clock, no kernel interface for administrators;
- ``lifetime``: it ends with the process that started it.

A machine where one of these does not hold runs nothing, and says which; `Limits.accept_risks` takes the risk by
name. What holds them: an allow list of system calls (seccomp), Landlock, a user or a user namespace of its own.

Not promised: that other files cannot be seen to exist (``stat``), an exact bound on the disk (the parent looks
ten times a second), a bug of the kernel, and a response that attacks its own test harness from inside: a reward
hack, not an escape. For hostile code use a virtual machine or gVisor as well: docs/sandbox.md.
"""

from __future__ import annotations

import functools
import json
import logging
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from prefopt.errors import SignalError
from prefopt.signals.sandbox_process import Limits, Promise, Running, Verdict, message, start

if sys.platform != "win32":  # compiled here, once: the child writes no bytecode
    from prefopt.signals import sandbox_promises, sandbox_source, sandbox_tests, sandbox_walls  # noqa: F401

__all__ = [
    "Attempt", "Limits", "Outcome", "Program", "Promise", "Reading", "Verdict", "Walls", "examine", "run_program",
    "source_program",
]  # fmt: skip

_logger = logging.getLogger(__name__)

Reading: TypeAlias = tuple[tuple[str, bool], ...]
"""One way to read a response: sources in order, each with whether it is said to be Python."""


@dataclass(frozen=True)
class Program:
    """What is run, and what it learns only once it ran."""

    readings: tuple[Reading, ...]
    """Of what the model wrote, the likeliest first (`prefopt.signals.markdown_code.readings`)."""
    before: str = ""
    """Source put before it."""
    entry_point: str | None = None
    """A function that ``before`` begins: code that does not define it is taken for its body."""
    module: str = "__main__"
    """Its ``__name__``."""
    tests: str | None = None
    """Source that is run after it, in the same module."""
    imports: tuple[str, ...] = ()
    """Modules that the tests use: loaded before the program, and as they were when the tests begin."""
    stdin: str | None = None
    """Makes it a program that reads this and prints; it may leave by ``sys.exit()``."""
    call: str | None = None
    """A function, or a method of its class ``Solution``, that is called once it ran."""
    arguments: tuple[Any, ...] = ()
    """Of the call, as JSON."""

    def order(self) -> dict[str, Any]:
        """What the process is told at once."""
        return {
            "readings": self.readings,
            "before": self.before,
            "entry_point": self.entry_point,
            "module": self.module,
            "imports": self.imports,
            "script": self.stdin is not None,
            "call": self.call,
        }

    def later(self) -> dict[str, Any]:
        """What it is told once the program ran."""
        if self.call is not None:
            return {"arguments": self.arguments}
        return {"tests": self.tests}


def source_program(source: str) -> Program:
    """A program that is one source as it is."""
    return Program((((source, True),),))


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    """``passed``: it ran to its end. ``failed``: it raised, left early, or was killed by a limit. ``output``: it
    printed, or wrote into files, more than it may."""
    output: str
    """What it printed, cut to ``output_bytes``; of a program with ``stdin`` without standard error."""
    value: Any = None
    """What the call gave, as JSON has it."""
    meddled: bool = False
    """It wrote where the sandbox alone writes, and was ended for it."""

    @property
    def passed(self) -> bool:
        return self.verdict == "passed"


@dataclass(frozen=True)
class Attempt:
    """One thing that must not be possible behind the walls, and what became of it here."""

    promise: str
    what: str
    held: bool
    how: str
    """The error that it met, or "possible"."""


@dataclass(frozen=True)
class Walls:
    """What the sandbox is made of on this machine, and whether it holds."""

    built: dict[str, str]
    """Wall -> what it is here; "not there: …" where there is none."""
    attempts: tuple[Attempt, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Promises that do not hold, in order."""
        return tuple(dict.fromkeys(each.promise for each in self.attempts if not each.held))


def run_program(program: str | Program, limits: Limits) -> Outcome:
    """Runs Python to its end, or to one of its limits. Safe to call from several threads.

    Args:
        program: a source as it is, or what a model wrote and what comes before and after it.
        limits: of the whole run, tests included.

    Raises: SignalError if a process cannot be started, or a promise that ``limits`` does not accept is not held
        here.
    """
    if isinstance(program, str):
        program = source_program(program)
    token = secrets.token_bytes(16)
    later = message(json.dumps(program.later()).encode()) + message(token)
    with start(program.stdin, limits, {**program.order(), "examine": False}) as running:
        verdict = running.watch(limits, later)
    walls, may_run = _walls(running)
    if not may_run:
        raise SignalError(_refusal(walls, limits.accept_risks))
    if walls.attempts:
        _warn(walls.broken)
    if running.returncode == -signal.SIGXCPU:
        verdict = "timeout"
    value = None
    if verdict is None and program.stdin is not None:
        verdict = "passed" if running.returncode == 0 else "failed"
    elif verdict is None:
        told = running.said.removeprefix(b"loaded\n").removesuffix(token)
        passed = running.said == b"loaded\n" + told + token
        if passed and program.call is not None:
            value, passed = _value(told)
        elif told:
            passed = False
        verdict = "passed" if passed else "failed"
    output = running.output[: limits.output_bytes].decode(errors="replace")
    return Outcome(verdict, output, value, running.meddled)


def _value(told: bytes) -> tuple[Any, bool]:
    try:
        return json.loads(told), True
    except (ValueError, RecursionError):  # a program may have written anything
        return None, False


def examine(limits: Limits | None = None) -> Walls:
    """What the sandbox is made of here, and every attempt on it.

    Raises: SignalError if a process cannot be started or isolated at all.
    """
    limits = limits or Limits()
    with start(None, limits, {**source_program("").order(), "examine": True}) as running:
        running.watch(limits, b"")
    return _walls(running)[0]


def _walls(running: Running) -> tuple[Walls, bool]:
    """What a process said of its walls, all of it or what does not hold; whether it went on to the program."""
    try:
        said = json.loads(running.first)
    except ValueError:  # it ended before it could say anything
        said = {}
    if "tried" in said:
        tried = tuple(Attempt(*each) for each in said["tried"])
        return Walls(said["built"], tried), bool(said["may_run"])
    reason = said.get("unable") or running.output.decode(errors="replace").strip()[-2000:]
    raise SignalError(
        f"model-written code is not run: the sandbox's process did not get ready: {reason or 'it ended'}"
    )


def _refusal(walls: Walls, accepted: Sequence[str]) -> str:
    """What does not hold, and what to do."""
    lines = []
    for promise in walls.broken:
        met = [f"{a.what} ({a.how})" for a in walls.attempts if a.promise == promise and not a.held]
        more = f" and {len(met) - 3} more" if len(met) > 3 else ""
        note = ", accepted" if promise in accepted else ""
        says = sandbox_promises.PROMISES[promise]
        lines.append(f"  {promise}{note} ({says}): {'; '.join(met[:3])}{more}")
    missing = [
        f"{name} ({what})" for name, what in walls.built.items() if what.startswith("not there")
    ]
    return (
        "model-written code is not run: this machine does not hold what the sandbox promises\n"
        + "\n".join(lines)
        + (f"\n  missing: {', '.join(missing)}" if missing else "")
        + "\n  what to do: a kernel with Landlock (Linux 5.13, `landlock` in its list of LSMs) and seccomp; "
        "`prefopt doctor` tries all of it. Where something else guards this machine (a virtual machine, a "
        f"container that holds nothing else), accept the rest by name: accept_risks: [{', '.join(walls.broken)}]"
    )


@functools.cache
def _warn(broken: tuple[str, ...]) -> None:
    _logger.warning(
        "model-written code runs although the sandbox does not hold here: %s. The settings accept it "
        "(`accept_risks`); `prefopt doctor` shows what is missing",
        ", ".join(broken),
    )
