"""What a benchmark is: examples, what to ask a model, what to ask a judge, a row an example, and a summary.

A task is one file below ``eval/tasks`` and one line in `eval.registry.TASKS`. It never generates, asks or
stores anything itself: the runner does, so that every task can be killed and gone on with. No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from prefopt.data.options import PLAIN, RenderOptions
from prefopt.errors import DataError

Message = Mapping[str, str]


@dataclass(frozen=True)
class Example:
    """One item of a benchmark."""

    key: str
    """Identifies it within the task, in every file of the run; never its position."""
    prompt: str | tuple[Message, ...]
    """Plain text (no template), or chat messages."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What scoring needs: the answer, the category, a pair's responses."""
    further_turns: tuple[str, ...] = ()
    """What the user says after each answer (MT-Bench's second turns)."""
    options: RenderOptions = PLAIN
    """What the prompt is rendered with beside its messages: tools, documents, what its source allows."""

    @property
    def num_turns(self) -> int:
        return 1 + len(self.further_turns)


@dataclass(frozen=True)
class Decoding:
    """How responses to one example are sampled: the benchmark's own preset unless told otherwise."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    num_samples: int = 1


@dataclass(frozen=True)
class Answer:
    """One response of a model."""

    text: str
    """Without special tokens; empty where there was no room to answer (``problem`` says so)."""
    num_tokens: int | None = None
    """None for a published response: nobody knows its tokenizer."""
    ended: bool = True
    """False: cut at ``max_new_tokens``."""
    ids: tuple[int, ...] | None = None
    """Token ids, the end token included; None for a published response."""
    problem: str | None = None
    """Why there is no answer (``prompt_too_long``, a `Reject`, ``null_response``); None if there is."""
    opened: str = ""
    """The mark that its prompt's rendering ended with (``<think>``), "" where it ended with none."""


Conversation = tuple[Answer, ...]
"""The answers to one example's turns, in order: one sample."""
Conversations = Sequence[Conversation]
"""The samples of one example."""


@dataclass(frozen=True)
class Question:
    """Something to ask a judge about one example."""

    id: str
    """Unique within the example: ``game_1``, ``turn_2``."""
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Judgment:
    """What the judge said to one `Question`."""

    text: str
    """Without what it thought; empty where it never left its thinking."""
    finish_reason: str | None = None
    top_logprobs: Mapping[str, float] = field(default_factory=dict)
    """Log-probs, nats, of the likeliest first tokens, where the endpoint was asked for them."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: str | None = None
    """Why the endpoint refused the request; its text is then empty."""


Judgments = Mapping[str, Judgment]
"""What the judge said about one example, by question id."""


@dataclass(frozen=True)
class Row:
    """The result of one example: what `Task.summarise` reads, and what comparisons pair by key."""

    key: str
    values: Mapping[str, float | None] = field(default_factory=dict)
    """Numbers by name; the headline's per-example value first, higher is better. None: there is none."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that the summary needs beside numbers: verdicts, lengths, the category."""
    problem: str | None = None
    """Why (part of) it could not be scored, in words that are counted: ``no_verdict``, ``null_response``."""


@dataclass(frozen=True)
class Metric:
    """One number of a result, in the unit its benchmark publishes (percent unless the task says otherwise)."""

    value: float
    stderr: float | None = None
    """Standard error over examples, same unit."""
    interval: tuple[float, float] | None = None
    """Confidence interval, where the benchmark defines one (a bootstrap); level in the task's docs."""


@dataclass(frozen=True)
class Summary:
    """The result of a task."""

    metrics: Mapping[str, Metric]
    counts: Mapping[str, int]
    """How many examples, and how many of them by problem: nothing is dropped without a count."""
    groups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Values by category: ``{"math": {"average": 3.2}}``."""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the numbers: files used, rows aligned by key, a splitter in place of
    another."""


@dataclass(frozen=True)
class Template:
    """A judge prompt, and where it comes from: never unsaid in a result."""

    name: str
    origin: str
    """``prefopt`` for our own, else the package or file that published it."""
    texts: Mapping[str, str]
    """Its parts by name (``system``, ``prompt``, …)."""

    @property
    def sha256(self) -> str:
        joined = "\0".join(f"{name}\0{text}" for name, text in sorted(self.texts.items()))
        return hashlib.sha256(joined.encode()).hexdigest()


class Task(Protocol):
    """What every task has. Options were bound when the task was made."""

    def examples(self) -> list[Example]:
        """All examples, in a fixed order, keys unique.

        Raises: DataError naming file and line; ConfigError if the data is not to be had, saying where from.
        """
        ...

    def summarise(self, rows: Sequence[Row]) -> Summary:
        """The numbers of one model from its rows, whatever their order.

        Raises: DataError if they cannot give a number (none left, calibration for other examples).
        """
        ...


class GenerationTask(Task, Protocol):
    """A task whose model answers in text."""

    def decoding(self, example: Example) -> Decoding:
        """The published preset for this example."""
        ...

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        """Scores one example. ``judgments`` are empty unless the task is a `JudgedTask`."""
        ...


@runtime_checkable
class JudgedTask(GenerationTask, Protocol):
    """A generation task that asks a judge.

    ``baseline``: ``none``; ``required``: the run's ``--baseline``; ``published``: the benchmark's own baseline
    answers, from `baseline_answers`, unless the run names a ``--baseline``.
    """

    baseline: Literal["none", "required", "published"]
    template: Template
    judge_sampling: Mapping[str, Any]
    """Fields of the request as published (``temperature``, ``max_tokens``, ``logprobs``, …)."""
    max_asks: int
    """Times an answer without a verdict is asked for, as the benchmark defines."""

    def questions(
        self, example: Example, samples: Conversations, baseline: Conversations | None
    ) -> list[Question]:
        """What to ask about this example; nothing for one that needs no judge (it is then scored without)."""
        ...

    def ask_again(self, question: Question, judgment: Judgment) -> Question | None:
        """The question once more, with whatever the benchmark adds, if ``judgment`` has no verdict; else None.

        Its id must be that of ``question``: the later answer takes the earlier one's place.
        """
        ...

    def baseline_answers(self, examples: Sequence[Example]) -> dict[str, list[Conversation]]:
        """The published baseline's answers by example key; only called if ``baseline`` is ``published``."""
        ...


@runtime_checkable
class ModelTask(Task, Protocol):
    """A task that reads log-probs or rewards of models instead of generating. See `eval.models.Models`."""

    batch_size: int
    """Examples scored (and then stored) at a time."""

    @property
    def uses_baseline(self) -> bool:
        """Does a ``--baseline`` change its numbers? Where not, results with and without one compare."""
        ...

    def open(self, models: Any) -> Any:
        """Loads what scoring needs from ``models`` (`eval.models.Models`); returns what `rows` is given."""
        ...

    def rows(self, examples: Sequence[Example], opened: Any) -> list[Row]:
        """A row for each example of one batch, in order."""
        ...

    def close(self, opened: Any) -> None:
        """Frees what `open` loaded. May be called after a failure."""
        ...


@runtime_checkable
class Adopting(Protocol):
    """A task that can take its examples from the run it evaluates."""

    def adopt_run(self, recipe: Mapping[str, Any]) -> None:
        """Takes the held-out data of the run's recipe where no data was given. Called before `Task.examples`."""
        ...


@runtime_checkable
class Closing(Protocol):
    """A task that holds processes or models while it scores."""

    def close(self) -> None:
        """Frees them. Called once, after the last row or a failure."""
        ...


@runtime_checkable
class Readable(Task, Protocol):
    """A task that can read published annotation, judgment or response files: `prefopt eval score`."""

    def read(self, path: Path) -> dict[str, list[Row]]:
        """Rows by model name; a file that names no model has the one name ``""``. See also `ReadModels`.

        A task of kind ``generate`` is also given the marks of the thinking in these responses (`Tags`).

        Aligned by key, never by position. Missing rows, duplicates and null responses are counted where they
        matter (``Row.problem`` or the summary's counts and notes), never dropped in silence.
        Raises: DataError naming file, line and key.
        """
        ...


class ReadModels(dict[str, list[Row]]):
    """Rows by model of a file in which the rows of some models contradict each other: the others can be scored.

    Args:
        rows: of each model, of a contradicted one those that stand.
        broken: what is wrong, by model; it must be raised where that model's rows are wanted.
    """

    def __init__(self, rows: Mapping[str, list[Row]], broken: Mapping[str, DataError]) -> None:
        super().__init__(rows)
        self.broken = dict(broken)


def close_task(task: object) -> None:
    """Frees what a task holds, if it holds anything."""
    if isinstance(task, Closing):
        task.close()


def missing_judgment(judgments: Mapping[str, Judgment], question_id: str) -> Judgment:
    """The judgment, or an empty one where the question was never asked."""
    return judgments.get(question_id, Judgment(""))
