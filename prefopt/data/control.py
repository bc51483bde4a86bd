"""Control tokens: strings that a tokenizer turns into tokens of their own, whoever wrote them.

A text that spells one out would close a turn, or open one, in the middle of what somebody says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.options import KeptControls
from prefopt.data.rows import Message, Refused
from prefopt.data.template import ANSWER, QUESTION, ChatTemplate
from prefopt.errors import ConfigError, suggest

_ROLES = ("bos", "eos", "pad", "unk")


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and what its chat template writes around contents.

    Some tokenizers hold the latter without marking them special, as they do others (``<think>``) that are said.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def first_in(self, texts: Iterable[str], kept: KeptControls = ()) -> str | None:
        """The first control token that one of ``texts`` would become, but for those ``kept``; None without one."""
        if kept == "all":
            return None
        for text in texts:
            for found in self._found(text):
                if found not in kept:
                    return found
        return None

    def require_known(self, kept: Sequence[str], where: str) -> None:
        """Raises ConfigError for a name that is no control token here, and so would keep nothing."""
        known = {"all", *self._texts.values()}
        for name in kept:
            if name not in known:
                raise ConfigError(
                    f"{where}control_tokens: {name!r} is no control token of the tokenizer; "
                    f"{suggest(name, known)}"
                )

    def without_lead(self, text: str) -> str:
        """``text`` without a BOS at its start, which the renderer puts there once, whoever wrote it."""
        bos = special_id(self._tokenizer, "bos")
        lead = "" if bos is None else str(self._tokenizer.bos_token)
        while lead and text.startswith(lead):
            text = text[len(lead) :]
        return text

    def without_end(self, text: str) -> tuple[str, int | None]:
        """``text`` without the end token that it closes with, and which that is."""
        bare = text.rstrip()
        for end, id_ in self.ends.items():
            if bare.endswith(end):
                while bare.endswith(end):
                    bare = bare[: -len(end)]
                return bare, id_
        return text, None

    @cached_property
    def ends(self) -> dict[str, int]:
        """``{text: id}`` of what may end a turn: special tokens without another job, and the template's end."""
        # An unknown character at the end of a response becomes unk: no end at all.
        others = {special_id(self._tokenizer, name) for name in ("unk", "bos", "pad")}
        # eos may double as pad or bos, and ends a turn all the same
        own = {*self._turn_end, special_id(self._tokenizer, "eos")}
        return {
            token.content: id_
            for id_, token in self._added.items()
            if id_ in own or (token.special and id_ not in others)
        }

    @cached_property
    def _texts(self) -> dict[int, str]:
        ids = {special_id(self._tokenizer, role) for role in _ROLES}
        ids |= {*self._turn_marks, *self._turn_end}
        return {i: t.content for i, t in self._added.items() if t.special or i in ids}

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(filter(None, self._texts.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    @cached_property
    def _after_normalising(self) -> frozenset[int]:
        """Those that are looked for in the normalised text: where they stand in it, the tokenizer alone knows."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None or backend.normalizer is None:
            return frozenset()
        # What an unknown character becomes was not spelt out by anybody.
        unknown = getattr(backend.model, "unk_token", None)
        found = {
            i for i, text in self._texts.items() if self._added[i].normalized and text != unknown
        }
        return frozenset(found - {special_id(self._tokenizer, "unk")})

    def _found(self, text: str) -> Iterator[str]:
        if self._pattern is not None:
            yield from (match.group() for match in self._pattern.finditer(text))
        if self._after_normalising:
            ids = self._encode(text)
            yield from (self._texts[each] for each in ids if each in self._after_normalising)

    @property
    def _added(self) -> dict[int, Any]:
        return self._tokenizer.added_tokens_decoder

    @cached_property
    def _turn_marks(self) -> list[int]:
        """Added tokens that open and close a turn of the user, and the one that opens the assistant's."""
        ids = self._probed([QUESTION])
        opened = self._probed([QUESTION], generate=True)[len(ids) :]
        return [each for each in (*ids, *opened[:1]) if each in self._added]

    @cached_property
    def _turn_end(self) -> list[int]:
        """The added token that closes a turn of the assistant; none where another kind of token does."""
        return [each for each in self._probed([QUESTION, ANSWER])[-1:] if each in self._added]

    def _probed(self, turns: list[Message], *, generate: bool = False) -> list[int]:
        if self._tokenizer.chat_template is None:
            return []
        text = self._template.text(turns, generate=generate)
        return [] if isinstance(text, Refused) else self._encode(text.rstrip())

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """Id of the ``bos``, ``eos``, ``pad`` or ``unk`` token, if the tokenizer has one."""
    found = getattr(tokenizer, f"{name}_token_id")
    return found if isinstance(found, int) else None


def added_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids the tokenizer adds before a text by itself: asked, because no attribute says it for all."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, at any depth, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key)
            yield from strings_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings_in(each)
