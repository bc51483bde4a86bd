"""The one place where text and chat messages become token ids, for training, rollouts and evaluation.

Invariants of everything that comes out: exactly one BOS (or whatever the tokenizer itself puts in
front) at the start where the tokenizer adds one, exactly one terminal end token at the end of a
response, and prompt ids that are a prefix of the ids of prompt + response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prefopt.data.rows import Message, Refused, Reject
from prefopt.errors import DataError, ModelError

RENDERER_VERSION = 1
"""Raise whenever the ids of some row change: it is part of the key tokenised data is cached under."""

Prompt = str | list[Message]


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
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.prefix = _added_prefix(tokenizer)
        """Ids the tokenizer itself puts before a text, usually (BOS,) or nothing."""
        ends = _end_tokens(tokenizer)
        self._end_ids = frozenset(ends)
        self._end_texts = tuple(ends.values())

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids a policy generates after. Raises: DataError if the template refuses; ModelError without one."""
        text = self._text(prompt)
        if isinstance(text, Refused):
            raise DataError(f"{text.reason}: {text.detail}")
        return self._start(self._encode([text])[0])

    def stop_ids(self, *, chat: bool) -> tuple[int, ...]:
        """What ends a response: the token that ends one in training, and the tokenizer's EOS."""
        answer: Any = {"role": "assistant", "content": "a"} if chat else "a"
        prompt: Any = [{"role": "user", "content": "a"}] if chat else "a"
        _, response = self.render(prompt, answer)
        eos = _special_id(self.tokenizer, "eos")
        return tuple(sorted({response[-1], eos} - {None}))  # type: ignore[type-var]

    def render(
        self, prompt: Prompt, response: str | Message
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(prompt_ids, response_ids)`` of one response; DataError where `render_batch` refuses."""
        result = self.render_batch([Request(prompt, (response,))])[0]
        if isinstance(result, Refused):
            raise DataError(f"{result.reason}: {result.detail}")
        return result.prompt_ids, result.responses[0]

    def render_batch(self, requests: Sequence[Request]) -> list[Rendered | Refused]:
        """Token ids of each request, in order; all texts go to the tokenizer in one call.

        Raises: ModelError if messages meet a tokenizer without chat template, or nothing ends a response.
        """
        texts = [self._texts(request) for request in requests]
        flat = [text for row in texts if not isinstance(row, Refused) for text in row]
        ids = iter(self._encode(flat))
        return [
            row if isinstance(row, Refused) else self._assemble([next(ids) for _ in row], request)
            for row, request in zip(texts, requests, strict=True)
        ]

    def _texts(self, request: Request) -> list[str] | Refused:
        """The prompt's text, then prompt + response for each response; the same of each earlier turn."""
        wanted = [(request.prompt, response) for response in (None, *request.responses)]
        for place in request.earlier:
            before, turn = request.prompt[:place], request.prompt[place]
            wanted += [(before, None), (before, turn)]
        texts = []
        for prompt, response in wanted:
            text = self._text(prompt, response)
            if isinstance(text, Refused):
                return text
            texts.append(text)
        return texts

    def _text(self, prompt: Prompt, response: str | Message | None = None) -> str | Refused:
        if isinstance(prompt, str):
            text = prompt if response is None else f"{prompt}{response}"
        else:
            turns = prompt if response is None else [*prompt, response]
            try:
                text = self._apply_template(turns, generate=response is None)
            except TemplateError as error:
                return Refused(Reject.TEMPLATE_REFUSED, str(error))
        if response is None:
            return text
        # Templates write a line break after the end of a turn; no policy ever generates past that end.
        stripped = text.rstrip()
        return stripped if stripped.endswith(self._end_texts) else text

    def _apply_template(self, turns: list[Any], *, generate: bool) -> str:
        if self.tokenizer.chat_template is None:
            raise ModelError(
                "the data holds chat messages, and the tokenizer has no chat template to render them with; "
                "set model.chat_template to a Jinja file, or format: text if the rows are plain strings"
            )
        text = self.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generate
        )
        assert isinstance(text, str)  # tokenize=False
        return text

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
        bos = _special_id(self.tokenizer, "bos")
        lead = self.prefix or (() if bos is None else (bos,))
        whole = tuple(ids)
        while lead and whole[: 2 * len(lead)] == lead * 2:
            whole = whole[len(lead) :]
        return whole if whole[: len(self.prefix)] == self.prefix else self.prefix + whole

    def _assemble(self, ids: list[list[int]], request: Request) -> Rendered | Refused:
        """From the ids of `_texts`."""
        count = 1 + len(request.responses)
        whole = self._split(ids[:count], request.ended)
        if isinstance(whole, Refused) or not request.earlier:
            return whole
        cuts = zip(ids[count::2], ids[count + 1 :: 2], strict=True)
        return self._joined(whole, [self._split(list(cut)) for cut in cuts])

    def _joined(self, last: Rendered, earlier: list[Rendered | Refused]) -> Rendered | Refused:
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
        places = tuple((start - first, stop - first) for start, stop in turns)
        return Rendered(whole[:first], (whole[first:],), places)

    def _split(self, ids: list[list[int]], ended: bool = True) -> Rendered | Refused:
        """Splits prompt + response at the prompt's end, and ends each response once (or not at all)."""
        prompt = self._start(ids[0])
        responses = []
        for whole in map(self._start, ids[1:]):
            if whole[: len(prompt)] != prompt:
                return Refused(Reject.PROMPT_NOT_PREFIX, self._where_it_parts(prompt, whole))
            rest = whole[len(prompt) :]
            responses.append(self._end(rest) if ended else rest)
        return Rendered(prompt, tuple(responses))

    def _end(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """``ids`` with exactly one end token last: the turn's own, else the tokenizer's EOS."""
        if ids and ids[-1] in self._end_ids:
            while len(ids) > 1 and ids[-2] == ids[-1]:
                ids = ids[:-1]
            return ids
        eos = _special_id(self.tokenizer, "eos")
        if eos is None:
            raise ModelError(
                "the tokenizer has no eos_token and the chat template ends a turn with no special token: "
                "a policy could not learn to stop; use a tokenizer with an eos_token"
            )
        return (*ids, eos)

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


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """``{id: text}`` of the special tokens that may end a turn: all but those with another job."""
    # An unknown character at the end of a response becomes unk: no end at all.
    others = {_special_id(tokenizer, name) for name in ("unk", "bos", "pad")}
    ends = {
        id_: token.content
        for id_, token in tokenizer.added_tokens_decoder.items()
        if token.special and id_ not in others
    }
    eos = _special_id(tokenizer, "eos")
    if eos is not None:  # may double as pad or bos, and ends a turn all the same
        ends[eos] = str(tokenizer.eos_token)
    return ends


def _special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """Id of the ``bos``, ``eos``, ``pad`` or ``unk`` token, if the tokenizer has one."""
    found = getattr(tokenizer, f"{name}_token_id")
    return found if isinstance(found, int) else None


def _added_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids the tokenizer adds before a text by itself: asked, because no attribute says it for all."""
    probe = "a"
    bare = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()
