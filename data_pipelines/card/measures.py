"""What is measured on every row: sizes, lengths, margins, duplicates. A few bytes a row, sorted at the end."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipelines.card.findings import Check, Section, TableView, grade, histogram, share_check
from data_pipelines.card.pairs import PairView, RefusedPair
from data_pipelines.sketch import Hashes, hash64
from prefopt.data.rows import Reject

_MOST_NAMES = 1_000
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class Sizes:
    """Rows, refused rows by reason, sources and models."""

    def __init__(self) -> None:
        self.num_pairs = 0
        self.refused: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.models: Counter[tuple[str, str]] = Counter()

    def refuse(self, row: RefusedPair) -> None:
        self.refused[str(row.reason)] += 1

    def add(self, pair: PairView) -> None:
        self.num_pairs += 1
        source = pair.extra.get("source")
        if source is not None and (source in self.sources or len(self.sources) < _MOST_NAMES):
            self.sources[str(source)] += 1
        for side, info in zip(("chosen", "rejected"), pair.info, strict=True):
            model = info.get("model")
            if model is not None and len(self.models) < _MOST_NAMES:
                self.models[(str(model), side)] += 1

    def section(self) -> Section:
        total = self.num_pairs + sum(self.refused.values())
        check = share_check(
            "rows training refuses", total - self.num_pairs, total, look=0.0, stop=0.05,
            advice="training would reject them, too, and count them: drop them here (`rated` does), or see "
            "whether columns are mapped right",
        )  # fmt: skip
        tables = []
        if self.refused:
            rows = tuple((name, f"{n:,}") for name, n in self.refused.most_common())
            tables.append(TableView("Refused, by reason", ("reason", "rows"), rows))
        if self.sources:
            rows = tuple(
                (n, f"{c:,}", f"{c / self.num_pairs:.1%}") for n, c in self.sources.most_common(20)
            )
            tables.append(TableView("Sources", ("source", "pairs", "share"), rows))
        if self.models:
            tables.append(self._models())
        numbers = {
            "num_rows": total,
            "num_pairs": self.num_pairs,
            "refused": dict(self.refused.most_common()),
            "sources": dict(self.sources.most_common()),
            "models": {f"{model} {side}": n for (model, side), n in sorted(self.models.items())},
        }
        return Section("sizes", "Size and sources", (check,), numbers, tables=tuple(tables))

    def _models(self) -> TableView:
        names = sorted({model for model, _ in self.models})
        rows = []
        for name in names:
            chosen, rejected = self.models[(name, "chosen")], self.models[(name, "rejected")]
            rows.append(
                (name, f"{chosen:,}", f"{rejected:,}", f"{chosen / (chosen + rejected):.1%}")
            )
        return TableView("Models", ("model", "chosen", "rejected", "chosen share"), tuple(rows))


class Lengths:
    """Characters of prompt and sides, and whether the longer side wins."""

    def __init__(self) -> None:
        self.values = {name: array("i") for name in ("prompt", "chosen", "rejected")}

    def add(self, pair: PairView) -> None:
        self.values["prompt"].append(len(pair.prompt_text))
        self.values["chosen"].append(len(pair.chosen))
        self.values["rejected"].append(len(pair.rejected))

    def section(self) -> Section:
        return length_section(
            {name: np.frombuffer(v, dtype=np.int32) for name, v in self.values.items()},
            "characters",
        )


def length_section(
    values: Mapping[str, np.ndarray[Any, Any]], unit: str, note: str = ""
) -> Section:
    """Quantiles, histogram, gap, and the share of pairs that the longer side wins.

    Bounds of that share: at 60 % a policy that only grows longer is right three times in five, at 80 % four
    times in five: more than reward models agree with people about.
    """
    gap = values["chosen"].astype(np.int64) - values["rejected"]
    decided = gap[gap != 0]
    share = float((decided > 0).mean()) if len(decided) else 0.5
    error = math.sqrt(share * (1 - share) / max(1, len(decided)))
    far = max(share, 1 - share) - 2 * error  # noise alone is no bias
    check = Check(
        "does longer win?",
        grade(far, look=0.6, stop=0.8) if len(decided) else "none",
        f"the longer side is chosen in {share:.1%} ± {error:.1%} of {len(decided):,} pairs of unequal length",
        share,
        "look at 60 % or 40 %, stop at 80 % or 20 %, beyond two standard errors",
        "a policy can learn length in place of quality: balance it (filter max_length_ratio), take an objective "
        "that discounts it (simpo, ld_dpo), and watch length_tokens"
        if far > 0.6
        else "",
    )
    rows = tuple(
        (
            name,
            f"{v.mean():,.0f}",
            *(f"{q:,.0f}" for q in np.quantile(v, _QUANTILES)),
            f"{v.max():,}",
        )
        for name, v in values.items()
    )
    headers = ("", "mean", *(f"{q:.0%}" for q in _QUANTILES), "longest")
    top = float(np.quantile(np.concatenate([values["chosen"], values["rejected"]]), 0.99)) or 1.0
    sides = {side: values[side] for side in ("chosen", "rejected")}
    bins = histogram(
        f"Length of both sides, {unit} (last bin: and longer)",
        sides,
        np.linspace(0, max(1.0, top), 41).tolist(),
    )
    numbers = {
        "unit": unit,
        "longer_is_chosen": share,
        "longer_is_chosen_stderr": error,
        "mean_gap": float(gap.mean()),
        "mean": {name: float(v.mean()) for name, v in values.items()},
        "quantiles": {
            n: dict(zip(map(str, _QUANTILES), np.quantile(v, _QUANTILES).tolist(), strict=True))
            for n, v in values.items()
        },
    }
    table = TableView(f"Lengths in {unit}", headers, rows)
    return Section(
        f"length_{unit}", f"Length in {unit}", (check,), numbers, (bins,), (table,), note
    )


class Margins:
    """score_chosen - score_rejected: ties, contradictions, distribution."""

    def __init__(self) -> None:
        self.values = array("d")
        self.unscored = self.refused_ties = 0

    def refuse(self, row: RefusedPair) -> None:
        self.refused_ties += row.is_tie

    def add(self, pair: PairView) -> None:
        margin = pair.margin
        if margin is None:
            self.unscored += 1
        else:
            self.values.append(margin)

    def section(self) -> Section:
        margins = np.frombuffer(self.values, dtype=np.float64) if self.values else np.empty(0)
        if not len(margins):
            none = Check(
                "margins",
                "none",
                "no scores",
                advice="name them: columns.score_chosen=… columns.score_rejected=…",
            )
            return Section("margins", "Margins", (none,), {"num_scored": 0})
        ties, negative = int((margins == 0).sum()), int((margins < 0).sum())
        checks = (
            share_check(
                "ties", ties, len(margins), look=0.0, stop=0.2, unit="scored pairs",
                advice="a pair of equal scores teaches chance: filter drop_ties, or data.train.N.drop_ties",
            ),
            share_check(
                "scores against the label", negative, len(margins), look=0.0, stop=0.4, unit="scored pairs",
                advice="the chosen side scores lower. Score and label disagree: see which is right; filter "
                "drop_negative_margins",
            ),
        )  # fmt: skip
        low, high = (float(q) for q in np.quantile(margins, (0.005, 0.995)))
        spread = (high - low) or 1.0
        edges = np.linspace(low - spread / 80, high + spread / 80, 41).tolist()
        numbers = {
            "num_scored": len(margins),
            "num_unscored": self.unscored,
            "num_ties": ties,
            "num_ties_refused": self.refused_ties,
            "num_negative": negative,
            "mean": float(margins.mean()),
            "quantiles": dict(
                zip(map(str, _QUANTILES), np.quantile(margins, _QUANTILES).tolist(), strict=True)
            ),
        }
        plot = histogram(
            "Margin, score of chosen - rejected (end bins: and beyond)", {"pairs": margins}, edges
        )
        note = f"Of the rows that training refuses, {self.refused_ties:,} are ties, too." * bool(
            self.refused_ties
        )
        return Section("margins", "Margins", checks, numbers, (plot,), note=note)


class Duplicates:
    """Equal pairs, repeated prompts, and pairs that say the opposite of each other."""

    def __init__(self) -> None:
        self.prompts = Hashes()
        self.oriented = Hashes()
        self.same_sides = self.refused = 0

    def refuse(self, row: RefusedPair) -> None:
        same = row.reason is Reject.IDENTICAL
        self.same_sides += same
        self.refused += same

    def add(self, pair: PairView) -> None:
        prompt, chosen, rejected = pair.prompt_text, pair.chosen.strip(), pair.rejected.strip()
        self.same_sides += chosen == rejected
        self.prompts.add(hash64(prompt))
        first, second = sorted((chosen, rejected))
        # the last bit says which side is chosen; the rest names prompt and answers
        self.oriented.add(hash64(prompt, first, second) & ~1 | (chosen == first))

    def section(self) -> Section:
        prompts = self.prompts.sorted()
        total = len(prompts)
        distinct = self.oriented.num_distinct()
        names = np.unique(self.oriented.sorted())
        contradictions = int((np.diff(names >> np.uint64(1)) == 0).sum()) if len(names) > 1 else 0
        counts = np.unique(prompts, return_counts=True)[1]
        checks = (
            share_check(
                "equal sides", self.same_sides, total + self.refused, look=0.0, stop=0.01,
                advice="both sides are the same text: no gradient, or noise of white space; filter "
                "drop_duplicate_sides",
            ),
            share_check(
                "the same pair again", total - distinct, total, look=0.0, stop=0.1,
                advice="each counts as often as it is there; deduplicate the prompts, or say so on purpose",
            ),
            share_check(
                "contradictions", contradictions, max(1, distinct), look=0.0, stop=0.01, unit="different pairs",
                advice="the same two answers to the same prompt are preferred both ways: noise of labels; drop "
                "both",
            ),
        )  # fmt: skip
        numbers = {
            "num_distinct_pairs": distinct,
            "num_distinct_prompts": len(counts),
            "most_pairs_of_one_prompt": int(counts.max()) if len(counts) else 0,
            "num_contradictions": contradictions,
            "num_equal_sides": self.same_sides,
        }
        most = numbers["most_pairs_of_one_prompt"]
        words = f"{len(counts):,} different prompts; the most pairs of one prompt: {most:,}."
        return Section("duplicates", "Duplicates", checks, numbers, note=words)
