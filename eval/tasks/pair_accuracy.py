"""Pair accuracy: how often the chosen side of a preference pair scores higher, and how sure of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from eval.base import Example, Metric, Row, Summary
from eval.calibration import (
    brier_scores,
    expected_calibration_error,
    log_losses,
    reliability_bins,
)
from eval.preference_data import (
    Format,
    column_map,
    held_out_sections,
    option_sections,
    pair_examples,
    response_text,
    scored_pairs,
)
from eval.registry import task
from eval.scorers import By, ColumnScorer, PairScorer, Scoring, open_scorer, pair_row
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.schema import ColumnMap, SourceSection

_NOT_PROBABLE = ("judge",)  # points and ratings: σ of their difference is no probability
_LENGTH_RATIOS = (0.5, 0.8, 1.25, 2.0)


@task(
    "pair_accuracy",
    version="1",
    kind="model",
    headline="accuracy",
    source="arXiv:2305.18290 (implicit reward), arXiv:2403.13787 (strict accuracy), arXiv:1706.04599 (ECE)",
    data="an option; for a run, the pairs of its data.eval",
)
def pair_accuracy(
    *,
    data: str | None = None,
    format: Format = "auto",
    columns: dict[str, str | None] | None = None,
    split: str | None = None,
    by: By = "auto",
    beta: PositiveFloat = 0.1,
    average: bool = False,
    max_length_tokens: PositiveInt | None = None,
    judge_mode: Literal["pairwise", "pointwise"] = "pairwise",
    judge_template: str | None = None,
    reward_model: dict[str, Any] | None = None,
) -> PairAccuracy:
    """Accuracy in percent over the pairs that could be scored: chosen strictly above rejected, ties are wrong.

    Beside it: ``tie_frac`` (percent); the mean ``margin``; ``ece`` (percent), ``brier`` (0 to 1) and
    ``log_loss`` (nats) of σ(margin) as the probability that the chosen side is better (not for a judge's
    points); ``longer_won``: percent of pairs of unequal length (characters) whose longer side scored higher,
    and ``longer_chosen``: percent whose longer side is the chosen one. Groups: reliability bins, accuracy by
    the ratio of lengths and by the gap of the data's own scores. A pair that training would refuse, or that
    is too long, is counted and not scored; nothing is cut.

    Args:
        data: file of pairs, or a hub data set; default: what the evaluated run held out (``data.eval``).
        format: as in a recipe's sources: ``text``, ``chat``, ``hh``, ``sharegpt``; ``auto`` goes by the first row.
        columns: as in a recipe's sources: ``{chosen: better, score_chosen: …}``.
        split: of a hub data set.
        by: ``logp`` and ``mean_logp``: MODEL's own log-prob, sum or mean over tokens. ``implicit_reward``:
            log-ratio to the baseline, else to the base under MODEL's adapter. ``reward_model``: MODEL is one.
            ``judge``: the judge's points; a win in both orders is 1, else a tie. ``score_columns``: scores
            that the file has. ``auto``: by what MODEL is, and by whether there is a reference.
        beta: multiplies log-probs and log-ratios: calibration reads σ(β·…), accuracy does not change. Set it to
            that of training.
        average: divide a log-ratio or log-prob by the number of tokens.
        max_length_tokens: longest prompt + response; default: the models' context.
        judge_mode: ``pairwise``: both orders; ``pointwise``: a rating from 1 to 10 for each side.
        judge_template: path of a template in place of ours; see `prefopt signals judge`.
        reward_model: further keys of the signal (`prefopt signals reward_model`): ``{keep_tail: true}``.
    """
    # Without data, columns still say what a file of scores calls them (`prefopt eval score`).
    sections = option_sections(
        "pair_accuracy", data, format=format, columns=columns if data else None, split=split
    )
    scoring = Scoring(
        "pair_accuracy",
        by,
        beta,
        average,
        max_length_tokens,
        judge_mode,
        judge_template,
        reward_model,
    )
    return PairAccuracy(sections, scoring, column_map("pair_accuracy", columns or {}))


class PairAccuracy:
    """See `pair_accuracy`."""

    batch_size = 64

    def __init__(
        self,
        sections: list[SourceSection] | None,
        scoring: Scoring,
        columns: ColumnMap,
    ) -> None:
        self.sections = sections
        self.scoring = scoring
        self.columns = columns

    @property
    def uses_baseline(self) -> bool:
        return self.scoring.by in ("auto", "implicit_reward")

    def adopt_run(self, recipe: Mapping[str, Any]) -> None:
        """Takes the held-out pairs of the evaluated run where no ``data`` was given."""
        if self.sections is None:
            self.sections = held_out_sections("pair_accuracy", recipe)

    def examples(self) -> list[Example]:
        if self.sections is None:
            raise ConfigError(
                "tasks.pair_accuracy.data is missing, and MODEL is no run with held-out pairs: give a file of "
                "pairs, tasks.pair_accuracy.data=PATH"
            )
        return pair_examples(self.sections)

    def open(self, models: Any) -> PairScorer:
        return open_scorer(models, self.scoring)

    def rows(self, examples: Sequence[Example], opened: PairScorer) -> list[Row]:
        scored = opened.score(examples)
        return [
            pair_row(example, each, opened.by, _details(example))
            for example, each in zip(examples, scored, strict=True)
        ]

    def close(self, opened: PairScorer) -> None:
        opened.close()

    def summarise(self, rows: Sequence[Row]) -> Summary:
        scored = [row for row in rows if row.values.get("accuracy") is not None]
        if not scored:
            raise DataError(
                f"pair_accuracy: none of {len(rows)} pairs could be scored: {problem_counts(rows)}"
            )
        right, margins = values_of(scored, "accuracy"), values_of(scored, "margin")
        ties = sum(margin == 0 for margin in margins)
        metrics = {
            "accuracy": mean_metric(right, 100),
            "tie_frac": Metric(100 * ties / len(scored)),
            "margin": mean_metric(margins),
            **_length_bias(scored),
        }
        by = str(scored[0].details.get("by"))
        groups = {**_by_length(scored), **_by_label_gap(scored)}
        if by not in _NOT_PROBABLE:
            metrics |= _calibration(margins)
            groups |= _reliability(margins)
        counts = {
            "n": len(rows),
            "n_scored": len(scored),
            "n_correct": int(sum(right)),
            "n_ties": ties,
            **problem_counts(rows),
        }
        return Summary(metrics, counts, groups, self._notes(by))

    def read(self, path: Path) -> dict[str, list[Row]]:
        """Pairs with a score for each side, by ``model`` where rows name one.

        The score columns are those of ``columns``, else the first usual names that the first row has
        (``score_chosen``/``score_rejected``, ``reward_…``, ``chosen_score``, …). Every pair with both scores
        counts, also one that training would refuse: the file has scored it.
        """
        found = scored_pairs(path, self.columns)
        return {model: self.rows(pairs, ColumnScorer()) for model, pairs in found.items()}

    def _notes(self, by: str) -> tuple[str, ...]:
        scoring = self.scoring
        if by in ("logp", "mean_logp", "implicit_reward"):
            per = "mean over tokens" if scoring.average or by == "mean_logp" else "sum over tokens"
            return (f"scores: {by}, {per}, β = {scoring.beta:g}",)
        if by == "judge":
            origin = scoring.judge_template or "prefopt's own template"
            return (f"scores: judge, {scoring.judge_mode}, {origin}",)
        return (f"scores: {by}",)


def _details(example: Example) -> dict[str, Any]:
    """Lengths in characters, None for a side that the file does not hold, and the data's own scores."""
    lengths = {
        f"{name}_chars": len(response_text(example.fields[name])) or None
        for name in ("chosen", "rejected")
    }
    return {**lengths, "scores": list(example.fields["scores"])}


def _calibration(margins: Sequence[float]) -> dict[str, Metric]:
    return {
        "ece": Metric(100 * expected_calibration_error(reliability_bins(margins))),
        "brier": mean_metric(brier_scores(margins)),
        "log_loss": mean_metric(log_losses(margins)),
    }


def _reliability(margins: Sequence[float]) -> dict[str, dict[str, float]]:
    return {
        f"confidence {each.low:.2f}-{each.high:.2f}": {
            "accuracy": 100 * each.accuracy,
            "confidence": 100 * each.confidence,
            "n": each.count,
        }
        for each in reliability_bins(margins)
    }


def _with_lengths(rows: Sequence[Row]) -> list[tuple[Row, int, int]]:
    """Rows whose two lengths are known."""
    found = []
    for row in rows:
        chosen, rejected = (row.details.get(f"{side}_chars") for side in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            found.append((row, int(chosen), int(rejected)))
    return found


def _length_bias(rows: Sequence[Row]) -> dict[str, Metric]:
    """Does length win? Ties of score count half."""
    unequal = [(row, c > r) for row, c, r in _with_lengths(rows) if c != r]
    if not unequal:
        return {}
    won = []
    for row, chosen_is_longer in unequal:
        margin = row.values["margin"] or 0.0
        won.append(0.5 if margin == 0 else float((margin > 0) == chosen_is_longer))
    return {
        "longer_won": mean_metric(won, 100),
        "longer_chosen": mean_metric([float(longer) for _, longer in unequal], 100),
    }


def _by_length(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Accuracy by length of chosen over length of rejected, characters."""
    edges = (0.0, *_LENGTH_RATIOS, float("inf"))
    groups: dict[str, list[float]] = {}
    for low, high in itertools.pairwise(edges):
        name = f"chosen/rejected length {low:g}-{high:g}"
        groups[name] = [
            row.values["accuracy"] or 0.0
            for row, c, r in _with_lengths(rows)
            if low <= c / r < high
        ]
    return {
        name: {"accuracy": 100 * float(np.mean(values)), "n": len(values)}
        for name, values in groups.items()
        if values
    }


def _by_label_gap(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Accuracy by how far apart the data's own scores are, about a third each; equal gaps stay together."""
    found = []
    for row in rows:
        chosen, rejected = row.details.get("scores") or (None, None)
        # where they are what is scored, they say nothing about it
        if chosen is not None and rejected is not None and row.details.get("by") != "score_columns":
            found.append((chosen - rejected, row.values["accuracy"] or 0.0))
    if not found:
        return {}
    gaps, right = np.asarray(found).T
    third = np.searchsorted(np.quantile(gaps, (1 / 3, 2 / 3)), gaps)
    groups = {}
    for number in np.unique(third):
        inside = third == number
        name = f"label gap {gaps[inside].min():g} to {gaps[inside].max():g}"
        groups[name] = {"accuracy": 100 * float(right[inside].mean()), "n": int(inside.sum())}
    return groups
