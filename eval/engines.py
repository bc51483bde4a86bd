"""An engine for a saved policy, and the one renderer before it: conversations in, answers out."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.base import Answer, Decoding, Message
from eval.models import asked, run_condition
from prefopt.data.options import PLAIN, RenderOptions
from prefopt.data.render import Renderer
from prefopt.data.render import Request as ToRender
from prefopt.data.rows import Refused
from prefopt.engines.base import Completion, Engine, Request, SamplingSpec
from prefopt.engines.start import Task, start_engine
from prefopt.errors import ModelError
from prefopt.model.end_tokens import end_token_ids, saved_end_ids
from prefopt.model.load import load_tokenizer
from prefopt.model.source import resolve_source
from prefopt.recipe.schema import EngineSection, ModelSection
from prefopt.storage.packed import pack_ids, unpack_ids

logger = logging.getLogger("prefopt.eval")

PROMPT_TOO_LONG = "prompt_too_long"
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Ask:
    """One prompt to answer: a seed a sample."""

    prompt: Prompt
    decoding: Decoding
    seeds: tuple[int, ...]
    options: RenderOptions = PLAIN


class Generator:
    """Answers prompts with one policy; its engine runs from `start` on.

    Args:
        policy: what answers; an adapter stays on its base, unmerged.
        section: the engine.
        device: of an ``hf`` engine.
        log_dir: where servers write what they have to say.

    Raises: ModelError for a tokenizer that is not there.
    """

    def __init__(
        self, policy: ModelSection, section: EngineSection, *, device: str, log_dir: Path
    ) -> None:
        self.policy = policy
        self.section = section
        self.device = device
        self.log_dir = log_dir
        self.tokenizer: Any = load_tokenizer(policy)
        self.renderer = Renderer(self.tokenizer)
        # A policy that was trained with rewards in its prompts is asked for the target of its run.
        self.condition = run_condition(policy.path)
        self.context: int | None = None
        """Longest prompt + response in tokens, once started; None: no limit known."""
        self._engine: Engine | None = None
        self._longest = 0

    @property
    def chat_template_sha256(self) -> str | None:
        """Of the chat template in force, and of the reward that is written into prompts; None without either."""
        text, condition = self.tokenizer.chat_template, self.condition
        if text is None and condition is None:
            return None
        said = str(text) if condition is None else f"{text}\n{condition!r}"
        return hashlib.sha256(said.encode()).hexdigest()

    def prompt_tokens(self, prompt: Prompt, options: RenderOptions = PLAIN) -> int | None:
        """Length of a prompt; None where it cannot be rendered."""
        ids = self.prompt_ids(prompt, options)
        return None if ids is None else len(ids)

    def prompt_ids(self, prompt: Prompt, options: RenderOptions = PLAIN) -> tuple[int, ...] | None:
        """What the policy is asked, a target reward written in; None where it cannot be rendered."""
        ids = self._ids(prompt, options)
        return None if isinstance(ids, Answer) else ids

    def start(self, longest: int) -> None:
        """Starts the engine for prompts + answers of up to ``longest`` tokens, or the model's context.

        One that runs with less room than that is started again.
        """
        if self.section.fixed_context and longest > self._longest:
            self.close()
        if self._engine is None:
            self._longest = longest
            task = Task(
                self.policy,
                pad_id=self.tokenizer.pad_token_id or 0,
                max_model_len=longest,
                device=self.device,
                log_dir=self.log_dir,
            )
            self._engine, self.context = start_engine(self.section, task)

    def answer(self, asks: Sequence[Ask]) -> list[list[Answer]]:
        """For each ask, in order, an answer a seed.

        A prompt that leaves less room than ``max_new_tokens`` gets what there is; one without room, or that
        cannot be rendered (`Reject`), gets an empty answer that says so.
        Raises: EngineError; ModelError for messages without a chat template.
        """
        results: list[list[Answer]] = [[] for _ in asks]
        calls: dict[SamplingSpec, list[tuple[int, Request]]] = {}
        for index, ask in enumerate(asks):
            ids = self._ids(ask.prompt, ask.options)
            room = 0 if isinstance(ids, Answer) else self._room(len(ids))
            if isinstance(ids, Answer) or room < 1:
                problem = (
                    ids if isinstance(ids, Answer) else Answer("", 0, False, None, PROMPT_TOO_LONG)
                )
                results[index] = [problem] * len(ask.seeds)
                continue
            decoding = replace(ask.decoding, max_new_tokens=min(ask.decoding.max_new_tokens, room))
            calls.setdefault(self.spec(decoding), []).append((index, Request(ids, ask.seeds)))
        for spec, numbered in calls.items():
            answers = self.sample([request for _, request in numbered], spec)
            for (index, _), group in zip(numbered, answers, strict=True):
                results[index] = group
        return results

    def sample(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[Answer]]:
        """The answers to prompts that are token ids already, of one sampling. Raises: EngineError."""
        assert self._engine is not None, "start() comes first"
        found = self._engine.generate(requests, spec)
        return [
            self._answers(group, self.renderer.opened_by(request.prompt_ids))
            for request, group in zip(requests, found, strict=True)
        ]

    def spec(self, decoding: Decoding) -> SamplingSpec:
        """How the engine samples: ``decoding``, up to what ends a turn, a text, or the model's own generation."""
        return SamplingSpec(
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            stop_token_ids=self._ends,
        )

    @functools.cached_property
    def _ends(self) -> tuple[int, ...]:
        source = resolve_source(self.policy.path, self.policy.revision)
        return end_token_ids(self.tokenizer, saved_end_ids(source.from_the_top))

    def close(self) -> None:
        """Frees the engine. May be called twice."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _room(self, num_prompt_tokens: int) -> int:
        return 10**9 if self.context is None else self.context - num_prompt_tokens

    def _ids(self, prompt: Prompt, options: RenderOptions) -> tuple[int, ...] | Answer:
        content = asked(prompt, self.condition)
        try:
            request = ToRender(content, (), options=when_asked(options))
            (found,) = self.renderer.render_batch([request])
        except ModelError as error:
            raise ModelError(
                f"{self.policy.path!r} has no chat template, and this task asks in chat messages. Evaluate an "
                "instruction-tuned model, or name a Jinja file: model.chat_template=FILE"
            ) from error
        if isinstance(found, Refused):
            logger.warning("a prompt cannot be rendered: %s: %s", found.reason, found.detail)
            return Answer("", 0, False, None, str(found.reason))
        return found.prompt_ids

    def _answers(self, group: Sequence[Completion], opened: str) -> list[Answer]:
        texts = self.tokenizer.batch_decode([list(c.ids) for c in group], skip_special_tokens=True)
        return [
            Answer(text, len(c.ids), c.stop_reason == "eos", c.ids, opened=opened)
            for text, c in zip(texts, group, strict=True)
        ]


def when_asked(options: RenderOptions) -> RenderOptions:
    """Of a prompt that is answered now: what earlier answers thought, templates leave out by design."""
    return replace(options, omits="history") if options.omits == "nothing" else options


def answer_record(answer: Answer) -> dict[str, Any]:
    """An answer as JSON; see `answer_from`."""
    ids = None if answer.ids is None else pack_ids(answer.ids)
    record = {"text": answer.text, "tokens": answer.num_tokens, "ended": answer.ended, "ids": ids}
    said = {"problem": answer.problem, "opened": answer.opened}
    return record | {name: value for name, value in said.items() if value}


def answer_from(record: Mapping[str, Any]) -> Answer:
    """The answer of a record."""
    ids = record.get("ids")
    return Answer(
        record["text"],
        record["tokens"],
        record["ended"],
        None if ids is None else unpack_ids(ids),
        record.get("problem"),
        record.get("opened", ""),
    )
