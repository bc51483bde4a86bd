"""Checkers that attack their harness: what they write is no vote, and the parent reads on."""

from __future__ import annotations

import pytest

from prefopt.signals.checkers import CheckerLimits, Vote, read_votes, run_checker

LIMITS = CheckerLimits(timeout_s=20.0)

WALK = """
import sys, os, gc
def found(frame=None):
    frame = frame or sys._getframe()
    while frame:
        yield frame.f_locals
        yield frame.f_globals
        frame = frame.f_back
"""


@pytest.mark.parametrize(
    "write",
    [
        "os.write(fd, b'0 bogus\\n')",
        "os.write(fd, b'0 1\\n')",
        "os.write(fd, b'usable\\n0 1\\n1 1\\n')",
        "os.write(fd, b'\\xff\\xfe\\0\\n')",
        "os.write(fd, b'usable')",
        "os.write(fd, b'99 1\\n')",
        "os.write(fd, b'0 1 1\\n')",
        "os.write(fd, b'\\n')",
        "os.write(fd, b'x' * (1 << 20))",
    ],
)
def test_what_a_checker_writes_itself_is_no_vote(write: str) -> None:
    """It knows every descriptor, and says no: a yes can only be forged."""
    source = (
        "import os\ndef evaluate(r):\n    for fd in range(3, 64):\n"
        f"        try: {write}\n        except OSError: pass\n    return False"
    )
    votes = run_checker(source, ["a", "b"], LIMITS)
    assert votes is None or votes == [None, None]


def test_a_source_that_speaks_before_its_turn_is_no_checker() -> None:
    source = (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0 1\\n')\n    except OSError: pass\n"
        "def evaluate(r): return False"
    )
    assert run_checker(source, ["a", "b"], LIMITS) is None


def test_no_frame_global_or_object_holds_a_secret_of_the_harness() -> None:
    """Random tokens are 16 hexadecimal characters or more, or as many bytes; there is none to be found."""
    source = WALK + (
        "import re\ndef evaluate(r):\n    texts = [v for d in found() for v in list(d.values())]\n"
        "    texts += [v for o in gc.get_objects() if isinstance(o, dict) for v in list(o.values())]\n"
        "    hits = [v for v in texts if isinstance(v, str) and re.fullmatch('[0-9a-f]{16,64}', v)]\n"
        "    hits += [v for d in found() for v in list(d.values()) if isinstance(v, bytes) and len(v) == 16]\n"
        "    return not hits"
    )
    assert run_checker(source, ["a"], LIMITS) == [True]


def test_a_checker_that_crawls_the_frames_for_mark_and_out_crashes_nobody() -> None:
    source = (
        "import sys, os\nf = sys._getframe()\nwhile f:\n    if 'out' in f.f_locals:\n"
        "        os.write(f.f_locals['out'], b'0 bogus\\n'); break\n    f = f.f_back\ndef evaluate(r): return True"
    )
    assert run_checker(source, ["a", "b"], LIMITS) is None


@pytest.mark.parametrize(
    "end",
    [
        "os._exit(0)",
        "os.kill(os.getpid(), 9)",
        "os.closerange(0, 64)",
        "ctypes.string_at(0)",
        "raise SystemExit",
    ],
)
def test_votes_before_a_sudden_end_stand_and_the_rest_is_missing(end: str) -> None:
    source = f"import os, ctypes\ndef evaluate(r):\n    if r == 'end': {end}\n    return True"
    assert run_checker(source, ["a", "end", "b"], LIMITS) in (
        [True, None, None],
        [True, None, True],  # SystemExit is caught, as any other
    )


@pytest.mark.parametrize(
    ("said", "votes"),
    [
        ("usable\n0 1\n1 0\n2 None\n", [True, False, None]),
        ("usable\n0 1\n", [True, None, None]),
        ("usable\n0 1\n1 ", [True, None, None]),  # cut amid a line
        ("usable\n", [None, None, None]),
        ("usable", None),
        ("unusable\n", None),
        ("", None),
        ("\n", None),
        ("usable\n0 1\n0 0\n", [None] * 3),
        ("usable\n1 1\n", [None] * 3),
        ("usable\n0 1\n1 1\n2 1\n3 1\n", [None] * 3),
        ("usable\n0 true\n", [None] * 3),
        ("usable\n0  1\n", [None] * 3),
        ("usable\n\ufffd\n", [None] * 3),
    ],
)
def test_votes_are_read_in_order_or_not_at_all(said: str, votes: list[Vote] | None) -> None:
    assert read_votes(said, 3) == votes
