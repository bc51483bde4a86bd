"""Which words give the chosen side away: log-odds with an informative Dirichlet prior."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_pipelines.card.findings import Check, Section, TableView, grade, judged
from data_pipelines.card.pairs import PairView
from data_pipelines.words import words

_SIZES = (1, 2, 3)
_PRIOR = 1_000.0
"""Size of the prior in n-grams: what a side's counts must outweigh."""
_LEAST = 20
_SHOWN = 15
_GIVEAWAY_SIDES, _GIVEAWAY_RATIO = 0.05, 3.0


@dataclass(frozen=True)
class LogOdds:
    """One n-gram: how much likelier it is in chosen sides, in standard errors (``z``), with its counts."""

    text: str
    z: float
    chosen: int
    rejected: int


def log_odds(
    chosen: Mapping[str, int], rejected: Mapping[str, int], *, prior: float, least: int = 1
) -> list[LogOdds]:
    """Every n-gram with ``least`` occurrences by its z-score, most over-represented in chosen first.

    With counts y_i of n_i n-grams on side i, and prior counts a = prior · (y_1 + y_2) / (n_1 + n_2),

        δ = log[(y_1 + a) / (n_1 + prior - y_1 - a)] - log[(y_2 + a) / (n_2 + prior - y_2 - a)]
        z = δ / sqrt(1 / (y_1 + a) + 1 / (y_2 + a))

    Source: Monroe, Colaresi and Quinn 2008, Fightin' Words, Political Analysis 16(4): eq. 16 (the log-odds
    ratio), 20 (its variance) and 22 (z), with the prior of section 3.5.1 in proportion to all text.
    """
    total_1, total_2 = sum(chosen.values()), sum(rejected.values())
    grams = chosen.keys() | rejected.keys()
    found = []
    for text in grams if len(grams) > 1 else ():  # one alone has no odds against others
        count_1, count_2 = chosen.get(text, 0), rejected.get(text, 0)
        if count_1 + count_2 < least:
            continue
        a = prior * (count_1 + count_2) / (total_1 + total_2)
        odds_1 = (count_1 + a) / (total_1 + prior - count_1 - a)  # a > 0, and less than all
        odds_2 = (count_2 + a) / (total_2 + prior - count_2 - a)
        error = math.sqrt(1 / (count_1 + a) + 1 / (count_2 + a))
        found.append(LogOdds(text, (math.log(odds_1) - math.log(odds_2)) / error, count_1, count_2))
    return sorted(found, key=lambda each: (-each.z, each.text))


def ngram_section(sample: Sequence[PairView]) -> Section:
    """1- to 3-grams of words that one side has more often than chance, of a sample."""
    sides = [(words(pair.chosen), words(pair.rejected)) for pair in sample]
    tables, numbers, giveaways = [], {}, []
    for size in _SIZES:
        counts = [Counter(gram for side in sides for gram in _grams(side[i], size)) for i in (0, 1)]
        ranked = log_odds(counts[0], counts[1], prior=_PRIOR, least=_LEAST)
        if not ranked:
            continue
        most, least = ranked[:_SHOWN], ranked[::-1][:_SHOWN]
        tables += [
            _table(f"{size}-grams of the chosen side", most),
            _table(f"{size}-grams of the rejected side", least),
        ]
        numbers[f"{size}_grams"] = {
            "chosen": [vars(each) for each in most],
            "rejected": [vars(each) for each in least],
        }
        giveaways += _giveaways(
            sides, [each.text for each in (*most, *least) if abs(each.z) > 3], size
        )
    check = _check(giveaways)
    numbers["giveaways"] = [{"text": text, "chosen": a, "rejected": b} for text, a, b in giveaways]
    note = (
        f"Counted on {len(sample):,} pairs drawn by hash, n-grams with at least {_LEAST} occurrences; z: log-odds "
        "with an informative Dirichlet prior (Monroe et al. 2008)."
    )
    return Section(
        "ngrams", "Words that give a side away", (check,), numbers, tables=tuple(tables), note=note
    )


def _grams(tokens: Sequence[str], size: int) -> list[str]:
    return [" ".join(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]


def _giveaways(
    sides: Sequence[tuple[list[str], list[str]]], grams: Sequence[str], size: int
) -> list[tuple[str, float, float]]:
    """N-grams that a twentieth of one side's texts hold and three times as many as of the other's."""
    holding = [[set(_grams(side[i], size)) for side in sides] for i in (0, 1)]
    found = []
    for gram in dict.fromkeys(grams):
        a, b = (sum(gram in each for each in texts) / len(sides) for texts in holding)
        if max(a, b) >= _GIVEAWAY_SIDES and max(a, b) >= _GIVEAWAY_RATIO * min(a, b):
            found.append((gram, a, b))
    return found


def _check(giveaways: Sequence[tuple[str, float, float]]) -> Check:
    verdict = grade(len(giveaways), look=0.0)
    shown = "; ".join(
        f"“{text}” in {a:.0%} of chosen, {b:.0%} of rejected" for text, a, b in giveaways[:3]
    )
    return judged(
        "give-away phrases", verdict, shown or "none", float(len(giveaways)),
        "look at any n-gram in 5 % of one side's texts and three times rarer in the other's",
        "a policy can learn the phrase in place of the answer: see whether one model or template wrote one side",
    )  # fmt: skip


def _table(title: str, found: Sequence[LogOdds]) -> TableView:
    rows = tuple(
        (each.text, f"{each.z:+.1f}", f"{each.chosen:,}", f"{each.rejected:,}") for each in found
    )
    return TableView(title, ("n-gram", "z", "in chosen", "in rejected"), rows)
