r"""Which letter of a multiple choice a response settles on, in the ways people and models write it.

The ways are asked one after the other, the surest first; of one way the last place counts. A place that names two
letters (``A or B``) settles on none, and nothing weaker is asked then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from prefopt.signals.plain_text import spelled, without_wrappers

_Texts = Sequence[str] | None
_NONE = ""
"""Of a place that names no letter, or several: no other place is asked."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_ANSWER = (
    r"\b(?:answer|choice|option|solution|antwort|lösung|réponse|respuesta|risposta|resposta|ответ)"
    "|答案|答え|正解|选项|選項|정답|답"
)
_THE_LETTER = r"(?:(?:the\s+)?(?:(?:correct|right|best)\s+)?(?:option|choice|letter|answer|选项|選項)\s*:?\s*)?"
_ASIDE = r"(?:\s+(?:to|for)\s+(?:this|the)\s+\w+(?:\s+above)?)?"
_VERB = r"(?:is|was|would\s+be|must\s+be|should\s+be|will\s+be|therefore|ist|est|es|è|é)"
_IS = rf"(?:\s*[:=]\s*|\s+{_VERB}\b\s*:?\s*|\s*(?:应为|應為|是|为|為|は|은|는)\s*:?\s*)"
_CHOOSE = (
    r"\b(?:choose|chose|pick|picked|select|selected|go\s+with|going\s+with|opt\s+for|settle\s+on)\s+"
    r"|[选選]择?\s*:?\s*"
)
_CUE = rf"(?i:(?:(?:{_ANSWER}){_ASIDE}{_IS}|{_CHOOSE}){_THE_LETTER}(?:is\s+)?)"
_RIGHT = (
    r"(?:is|was|must\s+be)\s+(?:the\s+)?(?:most\s+)?"
    r"(?:correct|right|best|true|answer|appropriate|likely)"
)
_OR = r"[)\].]?\s*(?:(?:,\s*)?\b(?:and|or|und|oder|et|ou)\b|[/&+,、和或])\s*"
_GOES_ON = r"(?!\s+(?:is|was|are|would|has|seems|can|does|says|and|but)\b)"
_LONGEST_LINE, _MOST_PLACES = 200, 20
"""Characters of a line that are looked at, and cues behind which a choice's text is looked for."""
_LEAD = r"(?:(?i:final\s+|correct\s+|my\s+)?(?i:answer|option|choice|letter)\s*[:.]?\s*|A:\s*)?"


def extract_choice(text: str, letters: str = "ABCD", choices: _Texts = None) -> str | None:
    r"""The letter a response settles on, or None.

    In this order: the last ``\boxed{B}``; "the answer is (B)", "answer: b", "I choose B", "B is correct"; a letter
    that is the last line or the first, or that alone begins a line, ``B``, ``**B**``, ``b)``, ``B: the text``; the
    last letter in brackets, ``(B)`` or ``[B]``. A small letter counts where a bracket, a stop or nothing follows
    it; "A" and "I" inside sentences are words.

    Args:
        text: a response without its thinking.
        letters: of the choices, capitals.
        choices: the texts of the choices, in order: one that is the answer stands for its letter.
    """
    text = _unmarked(text)
    for way in (_boxed, _said, _alone, _bracketed):
        found = way(text, letters, choices)
        if found is not None:
            return found or None
    return _of_text(text.rsplit("\n", 1)[-1], letters, choices)


def gold_choice(gold: object, letters: str, choices: _Texts = None) -> str | None:
    """The letter that a gold answer is: itself in any wrapper, an index from 0, or a choice's text; else None."""
    if isinstance(gold, float) and gold.is_integer():  # as columns with nulls are read
        gold = int(gold)
    if isinstance(gold, int) and not isinstance(gold, bool):
        return letters[gold] if 0 <= gold < len(letters) else None
    text = _unmarked(str(gold))
    if box := _BOX.match(text):
        text = _up_to_brace(text, box.end())
    bare = text.strip().strip("()[].: ").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    return _of_text(text, letters, choices)


@dataclass(frozen=True)
class _Patterns:
    """Of one set of letters; the group ``x`` is the letter."""

    content: re.Pattern[str]
    said: tuple[re.Pattern[str], ...]
    alone: re.Pattern[str]
    begins: re.Pattern[str]
    bracketed: re.Pattern[str]
    another: re.Pattern[str]


@lru_cache(maxsize=26)
def _patterns(letters: str) -> _Patterns:
    big, any_ = f"[{letters}]", f"[{letters}{letters.lower()}]"
    # A small letter may be a word ("a"): it counts in brackets, or where nothing or a stop is behind it.
    stops = r"\s*(?:[.,;:!?)\]}。，、]|$|\n)"
    one = rf"(?:[(\[{{]\s*)?(?P<x>{big}(?!\w|['’-]\w)|{any_}(?={stops}))"
    sure = rf"(?:[(\[]\s*(?P<x>{any_})\s*[)\]]|(?P<y>{big})(?!['’\w]))"
    rejected = (
        rf"(?i:not\s+{_THE_LETTER}[(\[]?{any_}[)\]]?\s*[,;]?\s*(?:but|rather)\s+{_THE_LETTER})?"
    )
    return _Patterns(
        content=re.compile(
            rf"(?:(?:{_ANSWER})\s*(?:is|:)?\s*)?[(\[]?\s*(?P<x>{any_})\s*(?:[)\].:].*)?",
            re.IGNORECASE | re.DOTALL,
        ),
        said=(
            re.compile(rf"{_CUE}{rejected}{one}"),
            re.compile(rf"(?<![\w'’])(?:(?i:option|choice|answer)\s+)?{sure}\s*,?\s*(?i:{_RIGHT})"),
            re.compile(rf"(?:^|[.\n])\s*(?i:option|choice)\s+{one}\s*(?=$|[.:)\n])"),
        ),
        alone=re.compile(rf"\W*{_LEAD}\W*(?P<x>{any_})\W*"),
        begins=re.compile(
            rf"\W*?{_LEAD}[(\[]?(?:(?P<x>{big})[.):\]]|(?P<y>{any_})[)\]:])\s*(?=\S)"
        ),
        bracketed=re.compile(rf"[(\[]\s*(?P<x>{big})\s*[)\]]"),
        another=re.compile(rf"{_OR}{_THE_LETTER}[(\[]?(?P<x>{big})(?![\w'’])[)\]]?{_GOES_ON}"),
    )


def _boxed(text: str, letters: str, choices: _Texts) -> str | None:
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    content = _up_to_brace(text, boxes[-1].end()).strip()
    if found := _patterns(letters).content.fullmatch(content):
        return _letter(found)
    return _of_text(content, letters, choices)


def _said(text: str, letters: str, choices: _Texts) -> str | None:
    """What follows "the answer is", or precedes "is correct"."""
    places = [
        (match.start(), _settled(text, match, letters))
        for pattern in _patterns(letters).said
        for match in pattern.finditer(text)
    ]
    if places:
        return max(places)[1]
    if not choices:
        return None
    ends = [match.end() for match in re.finditer(_CUE, text)][-_MOST_PLACES:]
    lines = (text[end : end + _LONGEST_LINE].split("\n", 1)[0] for end in ends)
    found = [letter for line in lines if (letter := _of_text(line, letters, choices))]
    return found[-1] if found else None


def _alone(text: str, letters: str, choices: _Texts) -> str | None:
    """A letter that is a line, or begins one, where no others begin lines: those list the choices."""
    stripped = (line.strip() for line in text.split("\n"))
    lines = [line[:_LONGEST_LINE] for line in stripped if line] or [""]
    for line in (lines[-1], lines[0]):
        if found := _patterns(letters).alone.fullmatch(line):
            return _letter(found)
    begun = {
        index: _letter(m)
        for index, line in enumerate(lines)
        if (m := _patterns(letters).begins.match(line))
    }
    if len(set(begun.values())) == 1 and begun.keys() & {0, len(lines) - 1}:
        return next(iter(begun.values()))
    return None


def _bracketed(text: str, letters: str, choices: _Texts) -> str | None:
    found = list(_patterns(letters).bracketed.finditer(text))
    if len(found) > 1 and re.compile(rf"\s*{_OR}{_THE_LETTER}", re.IGNORECASE).fullmatch(
        text, found[-2].end(), found[-1].start()
    ):
        return _NONE
    return _settled(text, found[-1], letters) if found else None


def _settled(text: str, match: re.Match[str], letters: str) -> str:
    """The letter of ``match``; `_NONE` where another follows it as an alternative, or where it is the word "I"."""
    letter = _letter(match)
    if letter == "I" and re.compile(r"\s+[^\W\d_]").match(text, match.end()):
        return _NONE
    another = _patterns(letters).another.match(text, match.end())
    return letter if another is None or _letter(another) == letter else _NONE


def _letter(match: re.Match[str]) -> str:
    return next(value for value in match.groupdict().values() if value).upper()


def _of_text(said: str, letters: str, choices: _Texts) -> str | None:
    """The letter of the one choice whose text ``said`` is."""
    said, texts = _normal(said), zip(letters, choices or (), strict=False)
    found = [letter for letter, each in texts if _normal(each) == said]
    return found[0] if said and len(found) == 1 else None


def _normal(text: str) -> str:
    return re.sub(r"^[\W_]+|[\W_]+$", "", " ".join(_unmarked(text).split())).casefold()


def _up_to_brace(text: str, start: int) -> str:
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place]
    return text[start:]


def _unmarked(text: str) -> str:
    """``text`` in ASCII letters, without marks of Markdown and LaTeX around words."""
    text = re.sub("[Ａ-Ｚａ-ｚ]", lambda m: chr(ord(m.group()) - 0xFEE0), text)
    text = re.sub("[Ⓐ-Ⓩ]", lambda m: f"({chr(ord(m.group()) - 0x24B6 + ord('A'))})", text)
    text = without_wrappers(spelled(text))
    return re.sub(r"(?<!\w)_+(?=\w)|(?<=\w)_+(?!\w)|[*$]+", "", text).strip()
