"""MT-Bench: 80 questions of two turns, every answer rated from 1 to 10 by a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt

from eval.base import (
    Conversation,
    Conversations,
    Decoding,
    Example,
    Judgment,
    Judgments,
    Question,
    ReadModels,
    Row,
    Summary,
    Template,
    missing_judgment,
)
from eval.registry import task
from eval.sources import columns, file_or_hub_rows, file_rows, keyed, package_file, require
from eval.statistics import clustered_mean, problem_counts
from eval.tasks._mt_bench_rows import (
    HIGHEST,
    LOWEST,
    TURNS,
    Rated,
    clusters,
    judged_twice,
    rated,
    rating_row,
    stored_identity,
    stored_rating,
)
from eval.tasks._mt_bench_template import judge_messages, load_template
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError, DataError

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7
"""Of a category that MT-Bench does not have, as FastChat samples it."""
_WITH_REFERENCE = {"math", "reasoning", "coding"}
_ORDER = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
_FIRST_ID, _PER_CATEGORY = 81, 10
_NUM_TURNS = 160


@task(
    "mt_bench",
    version="1",
    kind="judge",
    headline="average",
    source="Zheng et al. 2023, arXiv:2306.05685; lm-sys/FastChat@0e6d3e4, single-answer grading",
    data="the fastchat package, else hub HuggingFaceH4/mt_bench_prompts",
)
def mt_bench(
    *,
    data: str | None = None,
    reference: str | None = None,
    template: str | None = None,
    max_new_tokens: PositiveInt = 1024,
) -> MTBench:
    """Mean rating, 1 to 10, over both turns of all questions; also of each turn, and by category.

    A judge sees one answer at a time (the second with the first as context). An answer without a rating is left
    out and counted. The two turns of a question are not independent, so standard errors are clustered by
    question: sqrt(Q/(Q-1) Σ_q (s_q - m n_q)²) / Σ_q n_q, with s_q the sum and n_q the number of a question's
    ratings, m the mean of all. Sampling temperatures are MT-Bench's, by category.

    Args:
        data: file of questions (``question_id``, ``category``, ``turns``) in place of the package's or the hub's.
        reference: file of reference answers (``question_id``, ``choices``) for math, reasoning and coding;
            default: the installed fastchat package's. SimPO's, of gpt-4-1106-preview, correct mistakes of these.
        template: file of judge prompts in FastChat's shape (``judge_prompts.jsonl``); default: the installed
            fastchat package's, else our own. Published scores were made with FastChat's.
        max_new_tokens: longest answer of a turn.
    """
    loaded = load_template("tasks.mt_bench.template", template)
    return MTBench(data, reference, loaded, max_new_tokens)


class MTBench:
    """See `mt_bench`."""

    baseline: Literal["none", "required", "published"] = "none"
    judge_sampling: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": 2048}
    max_asks = 1

    def __init__(
        self, data: str | None, reference: str | None, template: Template, max_new_tokens: int
    ) -> None:
        self.data = data
        self.reference = reference
        self.template = template
        self.max_new_tokens = max_new_tokens

    def examples(self) -> list[Example]:
        """Raises: ConfigError if a question whose category is judged by reference has none."""
        questions = self._questions()
        references = self._references()
        examples = [_example(row, references) for row in questions.values()]
        missing = [
            each.key
            for each in examples
            if each.fields["category"] in _WITH_REFERENCE
            and len(each.fields["reference"]) < each.num_turns
        ]
        if missing:
            raise ConfigError(
                f"tasks.mt_bench.reference = {self.reference!r}: {len(missing)} questions of math, reasoning or "
                f"coding have no reference answer for every turn, e.g. {missing[0]}: they are judged by it. Give "
                "a file such as FastChat's reference_answer/gpt-4.jsonl, or install fschat"
            )
        return examples

    def decoding(self, example: Example) -> Decoding:
        temperature = TEMPERATURES.get(example.fields["category"], _OTHER_TEMPERATURE)
        return Decoding(self.max_new_tokens, temperature)

    def questions(
        self, example: Example, samples: Conversations, baseline: Conversations | None
    ) -> list[Question]:
        """One a turn. An answer that is not there is judged as an empty one."""
        answers = [answer.text for answer in samples[0]]
        turns = [example.fields["question"], *example.further_turns]
        kind = "single-math-v1" if example.fields["category"] in _WITH_REFERENCE else "single-v1"
        values = {"question": turns[0], "answer": answers[0]}
        for number, (turn, answer) in enumerate(zip(turns, answers, strict=True), 1):
            values |= {f"question_{number}": turn, f"answer_{number}": answer}
        for number, text in enumerate(example.fields["reference"], 1):
            values[f"ref_answer_{number}"] = text
        names = (kind, f"{kind}-multi-turn")[: example.num_turns]
        return [
            Question(turn, judge_messages(self.template, name, values))
            for turn, name in zip(TURNS, names, strict=False)
        ]

    def ask_again(self, question: Question, judgment: Judgment) -> Question | None:
        return None

    def baseline_answers(self, examples: Sequence[Example]) -> dict[str, list[Conversation]]:
        raise ConfigError("mt_bench: rates one model at a time: there is no baseline")

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        turns = {
            name: rated(missing_judgment(judgments, name), answer.problem)
            for name, answer in zip(TURNS, samples[0], strict=False)
        }
        return rating_row(example.key, example.fields["category"], turns)

    def summarise(self, rows: Sequence[Row]) -> Summary:
        ratings = {name: clusters(rows, (name,)) for name in TURNS}
        whole = clusters(rows, TURNS)
        if not whole:
            raise DataError("mt_bench: no answer has a rating")
        metrics = {"average": clustered_mean(whole)}
        metrics |= {name: clustered_mean(each) for name, each in ratings.items() if each}
        failed = Counter(reason for row in rows for reason in row.details["unrated"].values())
        counts = {
            "n": len(rows),
            "n_valid": int(sum(number for _, number in whole)),
            "n_failed_minus1": failed["no_rating"],
            **{
                f"n_{name}": number
                for name, number in sorted(failed.items())
                if name != "no_rating"
            },
            **problem_counts(rows),
        }
        return Summary(metrics, counts, _by_category(rows), self._notes(rows))

    def read(self, path: Path) -> dict[str, list[Row]]:
        """FastChat's judgment files; several models in one are told apart by name.

        A turn that is judged twice (two judges in one file) leaves that model without a number, and no other.
        """
        found: dict[str, dict[str, dict[str, Rated]]] = {}
        where: dict[tuple[str, str, str], RawRow] = {}
        twice: dict[str, list[tuple[RawRow, RawRow]]] = {}
        for raw in file_rows(path):
            model, key, turn = stored_identity(raw)
            questions = found.setdefault(model, {})
            if (model, key, turn) in where:
                twice.setdefault(model, []).append((where[model, key, turn], raw))
                continue
            where[model, key, turn] = raw
            questions.setdefault(key, {})[turn] = stored_rating(raw)
        categories = self._categories()
        unknown = [key for each in found.values() for key in each if key not in categories]
        if unknown and self.data is not None:
            raise DataError(f"{path}: question {unknown[0]} is not in tasks.mt_bench.data")
        rows = {
            model: [rating_row(key, categories.get(key), turns) for key, turns in questions.items()]
            for model, questions in found.items()
        }
        return ReadModels(rows, {model: judged_twice(model, each) for model, each in twice.items()})

    def _notes(self, rows: Sequence[Row]) -> tuple[str, ...]:
        notes = []
        present, expected = sum(len(row.details["turns"]) for row in rows), _NUM_TURNS
        if self.data is not None:
            expected = sum(len(_turns(row)) for row in self._questions().values())
        if present < expected:
            notes.append(
                f"{expected - present} of {expected} turns have no judgment: the mean is that of the others"
            )
        if odd := sum(row.details.get("disagreements", 0) for row in rows):
            notes.append(
                f"{odd} stored scores are not the rating in the judgment's text; the stored ones count"
            )
        outside = sum(
            not LOWEST <= rating <= HIGHEST
            for row in rows
            for turn in TURNS
            if (rating := row.values.get(turn)) is not None
        )
        if outside:
            notes.append(f"{outside} ratings are outside 1 to 10; they count, as published")
        return tuple(notes)

    def _questions(self) -> dict[str, RawRow]:
        package = package_file("fastchat", "llm_judge", "data", "mt_bench", "question.jsonl")
        path = self.data or (str(package) if package else None)
        rows = file_or_hub_rows(
            "tasks.mt_bench.data",
            path,
            repo="HuggingFaceH4/mt_bench_prompts",
            file="raw/question.jsonl",
        )
        return keyed(rows, lambda data: data.get("question_id"), "question", "question_id")

    def _references(self) -> dict[str, tuple[str, ...]]:
        package = package_file(
            "fastchat", "llm_judge", "data", "mt_bench", "reference_answer", "gpt-4.jsonl"
        )
        path = Path(self.reference).expanduser() if self.reference else package
        if path is None:
            return {}
        rows = keyed(
            file_rows(path), lambda data: data.get("question_id"), "reference answer", "question_id"
        )
        return {key: _reference(row) for key, row in rows.items()}

    def _categories(self) -> dict[str, str]:
        """By question: of the question file, else of MT-Bench's own numbering."""
        if self.data is not None:
            return {key: str(require(row, "category")) for key, row in self._questions().items()}
        return {
            str(_FIRST_ID + number): _ORDER[number // _PER_CATEGORY]
            for number in range(len(_ORDER) * _PER_CATEGORY)
        }


def _example(row: RawRow, references: Mapping[str, tuple[str, ...]]) -> Example:
    turns = _turns(row)
    key = str(require(row, "question_id"))
    fields = {
        "category": str(require(row, "category")),
        "question": turns[0],
        "reference": list(references.get(key, ())),
    }
    prompt = ({"role": "user", "content": turns[0]},)
    return Example(key, prompt, fields, tuple(turns[1:]))


def _reference(row: RawRow) -> tuple[str, ...]:
    try:
        turns = row.data["choices"][0]["turns"]
    except (LookupError, TypeError) as error:
        raise DataError(
            f"{row.where}: must hold choices[0].turns ({error!r}); its columns: {columns(row)}"
        ) from error
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise DataError(f"{row.where}: choices[0].turns must be a list of texts")
    return tuple(turns)


def _turns(row: RawRow) -> list[str]:
    turns = require(row, "turns", "prompt")
    if (
        not isinstance(turns, list)
        or not 1 <= len(turns) <= len(TURNS)
        or not all(isinstance(turn, str) for turn in turns)
    ):
        raise DataError(f"{row.where}: turns must be a list of one or two texts")
    return turns


def _by_category(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Micro averages, as the whole is."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "category" in row.details:
            groups.setdefault(row.details["category"], []).append(row)
    return {
        category: {"average": clustered_mean(ratings).value}
        for category, each in sorted(groups.items())
        if (ratings := clusters(each, TURNS))
    }
