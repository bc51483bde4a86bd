"""lm-evaluation-harness's result object as ours: metrics, counts, groups, and a line an example."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np

from eval.base import Metric, Summary
from eval.provenance import digest
from prefopt.errors import DataError

_RATES = {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1"}
_NO_FILTER = "none"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_DECODING = ("output_type", "num_fewshot", "repeats", "generation_kwargs")


@dataclass(frozen=True)
class HarnessResult:
    """One task or group."""

    name: str
    version: str
    """The task's own."""
    headline: str
    """The metric that the task lists first."""
    direction: Literal["higher", "lower", "none"]
    summary: Summary
    lines: list[str]
    """Of ``examples.jsonl``."""
    data_hash: str
    """Of documents and targets, without prompts: chat templates may differ between models."""
    decoding: list[dict[str, Any]]
    """How its tasks are asked, each way once."""
    config_hash: str
    """Of the task files as lm_eval resolved them."""


def harness_entries(name: str, raw: Mapping[str, Any]) -> list[HarnessResult]:
    """The results of what was asked for: one, or one a task where ``name`` has no numbers of its own.

    Tags, and groups that do not aggregate, stand for their tasks.
    Raises: DataError if there are no numbers.
    """
    if _metrics(raw["results"].get(name, {})):
        return [_result(name, raw)]
    found = [_result(task, raw) for task in raw["samples"] if _metrics(raw["results"][task])]
    if not found:
        raise DataError(f"lm_eval:{name}: lm-evaluation-harness computed no metric")
    return found


def _result(name: str, raw: Mapping[str, Any]) -> HarnessResult:
    tasks = _leaves(name, raw)
    metrics = _metrics(raw["results"][name])
    headline = next(iter(metrics))
    better = raw["higher_is_better"].get(name, {}).get(headline.split(",")[0])
    samples = {task: _by_document(raw["samples"][task]) for task in tasks}
    effective = sum(raw["n-samples"][task]["effective"] for task in tasks)
    original = sum(raw["n-samples"][task]["original"] for task in tasks)
    counts = {"n": effective} | ({"n_total": original} if original != effective else {})
    configs = [raw["configs"][task] for task in tasks]
    return HarnessResult(
        name=name,
        version=str(raw["versions"].get(name)),
        headline=headline,
        direction="none" if better is None else "higher" if better else "lower",
        summary=Summary(metrics, counts, _groups(name, raw)),
        lines=_lines(name, samples, list(metrics)),
        data_hash=_data_hash(samples),
        decoding=_decoding(configs),
        config_hash=digest(json.loads(_ADDRESS.sub("", json.dumps(configs, default=str)))),
    )


def _leaves(name: str, raw: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, or the task itself."""
    if name in raw["samples"]:
        return [name]
    children = raw["group_subtasks"].get(name, [])
    return list(dict.fromkeys(task for child in children for task in _leaves(child, raw)))


def _metrics(entry: Mapping[str, Any]) -> dict[str, Metric]:
    """``{"acc": …, "exact_match,strict-match": …}`` from ``{"acc,none": …, "acc_stderr,none": …}``.

    Rates in percent, everything else as lm_eval reports it.
    """
    found: dict[str, Metric] = {}
    for key, value in entry.items():
        metric, comma, filter_ = key.partition(",")
        number = _number(value)
        if not comma or metric.endswith("_stderr") or number is None:
            continue
        scale = 100.0 if metric in _RATES or metric.endswith("_acc") else 1.0
        error = _number(entry.get(f"{metric}_stderr,{filter_}"))
        stderr = None if error is None else error * scale
        found[_metric_name(metric, filter_)] = Metric(number * scale, stderr)
    return found


def _metric_name(metric: str, filter_: str) -> str:
    return metric if filter_ == _NO_FILTER else f"{metric},{filter_}"


def _groups(name: str, raw: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of everything below a group."""
    below: list[str] = list(raw["group_subtasks"].get(name, []))
    for child in below:  # grows: groups hold groups
        below += [each for each in raw["group_subtasks"].get(child, []) if each not in below]
    return {
        child: {metric: each.value for metric, each in _metrics(raw["results"][child]).items()}
        for child in below
    }


def _by_document(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """A document's samples, one a filter, by the hash of the document: its number is no key.

    Equal documents are told apart by how many there were before.
    """
    keys: dict[int, str] = {}
    seen: Counter[str] = Counter()
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        number = sample["doc_id"]
        if number not in keys:
            key = str(sample["doc_hash"])[:16]
            seen[key] += 1
            keys[number] = key if seen[key] == 1 else f"{key}#{seen[key]}"
        found.setdefault(keys[number], []).append(sample)
    return found


def _lines(
    name: str, samples: Mapping[str, Mapping[str, list[Mapping[str, Any]]]], metrics: list[str]
) -> list[str]:
    """A line of JSON a document, the headline's value first."""
    lines = []
    for task, documents in samples.items():
        for key, filtered in documents.items():
            values = {
                _metric_name(metric, sample["filter"]): number
                for sample in filtered
                for metric in sample["metrics"]
                if (number := _number(sample[metric])) is not None
            }
            line = {
                "key": key if task == name else f"{task}/{key}",
                "values": {each: values[each] for each in metrics if each in values},
                "details": {"task": task, "target": str(filtered[0]["target"])},
                "problem": None,
                "prompt": _prompt(filtered[0]),
                "answer": _answer(filtered[0]),
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines


def _prompt(sample: Mapping[str, Any]) -> str:
    return str(sample["arguments"][0][0])


def _answer(sample: Mapping[str, Any]) -> str:
    """What the model said, or the continuation it found likeliest; empty where there was no choice."""
    first = sample["resps"][0][0]
    if isinstance(first, str):
        return first
    scores = [each[0][0] for each in sample["resps"] if isinstance(each[0], tuple | list)]
    if len(scores) != len(sample["arguments"]) or len(scores) < 2:
        return ""
    return str(sample["arguments"][scores.index(max(scores))][1]).strip()


def _data_hash(samples: Mapping[str, Mapping[str, list[Mapping[str, Any]]]]) -> str:
    sha = hashlib.sha256()
    for task, documents in samples.items():
        for filtered in documents.values():
            item = [task, filtered[0]["doc_hash"], filtered[0]["target_hash"]]
            sha.update(json.dumps(item).encode() + b"\n")
    return sha.hexdigest()


def _decoding(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each way of asking once, with the number of tasks asked that way."""
    ways = Counter(
        json.dumps({name: config.get(name) for name in _DECODING}, sort_keys=True, default=str)
        for config in configs
    )
    return [{**json.loads(way), "tasks": count} for way, count in ways.items()]


def _number(value: Any) -> float | None:
    """None for what is no number: "N/A", or the pair that a perplexity is made of."""
    return float(value) if isinstance(value, Real | np.bool_) else None
