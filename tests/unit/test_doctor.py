"""``prefopt doctor``: what a machine's sandbox holds, as a user sees it."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from prefopt.cli import main
from prefopt.signals.sandbox_promises import PROMISES
from tests.signals.machines import on_machine


def _doctor(*options: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["doctor", *options])
    return code, out.getvalue(), err.getvalue()


def test_doctor_lists_every_promise_and_ends_with_0_where_all_hold(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for promise in PROMISES:
        assert promise in told
    assert "│ NO" not in told and "All of it holds" in told


def test_doctor_names_what_a_poorer_machine_does_not_hold_and_ends_with_1() -> None:
    code, out, err = on_machine(lambda: _doctor("--json"), lacks=("landlock",))
    found = json.loads(out)
    assert (code, found["held"], found["broken"]) == (1, False, ["reads", "changes"])
    assert found["walls"]["built"]["landlock"].startswith("not there")
    assert "accept_risks: [reads, changes]" in err
    code, out, _ = on_machine(_doctor, lacks=("landlock",))
    assert code == 1 and "got through: the parent's command line: possible" in " ".join(
        out.split()
    ).replace("│ ", "")


def test_doctor_tries_and_does_not_read_from_a_list() -> None:
    """A machine without seccomp: the attempts themselves say so, each with the error it met."""
    code, out, _ = on_machine(lambda: _doctor("--json"), lacks=("seccomp",))
    met = {
        each["what"]: each["how"]
        for each in json.loads(out)["walls"]["attempts"]
        if not each["held"]
    }
    assert code == 1 and met["execve"] == "ENOENT" and met["F_SETOWN"] == "possible"
