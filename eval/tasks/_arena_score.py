"""Arena-Hard's numbers from rows: win rates with bootstrap intervals, by category, with and without style."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eval.base import Metric, Row, Summary
from eval.bradley_terry import win_rate_interval
from eval.statistics import clustered_mean, problem_counts
from eval.style import (
    StyledBattle,
    StyledScore,
    StyleMethod,
    markdown_counts,
    pool,
    style_controlled,
)
from eval.tasks._arena_files import StoredAnswer
from prefopt.errors import ConfigError, DataError

_RESAMPLES = 100_000
"""The published 100 put 0.3 points of chance into each bound, which 100,000 draws of three numbers do not."""
_STYLE_RESAMPLES = 100
"""As published: each is a fit."""


class Styles:
    """Measures answers: ``[length, headers, list items, bold spans]``.

    Args:
        encoding: of tiktoken, for lengths that no file has counted.
        unit: what a length is counted in.
        option: what the user sets to change ``unit``; named in errors.
    """

    def __init__(self, encoding: str, unit: Literal["tokens", "characters"], option: str) -> None:
        self.encoding = encoding
        self.unit = unit
        self.option = option
        self._count: Callable[[str], int] | None = len if unit == "characters" else None

    def of(self, answer: StoredAnswer) -> list[int]:
        """A null answer has the style of an empty one."""
        text = answer.text or ""
        counted = answer.token_len if self.unit == "tokens" else None
        length = self.length(text) if counted is None else counted
        return [length, *(answer.counts or markdown_counts(text))]

    def length(self, text: str) -> int:
        """Raises: ConfigError if the tokenizer cannot be had."""
        if self._count is None:
            self._count = self._tokenizer()
        return self._count(text)

    def _tokenizer(self) -> Callable[[str], int]:
        try:
            import tiktoken

            encoding = tiktoken.get_encoding(self.encoding)
        except (ImportError, OSError, ValueError) as error:
            raise ConfigError(
                f"{self.option} = 'tokens': tiktoken's {self.encoding}, which the published lengths were counted "
                f"with, cannot be had ({error}). Install tiktoken and let it download once, or set "
                f"{self.option}=characters"
            ) from error
        return lambda text: len(encoding.encode(text, disallowed_special=()))


@dataclass(frozen=True)
class Scoring:
    """What an edition's numbers depend on beside rows."""

    categories: tuple[str, ...]
    """Reported apart; the first is the headline's."""
    percentiles: tuple[float, float]
    num_questions: int
    style: StyleMethod
    answers_option: str
    """Named in errors about styles."""


def arena_summary(
    rows: Sequence[Row], scoring: Scoring, others: Sequence[Sequence[Row]] | None
) -> Summary:
    """The numbers of one model.

    Args:
        others: rows of further models to fit style with; None without style control.

    Raises: DataError if no game of the model has a verdict.
    """
    headline = scoring.categories[0]
    by_category = _by_category(rows, headline)
    scored = {
        category: each
        for category, each in by_category.items()
        if any(row.values.get("score") is not None for row in each)
    }
    if not scored:
        raise DataError("no game has a verdict: there is no score")
    first = headline if headline in scored else next(iter(scored))
    metrics: dict[str, Metric] = {}
    groups: dict[str, dict[str, float]] = {}
    for category in (first, *(each for each in scored if each != first)):
        name = "score" if category == first else category
        metrics[name] = _win_rate(scored[category], scoring.percentiles)
        if others is not None:
            pooled = [_by_category(each, headline).get(category, []) for each in others]
            styled = _styled(scored[category], pooled, scoring)
            metrics |= _style_metrics(name, styled)
            groups[f"{name}: style coefficients"] = dict(styled.coefficients)
    if len(scored) > 1:
        groups |= {
            category: {"score": metrics["score" if category == first else category].value}
            for category in sorted(scored)
        }
    return Summary(metrics, _counts(rows), groups, _notes(rows, scoring, first, others))


def _win_rate(rows: Sequence[Row], percentiles: tuple[float, float]) -> Metric:
    """Percent. The standard error is clustered by question; the interval resamples battles, as published."""
    wins, losses, ties = (sum(row.details.get(name, 0) for row in rows) for name in _COUNTS)
    low, high = win_rate_interval(wins, losses, ties, percentiles=percentiles, resamples=_RESAMPLES)
    clusters = [_cluster(row) for row in rows]
    mean = clustered_mean(clusters, 100)
    return Metric(mean.value, mean.stderr, (100 * low, 100 * high))


_COUNTS = ("wins", "losses", "ties")


def _cluster(row: Row) -> tuple[float, float]:
    wins, losses, ties = (row.details.get(name, 0) for name in _COUNTS)
    return wins + ties / 2, wins + losses + ties


def _styled(rows: Sequence[Row], others: Sequence[Sequence[Row]], scoring: Scoring) -> StyledScore:
    mine = _styled_battles(rows)
    if not mine:
        raise DataError(
            f"style control: no judged question has both answers, the model's and the baseline's, in "
            f"{scoring.answers_option}"
        )
    pooled = [mine, *(battles for each in others if (battles := _styled_battles(each)))]
    return style_controlled(pool(pooled), scoring.style, _STYLE_RESAMPLES)


def _styled_battles(rows: Sequence[Row]) -> list[StyledBattle]:
    """Ordered by question: sums in floating point then do not depend on the order of rows."""
    found = []
    for row in sorted(rows, key=lambda row: row.key):
        style: Mapping[str, Sequence[float]] | None = row.details.get("style")
        if style is None:
            continue
        for name, points in zip(_COUNTS, (1.0, 0.0, 0.5), strict=True):
            if weight := row.details.get(name, 0):
                found.append(StyledBattle(points, weight, style["model"], style["baseline"]))
    return found


def _style_metrics(name: str, styled: StyledScore) -> dict[str, Metric]:
    low, high = styled.interval
    return {
        f"{name}_style_controlled": Metric(100 * styled.score, None, (100 * low, 100 * high)),
        f"{name}_equal_style": Metric(100 * styled.equal_style),
    }


def _by_category(rows: Sequence[Row], default: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(str(row.details.get("category") or default), []).append(row)
    return dict(sorted(found.items()))


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    battles = [sum(row.details.get(name, 0) for name in _COUNTS) for row in rows]
    return {
        "n": len(rows),
        "n_questions": sum(each > 0 for each in battles),
        "n_weighted": sum(battles),
        "n_unparsed_games": sum(row.details.get("unparsed", 0) for row in rows),
        **problem_counts(rows),
    }


def _notes(
    rows: Sequence[Row],
    scoring: Scoring,
    first: str,
    others: Sequence[Sequence[Row]] | None,
) -> tuple[str, ...]:
    notes = []
    present = sum(row.problem != "missing" for row in rows)
    if present < scoring.num_questions:
        notes.append(
            f"{scoring.num_questions - present} of {scoring.num_questions} questions have no row: the score is "
            "that of the others"
        )
    if first != scoring.categories[0]:
        notes.append(
            f"score is that of {first}: no question of {scoring.categories[0]} has a verdict"
        )
    if odd := sum(row.details.get("disagreements", 0) for row in rows):
        notes.append(
            f"{odd} games have a stored label that is not the one in their text; the stored one counts"
        )
    if others is None:
        return tuple(notes)
    unstyled = sum(
        row.values.get("score") is not None and row.details.get("style") is None for row in rows
    )
    if unstyled:
        notes.append(
            f"{unstyled} judged questions lack an answer's text: left out of style control"
        )
    if not others:
        notes.append(
            "style was fitted on this model's battles alone: the style-controlled score is the one at this "
            "model's own average style, and published ones, fitted with dozens of models, are not; equal_style is "
            "the one where both answers look alike"
        )
    return tuple(notes)
