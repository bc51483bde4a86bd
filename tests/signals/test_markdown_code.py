"""How a program comes out of what a model wrote: the table of docs/signals.md, and what stands around it."""

from __future__ import annotations

import pytest

from prefopt.signals.markdown_code import readings, sources
from prefopt.signals.sandbox_source import compiled, units
from tests.signals.code_table import BEGIN, END, PAGE, TABLE, Case, rendered

AREA = "def area(w, h):\n    return w * h\n"


def program(text: str, **order: object) -> str:
    """What is run of a text, an example that may fail marked by ``?``."""
    found = units({"readings": readings(text), **order})
    return "\n\n".join(source if must else f"? {source}" for source, must in found)


@pytest.mark.parametrize("case", TABLE, ids=[case.what for case in TABLE])
def test_a_text_gives_the_program_of_the_table(case: Case) -> None:
    assert program(case.text) == case.program


def test_the_page_shows_the_table_that_is_tested() -> None:
    _, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert rest.partition(END)[0] == rendered(), "run python -m tests.signals.code_table"


@pytest.mark.parametrize(
    "code",
    [
        "def add(a, b):\n    return a + b",
        "async def add(a, b):\n    return a + b",
        "add = lambda a, b: a + b",
        "add: object = lambda a, b: a + b",
        "from operator import add",
        "import operator as add",
        "class add:\n    pass",
        "try:\n    from operator import add\nexcept ImportError:\n    raise",
        "x, (add, y) = 1, (2, 3)",
        "if True:\n    add = sum",
    ],
)
def test_code_that_binds_the_function_is_no_body(code: str) -> None:
    prompt = 'def add(a, b):\n    """Sum."""\n'
    assert program(code, before=prompt, entry_point="add") == f"{prompt}\n\n{code}"


@pytest.mark.parametrize(
    ("body", "indented"),
    [
        ("return a + b", "    return a + b"),
        ("    return a + b", "    return a + b"),
        ("f = lambda a: a\nreturn f(a) + b", "    f = lambda a: a\n    return f(a) + b"),
        ("```python\nreturn a + b\n```", "    return a + b\n"),
        ("def add_(a):\n    return a\nreturn add_(a)", "    def add_(a):\n        return a\n    return add_(a)"),
    ],
)  # fmt: skip
def test_code_that_does_not_is_the_body(body: str, indented: str) -> None:
    prompt = 'def add(a, b):\n    """Sum."""\n'
    assert program(body, before=prompt, entry_point="add") == prompt + indented


def test_a_prompt_without_a_docstring_is_whole_without_its_function() -> None:
    prompt = "import math\ndef add(a, b):"
    found = program("def add(a, b): return math.floor(a + b)", before=prompt, entry_point="add")
    assert found.startswith(f"{prompt}\n    pass\n\n\ndef add")


def test_indented_code_goes_on_where_the_prefix_ends() -> None:
    prompt = 'def add(a, b):\n    """Sum."""\n'
    assert "return" in program("    return a + b", before=prompt)
    _, codes = compiled(units({"readings": readings("    return a + b"), "before": prompt}), "f")
    assert len(codes) == 1 and codes[0][0] is not None


def test_each_part_has_its_own_future_imports_and_those_before_it() -> None:
    """An annotation that names nothing is no error under the import, and one without it: Python's own rule."""
    future = "from __future__ import annotations\n"
    undefined = "def f(x: Nothing): pass\n"
    text = f"```python\n{future}{undefined}```\n```python\ndef g(x: Nothing): pass\n```"
    for order in ({"before": "import math"}, {}):
        _, codes = compiled(units({"readings": readings(text), **order}), "f")
        for code, _ in codes:
            assert code is not None
            exec(code, {})
    _, codes = compiled([(undefined, True)], "f")
    assert codes[0][0] is not None
    with pytest.raises(NameError):
        exec(codes[0][0], {})


def test_a_future_import_in_the_middle_stays_an_error() -> None:
    with pytest.raises(SyntaxError, match="__future__"):
        compiled(units({"readings": readings("x = 1\nfrom __future__ import annotations")}), "f")


def test_lines_of_a_program_are_those_of_its_file() -> None:
    text, codes = compiled([("x = 1\n", True), ("def f():\n    pass\n", True)], "f")
    namespace: dict = {}
    for code, _ in codes:
        assert code is not None
        exec(code, namespace)
    line = namespace["f"].__code__.co_firstlineno
    assert text.splitlines()[line - 1] == "def f():"


READS = "n = int(input())\nprint(n)\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"```python\n{READS}```", READS),
        (f"First:\n```python\n{READS}```\nBetter:\n```python\n# 2\n{READS}```", f"# 2\n{READS}"),
        (f"```python\n{AREA}```\nand\n```python\n{READS}```", f"{AREA}\n\n{READS}"),
        (f"```python\n{READS}```\nExample:\n```python\nprint(7)\n```", READS),
        (
            "```python\ndef read():\n    return input()\n```\n```python\nprint(read(), input())\n```",
            "def read():\n    return input()\n\n\nprint(read(), input())\n",
        ),
        (f"```\n3\n```\n```python\n{READS}```\n```\n3\n```", READS),
    ],
    ids=["one", "the last of two", "helpers", "an example is not run", "reader", "samples"],
)
def test_of_programs_that_read_the_last_is_run_with_its_helpers(text: str, expected: str) -> None:
    assert program(text, script=True) == expected


def test_fences_of_a_language_before_those_without_one() -> None:
    text = "```\na\n```\n```json\n{}\n```"
    assert sources(text, "json") == ["{}\n"] and sources(text, "yaml") == ["a\n"]
    assert sources("```x\n1\n```", "json") == ["1\n"] and sources("none", "json") == []
