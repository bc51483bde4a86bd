"""The user's own prompts, scored by any of the project's signals: the mean reward of a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from eval.base import Answer, Conversations, Decoding, Example, Judgments, Metric, Row, Summary
from eval.registry import task
from eval.sources import keyed, source_at, text_key
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.data.formats import Reading, prompt_reading, prompt_row
from prefopt.data.readers import RawRow
from prefopt.data.rows import Refused, column
from prefopt.data.sources import open_source, sound_rows, source_name
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.entries import Entry
from prefopt.recipe.load import import_plugin, validated
from prefopt.recipe.registry import BoundSignal
from prefopt.recipe.schema import ColumnMap, Section, SourceSection
from prefopt.recipe.scored_rows import columns_named, columns_read
from prefopt.signals.base import UnknownIds
from prefopt.signals.combine import WeightedSignals, build_signals
from prefopt.types import Candidates, Prompt

_WHERE = "tasks.signals.signals"


class _Entries(Section):
    signals: tuple[Annotated[BoundSignal, Entry("signals")], ...] = Field(strict=False)


@task(
    "signals",
    version="2",
    kind="generate",
    headline="reward",
    source="this project's: the reward of an online run, on any prompts",
    data="an option",
    whole_responses=True,
)
def signals(
    *,
    data: str,
    signals: list[dict[str, Any]],
    prompt: str = "prompt",
    system: str | None = None,
    id: str | None = None,
    format: Literal["auto", "text", "chat", "hh", "sharegpt"] = "auto",
    split: str | None = None,
    subset: str | None = None,
    samples: PositiveInt = 1,
    temperature: NonNegativeFloat = 1.0,
    max_new_tokens: PositiveInt = 512,
    plugins: Sequence[str] = (),
) -> Signals:
    """Mean of Σ weight · signal over prompts, in the reward's own units: what a reward-KL frontier plots.

    Every prompt counts once, however many samples it has; standard errors are over prompts. ``signals/NAME`` is
    a signal's own unweighted mean, ``length_tokens`` the mean length, ``ended`` the percentage of answers that
    end by themselves. A prompt that a signal cannot score is left out, and counted.

    Args:
        data: file, or hub data set, with a prompt a row; its other columns are what signals check against.
        signals: as a recipe's ``signals``: ``[{name: math, weight: 1.0, …}]``; `prefopt signals` lists them.
        prompt: column with the prompt: text or messages.
        system: column with a system message.
        id: column that identifies a row; default: a hash of the row.
        format: as a recipe's ``data.prompts.format``; ``chat`` makes a turn of a plain string.
        split: of a hub data set.
        subset: of a hub data set.
        samples: answers to each prompt.
        temperature: 1 samples what the model would say, so that the mean estimates its expected reward.
        max_new_tokens: longest answer.
        plugins: Python files that register signals of your own, as a recipe's ``plugins``.
    """
    problems = [text for plugin in plugins for text in _plugin_problems(plugin)]
    refused = {index: _problems(index, section) for index, section in enumerate(signals)}
    problems += [text for texts in refused.values() for text in texts]
    found = validated(_Entries, {"signals": list(signals)}, place=("tasks", "signals"))
    own = tuple(f"{_WHERE}.{index}." for index, texts in refused.items() if texts)
    problems += [text for text in found.problems if not text.startswith(own)]
    if not signals:
        problems.append(f"{_WHERE} is empty: name what scores, e.g. [{{name: math}}]")
    if problems or found.value is None:
        raise ConfigError(problems)
    columns = ColumnMap(prompt=prompt, system=system, id=id)
    read_by = {"split": split, "subset": subset, "format": format, "columns": columns}
    source = source_at("tasks.signals.data", path=data, **read_by)
    decoding = Decoding(max_new_tokens, temperature=temperature, num_samples=samples)
    return Signals(source, found.value.signals, decoding)


class Signals:
    """See `signals`. Models and processes of the signals start with the first answer, and end with `close`."""

    def __init__(
        self, source: SourceSection, entries: Sequence[BoundSignal], decoding: Decoding
    ) -> None:
        self.source = source
        self.entries = entries
        self.preset = decoding
        self._signals: WeightedSignals | None = None

    def examples(self) -> list[Example]:
        rows = list(sound_rows(open_source(self.source).rows()))
        if not rows:
            raise DataError(f"tasks.signals.data = {self.source.path!r}: holds no rows")
        reading = prompt_reading(self.source, rows[0])
        name = self.source.columns.id
        found = keyed(
            rows, lambda data: _hash(data) if name is None else data.get(name), "row", str(name)
        )
        return [self._example(key, row, reading) for key, row in found.items()]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        answers = [conversation[0] for conversation in samples]
        problem = next((answer.problem for answer in answers if answer.problem), None)
        if problem is not None:
            return Row(example.key, {"reward": None}, problem=problem)
        if self._signals is None:
            self._signals = build_signals(self.entries)
        asked = _candidates(example, answers, source_name(self.source))
        scored = self._signals.score([asked])[0]
        form = {
            "length_tokens": _mean(
                [float(a.num_tokens) for a in answers if a.num_tokens is not None]
            ),
            "ended": _mean([float(answer.ended) for answer in answers]),
        }
        parts = {f"signals/{name}": _mean(values) for name, values in scored.parts.items()}
        if scored.rewards is None:
            details = {"failure": scored.failure}
            problem = "no_signal" if scored.is_unjudged else "signal_failed"
            return Row(example.key, {"reward": None} | form, details, problem)
        return Row(example.key, {"reward": _mean(scored.rewards)} | parts | form)

    def summarise(self, rows: Sequence[Row]) -> Summary:
        rewards = values_of(rows, "reward")
        failures = Counter(row.details["failure"] for row in rows if "failure" in row.details)
        if not rewards:
            reasons = "; ".join(f"{count} × {reason}" for reason, count in failures.most_common(3))
            raise DataError(
                f"signals: no prompt of {len(rows)} has a reward"
                + (f": {reasons}" if reasons else f": {problem_counts(rows)}")
            )
        names = dict.fromkeys(name for row in rows for name in row.values)
        metrics: dict[str, Metric] = {}
        for name in names:
            if found := values_of(rows, name):
                metrics[name] = mean_metric(found, 100 if name == "ended" else 1)
        counts = {"n": len(rows), "n_scored": len(rewards), **problem_counts(rows)}
        notes = tuple(
            f"{count} prompts left out: {reason}" for reason, count in failures.most_common(5)
        )
        return Summary(metrics, counts, notes=notes)

    def _example(self, key: str, row: RawRow, reading: Reading) -> Example:
        found = prompt_row(row, reading)
        if isinstance(found, Refused):
            raise DataError(
                f"{row.where}: no prompt to answer: {found.reason}{f' ({found.detail})' if found.detail else ''}. "
                "Mend or remove the row"
            )
        for name in columns_read(self.entries, row.data, source_name(self.source)):
            column(row, name)  # a signal reads it: raises, naming the columns there are
        own, named = {reading.columns.prompt, reading.columns.system}, columns_named(self.entries)
        kept = {name: value for name, value in row.data.items() if name not in own or name in named}
        prompt = found.prompt if isinstance(found.prompt, str) else tuple(found.prompt)
        return Example(key, prompt, kept, options=found.options)

    def close(self) -> None:
        signals, self._signals = self._signals, None
        if signals is not None:
            signals.close()


_READS_PROMPT = (
    "reads the token ids of the prompt, which only the generating engine has; the tasks kl and pair_accuracy "
    "score by log-probs"
)
_PROMPT_IDS: Any = UnknownIds(f"{_WHERE}: a signal {_READS_PROMPT}")
_RESPONSE_IDS: Any = UnknownIds(
    f"{_WHERE}: a signal reads the token ids of an answer that came without them; only answers generated in this "
    "run have any"
)


def _candidates(example: Example, answers: Sequence[Answer], source: str) -> Candidates:
    prompt = example.prompt
    content = prompt if isinstance(prompt, str) else tuple(dict(message) for message in prompt)
    return Candidates(
        Prompt(
            example.key,
            _PROMPT_IDS,
            content,
            example.fields,
            given=example.options.given,
            source=source,
        ),
        tuple(answer.text for answer in answers),
        tuple(_RESPONSE_IDS if answer.ids is None else answer.ids for answer in answers),
        tuple(not answer.ended for answer in answers),
        tuple(answer.opened for answer in answers),
    )


def _plugin_problems(plugin: str) -> list[str]:
    """Imports a file of the user's; returns why it could not be."""
    path = Path(plugin).expanduser().resolve()
    where = f"tasks.signals.plugins = {plugin!r}"
    if path.suffix != ".py" or not path.is_file():
        return [f"{where}: no such Python file (looked at {path})"]
    try:
        import_plugin(path)
    except Exception as error:  # user code: whatever it raises, say which file raised it
        return [f"{where}: importing it raised {type(error).__name__}: {error}"]
    return []


def _problems(index: int, section: Mapping[str, Any]) -> list[str]:
    """What is wrong with one entry of ``signals``, a sentence each."""
    name = section.get("name")
    if not isinstance(name, str):
        return [
            f"{_WHERE}.{index}.name is missing: the signal's name; `prefopt signals` lists them"
        ]
    if name == "implicit_reward":
        return [f"{_WHERE}.{index}.name = {name!r}: {_READS_PROMPT}"]
    if name == "judge" and section.get("mode", "pairwise") == "pairwise":
        return [
            f"{_WHERE}.{index}.mode = 'pairwise': compares a model's answers with each other, so that "
            "their mean is 0.5 for every model. Set mode: pointwise, or run the task win_rate"
        ]
    return []


def _hash(data: Mapping[str, Any]) -> str:
    return text_key(json.dumps(data, sort_keys=True, default=str))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
