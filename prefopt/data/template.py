"""A tokenizer's chat template: messages to text, each message in the form that this template takes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from prefopt.data.options import PLAIN, RenderOptions, broken, template_variables
from prefopt.data.rows import Message, Refused, Reject
from prefopt.data.said import parsed_arguments
from prefopt.errors import ModelError

REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template raises on messages that it is not made for: its own errors, and those of what it does to a value
of another type (joining a dict to a string)."""

QUESTION: Message = {"role": "user", "content": "a"}
ANSWER: Message = {"role": "assistant", "content": "a"}
CALL: Message = {
    "role": "assistant",
    "content": "",
    # Mistral's template insists on an id of nine characters.
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "zqname", "arguments": {"zqkey": "zqvalue"}},
        }
    ],
}
"""What a template is asked with, to see what it makes of a question, an answer and a tool call."""


class CallForm(NamedTuple):
    """How a template takes a message that calls tools: arguments as JSON text or as an object, no content as null
    or as an empty text."""

    text_arguments: bool
    null_content: bool


class ChatTemplate:
    """The chat template of a tokenizer, which may have none: then messages cannot be rendered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text(
        self, turns: Sequence[Message], options: RenderOptions = PLAIN, *, generate: bool = False
    ) -> str | Refused:
        """The rendering, with the generation prompt where asked for, or why the template refuses.

        Raises: ModelError without a template, or for one that is no Jinja.
        """
        return self._rendered([self._adapted(turn) for turn in turns], options, generate)

    def reads(self, options: RenderOptions = PLAIN) -> frozenset[str]:
        """The names that the template reads."""
        template = self._tokenizer.get_chat_template(tools=list(options.tools) or None)  # type: ignore[arg-type]
        return template_variables(template)

    @cached_property
    def fault(self) -> str | None:
        """What is wrong with what the template writes between turns, whatever the row; None where nothing is.

        A policy generates after what ``add_generation_prompt`` asks for. A template that does not read it opens an
        answer always, so that every response would end with a further one, or never, so that the opening would
        be part of the response. Templates that need no opening (Mistral's) may ignore it.
        """
        turns = [{**QUESTION, "content": "zqone"}, {**ANSWER, "content": "zqtwo"}]
        asked, answered = turns[:1], turns
        told = [
            self._rendered(each, PLAIN, flag)
            for each in (asked, answered)
            for flag in (False, True)
        ]
        longer = self._rendered([*turns, {**QUESTION, "content": "zqthree"}], PLAIN, False)
        if any(isinstance(each, Refused) for each in (*told, longer)):
            return None  # it takes no such dialogue: what it makes of it says nothing
        bare, opened, whole, reopened = map(str, told)
        if r"\n" in opened:
            return (
                r"the chat template writes a backslash and an n (\n) where it means a line break, as in a copy "
                "out of JSON: the policy would be trained on those two characters"
            )
        before, _, after = whole.partition("zqtwo")
        opening = before.removeprefix(opened)
        if bare == opened and before.startswith(opened) and opening.strip():
            return (
                f"the chat template writes {opening!r} before an answer, and not where it is asked to open one "
                "(add_generation_prompt): the policy would be trained to write that itself"
            )
        end = after.rstrip().removesuffix(str(self._tokenizer.eos_token)).rstrip()
        between = str(longer).partition("zqtwo")[2].partition("zqthree")[0]
        if whole == reopened and not between.startswith(end):
            return (
                f"the chat template writes {after!r} after an answer that nothing follows: it opens another one "
                "without being asked to (add_generation_prompt), and the policy would be trained to do so too"
            )
        return None

    def _rendered(
        self, turns: list[Message], options: RenderOptions, generate: bool
    ) -> str | Refused:
        if self._tokenizer.chat_template is None:
            raise ModelError(
                "the data holds chat messages, and the tokenizer has no chat template to render them with; "
                "set model.chat_template to a Jinja file, or format: text if the rows are plain strings"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=generate, **options.given
            )
        except TemplateSyntaxError as error:
            raise ModelError(broken(error)) from error
        except REFUSALS as error:
            return Refused(Reject.TEMPLATE_REFUSED, str(error) or type(error).__name__)
        assert isinstance(text, str)  # tokenize=False
        return text

    def _adapted(self, turn: Message) -> Message:
        if self._takes_parts and isinstance(turn.get("content"), str):
            turn = {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        calls = turn.get("tool_calls")
        if not isinstance(calls, list) or not calls:
            return turn
        given = any(isinstance(_function(call).get("arguments"), str) for call in calls)
        form = next((form for form in _forms(given) if form in self._call_forms), None)
        return turn if form is None else _in_form(turn, form)

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether contents must be lists of parts, as templates of models that also see have it."""
        said = "zqword"
        found = self._rendered([{"role": "user", "content": said}], PLAIN, False)
        if isinstance(found, Refused) or said in found:
            return False
        parts = [{"type": "text", "text": said}]
        found = self._rendered([{"role": "user", "content": parts}], PLAIN, False)
        return not isinstance(found, Refused) and said in found

    @cached_property
    def _call_forms(self) -> frozenset[CallForm]:
        """The forms in which a tool call comes out whole: asked, because no two families agree."""
        return frozenset(form for form in _forms(False) if self._renders(form))

    def _renders(self, form: CallForm) -> bool:
        text = self._rendered([QUESTION, _in_form(CALL, form)], PLAIN, False)
        if isinstance(text, Refused):
            return False
        whole = all(word in text for word in ("zqname", "zqkey", "zqvalue"))
        # Python's own notation of an object, JSON text within JSON, a null written out.
        spoilt = any(word in text for word in ("'zqkey'", '\\"zqkey', "None"))
        return whole and not spoilt


def _forms(text_arguments: bool) -> Iterator[CallForm]:
    """All forms, those with arguments as they are given first."""
    for null_content in (False, True):
        yield CallForm(text_arguments, null_content)
        yield CallForm(not text_arguments, null_content)


def _in_form(turn: Message, form: CallForm) -> Message:
    changed = {**turn, "tool_calls": [_call_in_form(each, form) for each in turn["tool_calls"]]}
    if form.null_content and not turn.get("content"):
        changed["content"] = None
    return changed


def _call_in_form(call: Any, form: CallForm) -> Any:
    function = _function(call)
    if "arguments" not in function:
        return call
    arguments = function["arguments"]
    if form.text_arguments and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not form.text_arguments:
        arguments = parsed_arguments(arguments)
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


def _function(call: Any) -> dict[str, Any]:
    """Name and arguments of a call, which stand under ``function`` or in the call itself."""
    found = call.get("function", call) if isinstance(call, dict) else None
    return found if isinstance(found, dict) else {}
