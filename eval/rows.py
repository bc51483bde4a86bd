"""Rows: scored, stored, written for people and comparisons."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.base import Conversation, Example, Row
from eval.store import Store
from prefopt.report.bars import Bar
from prefopt.storage.cache import atomic_write

_ROWS_A_WRITE = 64


def score_rows(
    task: Any,
    examples: Sequence[Example],
    samples: Mapping[str, list[Conversation]],
    judged: Mapping[str, Mapping[str, Any]],
    store: Store,
) -> list[Row]:
    """A row an example; scoring may run programs for minutes, so rows are stored, too."""
    missing = [example for example in examples if example.key not in store]
    with Bar(
        total=len(examples), initial=len(examples) - len(missing), desc="score", unit="example"
    ) as bar:
        for start in range(0, len(missing), _ROWS_A_WRITE):
            batch = missing[start : start + _ROWS_A_WRITE]
            rows = [task.row(each, samples[each.key], judged.get(each.key, {})) for each in batch]
            store.add(map(_record, rows))
            bar.update(len(batch))
    return [row_from(store[example.key]) for example in examples]


def score_batches(task: Any, examples: Sequence[Example], opened: Any, store: Store) -> None:
    """Batches are cut by position; see `eval.generate.generate`."""
    size = task.batch_size
    done = sum(example.key in store for example in examples)
    with Bar(total=len(examples), initial=done, desc="score", unit="example") as bar:
        for start in range(0, len(examples), size):
            batch = examples[start : start + size]
            missing = sum(example.key not in store for example in batch)
            if missing:
                store.add(map(_record, task.rows(batch, opened)))
                bar.update(missing)


def _record(row: Row) -> dict[str, Any]:
    record = {"id": row.key, "values": dict(row.values), "details": dict(row.details)}
    return record | ({"problem": row.problem} if row.problem else {})


def row_from(record: Mapping[str, Any]) -> Row:
    return Row(record["id"], record["values"], record["details"], record.get("problem"))


def write_examples(
    path: Path,
    examples: Sequence[Example],
    rows: Sequence[Row],
    samples: Mapping[str, list[Conversation]] | None,
) -> None:
    """What people and comparisons read: a line an example, in the examples' order."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for example, row in zip(examples, rows, strict=True):
            line = {
                "key": row.key,
                "values": dict(row.values),
                "details": dict(row.details),
                "problem": row.problem,
                "prompt": _prompt_text(example),
                "answer": _answer_text(samples[example.key]) if samples else "",
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _prompt_text(example: Example) -> str:
    prompt = example.prompt
    first = prompt if isinstance(prompt, str) else "\n\n".join(str(m["content"]) for m in prompt)
    return "\n\n".join([first, *example.further_turns])


def _answer_text(samples: Sequence[Conversation]) -> str:
    """The first sample's answers, one after the other."""
    return "\n\n".join(answer.text for answer in samples[0]) if samples else ""


def count_answers(samples: Iterable[Sequence[Conversation]]) -> dict[str, int]:
    """Answers, tokens, how many were cut at their length limit, and those that are none, by reason."""
    counts = Counter(num_answers=0, num_tokens=0, num_cut=0)
    problems: Counter[str] = Counter()
    for answer in (answer for example in samples for turns in example for answer in turns):
        counts["num_answers"] += 1
        counts["num_tokens"] += answer.num_tokens or 0
        counts["num_cut"] += not answer.ended and not answer.problem
        problems.update([f"num_{answer.problem}"] if answer.problem else [])
    return {**counts, **dict(sorted(problems.items()))}
