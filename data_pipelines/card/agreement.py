"""Whether those who rated agree: each signal alone with the label, and a judge with itself when sides change."""

from __future__ import annotations

import math
from collections.abc import Mapping

from data_pipelines.battles import ORDERS_AGREE
from data_pipelines.card.findings import Check, Section, TableView, grade, judged
from data_pipelines.card.pairs import PairView


class Agreement:
    """Counts, by signal, how often its own scores rank the pair as it is labelled."""

    def __init__(self) -> None:
        self.right: dict[str, int] = {}
        self.tied: dict[str, int] = {}
        self.total: dict[str, int] = {}
        self.orders = self.orders_agree = 0

    def add(self, pair: PairView) -> None:
        agree = pair.extra.get(ORDERS_AGREE)
        if isinstance(agree, bool):
            self.orders += 1
            self.orders_agree += agree
        chosen, rejected = (info.get("scores") or {} for info in pair.info)
        for name in chosen.keys() & rejected.keys():
            if chosen[name] is None or rejected[name] is None:
                continue
            gap = chosen[name] - rejected[name]
            self.total[name] = self.total.get(name, 0) + 1
            self.right[name] = self.right.get(name, 0) + (gap > 0)
            self.tied[name] = self.tied.get(name, 0) + (gap == 0)

    def section(self) -> Section:
        rows = tuple(
            (name, f"{self.right[name] / n:.1%}", f"{self.tied[name] / n:.1%}", f"{n:,}")
            for name, n in sorted(self.total.items())
        )
        headers = ("signal", "ranks as labelled", "ties", "pairs")
        tables = (TableView("Each signal alone, against the label", headers, rows),) if rows else ()
        numbers = {
            "signals": {
                name: {"agrees": self.right[name] / n, "ties": self.tied[name] / n, "num_pairs": n}
                for name, n in sorted(self.total.items())
            },
            "num_judged_both_orders": self.orders,
            "num_orders_agree": self.orders_agree,
        }
        return Section(
            "agreement", "Agreement", (self._judge(), self._signals()), numbers, tables=tables
        )

    def _judge(self) -> Check:
        if not self.orders:
            return Check(
                "judge consistency", "none", "no column says what a judge said in both orders"
            )
        share = self.orders_agree / self.orders
        error = math.sqrt(share * (1 - share) / self.orders)
        verdict = grade(1 - share, look=0.2, stop=0.4)
        value = f"both orders agree in {share:.1%} ± {error:.1%} of {self.orders:,} pairs"
        return judged(
            "judge consistency", verdict, value, share, "look below 80 %, stop below 60 %",
            "the judge prefers a place, not an answer: take another, or a larger winners.min_gap",
        )  # fmt: skip

    def _signals(self) -> Check:
        decided: Mapping[str, float] = {
            name: self.right[name] / (n - self.tied[name])
            for name, n in self.total.items()
            if n > self.tied[name]
        }
        if not decided:
            return Check(
                "signals against the label", "none", "no signal's own scores are stored (score.keep_parts)"
            )  # fmt: skip
        name = min(decided, key=lambda each: decided[each])
        verdict = grade(1 - decided[name], look=0.5)
        value = f"{name} ranks {decided[name]:.1%} of the pairs it decides as labelled"
        return judged(
            "signals against the label", verdict, value, decided[name],
            "look where one ranks fewer than half as labelled",
            "this signal is outvoted: is its weight meant, and its sign right?",
        )  # fmt: skip
