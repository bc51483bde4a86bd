"""The one place where text and chat messages become token ids, for training, rollouts and evaluation.

Invariants of everything that comes out: exactly one BOS (or whatever the tokenizer itself puts in
front) at the start where the tokenizer adds one, exactly one terminal end token at the end of a
response, and prompt ids that are a prefix of the ids of prompt + response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.control import ControlTokens, added_prefix, special_id, strings_in
from prefopt.data.options import PLAIN, RenderOptions
from prefopt.data.rows import Message, Refused, Reject
from prefopt.data.said import missing_from_prompt, missing_from_response, not_taken
from prefopt.data.template import ANSWER, CALL, ChatTemplate
from prefopt.errors import DataError, ModelError
from prefopt.recipe.thinking import mark_at_end

RENDERER_VERSION = 3
"""Raise whenever the ids of some row change: it is part of the key tokenised data is cached under."""

Prompt = str | list[Message]
_TAIL_TOKENS = 32
"""More than a mark of thinking is ever split into."""


@dataclass(frozen=True)
class Rendered:
    """Token ids of one prompt and of each of its responses, terminal end token included."""

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    turns: tuple[tuple[int, int], ...] = ()
    """Of a response of several turns: start and stop in it of each that carries loss; else the whole does."""


@dataclass(frozen=True)
class Request:
    """A prompt and the responses to render after it: text with text, messages with messages."""

    prompt: Prompt
    responses: tuple[str | Message, ...]
    ended: bool = True
    """False: no end token after the responses, which stop within their turn."""
    earlier: tuple[int, ...] = ()
    """Places in the prompt of turns that are trained on as the one response is. What is rendered as the response
    then begins with the first of them."""
    trained: bool = True
    """False: the response itself carries no loss, and the earlier turns alone do."""
    options: RenderOptions = PLAIN


def conditioned(prompt: Prompt, template: str, reward: float) -> Prompt:
    """``prompt`` with a reward written into it: into the text, or into the content of a dialogue's last turn.

    Args:
        template: with ``{input}``, the prompt or that content, and ``{reward}``, which gets two decimals.
    """

    def written(text: str) -> str:
        # Not str.format: a prompt may hold braces, and so may the template.
        parts = (part.replace("{reward}", f"{reward:.2f}") for part in template.split("{input}"))
        return text.join(parts)

    if isinstance(prompt, str):
        return written(prompt)
    *before, last = prompt
    return [*before, {**last, "content": written(last["content"])}]


class Renderer:
    """Renders prompts and responses to token ids with one tokenizer and its chat template.

    Chat messages go through the chat template (the prompt with the generation prompt, prompt and
    response without); plain text is tokenised as it stands. Either way prompt + response is tokenised
    as one text and must begin with the prompt's own ids: otherwise the policy would be trained after
    a context it never sees when it generates.

    A turn within a dialogue is found in the same way: the dialogue cut after it is rendered as if it were all, and
    must be how the whole begins. So the turn has the tokens it would have as a last turn, its end token included,
    with any template; `{% generation %}` marks are in few templates, and not all put the end token inside them.

    What a message says must be in what is rendered, and a control token in a text is no text: a row with one or
    without the other is refused (`RenderOptions` says what is allowed).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.controls = ControlTokens(tokenizer, self.template)
        self.prefix = added_prefix(tokenizer)
        """Ids the tokenizer itself puts before a text, usually (BOS,) or nothing."""

    def prompt_ids(self, prompt: Prompt, options: RenderOptions = PLAIN) -> tuple[int, ...]:
        """Ids a policy generates after. Raises: DataError where it is refused; ModelError without a template."""
        (found,) = self.render_batch([Request(prompt, (), options=options)])
        return _accepted(found).prompt_ids

    def opened_by(self, prompt_ids: Sequence[int]) -> str:
        """The mark that a rendered prompt ends with, as `mark_at_end` finds it: ``<think>``, or "" for none."""
        return mark_at_end(str(self.tokenizer.decode([*prompt_ids[-_TAIL_TOKENS:]])))

    def stop_ids(self, *, chat: bool) -> tuple[int, ...]:
        """What ends a response: the tokens that end one in training, of a chat also one that calls a tool, and the
        tokenizer's EOS."""
        prompt: Any = [{"role": "user", "content": "a"}] if chat else "a"
        answers = [ANSWER, CALL] if chat else ["a"]
        # A template may know no tools: what it makes of them says nothing.
        options = RenderOptions(omits="anything")
        found = [self.render_batch([Request(prompt, (a,), options=options)])[0] for a in answers]
        ends = {_accepted(found[0]).responses[0][-1], special_id(self.tokenizer, "eos")}
        ends |= {each.responses[0][-1] for each in found if isinstance(each, Rendered)}
        return tuple(sorted(each for each in ends if each is not None))

    def render(
        self, prompt: Prompt, response: str | Message, options: RenderOptions = PLAIN
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(prompt_ids, response_ids)`` of one response; DataError where `render_batch` refuses."""
        (found,) = self.render_batch([Request(prompt, (response,), options=options)])
        result = _accepted(found)
        return result.prompt_ids, result.responses[0]

    def render_batch(self, requests: Sequence[Request]) -> list[Rendered | Refused]:
        """Token ids of each request, in order; all texts go to the tokenizer in one call.

        Raises: ModelError if messages meet a tokenizer without chat template, or one that opens an answer always
            or never (`ChatTemplate.fault`), or nothing ends a response.
        """
        texts = [self._texts(request) for request in requests]
        flat = [text for row in texts if not isinstance(row, Refused) for text in row]
        ids = iter(self._encode(flat))
        return [
            row if isinstance(row, Refused) else self._assemble([next(ids) for _ in row], request)
            for row, request in zip(texts, requests, strict=True)
        ]

    def whole_text(self, content: Prompt, options: RenderOptions = PLAIN) -> str | Refused:
        """A text or dialogue that is read and not continued, as reward models do, looked at as any other."""
        if isinstance(content, str):
            return self._controls(Request("", (content,), options=options)) or content
        refused = self._controls(Request(content[:-1], (content[-1],), options=options))
        text = refused or self.template.text(content, options)
        if isinstance(text, Refused):
            return text
        return self._unsaid(content, text, options) or text

    def whole_ids(
        self, content: Prompt, options: RenderOptions = PLAIN
    ) -> tuple[int, ...] | Refused:
        """The ids of `whole_text`, one end token last."""
        text = self.whole_text(content, options)
        if isinstance(text, Refused):
            return text
        return self._end(self._start(self._encode([self._without_tail(text)])[0]))

    def _texts(self, request: Request) -> list[str] | Refused:
        """The prompt's text, then prompt + response for each response; the same of each earlier turn."""
        if not isinstance(request.prompt, str) and self.template.fault is not None:
            raise ModelError(
                f"{self.template.fault}. Set model.chat_template to a Jinja file without that"
            )
        refused = self._controls(request)
        if refused is not None:
            return refused
        wanted = [(request.prompt, response) for response in (None, *request.responses)]
        for place in request.earlier:
            before, turn = request.prompt[:place], request.prompt[place]
            wanted += [(before, None), (before, turn)]
        texts = []
        for prompt, response in wanted:
            text = self._text(prompt, response, request.options)
            if isinstance(text, Refused):
                return text
            texts.append(text)
        return self._checked(texts, request)

    def _text(
        self, prompt: Prompt, response: str | Message | None, options: RenderOptions
    ) -> str | Refused:
        if isinstance(prompt, str):
            text = prompt if response is None else f"{prompt}{response}"
        else:
            turns: list[Any] = prompt if response is None else [*prompt, response]
            text = self.template.text(turns, options, generate=response is None)
        if response is None or isinstance(text, Refused):
            return text
        return self._without_tail(text)

    def _without_tail(self, text: str) -> str:
        """Templates write a line break after the end of a turn; no policy ever generates past that end."""
        stripped = text.rstrip()
        return stripped if stripped.endswith(tuple(self.controls.ends)) else text

    def _checked(self, texts: list[str], request: Request) -> list[str] | Refused:
        """``texts``, or what of the request they lack."""
        prompt, options = request.prompt, request.options
        if isinstance(prompt, str):
            return texts
        # Earlier turns with loss are looked at as the last turns of their own dialogues.
        context = [turn for n, turn in enumerate(prompt) if n not in request.earlier]
        refused = self._unsaid(context, texts[0], options)
        if refused is not None or options.omits == "anything":
            return refused or texts
        count = 1 + len(request.responses)
        said = [(response, texts[0], texts[n]) for n, response in enumerate(request.responses, 1)]
        said += [
            (prompt[place], *texts[n : n + 2])
            for place, n in zip(request.earlier, range(count, len(texts), 2), strict=True)
        ]
        for response, before, whole in said:
            assert not isinstance(response, str)  # messages go with messages
            missing = missing_from_response(response, before, whole)
            if missing is not None:
                return Refused(Reject.NOT_RENDERED, f"of the response: {missing!r}")
        return texts

    def _unsaid(
        self, messages: Sequence[Message], rendered: str, options: RenderOptions
    ) -> Refused | None:
        missing = missing_from_prompt(messages, rendered, options.omits)
        if missing is not None:
            return Refused(Reject.NOT_RENDERED, f"of a turn of the {missing[0]}: {missing[1]!r}")
        if not options.given:
            return None
        problem = not_taken(options, self.template.reads(options), rendered)
        return None if problem is None else Refused(Reject.NOT_RENDERED, problem)

    def _controls(self, request: Request) -> Refused | None:
        """Refuses what is no text, or spells a control token out that the renderer would not put there itself."""
        prompt = request.prompt
        texts = (
            [self.controls.without_lead(prompt)]
            if isinstance(prompt, str)
            else [*strings_in(prompt)]
        )
        texts += strings_in(request.options.given)
        for response in request.responses:
            said = response if isinstance(response, str) else response["content"]
            texts.append(self.controls.without_end(said)[0] if request.ended else said)
            if not isinstance(response, str):
                texts += strings_in({**response, "content": ""})
        if not all(map(_is_unicode, texts)):
            return Refused(Reject.BROKEN_TEXT, "half a surrogate pair in a text")
        found = self.controls.first_in(texts, request.options.control_tokens)
        return None if found is None else Refused(Reject.CONTROL_TOKEN, f"{found!r} in a text")

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: the warning about model_max_length is our own too_long, counted
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def _start(self, ids: list[int]) -> tuple[int, ...]:
        """``ids`` with what the tokenizer puts in front there exactly once, whoever put it there."""
        bos = special_id(self.tokenizer, "bos")
        lead = self.prefix or (() if bos is None else (bos,))
        whole = tuple(ids)
        while lead and whole[: 2 * len(lead)] == lead * 2:
            whole = whole[len(lead) :]
        return whole if whole[: len(self.prefix)] == self.prefix else self.prefix + whole

    def _assemble(self, ids: list[list[int]], request: Request) -> Rendered | Refused:
        """From the ids of `_texts`."""
        count = 1 + len(request.responses)
        whole = self._split(ids[:count], request.ended, request.responses)
        if isinstance(whole, Refused) or not request.earlier:
            return whole
        cuts = zip(ids[count::2], ids[count + 1 :: 2], strict=True)
        return self._joined(whole, [self._split(list(cut)) for cut in cuts], request.trained)

    def _joined(
        self, last: Rendered, earlier: list[Rendered | Refused], trained: bool
    ) -> Rendered | Refused:
        """One response from the first of the ``earlier`` turns to the end of the ``last``."""
        whole = last.prompt_ids + last.responses[0]
        turns = []
        for turn in (*earlier, last):
            if isinstance(turn, Refused):
                return turn
            cut = turn.prompt_ids + turn.responses[0]
            if whole[: len(cut)] != cut:
                names = ("the dialogue up to a turn", "the whole")
                return Refused(Reject.TURN_NOT_PREFIX, self._where_it_parts(cut, whole, names))
            turns.append((len(turn.prompt_ids), len(cut)))
        first = turns[0][0]
        places = [(start - first, stop - first) for start, stop in turns]
        return Rendered(whole[:first], (whole[first:],), tuple(places if trained else places[:-1]))

    def _split(
        self, ids: list[list[int]], ended: bool = True, said: Sequence[str | Message] = ()
    ) -> Rendered | Refused:
        """Splits prompt + response at the prompt's end, and ends each response once (or not at all)."""
        prompt = self._start(ids[0])
        responses = []
        for number, whole in enumerate(map(self._start, ids[1:])):
            if whole[: len(prompt)] != prompt:
                return Refused(Reject.PROMPT_NOT_PREFIX, self._where_it_parts(prompt, whole))
            response = whole[len(prompt) :]
            if ended:
                response = self._end(response)
                refused = self._second_end(response, said[number] if said else "")
                if refused is not None:
                    return refused
            responses.append(response)
        return Rendered(prompt, tuple(responses))

    def _end(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """``ids`` with exactly one end token last: the turn's own, else the tokenizer's EOS."""
        if ids and ids[-1] in self.controls.ends.values():
            while len(ids) > 1 and ids[-2] == ids[-1]:
                ids = ids[:-1]
            return ids
        eos = special_id(self.tokenizer, "eos")
        if eos is None:
            raise ModelError(
                "the tokenizer has no eos_token and the chat template ends a turn with no special token: "
                "a policy could not learn to stop; use a tokenizer with an eos_token"
            )
        return (*ids, eos)

    def _second_end(self, ids: tuple[int, ...], said: str | Message) -> Refused | None:
        """Refuses a response that holds an end token before its last: nothing is ever generated after that."""
        own = self.controls.without_end(said if isinstance(said, str) else said["content"])[1]
        if ids[-1] not in ids[:-1] and own in (None, ids[-1]):
            return None
        token = self.tokenizer.convert_ids_to_tokens(ids[-1] if own is None else own)
        return Refused(Reject.CONTROL_TOKEN, f"the response goes on after its end token {token!r}")

    def _where_it_parts(
        self,
        prompt: tuple[int, ...],
        whole: tuple[int, ...],
        names: tuple[str, str] = ("the prompt alone", "prompt + response"),
    ) -> str:
        """The texts on which a beginning and what it should begin part ways, for the rejects file."""
        at = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
            min(len(prompt), len(whole)),
        )
        alone = self.tokenizer.decode(list(prompt[at : at + 8]))
        joined = self.tokenizer.decode(list(whole[at : at + 8]))
        return f"at token {at} {names[0]} has {alone!r}, {names[1]} {joined!r}"


def _accepted(found: Rendered | Refused) -> Rendered:
    if isinstance(found, Refused):
        raise DataError(f"{found.reason}: {found.detail}")
    return found


def _is_unicode(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
