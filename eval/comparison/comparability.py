"""May two results be compared? What decides a number must be equal; of the rest, differences are said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from eval.comparison.outputs import Output, TaskResult, measured_by
from eval.registry import get_task, task_names
from prefopt.errors import ConfigError

_HASH = re.compile(r"[0-9a-f]{32,}")
_READING_OPTIONS = {"data", "format", "columns", "split", "subset", "id", "template"}
"""Say where examples and templates come from: their content is hashed, so another path is no difference."""
_SPEED_OPTIONS = {"batch_size", "num_workers"}


@dataclass(frozen=True)
class Mismatch:
    """Something that differs between the results of one task, or between whole results."""

    task: str | None
    what: str
    values: Mapping[str, str]
    """By result, as shown."""

    def __str__(self) -> str:
        by_value: dict[str, list[str]] = {}
        for name, value in self.values.items():
            by_value.setdefault(value, []).append(name)
        listed = ", ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())
        return f"{f'{self.task}: ' if self.task else ''}{self.what} differs: {listed}"


def mismatches(task: str, outputs: Sequence[Output]) -> list[Mismatch]:
    """What makes the results of one task different measurements: to be refused.

    Version, examples, decoding, judge (model, sampling, prompt), the other side of the comparison, what is
    measured, options.
    """
    results = {output.name: output.tasks[task] for output in outputs}
    found = [
        Mismatch(task, what, values)
        for what, read in _DECIDING
        if _differ(values := {name: _shown(read(result)) for name, result in results.items()})
    ]
    measures = {output.name: _shown(measured_by(output, task)) for output in outputs}
    if _differ(measures):
        found.append(Mismatch(task, "what the scores are", measures))
    data = {result.made.get("data_hash") for result in results.values()}
    limits = {output.name: _shown(output.head.get("limit")) for output in outputs}
    # A limit above the number of examples changes nothing; the examples' hash tells.
    if _differ(limits) and (len(data) > 1 or None in data):
        found.append(Mismatch(task, "--limit", limits))
    return [*found, *_option_mismatches(task, results)]


def remarks(task: str, outputs: Sequence[Output]) -> list[Mismatch]:
    """What differs and should hardly move a number, or differs by right: the models' own chat templates."""
    templates = {o.name: _shown(o.tasks[task].made.get("chat_template_hash")) for o in outputs}
    found = {"the chat template": templates}
    if all(
        o.tasks[task].kind == "model" and not o.tasks[task].made.get("baseline") for o in outputs
    ):
        # Without a --baseline, KL and implicit rewards are measured from the base under the adapter.
        found["the base under the adapter"] = {o.name: _shown(_base(o)) for o in outputs}
    return [Mismatch(task, what, values) for what, values in found.items() if _differ(values)]


def _base(output: Output) -> str | None:
    model = output.head.get("model") or {}
    return model.get("base") if model.get("adapters") else None


def head_remarks(outputs: Sequence[Output]) -> list[Mismatch]:
    """As `remarks`, of whole results: engine, dtype, seed, versions of packages."""
    reads: list[tuple[str, Callable[[Mapping[str, Any]], Any]]] = [
        ("the engine", lambda head: (head.get("engine") or {}).get("name")),
        ("the engine's dtype", lambda head: (head.get("engine") or {}).get("dtype")),
        ("engine.options", lambda head: (head.get("engine") or {}).get("options") or {}),
        ("the seed", lambda head: head.get("seed")),
    ]
    packages = sorted({name for output in outputs for name in output.head.get("versions") or {}})
    reads += [
        (f"the version of {name}", lambda head, name=name: (head.get("versions") or {}).get(name))
        for name in packages
    ]
    return [
        Mismatch(None, what, values)
        for what, read in reads
        if _differ(values := {output.name: _shown(read(output.head)) for output in outputs})
    ]


def refuse(found: Sequence[Mismatch]) -> None:
    """Raises: ConfigError listing every mismatch, with every value."""
    if found:
        raise ConfigError(
            [
                f"{each}. Evaluate again with the same, or add --force to compare all the same, marked"
                for each in found
            ]
        )


_DECIDING: tuple[tuple[str, Callable[[TaskResult], Any]], ...] = (
    ("the task's version", lambda result: result.version),
    ("the headline metric", lambda result: result.headline),
    ("the hash of the examples", lambda result: result.made.get("data_hash")),
    ("the hash of the decoding settings", lambda result: result.made.get("decoding_hash")),
    (
        "the hash of the judge's template",
        lambda result: (result.made.get("template") or {}).get("sha256"),
    ),
    ("the judge", lambda result: (result.made.get("judge") or {}).get("model")),
    ("the judge's sampling", lambda result: (result.made.get("judge") or {}).get("sampling")),
    ("the hash of the task's own configuration", lambda result: result.made.get("config_hash")),
    ("the baseline", lambda result: result.made.get("baseline")),
)


def _option_mismatches(task: str, results: Mapping[str, TaskResult]) -> Iterator[Mismatch]:
    options = {name: result.made.get("options") or {} for name, result in results.items()}
    given = {key for each in options.values() for key in each}
    defaults = _defaults(task) if given else {}
    for key in sorted(given - _READING_OPTIONS - _SPEED_OPTIONS):
        values = {
            name: _shown(_moved(each.get(key, defaults.get(key)))) for name, each in options.items()
        }
        if _differ(values):
            yield Mismatch(task, f"tasks.{task}.{key}", values)


def _defaults(task: str) -> dict[str, Any]:
    """What an option is where it was not given; results hold only what was."""
    if task not in task_names():  # lm-evaluation-harness's, or of a plugin
        return {}
    return {key: default for key, (_, default) in get_task(task).fields.items()}


def _moved(value: Any) -> Any:
    """A path without its folder: files may lie elsewhere on another machine."""
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def _differ(values: Mapping[str, str]) -> bool:
    return len(set(values.values())) > 1


def _shown(value: Any) -> str:
    """``none``, text as it is, JSON else; never shortened: values must not look alike that are not.

    Hashes are cut to 16 digits, which no two share by chance.
    """
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return _HASH.sub(lambda match: match[0][:16], text)
