"""What this machine's sandbox holds: ``prefopt doctor``. Everything shown was tried just now."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table
from rich.text import Text

from prefopt.errors import SignalError
from prefopt.report.terminal import Terminal
from prefopt.signals.sandbox import Attempt, Limits, Walls, examine, run_program
from prefopt.signals.sandbox_promises import PROMISES

_MIB = 1 << 20
_PROGRAMS = (
    # what, program, its limits, the end that it must come to
    ("a program without an end", "while True: pass", Limits(wall_s=0.3), "timeout"),
    ("one that sleeps", "import time; time.sleep(60)", Limits(wall_s=0.3), "timeout"),
    (
        "one that prints without an end",
        "import os\nwhile True: os.write(1, b'x' * 999)",
        Limits(),
        "output",
    ),
    (
        "one that fills the disk",
        "for n in range(9999): open(f'f{n}', 'wb').write(bytes(1 << 20))",
        Limits(disk_bytes=8 * _MIB),
        "output",
    ),
    (
        "one that starts 200 threads",
        "import threading\nthreading.stack_size(32768); e = threading.Event()\n"
        "for _ in range(200): threading.Thread(target=e.wait, daemon=True).start()",
        Limits(threads=100),
        "failed",
    ),
    ("one that does nothing wrong", "import asyncio, json; json.dumps([1])", Limits(), "passed"),
)


@dataclass(frozen=True)
class Report:
    """What `doctor` found."""

    machine: str
    walls: Walls
    programs: tuple[Attempt, ...]

    @property
    def broken(self) -> tuple[str, ...]:
        """Promises that do not hold; signals that run code refuse where there is one."""
        found = [*self.walls.broken, *(each.promise for each in self.programs if not each.held)]
        return tuple(dict.fromkeys(found))


def doctor() -> Report:
    """Tries the sandbox of this machine.

    Raises: SignalError where no process can be isolated at all.
    """
    walls = examine()
    accepted = Limits(accept_risks=walls.broken).accept_risks  # type: ignore[arg-type]
    programs = []
    # what is accepted here is shown below
    logging.getLogger("prefopt.signals.sandbox").disabled = True
    for what, program, limits, right in _PROGRAMS:
        limits = Limits(**{**vars(limits), "accept_risks": accepted})
        ended = run_program(program, limits).verdict
        promise = "threads" if "threads" in what else "limits"
        programs.append(Attempt(promise, what, ended == right, ended))
    logging.getLogger("prefopt.signals.sandbox").disabled = False
    machine = f"Linux {platform.release()} on {platform.machine()}"
    return Report(machine, walls, tuple(programs))


def show_doctor(*, as_json: bool = False, console: Terminal | None = None) -> None:
    """Prints what holds and what not.

    Raises: SignalError where signals that run code would refuse, so that the command fails.
    """
    console = console or Terminal()
    report = doctor()
    if as_json:
        found = {"held": not report.broken, "broken": report.broken, **asdict(report)}
        console.out(json.dumps(found, indent=1))
    else:
        _print(report, console)
    if report.broken:
        names = ", ".join(report.broken)
        raise SignalError(
            f"signals that run model-written code refuse here: {names}. Mend what is not there, run in a virtual "
            f"machine or a container that guards the rest, or accept it by name: accept_risks: [{names}]. "
            "docs/sandbox.md says which wall holds what"
        )


def _print(report: Report, console: Terminal) -> None:
    console.print(f"Sandbox of model-written code, tried on {report.machine}")
    for name, what in report.walls.built.items():
        console.print(f"  {name}: {what}")
    attempts = (*report.walls.attempts, *report.programs)
    table = Table("promise", "held", "what was tried, and what became of it")
    for promise, says in PROMISES.items():
        tried = [each for each in attempts if each.promise == promise]
        held = all(each.held for each in tried)
        table.add_row(
            promise, Text("yes", "green") if held else Text("NO", "red"), _tried(says, tried)
        )
    console.print(table)
    if not report.broken:
        console.print("All of it holds: signals that run model-written code run.")


def _tried(says: str, tried: Sequence[Attempt]) -> Text:
    """The promise in words, then what got through, what was refused, and how programs ended."""
    ended = [f"{each.what}: {each.how}" for each in tried if each.how in _ENDS]
    through = [f"{each.what}: {each.how}" for each in tried if not each.held]
    met = [each.what for each in tried if each.held and each.how not in _ENDS]
    lines = [Text(says, "bold")]
    lines += [Text(f"got through: {'; '.join(through)}", "red")] if through else []
    lines += [Text(f"refused: {'; '.join(met)}")] if met else []
    lines += [Text(f"ended: {'; '.join(ended)}")] if ended else []
    return Text("\n").join(lines)


_ENDS = ("passed", "failed", "timeout", "output")
