"""Programs that read and print, in the shapes of public contest sets; what is expected stays outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt.errors import DataError
from prefopt.recipe.registry import get_signal
from prefopt.signals.contest_cases import (
    Case,
    cases_apart,
    cases_together,
    function_name,
    same_text,
    same_value,
    spread,
)
from tests.eval.runs import write_jsonl
from tests.pipelines.pipelines import build, rows, write_pipeline
from tests.signals.cases import scores
from tests.signals.readings import require_in_page, table

ADD = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
ZERO = "```python\nprint(0)\n```"
PAIRS = (["2 3\n", "0 0\n"], ["5\n", "0\n"])
TEXTS = [Case("2 3\n", expected="5\n"), Case("0 0\n", expected="0\n")]
LIST = [{"input": given, "output": expected} for given, expected in zip(*PAIRS, strict=True)]
CALLS = [Case(function="add", arguments=(2, 3), expected=5)]


def scored(text: str, **columns: Any) -> list[float]:
    return scores(get_signal("python_io").fn(timeout_s=20.0), text, **columns)


def test_a_pipeline_tells_right_from_wrong_by_what_is_printed(tmp_path: Path) -> None:
    given = [
        {"prompt": "Add.", "inputs": "2 3\n", "outputs": "5\n", "completions": [{"r": ADD}, {"r": ZERO}]},
        {"prompt": "Add them.", "inputs": PAIRS[0], "outputs": PAIRS[1], "completions": [{"r": ADD}, {"r": ZERO}]},
    ]  # fmt: skip
    rated = {
        "stage": "rated",
        "sources": [{"path": str(write_jsonl(tmp_path / "g.jsonl", given)), "format": "text"}],
        "responses": {"column": "completions", "text": "r"},
        "keep": ["inputs", "outputs"],
    }
    signals = [{"name": "python_io"}, {"name": "python_io", "reward": "share"}]
    score = {"stage": "score", "signals": signals}
    found = rows(build(write_pipeline(tmp_path / "p.yaml", [rated, score])) / "score")
    expected = [[(1.0, 1.0), (0.0, 0.0)], [(1.0, 1.0), (0.0, 0.5)]]
    assert [
        [tuple(each["scores"].values()) for each in row["responses"]] for row in found
    ] == expected


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
        "print(sum(map(int, open(0).read().split())))",
        "import os\nprint(sum(map(int, os.read(0, os.fstat(0).st_size).split())))",
        "import fileinput\nfor line in fileinput.input(): print(sum(map(int, line.split())))",
        "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.buffer.readline().split()))))",
        "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
        "import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
        "import sys\nprint(sum(map(int, input().split())))\nsys.exit()",
        "import os, sys\nprint(sum(map(int, input().split())))\nsys.stdout.flush()\nos._exit(0)",
        "import sys\nprint('debug', file=sys.stderr)\nprint(sum(map(int, input().split())), '  \\n\\n')",
        "import atexit\natexit.register(lambda: print(sum(map(int, input().split()))))",
        "from __future__ import annotations\nimport sys\nsys.setrecursionlimit(10**6)\n"
        "def f(n: int) -> int: return n and 1 + f(n - 1)\n"
        "a, b = map(int, input().split())\nprint(f(5000) - 5000 + a + b)",
    ],
)
def test_a_right_program_may_read_and_print_as_it_likes(program: str) -> None:
    assert scored(program, inputs="2 3\n", outputs="5") == [1.0]


@pytest.mark.parametrize(
    "program",
    [
        "print(5); raise ValueError",
        "print(5); import sys; sys.exit(1)",
        "print('5 5')",
        "print(5, file=__import__('sys').stderr)",
        "print(' 5')",
        "x = input() + input() + input(); print(5)",
        "",
        "I cannot.",
        "while True: pass",
        "while True: print(5)",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'loaded\\n5')\n    except OSError: pass",
    ],
)
def test_a_wrong_one_has_nothing_to_gain(program: str) -> None:
    signal = get_signal("python_io").fn(timeout_s=1.0)
    assert scores(signal, program, inputs="2 3\n", outputs="5") == [0.0]
    assert sum(signal.report().values()) == 1 and signal.report()["passed"] == 0  # type: ignore[attr-defined]


def test_what_is_expected_is_never_in_the_process() -> None:
    """It looks into every object, frame and file of its own; it does find its input there."""
    program = (
        "import gc, glob, os, sys\nheld = {input()}\n"
        "frame = sys._getframe()\n"
        "for each in [*gc.get_objects(), frame.f_back.f_locals]:\n"
        "    each = list(each.values()) if isinstance(each, dict) else each\n"
        "    if isinstance(each, (list, tuple, set)):\n"
        "        held.update(str(x) for x in each if isinstance(x, (str, bytes)))\n"
        "held.update(open(f, errors='replace').read() for f in glob.glob('*'))\n"
        "held.add(repr(sys.argv) + repr(dict(os.environ)))\n"
        "text = ' '.join(held)\nprint('the-input' in text, ''.join(('EXPECT', 'ED-7')) in text)\n"
    )
    signal = get_signal("python_io").fn(timeout_s=20.0)
    assert scores(signal, program, inputs=["the-input"], outputs=["EXPECTED-7"]) == [0.0]
    assert scores(signal, program, inputs=["the-input"], outputs=["True False"]) == [1.0]


@pytest.mark.parametrize(
    ("value", "function", "cases"),
    [
        (json.dumps({"inputs": PAIRS[0], "outputs": PAIRS[1]}), None, TEXTS),  # APPS, TACO
        ({"inputs": [[2, 3]], "outputs": [5], "fn_name": "add"}, None, CALLS),
        ({"input": PAIRS[0], "output": PAIRS[1]}, None, TEXTS),  # CodeContests
        (LIST, None, TEXTS),  # Codeforces
        (json.dumps([{**each, "testtype": "stdin"} for each in LIST]), None, TEXTS),
        ([{"input": "2\n3", "output": "5", "testtype": "functional"}], "add", CALLS),  # LiveCodeBench
        ({"test_cases": [{**each, "type": "stdin_stdout", "fn_name": None} for each in LIST]}, None, TEXTS),
        ({"test_cases": [{"fn_name": "add", "input": [2, 3], "output": 5, "type": "function_call"}]}, None, CALLS),
        ({"inputs": [["2", "3"]], "outputs": [["5"]]}, None, [Case("2\n3", expected="5")]),  # TACO: lines
        ({"inputs": "1", "outputs": "1"}, None, [Case("1", expected="1")]),
    ],
)  # fmt: skip
def test_shapes_of_public_sets_are_read(
    value: Any, function: str | None, cases: list[Case]
) -> None:
    assert cases_together(value, function) == cases


def test_two_columns_hold_texts_or_lists_of_them() -> None:
    assert cases_apart(*PAIRS, None) == TEXTS
    assert cases_apart("2 3\n", "5\n", None) == TEXTS[:1]
    assert cases_apart([7], [8.5], None) == [Case("7", expected="8.5")]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"inputs": ["1"], "outputs": ["1", "2"]}, "1 inputs and 2 outputs"),
        ({"inputs": ["1"], "outputs": "1"}, "not both lists"),
        ({"inputs": [], "outputs": []}, "no case"),
        ({"inputs": [{"a": 1}], "outputs": ["1"]}, "case 0: its input is dict"),
        ({"inputs": [True], "outputs": ["1"]}, "case 0: its input is bool"),
        ({"inputs": ["1"]}, "'outputs' is missing"),
        ({"both": "eJx9"}, "'both' is no JSON.*pickles"),
        ({"both": {"in": []}}, "has the keys in"),
        ({"both": []}, "no case"),
        ({"both": 3}, "holds int"),
        ({"both": [["1", "2"]]}, "case 0 must be an object"),
        ({"both": [{"input": "1", "output": "1", "testtype": "functional"}]}, "set `function`"),
        ({"both": [{"input": "1", "output": "1", "testtype": "interactive"}]}, "interactive"),
        ({"both": [{"input": "a", "output": "1", "fn_name": "f"}]}, "arguments of f"),
    ],
)
def test_columns_that_do_not_fit_are_an_error_of_their_row(columns: dict, said: str) -> None:
    keys = {"inputs": "both", "outputs": None} if "both" in columns else {}
    with pytest.raises(DataError, match=f"prompt row-7: column .*{said}"):
        scores(get_signal("python_io").fn(**keys), ADD, **columns)


@pytest.mark.parametrize(
    ("code", "calls", "score"),
    [
        ("def add(a, b):\n    return a + b", {"inputs": [[2, 3]], "outputs": [5]}, 1.0),
        ("def add(a, b):\n    return a + b", {"inputs": [[2, 3]], "outputs": [[5]]}, 1.0),
        ("def add(a, b):\n    return a - b", {"inputs": [[2, 3]], "outputs": [5]}, 0.0),
        ("class Solution:\n    def add(self, a: List[int]): return a[0]", {"inputs": [[[5]]], "outputs": [5]}, 1),
        ("def add(a):\n    return (a, {1: a})", {"inputs": [[2]], "outputs": [[2, {"1": 2}]]}, 1.0),
        ("import numpy\ndef add(a):\n    return numpy.arange(a)", {"inputs": [[2]], "outputs": [[0, 1]]}, 1.0),
        ("def add(a):\n    print(5)\n    return 'x' * a", {"inputs": [[3]], "outputs": ["xxx"]}, 1.0),
        ("def add(a):\n    raise SystemExit(0)", {"inputs": [[3]], "outputs": [None]}, 0.0),
        ("def add(a):\n    return object()", {"inputs": [[3]], "outputs": [None]}, 0.0),
        ("def other(a):\n    return 3", {"inputs": [[3]], "outputs": [3]}, 0.0),
        ("def add(a):\n    return None", {"inputs": [[3]], "outputs": [3]}, 0.0),
    ],
)  # fmt: skip
def test_functions_are_called_and_their_values_compared_outside(
    code: str, calls: dict, score: float
) -> None:
    both = json.dumps({**calls, "fn_name": "add"})
    found = get_signal("python_io").fn(inputs="both", outputs=None, timeout_s=60.0)
    assert scores(found, f"```python\n{code}\n```", both=both) == [score]


def test_the_name_of_a_function_may_stand_in_another_column() -> None:
    for value in ("add", {"fn_name": "add"}, '{"func_name": "add"}'):
        assert function_name(value) == "add"
    with pytest.raises(DataError, match="must be the column"):
        function_name("not a name")
    signal = get_signal("python_io").fn(function="metadata", inputs="cases", outputs=None)
    cases = [{"input": "2\n3", "output": "5", "testtype": "functional"}]
    texts = ("class Solution:\n    def add(self, a, b): return a + b", "def add(a, b): return 0")
    assert scores(signal, *texts, cases=cases, metadata='{"func_name": "add"}') == [1.0, 0.0]


COMPARED: list[tuple[str, str, tuple[Any, float | None], bool]] = [
    ("5\n", "5", ("lines", None), True),
    ("5 \r\n6\t\n\n", "5\n6", ("lines", None), True),
    ("5 6", "5\n6", ("lines", None), False),
    ("5 6", "5\n6", ("tokens", None), True),
    ("5  6", "5 6", ("lines", None), False),
    (" 5", "5", ("lines", None), False),
    (" 5", "5", ("tokens", None), True),
    ("YES", "yes", ("lines", None), False),
    ("0.333333", "0.333334", ("lines", None), False),
    ("0.333333", "0.333334", ("lines", 1e-5), True),
    ("1000001", "1000000", ("lines", 1e-5), True),
    ("0.34", "0.33", ("lines", 1e-5), False),
    ("5.0 x", "5 x", ("lines", 0.0), True),
    ("5.0 y", "5 x", ("tokens", 1e-5), False),
    ("nan", "1", ("lines", 1e9), False),
    ("inf", "inf", ("lines", 1e-5), True),
    ("1 2 3", "1 2", ("tokens", 1e-5), False),
    ("1_0", "10", ("lines", 1e-5), False),
    ("", "", ("lines", None), True),
    ("0", "", ("lines", None), False),
]


@pytest.mark.parametrize(("printed", "expected", "options", "same"), COMPARED)
def test_outputs_are_compared_as_checkers_of_contests_do(
    printed: str, expected: str, options: tuple[Any, float | None], same: bool
) -> None:
    assert same_text(printed, expected, *options) is same


def test_the_page_says_which_outputs_are_the_same() -> None:
    rows = [
        (printed, expected, compare, tolerance, "yes" if same else "no")
        for printed, expected, (compare, tolerance), same in COMPARED
    ]
    head = ("printed", "expected", "compare", "tolerance", "the same")
    require_in_page("outputs", table(head, rows))


def test_values_are_compared_through_lists_and_objects() -> None:
    assert same_value([1.0000001, {"a": [2]}], [1, {"a": [2]}], 1e-6)
    assert not same_value([1.0000001], [1], None)
    assert not same_value({"a": 1}, {"b": 1}, 1.0) and not same_value("1", 1, 1.0)
    assert same_value(10**400, 10**400, 1e-6) and not same_value(10**400, 0.5, 1e-6)


def test_a_budget_of_cases_spreads_over_their_order_and_counts_the_rest() -> None:
    cases = [Case(str(number)) for number in range(10)]
    assert [case.input for case in spread(cases, 4)] == ["0", "3", "6", "9"]
    assert spread(cases, None) == spread(cases, 10) == cases and spread(cases, 1) == cases[:1]
    signal = get_signal("python_io").fn(max_cases=2, reward="share", timeout_s=20.0)
    columns = {"inputs": ["1", "2", "3"], "outputs": ["1", "2", "4"]}
    assert scores(signal, "print(input())", **columns) == [0.5]
    assert signal.report()["cases_left_out"] == 1  # type: ignore[attr-defined]


def test_a_large_right_answer_is_read_whole() -> None:
    text = "\n".join(map(str, range(40000)))
    assert scored("for i in range(int(input())): print(i)", inputs="40000", outputs=text) == [1.0]


def test_a_large_input_reaches_the_program_whole() -> None:
    text = "1 " * 300000
    assert scored("print(len(input().split()))", inputs=text, outputs="300000") == [1.0]
