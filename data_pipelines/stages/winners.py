"""Training data out of battles: pairs of winner and loser, or the winner's answer where the target lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.battles import ORDERS_AGREE, Battle, read_battles
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, user_fields
from data_pipelines.stages.pair import pair_rows
from prefopt.recipe.schema import NonNegativeFloat
from prefopt.recipe.yaml_file import Document, KeyPath


@stage(
    "winners",
    works="map",
    reads={RowKind.GROUPS},
    gives="either",
    source="Arena Learning (arXiv:2407.10627): score gaps of 3.0 for SFT and 2.0 for DPO",
)
class Winners(StageSettings):
    """Takes from each row's battles what the target can learn from.

    `pairs`: every battle that is decided by `min_gap` or more gives a pair, winner over loser, with the mean
    ratings as scores. `sft`: where the target lost by so much, the best answer that beat it becomes a sample, with
    its mean rating as `reward` and the gap as `advantage`. A recipe with `stage: sft` reads it with
    `columns: {chosen: response}`; `data.train` takes no group, and a pair without a loser would be none.

    Ties and smaller gaps count as undecided. Dropped: `undecided` (no battle that counts is decided) and, for
    `sft`, `unbeaten` (no opponent won one). The rows leave the column `battles` behind; a pair of two games says
    in `orders_agree` whether each alone has that winner, for `prefopt data card`.
    """

    gives: Literal["pairs", "sft"]
    """`pairs` for DPO and reward models, `sft` for samples."""
    min_gap: NonNegativeFloat
    """Least difference of the mean ratings, K. The paper's best: 3.0 for SFT, 2.0 for DPO."""
    target: str | None = None
    """The model to be trained; its own answers are never samples. Needed except for all pairs."""
    all_pairs: bool = False
    """Battles among the opponents count, too (the paper's round robin): they give pairs, and an opponent that beat
    another gives a sample, also where the target did not lose. Without it `target` is needed."""

    @property
    def gives_kind(self) -> RowKind:
        return RowKind.PAIRS if self.gives == "pairs" else RowKind.SAMPLES

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        if self.target is None and not (self.gives == "pairs" and self.all_pairs):
            return [
                f"{document.origin(path)}winners.target is missing: whose losses count? Name the model to be "
                "trained, as `battle` does; only {gives: pairs, all_pairs: true} goes without"
            ]
        if self.target is not None and self.gives == "pairs" and self.all_pairs:
            where = document.origin((*path, "target"))
            return [
                f"{where}winners.target = {self.target!r}: would be ignored with all_pairs: every battle gives a "
                "pair; leave one of them out"
            ]
        return []

    def needs_fields(self) -> tuple[str, ...]:
        return ("battles",)

    def code(self) -> tuple[Any, ...]:
        return (Battle, pair_rows)

    def open(self, place: Place) -> RowByRow:
        def take(row: Row) -> Result:
            battles = [battle for battle in read_battles(row) if self._counts(battle)]
            wins = [win for battle in battles if (win := _win(battle, self.min_gap)) is not None]
            if not wins:
                return Dropped("undecided", f"{len(battles)} battles")
            row = {key: value for key, value in row.items() if key != "battles"}
            return _pairs(row, wins) if self.gives == "pairs" else self._sample(row, wins)

        return RowByRow(take)

    def _counts(self, battle: Battle) -> bool:
        return self.all_pairs or self.target in (battle.model_a, battle.model_b)

    def _sample(self, row: Row, wins: Sequence[_Win]) -> Result:
        """The best answer with which an opponent won; of equal ones that with the larger gap, then the first."""
        opponents = [win for win in wins if row["responses"][win.winner]["model"] != self.target]
        if not opponents:
            return Dropped("unbeaten")
        best = max(opponents, key=lambda win: (win.rating, win.gap))
        response = row["responses"][best.winner]
        sample = {
            "id": row["id"],
            "prompt": row["prompt"],
            "response": response["text"],
            "reward": best.rating,
            "advantage": best.gap,
        }
        return {**sample, **user_fields(row), "model": response["model"]}


@dataclass(frozen=True)
class _Win:
    """A decided battle: indices of the responses, the winner's mean rating, and by how much it won."""

    winner: int
    loser: int
    rating: float
    gap: float
    orders_agree: bool | None


def _win(battle: Battle, min_gap: float) -> _Win | None:
    """Who won a battle by ``min_gap`` or more; nobody wins a tie or an unreadable one."""
    gap, (mean_a, mean_b) = battle.gap, battle.means
    if battle.unreadable or gap == 0 or abs(gap) < min_gap:
        return None
    if gap > 0:
        return _Win(battle.a, battle.b, mean_a, gap, battle.orders_agree)
    return _Win(battle.b, battle.a, mean_b, -gap, battle.orders_agree)


def _pairs(row: Row, wins: Sequence[_Win]) -> list[Row]:
    """A pair a win, each side scored as in that battle: one response may be rated anew in every battle."""
    sides = []
    for win in wins:
        sides.append({**row["responses"][win.winner], "score": win.rating})
        sides.append({**row["responses"][win.loser], "score": win.rating - win.gap})
    places = range(0, len(sides), 2)
    pairs = pair_rows({**row, "responses": sides}, sides, [(place, place + 1) for place in places])
    return [
        pair if win.orders_agree is None else {**pair, ORDERS_AGREE: win.orders_agree}
        for pair, win in zip(pairs, wins, strict=True)
    ]
