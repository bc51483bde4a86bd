"""How code comes out of what a model wrote: verifiers, checkers, benchmarks and pipelines all ask here.

Nothing is compiled in this process. A text has several readings, and the sandbox takes the first that is
Python (`sandbox_source.py`): a fence may lack its beginning or its end, or stand inside a docstring, and only
a parser can tell. docs/signals.md has the table of texts and the programs that come out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

from markdown_it import MarkdownIt
from markdown_it.token import Token

_MARK = re.compile(r"`{3,}|~{3,}")
_MOST = 16
"""Fences that may end what the prompt opened: as many readings are tried."""
_MARKDOWN = frozenset({"markdown", "md"})
_TAGS = re.compile(r"^[ \t]*(</?[a-zA-Z][^<>\n]*>[ \t]*)+$\n?", re.MULTILINE)
_PYTHON = re.compile(r"(i?python|py|sage)[\d.]*", re.IGNORECASE)
_SESSION = re.compile(r"\s*>>>( |$)", re.MULTILINE)
_FIRST_LINE = re.compile(r"[ \t]*([\w.+#-]*)[^\n]*\n")
_ONE_LINE = re.compile(r"\s*(python|py)?3?\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Block:
    """What stood between two fences."""

    source: str
    language: str
    """As the fence says, in lower case; empty where it says nothing."""

    @property
    def is_python(self) -> bool:
        return _PYTHON.fullmatch(self.language) is not None


Reading: TypeAlias = tuple[tuple[str, bool], ...]
"""One way to read a text: sources in order, each with whether it is said to be Python."""


def blocks(text: str, depth: int = 3) -> list[Block]:
    """The fenced blocks of a text in order, by CommonMark: the last one may lack its end.

    A block of Markdown is what an answer is wrapped in: its own blocks stand for it, to a depth.
    """
    found = [Block(token.content, _language(token.info)) for token in _tokens(text, "fence")]
    return [
        inner
        for block in found
        for inner in (
            (depth and block.language in _MARKDOWN and blocks(block.source, depth - 1)) or [block]
        )
    ]


def readings(text: str) -> list[Reading]:
    """Every way in which a text may hold a program, the likeliest first; never empty.

    1. All of it: code without fences, fences inside its docstrings included.
    2. Its fences as Markdown has them: all that say Python, in order; unmarked ones too.
    3. From the first fence to the last, or to the end: a docstring of the code holds fences.
    4. What stands before a fence: the prompt opened it. The last one first, for docstrings.
    5. Fences that do not stand on a line of their own: after a word, or at the end of a line of code.
    6. What is indented by four spaces, where there is no fence.
    7. All of this again without the lines that are tags alone (``<answer>``).
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    bare = _TAGS.sub("", text)
    return _readings(text) + (_readings(bare) if bare != text else [])


def _readings(text: str) -> list[Reading]:
    whole: Reading = ((text, True),)
    marks = list(_MARK.finditer(text))
    if not marks:
        indented = tuple((token.content, True) for token in _tokens(text, "code_block"))
        return [whole, indented] if indented else [whole]
    body = _FIRST_LINE.match(text, marks[0].end())
    start = body.end() if body else marks[0].end()
    outer: list[Reading] = [
        ((text[start : max(start, end)], True),) for end in (marks[-1].start(), len(text))
    ]
    before: list[Reading] = [((text[: mark.start()], True),) for mark in marks[:_MOST][::-1]]
    return [whole, _python(blocks(text)), *outer, *before, _python(_loose(text))]


def sources(text: str, language: str) -> list[str]:
    """What the fences of a text hold: those of a language, else those without one, else all."""
    found = blocks(text)
    for wanted in (language, ""):
        if chosen := [block.source for block in found if block.language == wanted]:
            return chosen
    return [block.source for block in found]


def _python(found: list[Block]) -> Reading:
    """The blocks that may be Python. A session (``>>>``) is an example, not a program."""
    found = [b for b in found if b.source.strip() and not _SESSION.match(b.source)]
    if not any(block.is_python or not block.language for block in found):
        return tuple((block.source, True) for block in found)
    marked = any(block.is_python for block in found)
    kept = [block for block in found if block.is_python or not block.language]
    return tuple((block.source, block.is_python or not marked) for block in kept)


def _loose(text: str) -> list[Block]:
    """Blocks between marks wherever these stand."""
    found = []
    for part in _MARK.split(text)[1::2]:
        first = _FIRST_LINE.match(part) or _ONE_LINE.match(part)
        language = (first and first[1]) or ""
        found.append(Block(part[first.end() :] if first else part, language.lower()))
    return found


def _language(info: str) -> str:
    """``{.python .numberLines}`` and ``Python title=a.py`` are python."""
    words = info.strip().strip("{}").split()
    return words[0].lstrip(".").rstrip(",:").lower() if words else ""


@cache
def _parser() -> MarkdownIt:
    # No HTML blocks: <answer> on a line of its own would swallow the fence after it.
    return MarkdownIt("zero").enable(["fence", "code", "blockquote", "list"])


def _tokens(text: str, kind: str) -> list[Token]:
    return [token for token in _parser().parse(text) if token.type == kind]
