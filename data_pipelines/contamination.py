"""Prompts that an evaluation also asks: they share a run of words with one of its examples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from data_pipelines.sketch import hash64
from data_pipelines.words import ngrams, num_words, words
from prefopt.data.rows import Refused, Reject
from prefopt.errors import ConfigError, DataError, suggest
from prefopt.recipe.schema import PathText, Section, SourceSection
from prefopt.recipe.yaml_file import Document, KeyPath

_TEMPLATE_FRAC = 0.1
"""A run of words that so many examples of a set share is its template (an instruction), not a question."""
_TEMPLATE_LEAST = 5


class EvalSet(Section):
    """Prompts that must not be trained on."""

    task: str | None = None
    """A task of `prefopt eval`, e.g. gsm8k: `prefopt eval list`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the task, e.g. `{data: test.jsonl}` for a file in place of the hub's."""
    path: PathText | None = None
    """Or a file, directory, glob or hub data set."""
    split: str | None = None
    """Split of a hub data set."""
    column: str = "prompt"
    """Column of `path` that holds the prompt, as text or chat messages."""

    @property
    def name(self) -> str:
        return self.task or str(self.path)


class Decontamination(Section):
    """Which evaluations, and what counts as overlap."""

    against: Annotated[tuple[str | EvalSet, ...], Field(strict=False, min_length=1)]
    """Names of `prefopt eval` tasks, or `{task, options}`, or `{path, column}`."""
    ngram_words: PositiveInt = 13
    """A prompt that shares a run of this many words with an example is dropped; examples that are shorter count
    where a prompt is the same words and no more. Two characters of a script without spaces count as one word.
    13 is GPT-3's (arXiv:2005.14165, appendix C)."""

    @property
    def sets(self) -> list[EvalSet]:
        return [EvalSet(task=each) if isinstance(each, str) else each for each in self.against]

    def problems(self, document: Document, path: KeyPath) -> list[str]:
        """Unknown tasks and their options; sets that name neither or both."""
        from eval.registry import get_task, option_problems, task_names

        found = []
        for number, each in enumerate(self.sets):
            where = f"{document.origin((*path, 'against', number))}against.{number}"
            if (each.task is None) == (each.path is None):
                found.append(f"{where}: name a task or a path, and one of them")
            elif each.task is not None and each.task not in task_names():
                found.append(
                    f"{where} = {each.task!r}: no task of `prefopt eval`; {suggest(each.task, task_names())} For "
                    "a file write {path: FILE}"
                )
            elif each.task is not None:
                found += [
                    f"{where}: {p}" for p in option_problems(get_task(each.task), each.options)
                ]
        return found


class Contamination:
    """Runs of words of every example, to look prompts up in.

    Args:
        settings: sets and length of a run.

    Raises: ConfigError, DataError for a set that cannot be read.
    """

    def __init__(self, settings: Decontamination) -> None:
        self.size = settings.ngram_words
        self._runs: dict[int, str] = {}
        self._short: dict[int, str] = {}
        self.hashes: dict[str, str] = {}
        """SHA-256 of each set's prompts, by name."""
        for each in settings.sets:
            self._add(each)

    def found(self, text: str) -> str | None:
        """The name of an evaluation that asks this prompt, too."""
        tokens = words(text)
        whole = self._short.get(hash64(" ".join(tokens)))
        if whole is not None or num_words(tokens) < self.size:
            return whole
        runs = map(hash64, ngrams(tokens, self.size))
        return next((self._runs[run] for run in runs if run in self._runs), None)

    def _add(self, each: EvalSet) -> None:
        digest = hashlib.sha256()
        counts: Counter[int] = Counter()
        num_prompts = 0
        for text in eval_prompts(each):
            num_prompts += 1
            digest.update(f"{text}\0".encode())
            tokens = words(text)
            if num_words(tokens) < self.size:
                if tokens:
                    self._short.setdefault(hash64(" ".join(tokens)), each.name)
                continue
            counts.update(set(map(hash64, ngrams(tokens, self.size))))
        most = max(_TEMPLATE_LEAST, _TEMPLATE_FRAC * num_prompts)
        for run, count in counts.items():
            if count < most:
                self._runs.setdefault(run, each.name)
        self.hashes[each.name] = digest.hexdigest()


def eval_prompts(each: EvalSet) -> Iterator[str]:
    """The texts of an evaluation's prompts: of a dialogue, what the user says.

    Raises: ConfigError, DataError for data that is not there.
    """
    if each.task is not None:
        from eval.registry import make_task

        task = make_task(each.task, each.options)
        if not hasattr(task, "examples"):
            raise ConfigError(
                f"decontaminate: {each.task!r} has no prompts of its own; name a path instead"
            )
        for example in task.examples():
            yield _text(example.prompt)
        return
    from data_pipelines.reading import source_rows

    section = SourceSection.model_validate(
        {"path": each.path, "split": each.split, "columns": {"prompt": each.column}}
    )
    for row in source_rows([section], pairs=False):
        if not isinstance(row.found, Refused):
            yield _text(row.found.prompt)
        elif row.found.reason is Reject.BROKEN_TEXT:  # what cannot be read would not be looked for
            raise DataError(f"{row.raw.where}: {row.found.detail}. Mend or remove the row")


def _text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return prompt
    turns: Iterable[Any] = (m["content"] for m in prompt if m.get("role") == "user")
    return "\n".join(str(turn) for turn in turns)
