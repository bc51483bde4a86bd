"""IFEval: prompts with instructions that a program can check, followed strictly or loosely."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from eval.base import Conversations, Decoding, Example, Judgments, Row, Summary
from eval.registry import task
from eval.responses import answer_of, answered
from eval.statistics import clustered_mean, mean_metric, problem_counts, values_of
from eval.tasks._ifeval_files import Item, Response, items_of, read_responses
from prefopt.errors import DataError
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags
from prefopt.signals.constraint_checks import NEEDS_LANGUAGE
from prefopt.signals.instructions import SENTENCES, Instruction, instruction
from prefopt.signals.language import SEED, detector_factory
from prefopt.signals.sentences import Splitter, punkt_splitter, split_sentences

Sentences = Literal["rules", "punkt"]


@task(
    "ifeval",
    version="2",
    kind="generate",
    headline="prompt_strict",
    source="Zhou et al. 2023, arXiv:2311.07911; checks as published by google-research",
    data="hub google/IFEval",
)
def ifeval(
    *,
    data: str | None = None,
    sentences: Sentences = "rules",
    max_new_tokens: PositiveInt = 1280,
) -> Ifeval:
    """Accuracies in percent: prompts with all instructions followed, and instructions, strict and loose.

    Loose: followed by the response, or by it without its first or last line, both, or asterisks. Standard errors
    of the instruction level let the instructions of a prompt depend on each other. Needs langdetect, seeded
    (``prefopt[eval]``). The published checker counts a random letter for the two prompts that ask for ``#`` and
    ``!``; here those are counted.

    Args:
        data: file with columns ``key``, ``prompt``, ``instruction_id_list`` and ``kwargs`` in place of the hub's.
        sentences: ``rules``: ends of sentences by fixed rules, the same everywhere. ``punkt``: nltk's trained
            model, as the published checker; its data must be installed.
        max_new_tokens: longest answer; 1280 is lm-evaluation-harness's.
    """
    return Ifeval(data, sentences, max_new_tokens)


class Ifeval:
    """See `ifeval`."""

    def __init__(self, data: str | None, sentences: Sentences, max_new_tokens: int) -> None:
        self.data = data
        self.sentences = sentences
        self.preset = Decoding(max_new_tokens)

    def examples(self) -> list[Example]:
        items = items_of(self.data)
        self._require({each.id for item in items for each in item.instructions})
        return [
            Example(
                item.key,
                ({"role": "user", "content": item.prompt},),
                {"instructions": [[each.id, dict(each.arguments)] for each in item.instructions]},
            )
            for item in items
        ]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        answer = samples[0][0]
        instructions = [instruction(id, given) for id, given in example.fields["instructions"]]
        return _row(example.key, instructions, answer.text, answer.problem, self._split())

    def summarise(self, rows: Sequence[Row]) -> Summary:
        scored = [row for row in rows if row.values.get("prompt_strict") is not None]
        if not scored:
            raise DataError("ifeval: no row has a response to score")
        metrics = {}
        for reading in ("strict", "loose"):
            verdicts = [row.details[reading] for row in scored]
            metrics[f"prompt_{reading}"] = mean_metric(values_of(scored, f"prompt_{reading}"), 100)
            metrics[f"inst_{reading}"] = clustered_mean(
                [(sum(each), len(each)) for each in verdicts], 100
            )
        counts = {
            "n": len(scored),
            "num_instructions": sum(len(row.details["instructions"]) for row in scored),
            **problem_counts(rows),
        }
        return Summary(metrics, counts, _families(scored), self._notes(rows, scored))

    def read(self, path: Path, thinking: Tags = DEFAULT_TAGS) -> dict[str, list[Row]]:
        """Files of responses: columns ``response`` and ``prompt`` (or ``key``), ``model`` where there are several.

        lm-evaluation-harness's samples are read as such rows.
        What a prompt instructs is read from its own row if that has ``instruction_id_list`` and ``kwargs``, else
        from ``tasks.ifeval.data``, else from a file ``input_data*.jsonl`` beside this one, else from the hub.
        A null response follows nothing; a prompt without a row is counted and not scored.
        """
        found = read_responses(path, self.data)
        items = (each.item for responses in found.values() for each in responses)
        self._require({each.id for item in items for each in item.instructions})
        split = self._split()
        return {
            model: [
                _missing(each.item) if each.missing else _published(each, split, thinking)
                for each in responses
            ]
            for model, responses in found.items()
        }

    def _require(self, ids: set[str]) -> None:
        """Fails before anything is generated or scored if what these checks need is not installed."""
        self._split()
        if ids & NEEDS_LANGUAGE:
            detector_factory()

    def _split(self) -> Splitter:
        return punkt_splitter() if self.sentences == "punkt" else split_sentences

    def _notes(self, rows: Sequence[Row], scored: Sequence[Row]) -> tuple[str, ...]:
        ids = {id for row in scored for id in row.details["instructions"]}
        notes = [
            f"instructions from {source}"
            for source in sorted(
                {str(row.details["source"]) for row in scored if "source" in row.details}
            )
        ]
        if SENTENCES in ids:
            how = {
                "rules": "by rule (the published checker: nltk's Punkt model, which tasks.ifeval.sentences=punkt "
                "takes where its data is installed)",
                "punkt": "by nltk's Punkt model, as by the published checker",
            }
            notes.append(f"sentences are counted {how[self.sentences]}")
        if ids & NEEDS_LANGUAGE:
            notes.append(f"languages are told by langdetect {version('langdetect')}, seed {SEED}")
        if missing := len(rows) - len(scored):
            notes.append(
                f"{missing} of {len(rows)} prompts have no response: not scored; responses are aligned by prompt "
                "or key"
            )
        return tuple(notes)


def _row(
    key: str,
    instructions: Sequence[Instruction],
    text: str,
    problem: str | None,
    split: Splitter,
    source: str | None = None,
) -> Row:
    """The verdicts of one response; one that is not there, or empty, follows nothing and is counted."""
    strict = [each.follows(text, split) for each in instructions]
    # Loose includes strict: its first variant is the response as it is.
    loose = [
        followed or each.follows_loosely(text, split)
        for followed, each in zip(strict, instructions, strict=True)
    ]
    values = {
        "prompt_strict": float(all(strict)),
        "inst_strict": sum(strict) / len(strict),
        "prompt_loose": float(all(loose)),
        "inst_loose": sum(loose) / len(loose),
    }
    details: dict[str, Any] = {
        "instructions": [each.id for each in instructions],
        "strict": strict,
        "loose": loose,
    }
    if source is not None:
        details["source"] = source
    if problem is None and not text.strip():
        problem = "empty_response"
    return Row(key, values, details, problem)


def _published(response: Response, split: Splitter, thinking: Tags) -> Row:
    item = response.item
    answer = answered(answer_of(response.text, item.where), thinking)
    return _row(
        item.key, item.instructions, answer.text, answer.problem, split, source=response.source
    )


def _missing(item: Item) -> Row:
    names = ("prompt_strict", "inst_strict", "prompt_loose", "inst_loose")
    return Row(item.key, dict.fromkeys(names), problem="missing_response")


def _families(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Instruction-level accuracies in percent by what stands before the colon of an instruction's id."""
    found: dict[str, list[tuple[bool, bool]]] = {}
    for row in rows:
        details = row.details
        for id, strict, loose in zip(
            details["instructions"], details["strict"], details["loose"], strict=True
        ):
            found.setdefault(id.split(":")[0], []).append((strict, loose))
    return {
        family: {
            "inst_strict": 100 * sum(strict for strict, _ in verdicts) / len(verdicts),
            "inst_loose": 100 * sum(loose for _, loose in verdicts) / len(verdicts),
            "num_instructions": len(verdicts),
        }
        for family, verdicts in sorted(found.items())
    }
