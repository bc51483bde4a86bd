"""What a model writes, and the program that comes out of it: test data, and the table of docs/signals.md.

``python -m tests.signals.code_table`` writes the table into the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[2] / "docs" / "signals.md"
BEGIN, END = "<!-- table: code -->\n", "<!-- end -->"


class Case(NamedTuple):
    what: str
    text: str
    program: str
    """Units that are run, blank lines between them; an example that may fail begins with ``?``."""


AREA = "def area(w, h):\n    return w * h\n"
DOCSTRING = (
    'def area(w, h):\n    """So:\n    ```\n    area(2, 3)\n    ```\n    """\n    return w * h\n'
)
TOP = '"""\n```\narea(2, 3)\n```\n"""\n' + AREA

TABLE = (
    Case("no fence", AREA, AREA),
    Case("a fence", f"Here:\n```python\n{AREA}```\nDone.", AREA),
    Case("without its end", f"Here:\n```python\n{AREA}", AREA),
    Case("without its beginning", f"{AREA}```\n", AREA),
    Case("the same, talk after it", f"{AREA}```\nIt multiplies.", AREA),
    Case("the same, fences in its docstring", f"{DOCSTRING}```\nSo:\n```\n6\n```", DOCSTRING),
    Case("its end on the line of code", f"```python\n{AREA[:-1]}```\nDone.", AREA[:-1]),
    Case("its beginning after a word", f"Here: ```python\n{AREA}```", AREA),
    Case("all on one line", "So: ```python area = max```", "area = max"),
    Case("tildes", f"~~~python\n{AREA}~~~\n", AREA),
    Case("four marks", f"````py\n{AREA}````\n", AREA),
    Case("other names of Python", f"``` {{.python .lines}}\n{AREA}```", AREA),
    Case("a title", f'```Python3 title="a.py"\n{AREA}```', AREA),
    Case("a fence without a name", f"```\n{AREA}```", AREA),
    Case("in a list", "1. so\n   ```python\n   x = 1\n   ```", "x = 1\n"),
    Case("deeply indented", "    ```python\n    x = 1\n    ```", "x = 1\n"),
    Case("in a quotation", "> ```python\n> x = 1\n> ```", "x = 1\n"),
    Case("in a tag", f"<answer>\n```python\n{AREA}```\n</answer>", AREA),
    Case("lines that end with CR LF", "```python\r\nx = 1\r\n```\r\n", "x = 1\n"),
    Case("indented code, no fence", "Here:\n\n    def area(w, h):\n        return w * h\n", AREA),
    Case("a fence in a docstring, in a fence", f"```python\n{DOCSTRING}```", DOCSTRING),
    Case("the same, no fence around it", DOCSTRING, DOCSTRING),
    Case("in a docstring on the left edge", f"```python\n{TOP}```", TOP),
    Case("the same, without an end", f"```python\n{TOP}", TOP),
    Case(
        "several blocks: all, in order",
        f"```python\nimport math\n```\nthen\n```python\n{AREA}```",
        f"? import math\n\n\n{AREA}",
    ),
    Case(
        "a better one after it",
        f"```python\narea = 0\n{AREA}```\nBetter:\n```python\n{AREA}```",
        f"area = 0\n{AREA}\n\n{AREA}",
    ),
    Case(
        "an example: it may fail",
        f"```python\n{AREA}```\nUse:\n```python\narea(2, 3) -> 6\n```",
        f"{AREA}\n\n? area(2, 3) -> 6\n",
    ),
    Case(
        "an example cut short",
        f"```python\n{AREA}```\nUse:\n```python\nprint(area(2",
        f"{AREA}\n\n? print(area(2",
    ),
    Case(
        "no Python, then mended",
        f"```python\ndef area(w, h:\n```\nMended:\n```python\n{AREA}```",
        f"? def area(w, h:\n\n\n{AREA}",
    ),
    Case(
        "one that is cut after it",
        f"```python\n{AREA}```\nBetter:\n```python\ndef area(w, h",
        f"{AREA}\n\ndef area(w, h",
    ),
    Case("wrapped in Markdown", f"````markdown\n```python\n{AREA}```\n````", AREA),
    Case("a tag without a fence", f"<answer>\n{AREA}</answer>", AREA),
    Case("a session", f"```python\n{AREA}```\n```python\n>>> area(2, 3)\n6\n```", AREA),
    Case("another language", f"```bash\npip install x\n```\n```python\n{AREA}```", AREA),
    Case("what it prints", f"```python\n{AREA}```\nprints\n```\n6\n```", AREA),
    Case("code in an unmarked fence beside it", f"```\n{AREA}```\n```python\nx = 1\n```", f"{AREA}\n\n? x = 1\n"),
    Case("no Python: run as it is, and fails", "```python\ndef area(w h)\n```", "def area(w h)\n"),
    Case("only words", "I cannot help.", "I cannot help."),
)  # fmt: skip


def rendered() -> str:
    """The table as Markdown."""
    rows = [f"| {case.what} | {_cell(case.text)} | {_cell(case.program)} |" for case in TABLE]
    return "\n".join(["| what | text | program |", "|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return f"````` {text} `````".replace("\r\n", "␍⏎").replace("\n", "⏎").replace("|", "\\|")


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(f"{head}{BEGIN}{rendered()}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
