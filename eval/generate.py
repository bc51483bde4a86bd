"""Answers to a task's examples, each stored once: killed and started again, it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from eval.base import Answer, Conversation, Decoding, Example, Message
from eval.engines import Ask, Generator, answer_from, answer_record
from eval.store import Store
from prefopt.report.bars import Bar

_CHUNK = {"hf": 64, "vllm": 512, "vllm_server": 512}
"""Examples answered at a time, and then stored: enough to keep an engine busy, few enough to lose to a kill."""


def generate(
    generator: Generator,
    examples: Sequence[Example],
    decoding: Callable[[Example], Decoding],
    store: Store,
    *,
    task: str,
    seed: int,
    label: str,
) -> None:
    """Fills ``store`` with the answers to every example that it has none for yet.

    Chunks are cut by position, so that one that was cut short is answered again in the same company: then the
    arithmetic, and with it greedy near-ties, are those of a run that was never killed.
    Raises: EngineError; DataError if the store cannot be written.
    """
    size = _CHUNK[generator.section.name]
    chunks = [examples[start : start + size] for start in range(0, len(examples), size)]
    done = sum(example.key in store for example in examples)
    with Bar(total=len(examples), initial=done, desc=label, unit="example") as bar:
        for chunk in chunks:
            missing = sum(example.key not in store for example in chunk)
            if missing:
                store.add(_answer_chunk(generator, chunk, decoding, task, seed))
                bar.update(missing)


def conversations(store: Store, key: str) -> list[Conversation]:
    """The samples of one example."""
    return [tuple(map(answer_from, turns)) for turns in store[key]["samples"]]


class Samples(Mapping[str, list[Conversation]]):
    """The samples of every example of a store, unpacked when asked for: thousands at once would not fit."""

    def __init__(self, store: Store, keys: Sequence[str]) -> None:
        self._store = store
        self._keys = dict.fromkeys(keys)

    def __getitem__(self, key: str) -> list[Conversation]:
        if key not in self._keys:
            raise KeyError(key)
        return conversations(self._store, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def response_seed(seed: int, task: str, key: str, sample: int, turn: int) -> int:
    """A seed of its own for every response, the same whatever else is generated."""
    text = f"{seed}\0{task}\0{key}\0{sample}\0{turn}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def overridden(decoding: Decoding, changes: Mapping[str, Any]) -> Decoding:
    """The benchmark's preset with what the user set in its place."""
    return dataclasses.replace(decoding, **changes)


def _answer_chunk(
    generator: Generator,
    examples: Sequence[Example],
    decoding: Callable[[Example], Decoding],
    task: str,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Records of whole conversations: all first turns, then all second ones."""
    samples: dict[str, list[list[Answer]]] = {
        example.key: [[] for _ in range(decoding(example).num_samples)] for example in examples
    }
    for turn in range(max(example.num_turns for example in examples)):
        open_ = [
            (example, number, conversation)
            for example in examples
            if turn < example.num_turns
            for number, conversation in enumerate(samples[example.key])
        ]
        asks = [
            Ask(
                _prompt(example, conversation),
                decoding(example),
                (response_seed(seed, task, example.key, number, turn),),
                example.options,
            )
            for example, number, conversation in open_
        ]
        for (_, _, conversation), answers in zip(open_, generator.answer(asks), strict=True):
            conversation.append(answers[0])
    for key, found in samples.items():
        yield {"id": key, "samples": [[answer_record(a) for a in turns] for turns in found]}


def _prompt(example: Example, answers: Sequence[Answer]) -> str | tuple[Message, ...]:
    """The conversation so far, up to what is to be answered next."""
    if not answers:
        return example.prompt
    prompt = example.prompt
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    for answer, following in zip(answers, example.further_turns, strict=False):
        turns.append({"role": "assistant", "content": answer.text})
        turns.append({"role": "user", "content": following})
    return tuple(turns)
