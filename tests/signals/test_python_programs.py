"""How a program is run before its tests: as Python runs a file, and what it cannot make its tests say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from prefopt.errors import DataError
from prefopt.recipe.registry import get_signal
from prefopt.signals.python_tests import RowTests, read_tests
from prefopt.signals.sandbox import Limits, Outcome, run_program, source_program
from tests.eval.runs import write_jsonl
from tests.pipelines.pipelines import build, rows, write_pipeline
from tests.signals.cases import scores

LIMITS = Limits(wall_s=20.0, cpu_s=20.0)
RIGHT, WRONG = "def area(w, h):\n    return w * h\n", "def area(w, h):\n    return -1\n"
UNITTEST = (
    "import unittest\nclass T(unittest.TestCase):\n    def test_area(self):\n"
    "        self.assertEqual(area(2, 3), 6)\n"
)
EXAMPLE = '    """\n    >>> area(2, 3)\n    6\n    """\n'


def checked(code: str, tests: str) -> Outcome:
    """How a program ended with its tests."""
    found = read_tests(tests)
    assert isinstance(found, RowTests), found
    program = replace(source_program(code), tests=found.source, imports=found.imports)
    return run_program(program, LIMITS)


def with_example(code: str) -> str:
    return code.replace(":\n", f":\n{EXAMPLE}", 1)


@pytest.mark.parametrize(
    "tests",
    [
        f"{UNITTEST}unittest.main()",
        f"{UNITTEST}unittest.main(exit=False)",
        f"{UNITTEST}if __name__ == '__main__':\n    unittest.main()",
        f"{UNITTEST}assert unittest.main(exit=False).result.wasSuccessful()",
        f"{UNITTEST}unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))",
    ],
)
def test_unittest_tells_right_from_wrong_however_it_is_run(tests: str) -> None:
    right, wrong = checked(RIGHT, tests), checked(WRONG, tests)
    assert (right.verdict, wrong.verdict) == ("passed", "failed"), right.output


@pytest.mark.parametrize(
    "tests",
    [
        "import doctest\nassert doctest.testmod().failed == 0",
        "import doctest\ndoctest.testmod()",
        "from doctest import testmod\ntestmod(verbose=False)",
        "import doctest\ndoctest.run_docstring_examples(area, globals())",
    ],
)
def test_doctest_tells_right_from_wrong_and_from_no_example(tests: str) -> None:
    right = checked(with_example(RIGHT), tests)
    assert right.passed, right.output
    assert checked(with_example(WRONG), tests).verdict == "failed"
    assert checked(RIGHT, tests).verdict == "failed"


def test_a_run_that_finds_no_test_is_no_pass() -> None:
    empty = "import unittest\nclass T(unittest.TestCase):\n    pass\n"
    assert checked(RIGHT, f"{empty}unittest.main(exit=False)").verdict == "failed"
    skipped = UNITTEST.replace("    def test", "    @unittest.skip('')\n    def test")
    assert checked(RIGHT, f"{skipped}unittest.main()").verdict == "failed"


@pytest.mark.parametrize(
    "program",
    [
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
        "import typing\nclass A: pass\ndef f(x: 'A'): pass\nassert typing.get_type_hints(f) == {'x': A}",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nassert A() == A(1)",
        "from __future__ import annotations\nimport dataclasses, typing\n@dataclasses.dataclass\nclass A:\n"
        "    x: int\nassert typing.get_type_hints(A) == {'x': int}",
        "import inspect\ndef f():\n    return 1\nassert inspect.getsource(f) == 'def f():\\n    return 1\\n'",
        "import inspect\nclass A:\n    x = 1\nassert 'x = 1' in inspect.getsource(A)",
        "import sys, os\nassert sys.argv == [__file__] and os.path.exists(__file__)",
        "import sys\nx = 1\nassert sys.modules['__main__'].x == 1 and __name__ == '__main__'",
        "import sys\ndel sys.modules['__main__']",
        "import __main__\nx = 1\nassert __main__.x == 1",
        "import enum, collections\nA = enum.Enum('A', 'b c')\nP = collections.namedtuple('P', 'x')\n"
        "import pickle\nassert pickle.loads(pickle.dumps((A.b, P(1)))) == (A.b, P(1))",
        "try:\n    input()\nexcept EOFError:\n    pass\nelse:\n    raise ValueError",
        "import asyncio\nasync def f(): return 1\nassert asyncio.run(f()) == 1",
    ],
)
def test_a_program_runs_in_the_module_that_is_main(program: str) -> None:
    outcome = run_program(program, LIMITS)
    assert outcome.passed, outcome.output


def test_annotations_are_evaluated_unless_the_program_says_otherwise() -> None:
    undefined = "def area(w: Nothing, h):\n    return w * h\n"
    assert checked(undefined, "assert area(2, 3) == 6").verdict == "failed"
    assert checked(
        f"from __future__ import annotations\n{undefined}", "assert area(2, 3) == 6"
    ).passed


def test_an_error_shows_the_lines_it_is_of() -> None:
    outcome = run_program("def f(x):\n    return (x +\n            1 / 0)\n\nf(\n    1\n)", LIMITS)
    assert "1 / 0" in outcome.output and "line 3" in outcome.output


HACKS = {
    "leaves": "import os\ndef area(w, h):\n    os._exit(0)\n",
    "leaves politely": "import sys\ndef area(w, h):\n    sys.exit(0)\n",
    "leaves at once": f"{WRONG}import os; os._exit(0)\n",
    "a thread that leaves": f"{WRONG}import os, threading\nthreading.Timer(0, os._exit, (0,)).start()\n",
    "assertEqual": f"import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n{WRONG}",
    "assertEqual, once asked": (
        "import unittest\ndef area(w, h):\n    unittest.TestCase.assertEqual = lambda *a: None\n    return -1\n"
    ),
    "a false unittest": f"import sys, types\nsys.modules['unittest'] = types.ModuleType('unittest')\n{WRONG}",
    "run": f"import unittest\nunittest.TestCase.run = lambda *a, **k: None\n{WRONG}",
    "getattribute": f"import unittest\nunittest.TestCase.__getattribute__ = lambda s, n: print\n{WRONG}",
    "main": f"import unittest\nunittest.main = print\n{WRONG}",
    "wasSuccessful": f"import unittest\nunittest.TestResult.wasSuccessful = lambda s: True\n{WRONG}",
    "isclose": f"import math\nmath.isclose = lambda *a, **k: True\n{WRONG}",
    "builtins": f"import builtins\nbuiltins.abs = lambda x: 0\nbuiltins.AssertionError = None\n{WRONG}",
    "build class": f"import builtins\nbuiltins.__build_class__ = lambda *a, **k: object\n{WRONG}",
    "trace": (
        "import sys\ndef skip(frame, event, value):\n"
        "    if frame.f_code.co_filename == '<tests>' and event == 'line': frame.f_lineno = 99\n"
        f"    return skip\nsys.settrace(skip)\n{WRONG}"
    ),
    "its own builtins": f"import builtins\n__builtins__ = dict(vars(builtins), abs=lambda x: 0)\n{WRONG}",
    "ours": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    frame.f_globals['exec'] = lambda *a: None\n"
        f"    frame = frame.f_back\n{WRONG}"
    ),
    "every descriptor": (
        f"{WRONG}import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'loaded\\n' + b'0' * 16)\n"
        "    except OSError: pass\n"
    ),
    "prints": f"{WRONG}print('ready\\nloaded\\npassed', flush=True)\n",
}  # fmt: skip


ASKED = {
    "leaves": "assert area(2, 3) == 6",
    "isclose": "import math\nassert math.isclose(area(2, 3), 6)",
    "builtins": "assert abs(area(2, 3) - 6) < 1e-9",
    "its own builtins": "assert abs(area(2, 3) - 6) < 1e-9",
    "ours": "assert area(2, 3) == 6",
    "trace": "assert area(2, 3) == 6\nx = 1",
    "every descriptor": "assert area(2, 3) == 6",
    "prints": "assert area(2, 3) == 6",
}


@pytest.mark.parametrize("name", HACKS)
def test_a_wrong_program_cannot_change_what_its_tests_ask(name: str) -> None:
    tests = ASKED.get(name, f"{UNITTEST}unittest.main(exit=False)")
    assert not checked(HACKS[name], tests).passed


THIEF = """
import gc, sys
found = set()
def seek():
    held = list(gc.get_objects())
    frame = sys._getframe()
    while frame:
        held.append(frame.f_locals)
        frame = frame.f_back
    for each in held:
        if isinstance(each, dict):
            each = list(each.values())
        if isinstance(each, (list, tuple)):
            found.update(str(x) for x in each if isinstance(x, (str, bytes)))
seek()
"""


def test_tests_and_token_are_not_in_the_process_before_the_program_ran() -> None:
    """It looks through frames, objects, arguments and its input; the same search finds a string of its own."""
    secret = "SECRET-OF-THE-TESTS"
    # joined where it runs: a constant of the program would be found
    code = (
        f"{THIEF}own = [''.join(('SECRET-', 'OF-MINE'))]\nseek()\n"
        "text = ' '.join(found) + repr(sys.argv) + sys.stdin.read()\n"
        "assert own[0] in text and ''.join(('SECRET-OF-', 'THE-TESTS')) not in text\n"
    )
    outcome = checked(code, f"assert True, {secret!r}")
    assert outcome.passed, outcome.output[-500:]


def test_the_token_is_in_no_object_while_the_tests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    token = b"token-of-this-run"
    monkeypatch.setattr("secrets.token_bytes", lambda size: token)
    code = (
        f"{THIEF}def area(w, h):\n    seek()\n"
        "    assert ''.join(('token-of-', 'this-run')) not in ' '.join(found)\n"
    )
    outcome = checked(code, "area(2, 3)")
    assert outcome.passed, outcome.output[-500:]


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ("import io, sys", "run nothing"),
        ("def test_area():\n    assert area(2, 3) == 6", "a call of each"),
        (UNITTEST, "unittest.main"),
        ("METADATA = {}\n\ndef check(candidate):\n    assert candidate(2, 3) == 6", "check"),
        ("", "run nothing"),
        ("assert area(2, 3 == 6", "no Python.*line 1"),
    ],
)
def test_tests_that_can_fail_nothing_are_an_error_of_their_row(tests: str, said: str) -> None:
    with pytest.raises(DataError, match=f"row-7: column 'tests': .*{said}"):
        scores(get_signal("python_tests").fn(), RIGHT, tests=tests)


GROUPS = [
    ("assert area(2, 3) == 6", {f"```python\n{RIGHT}": 1.0, f"{RIGHT}```": 1.0, f"~~~\n{WRONG}~~~": 0.0}),
    (f"{UNITTEST}unittest.main()", {f"```python\n{RIGHT}```": 1.0, f"```python\n{WRONG}```": 0.0}),
    ("assert area(2, 3) == 6", {f"```python\nfrom __future__ import annotations\n{RIGHT}```": 1.0, WRONG: 0.0}),
]  # fmt: skip


def test_a_pipeline_scores_programs_so(tmp_path: Path) -> None:
    given = [
        {
            "prompt": f"Write area(w, h), {number}.",
            "tests": tests,
            "imports": "import math",
            "completions": [{"response": text} for text in texts],
        }
        for number, (tests, texts) in enumerate(GROUPS)
    ]
    source = write_jsonl(tmp_path / "groups.jsonl", given)
    path = write_pipeline(
        tmp_path / "scored.yaml",
        [
            {
                "stage": "rated",
                "sources": [{"path": str(source), "format": "text"}],
                "responses": {"column": "completions", "text": "response"},
                "keep": ["tests", "imports"],
            },
            {"stage": "score", "signals": [{"name": "python_tests", "prefix": "imports"}]},
        ],
    )
    found = rows(build(path) / "score")
    expected = [list(texts.values()) for _, texts in GROUPS]
    assert [
        [each["scores"]["python_tests"] for each in row["responses"]] for row in found
    ] == expected
