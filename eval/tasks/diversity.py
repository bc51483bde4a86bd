"""Diversity: how much a policy repeats itself, within the samples of one prompt and over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from eval.base import Conversations, Decoding, Example, Judgments, Metric, Row, Summary
from eval.preference_data import Format, TaskPrompts, option_sections
from eval.registry import task
from eval.sources import file_rows, text_key
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError, DataError

_ORDERS = (1, 2, 3)
_RESPONSE_COLUMNS = ("responses", "samples", "response", "output", "completion", "answer")
_PROMPT_COLUMNS = ("prompt", "instruction", "question")
_MODEL_COLUMNS = ("model", "generator", "model_id")
_KEY_COLUMNS = ("id", "key", "question_id")


@task(
    "diversity",
    version="1",
    whole_responses=True,
    kind="generate",
    headline="distinct_2",
    source="arXiv:1510.03055 (distinct-n), arXiv:1802.01886 (self-BLEU), arXiv:2305.14718 (A-LoL)",
    data="an option; for a run, the prompts of its data.eval",
)
def diversity(
    *,
    data: str | None = None,
    format: Format = "auto",
    columns: dict[str, str | None] | None = None,
    split: str | None = None,
    samples: Annotated[int, Field(ge=1)] = 4,
    temperature: NonNegativeFloat = 1.0,
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
    max_new_tokens: PositiveInt = 512,
    self_bleu_responses: PositiveInt = 100,
) -> Diversity:
    """Distinct n-grams in percent, self-BLEU (0 to 100, lower is more diverse), length and endings of samples.

    Words are what white space separates, case kept. ``distinct_n``: different n-grams over all n-grams of all
    responses; ``distinct_n_alol``: over all *words*, as A-LoL's code divides. Both fall as responses get longer
    or more: compare like with like. ``prompt_distinct_n``: `distinct_n` of one prompt's samples, mean over
    prompts; ``sequence_diversity`` (0 to 3): the sum over n of a response's own `distinct_n`, mean (A-LoL's
    reward). ``self_bleu``: of each sample against the others of its prompt, mean; ``corpus_self_bleu``: the same
    among responses drawn from all prompts. ``eos_rate`` (percent), ``length_tokens``, ``length_words``.

    Args:
        data: file of prompts or pairs, or a hub data set; default: the prompts of what the run held out.
        format: as in a recipe's sources.
        columns: as in a recipe's sources.
        split: of a hub data set.
        samples: responses a prompt; within-prompt numbers need 2.
        temperature: of sampling.
        top_p: of sampling.
        max_new_tokens: longest response.
        self_bleu_responses: how many responses ``corpus_self_bleu`` draws (its cost grows with the square).
    """
    sections = option_sections("diversity", data, format=format, columns=columns, split=split)
    decoding = Decoding(max_new_tokens, temperature, top_p, num_samples=samples)
    return Diversity(TaskPrompts("diversity", sections), decoding, self_bleu_responses)


class Diversity:
    """See `diversity`."""

    def __init__(self, prompts: TaskPrompts, decoding: Decoding, self_bleu_responses: int) -> None:
        self.prompts = prompts
        self.preset = decoding
        self.self_bleu_responses = self_bleu_responses

    def adopt_run(self, recipe: Mapping[str, Any]) -> None:
        self.prompts.adopt_run(recipe)

    def examples(self) -> list[Example]:
        return self.prompts.rows.examples

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        answers = [sample[0] for sample in samples]
        given = [answer for answer in answers if answer.problem is None]
        problem = next((answer.problem for answer in answers if answer.problem), None)
        tokens = [answer.num_tokens for answer in given]
        ended = [answer.ended for answer in given]
        return _row(example.key, [answer.text for answer in given], tokens, ended, problem)

    def summarise(self, rows: Sequence[Row]) -> Summary:
        texts = {row.key: list(row.details["responses"]) for row in rows}
        responses = [text for each in texts.values() for text in each]
        if not any(text.split() for text in responses):
            raise DataError(f"diversity: no row has a response: {problem_counts(rows)}")
        metrics = {**corpus_distinct(responses)}
        for name in (*(f"prompt_distinct_{n}" for n in _ORDERS), "self_bleu"):
            if values := values_of(rows, name.replace("prompt_", "")):
                metrics[name] = mean_metric(values, 100 if "distinct" in name else 1)
        metrics["sequence_diversity"] = mean_metric([*map(sequence_diversity, responses)])
        if (drawn := self._drawn(texts)) and len(drawn) > 1:
            metrics["corpus_self_bleu"] = mean_metric(self_bleu(drawn))
        metrics |= _lengths(rows, responses)
        counts = {
            "n": len(rows),
            "n_responses": len(responses),
            "n_empty": sum(not text.split() for text in responses),
            **problem_counts(rows),
            **self.prompts.refused_counts(),
        }
        return Summary(metrics, counts)

    def read(self, path: Path) -> dict[str, list[Row]]:
        """Rows with ``response`` (or ``output``, …; a list: ``responses``), by ``model`` or ``generator``.

        Rows of one key or prompt are its samples; a row with neither stands for itself. Where rows say
        ``ended`` or ``finish_reason``, the EOS rate is known.
        """
        by_model: dict[str, dict[str, list[RawRow]]] = {}
        for raw in file_rows(path):
            model = str(_first(raw, _MODEL_COLUMNS) or "")
            by_model.setdefault(model, {}).setdefault(_key_of(raw), []).append(raw)
        return {
            model: [_published(key, raws) for key, raws in groups.items()]
            for model, groups in by_model.items()
        }

    def _drawn(self, texts: Mapping[str, list[str]]) -> list[str]:
        """Responses by the hash of their prompt's key and number: the same ones whatever the order of rows."""
        places = [(key, number) for key, each in texts.items() for number in range(len(each))]
        places.sort(key=lambda place: text_key(f"{place[0]}\0{place[1]}"))
        chosen = [texts[key][number] for key, number in places]
        return [text for text in chosen if text.split()][: self.self_bleu_responses]


def corpus_distinct(responses: Iterable[str]) -> dict[str, Metric]:
    """``distinct_n`` and ``distinct_n_alol``, percent, n = 1, 2, 3, over all responses together.

    distinct_n = |different n-grams| / number of n-grams (Li et al. 2016); A-LoL divides by the number of words
    for every n (abaheti95/LoL-RL, utils/utils.py; there words end at every single space). N-grams never cross
    from one response into the next. 0 where there is no n-gram.
    """
    different, totals = _count_ngrams(responses)
    metrics = {}
    for n in _ORDERS:
        metrics[f"distinct_{n}"] = Metric(100 * different[n] / max(1, totals[n]))
        metrics[f"distinct_{n}_alol"] = Metric(100 * different[n] / max(1, totals[1]))
    return metrics


def sequence_diversity(response: str) -> float:
    """Σ_n distinct_n of this response alone, in [0, 3]; an n without n-grams adds 0 (A-LoL's reward)."""
    words = response.split()
    return sum(
        len(set(_ngrams(words, n))) / (len(words) - n + 1) for n in _ORDERS if len(words) >= n
    )


def self_bleu(responses: Sequence[str]) -> list[float]:
    """BLEU-4 of each response against all others as references, 0 to 100: sacrebleu's sentence BLEU.

    Tokenizer 13a, exponential smoothing, effective order (a response shorter than four words is judged by the
    n-grams it has). Source: Zhu et al. 2018 (Texygen), arXiv:1802.01886.
    Raises: ConfigError without sacrebleu.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ConfigError(
            'diversity: self-BLEU needs sacrebleu: pip install "prefopt[eval]"'
        ) from error
    bleu = BLEU(effective_order=True)
    return [
        bleu.sentence_score(text, [*responses[:index], *responses[index + 1 :]]).score
        for index, text in enumerate(responses)
    ]


def _count_ngrams(responses: Iterable[str]) -> tuple[dict[int, int], dict[int, int]]:
    """How many different n-grams, and how many in all, for n = 1, 2, 3.

    In arrays: sets of tuples of words would take a gigabyte for 10,000 long responses. An n-gram is a number
    made of that of its first n - 1 words (renumbered from 0 each time, so that nothing overflows) and its last.
    """
    vocabulary: dict[str, int] = {}
    ids: list[int] = []
    left: list[int] = []  # words from here to the end of the response
    for response in responses:
        words = response.split()
        ids += [vocabulary.setdefault(word, len(vocabulary)) for word in words]
        left += range(len(words), 0, -1)
    word, remaining = np.array(ids, np.int64), np.array(left, np.int64)
    starts, prefix = np.arange(len(word)), np.zeros(len(word), np.int64)
    different, totals = {}, {}
    for n in _ORDERS:
        inside = remaining[starts] >= n
        starts = starts[inside]
        codes = prefix[inside] * len(vocabulary) + word[starts + n - 1]
        unique, prefix = np.unique(codes, return_inverse=True)
        different[n], totals[n] = len(unique), len(starts)
    return different, totals


def _ngrams(words: Sequence[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(n)), strict=False)


def _row(
    key: str,
    texts: list[str],
    tokens: Sequence[int | None],
    ended: Sequence[bool | None],
    problem: str | None,
) -> Row:
    """One prompt's samples; values are fractions and BLEU within the prompt."""
    spoken = [text for text in texts if text.split()]
    values: dict[str, float | None] = dict.fromkeys((f"distinct_{n}" for n in (2, 1, 3)), None)
    values["self_bleu"] = None
    if len(spoken) > 1:
        distinct = corpus_distinct(spoken)
        values |= {name: distinct[name].value / 100 for name in values if name in distinct}
        values["self_bleu"] = float(np.mean(self_bleu(spoken)))
    details = {"responses": texts, "tokens": list(tokens), "ended": list(ended)}
    return Row(key, values, details, problem or (None if spoken else "empty_response"))


def _lengths(rows: Sequence[Row], responses: Sequence[str]) -> dict[str, Metric]:
    """Lengths and endings, as far as they are known."""
    tokens = [count for row in rows for count in row.details["tokens"] if count is not None]
    ended = [float(end) for row in rows for end in row.details["ended"] if end is not None]
    metrics = {"length_words": mean_metric([len(text.split()) for text in responses])}
    if tokens:
        metrics["length_tokens"] = mean_metric(tokens)
    if ended:
        metrics["eos_rate"] = mean_metric(ended, 100)
    return metrics


def _published(key: str, raws: Sequence[RawRow]) -> Row:
    """The samples of one prompt from a file; a null response is none, and counted."""
    texts: list[str] = []
    ended: list[bool | None] = []
    problem = None
    for raw in raws:
        column = next((name for name in _RESPONSE_COLUMNS if name in raw.data), None)
        if column is None:
            raise DataError(
                f"{raw.where}: no response ({', '.join(_RESPONSE_COLUMNS)}); it has {', '.join(raw.data)}"
            )
        value = raw.data[column]
        for text in value if isinstance(value, list) else [value]:
            if text is None:
                problem = "null_response"
                continue
            if not isinstance(text, str):
                raise DataError(f"{raw.where}: {column}: a response must be text, this is {text!r}")
            texts.append(text)
            ended.append(_ended(raw))
    return _row(key, texts, [None] * len(texts), ended, problem)


def _ended(raw: RawRow) -> bool | None:
    if isinstance(raw.data.get("ended"), bool):
        return raw.data["ended"]
    reason = raw.data.get("finish_reason")
    return None if reason is None else reason != "length"


def _key_of(raw: RawRow) -> str:
    key = _first(raw, _KEY_COLUMNS)
    if key is not None:
        return str(key)
    prompt = _first(raw, _PROMPT_COLUMNS)
    return raw.where if prompt is None else text_key(str(prompt))


def _first(raw: RawRow, names: Sequence[str]) -> Any:
    return next((raw.data[name] for name in names if raw.data.get(name) is not None), None)
