"""Reward models: sequence classifiers with one output, with their own tokenizer, template and device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveInt

from prefopt.data.options import Omits, given_options
from prefopt.data.rows import Refused, Reject
from prefopt.errors import SignalError
from prefopt.recipe.registry import signal
from prefopt.recipe.section import NoEffect
from prefopt.signals.base import Signal
from prefopt.types import Candidates, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Format = Literal["auto", "chat", "text", "pair"]
_UNBOUNDED = 10**9  # a tokenizer that knows no length says 1e30


@signal(
    "reward_model", source="Bradley-Terry reward model as transformers' sequence classification"
)
def reward_model(
    *,
    path: str,
    revision: str | None = None,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    template_omits: Omits = "history",
    format: Format = "auto",
    separator: str = "",
    keep_tail: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Annotated[str | None, NoEffect()] = None,
    batch_size: PositiveInt = 16,
    max_length_tokens: PositiveInt | None = None,
    trust_remote_code: bool = False,
) -> Signal:
    """The scalar a reward model gives prompt and response. Loads the model when it is made.

    What the model reads ends with one end token, as our own reward models are trained; it is appended to
    a truncated response, too (combine with ``truncation_value``). A response that does not fit is NaN and
    counted, never cut.

    Args:
        path: directory or hub id of the model, or of a PEFT adapter of one.
        revision: hub revision of ``path``.
        tokenizer: directory or hub id of its tokenizer; default: the model's own.
        chat_template: path of a Jinja file that replaces the tokenizer's.
        chat_template_kwargs: keywords for it.
        template_omits: what it may leave out of the dialogue, as a source's; else the response is NaN.
        format: ``chat``: the model's own chat template over the prompt's messages (a text prompt is one
            user turn) and the response. ``text``: prompt + ``separator`` + response, of a dialogue its
            turns two line breaks apart. ``pair``: the tokenizer's two-segment input, for encoders such as
            DeBERTa. ``auto``: ``chat`` for messages, ``text`` for text.
        separator: put between prompt and response under ``text``.
        keep_tail: under ``chat``, keep what the template writes after the last end token (Qwen's line
            break), as model cards with ``apply_chat_template(tokenize=True)`` do.
        dtype: of the weights; ``auto`` is what they were saved in.
        device: torch device; default: CUDA where there is one, else the CPU.
        batch_size: responses in one forward; they are batched by length.
        max_length_tokens: longest input; default: the shorter of the model's and the tokenizer's limit.
        trust_remote_code: run model code from the hub repository.

    Raises: SignalError for a model without exactly one trained output; ModelError if it cannot be loaded.
    """
    from prefopt.model.load import load_tokenizer
    from prefopt.recipe.schema import ModelSection

    section = ModelSection(
        path=path, revision=revision, tokenizer=tokenizer, chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs or {}, dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    own_tokenizer = load_tokenizer(section)
    model, pad_id = _load(section, own_tokenizer)
    _freeze(model, device)
    reader = _Reader(own_tokenizer, format, separator, keep_tail, template_omits)
    limit = max_length_tokens or _longest_input(model, own_tokenizer)
    return RewardModel(model, reader, pad_id, batch_size, limit)


class RewardModel:
    """A loaded reward model; see `reward_model` for what it reads.

    Args:
        pad_id: what ends a row for the model's head; None: any token that no row holds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reader: _Reader,
        pad_id: int | None,
        batch_size: int,
        max_length_tokens: int,
    ) -> None:
        self.model: Any = model
        self.reader = reader
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.max_length_tokens = max_length_tokens
        self._counts: Counter[str] = Counter(responses=0, too_long=0, template_refused=0)

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        if self.model is None:
            raise SignalError("the reward model was closed")
        rows = [self._row(group.prompt, text) for group in groups for text in group.texts]
        scores = [float("nan")] * len(rows)
        for batch in self._batches(rows):
            values = self._forward([rows[index] or [] for index in batch])
            for index, value in zip(batch, values, strict=True):
                scores[index] = value
        flat = iter(scores)
        return [[next(flat) for _ in group.texts] for group in groups]

    def report(self) -> Mapping[str, float]:
        """Responses seen, and of them too long, refused by the chat template, or not rendered otherwise."""
        return dict(self._counts)

    def close(self) -> None:
        self.model = None

    def _row(self, prompt: Prompt, text: str) -> list[int] | None:
        """Token ids to read, or None (counted) for what cannot be read whole."""
        self._counts["responses"] += 1
        ids = self.reader.ids(prompt, text)
        if isinstance(ids, Refused):
            self._counts[str(ids.reason)] += 1
            return None
        if len(ids) > self.max_length_tokens:
            self._counts["too_long"] += 1
            return None
        return ids

    def _batches(self, rows: Sequence[list[int] | None]) -> Iterator[list[int]]:
        """Row numbers in batches of like lengths, longest first: memory runs out at once or not at all."""
        readable = [(len(row), index) for index, row in enumerate(rows) if row is not None]
        order = [index for _, index in sorted(readable, reverse=True)]
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _forward(self, rows: list[list[int]]) -> list[float]:
        import torch

        # The head reads the last token that is not the pad token, so no row may hold it. A saved pad id
        # stays: the model was trained to be read there, even where that is its EOS.
        pad_id = self.pad_id if self.pad_id is not None else _absent(rows)
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        device = next(self.model.parameters()).device
        self.model.config.get_text_config().pad_token_id = pad_id
        with torch.inference_mode():
            output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        return output.logits[:, 0].float().tolist()


class _Reader:
    """Prompt and response as the token ids a reward model reads."""

    def __init__(
        self, tokenizer: Any, format: Format, separator: str, keep_tail: bool, omits: Omits
    ) -> None:
        from prefopt.data.render import Renderer

        self.tokenizer = tokenizer
        self.format = format
        self.separator = separator
        self.keep_tail = keep_tail
        self.omits: Omits = omits
        self._renderer = Renderer(tokenizer)
        if format == "chat" and tokenizer.chat_template is None:
            raise SignalError(
                "signals reward_model.format = 'chat': its tokenizer has no chat template; set "
                "chat_template to a Jinja file, or format: text"
            )

    def ids(self, prompt: Prompt, text: str) -> list[int] | Refused:
        """Refused where the chat template refuses the dialogue, or would not render what it says."""
        if self.format == "pair":
            found = self._renderer.controls.first_in([prompt.text, text])
            if found is not None:
                return Refused(Reject.CONTROL_TOKEN, f"{found!r} in a text")
            return self.tokenizer(prompt.text, text, verbose=False)["input_ids"]
        if self.format == "text" or (self.format == "auto" and isinstance(prompt.content, str)):
            return _listed(self._renderer.whole_ids(f"{prompt.text}{self.separator}{text}"))
        if self.tokenizer.chat_template is None:
            raise SignalError(
                "the prompts are chat messages, and the reward model's tokenizer has no chat template; "
                "set chat_template to a Jinja file, or format: text"
            )
        options = given_options(prompt.given, self.omits)
        if not self.keep_tail:
            return _listed(self._renderer.whole_ids(dialogue(prompt, text), options))
        whole = self._renderer.whole_text(dialogue(prompt, text), options)
        if isinstance(whole, Refused):
            return whole
        return self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]


def dialogue(prompt: Prompt, text: str) -> list[dict[str, Any]]:
    """The prompt's messages (a text is one turn of the user), and ``text`` as the assistant's."""
    content = prompt.content
    turns = [{"role": "user", "content": content}] if isinstance(content, str) else [*content]
    return [*map(dict, turns), {"role": "assistant", "content": text}]


def _listed(ids: tuple[int, ...] | Refused) -> list[int] | Refused:
    return ids if isinstance(ids, Refused) else list(ids)


def _load(section: Any, tokenizer: Any) -> tuple[Any, int | None]:
    """The model, and the pad id its head was trained with, if it has one."""
    from transformers import AutoModelForSequenceClassification

    from prefopt.model.adapters import load_saved_adapter
    from prefopt.model.distributed import loaded_whole
    from prefopt.model.source import LOAD_ERRORS, first_line, resolve_source

    source = resolve_source(section.path, section.revision)
    if len(source.adapters) > 1:
        raise SignalError(
            f"signals reward_model.path = {section.path!r} is an adapter on an adapter; merge the inner one"
        )
    try:
        with loaded_whole():
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                source.name,
                revision=source.revision or "main",
                dtype=section.dtype,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
                **({"num_labels": 1} if source.adapters else {}),  # the head is in the adapter
            )
    except LOAD_ERRORS as error:
        raise SignalError(
            f"signals reward_model.path = {section.path!r}: cannot be loaded as a sequence classifier: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    model, info = loaded
    _refuse_other_models(section.path, model, info["missing_keys"], bool(source.adapters))
    if not source.adapters:
        return model, model.config.get_text_config().pad_token_id
    # Adapters are saved without the configuration; training took the tokenizer's pad token.
    return load_saved_adapter(model, source.adapters[0], trainable=False), tokenizer.pad_token_id


def _freeze(model: Any, device: str | None) -> None:
    from prefopt.model.frozen import default_device
    from prefopt.model.load import disable_dropout

    disable_dropout(model)
    model.requires_grad_(False)
    model.eval()
    model.to(default_device(device))


def _refuse_other_models(path: str, model: Any, missing: Sequence[str], adapter: bool) -> None:
    """Raises SignalError unless every weight came from a file, and there is one output."""
    where = f"signals reward_model.path = {path!r}"
    if missing and not adapter:
        raise SignalError(
            f"{where}: {sorted(missing)[:3]} are in no file and would be random: this is no reward model "
            "(a language model has no scoring head). Train one with stage: reward_model"
        )
    if model.config.num_labels != 1:
        raise SignalError(
            f"{where}: has {model.config.num_labels} outputs, a reward model has 1; which of them is the "
            "reward, nobody has said"
        )


def _longest_input(model: Any, tokenizer: Any) -> int:
    config = model.config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    return min([limit for limit in limits if limit and 0 < limit < _UNBOUNDED], default=_UNBOUNDED)


def _absent(rows: list[list[int]]) -> int:
    """The smallest id that no row holds: for a model that never learned to read a pad token."""
    used = {token for row in rows for token in row}
    return next(token for token in range(len(used) + 1) if token not in used)
