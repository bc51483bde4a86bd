"""Step pairs with a common prefix, out of sampled solutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings
from data_pipelines.cut_turns import cut_turn, renderer_basis, template_problems, turn_renderer
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, asked_options, side_columns, user_fields
from data_pipelines.stages.pair import is_scored
from data_pipelines.step_tree import Node, grow, sibling_pairs, split_steps, value
from prefopt.recipe.schema import NonNegativeFloat, PathText
from prefopt.recipe.yaml_file import Document, KeyPath

if TYPE_CHECKING:
    from prefopt.data.render import Renderer

_KEPT = ("model", "seed", "temperature", "ended")
"""What is known of a solution and still true of its rest."""


@stage(
    "tree",
    works="map",
    reads={RowKind.GROUPS},
    gives=RowKind.PAIRS,
    source="AlphaLLM-CPL (arXiv:2410.06508): children of one parent; values by Monte Carlo instead of its critics",
)
class Tree(StageSettings):
    """Builds a tree of each group's solutions and pairs steps that follow the same beginning.

    A response is a solution, its `score` the outcome. A partial solution is worth the mean outcome of the
    solutions that begin with it; two next steps make a pair where their values differ by more than `min_gap`.
    The prompt of the pair is the prompt and the steps they share; each side goes on from there to the end of a
    solution: the best one (first of equals) through the better step, the worst through the other. A side that
    stopped after its step would be trained to end there, since every response gets an end token.

    `score_chosen` and `score_rejected` are the values; `info_*` has the `outcome` of the solution that is shown
    and `num_leaves`, how many solutions the value is the mean of; `step_pair` says how many steps are shared.

    Plain prompts just grow. A dialogue needs `tokenizer`: the row is then the rendered text, cut behind the
    shared steps, and trains as plain text (`format: text`, `control_tokens: [all]`) with that tokenizer alone.

    Dropped: `fewer_than_two_scored`, `no_gap`, and where none of a row's pairs can be rendered, the first reason
    (`template_changes_text`, `prompt_not_prefix`, `renders_differently`, …); where only some cannot, the others
    count them in `num_unrendered`.
    """

    separator: str = Field(default="\n", min_length=1)
    """What ends a step. It stays with its step; several in a row end one."""
    min_gap: NonNegativeFloat = 0.0
    """Values must differ by more than this, in the units of the score."""
    min_leaves: PositiveInt = 1
    """Least solutions behind each of the two values."""
    max_pairs: PositiveInt | None = None
    """Most pairs of one prompt; of more, as many are drawn evenly. Default: all."""
    complete: bool = False
    """Also pair the best whole solution with the worst, if their outcomes differ by more than `min_gap`."""
    tokenizer: PathText | None = None
    """Model or tokenizer directory that renders dialogues: the one that will be trained."""
    chat_template: PathText | None = None
    """Jinja file that replaces the tokenizer's chat template."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        return template_problems("tree", self.tokenizer, self.chat_template, document, path)

    def basis(self) -> Mapping[str, Any]:
        return renderer_basis(self.tokenizer, self.chat_template)

    def code(self) -> tuple[Any, ...]:
        return (grow, cut_turn)

    def open(self, place: Place) -> RowByRow:
        renderer = turn_renderer(self.tokenizer, self.chat_template)
        return RowByRow(lambda row: self._pairs(row, renderer, place))

    def _pairs(self, row: Row, renderer: Renderer | None, place: Place) -> Result:
        responses = [each for each in row["responses"] if is_scored(each)]
        if len(responses) < 2:
            return Dropped("fewer_than_two_scored", f"{len(responses)} of {len(row['responses'])}")
        pairs = self._step_pairs(responses)
        if not pairs:
            return Dropped("no_gap")
        if self.max_pairs is not None and len(pairs) > self.max_pairs:
            drawn = place.rng(row["id"]).sample(range(len(pairs)), self.max_pairs)
            pairs = [pairs[number] for number in sorted(drawn)]
        found = [_row(row, responses, pair, renderer) for pair in pairs]
        made = [each for each in found if not isinstance(each, Dropped)]
        dropped = [each for each in found if isinstance(each, Dropped)]
        if not made:
            return dropped[0]
        counts = {
            "num_unscored": len(row["responses"]) - len(responses),
            "num_unrendered": len(dropped),
        }
        notes = {name: count for name, count in counts.items() if count}
        ids = [row["id"]] if len(made) == 1 else [f"{row['id']}#{n}" for n in range(len(made))]
        return [{**each, "id": id_, **notes} for each, id_ in zip(made, ids, strict=True)]

    def _step_pairs(self, responses: Sequence[Mapping[str, Any]]) -> list[_StepPair]:
        outcomes = [float(each["score"]) for each in responses]
        root = grow([split_steps(each["text"], self.separator) for each in responses])
        siblings = sibling_pairs(root, outcomes, min_gap=self.min_gap, min_leaves=self.min_leaves)
        found = [
            _StepPair(pair.prefix, _best(pair.chosen, outcomes), _worst(pair.rejected, outcomes))
            for pair in siblings
        ]
        if self.complete:
            whole = _complete_pair(root, outcomes)
            apart = whole.chosen.value - whole.rejected.value
            if apart > self.min_gap and whole.solutions not in map(_from_start, found):
                found.append(whole)
        return found


@dataclass(frozen=True)
class _Side:
    """One side of a pair: the solution that is shown, and a value that is the mean of ``num_leaves`` solutions."""

    solution: int
    value: float
    num_leaves: int


@dataclass(frozen=True)
class _StepPair:
    shared: Node
    chosen: _Side
    rejected: _Side
    complete: bool = False

    @property
    def solutions(self) -> tuple[int, int]:
        return self.chosen.solution, self.rejected.solution


def _from_start(pair: _StepPair) -> tuple[int, int] | None:
    """The solutions of a pair that shares no step: what a complete pair may not repeat."""
    return None if pair.shared.depth else pair.solutions


def _complete_pair(root: Node, outcomes: Sequence[float]) -> _StepPair:
    """The best whole solution and the worst, each worth its own outcome; the first of equals."""
    best = max(root.leaves, key=outcomes.__getitem__)
    worst = min(root.leaves, key=outcomes.__getitem__)
    sides = (_Side(number, outcomes[number], 1) for number in (best, worst))
    return _StepPair(root, *sides, complete=True)


def _best(node: Node, outcomes: Sequence[float]) -> _Side:
    best = max(node.leaves, key=outcomes.__getitem__)
    return _Side(best, value(node, outcomes), len(node.leaves))


def _worst(node: Node, outcomes: Sequence[float]) -> _Side:
    worst = min(node.leaves, key=outcomes.__getitem__)
    return _Side(worst, value(node, outcomes), len(node.leaves))


def _row(
    row: Row,
    responses: Sequence[Mapping[str, Any]],
    pair: _StepPair,
    renderer: Renderer | None,
) -> Row | Dropped:
    """The pair as a row without an id; Dropped where it cannot be rendered."""
    found: Row = {"id": None, "prompt": None}
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        response = responses[side.solution]
        cut = cut_turn(
            row["prompt"],
            response["text"],
            pair.shared.text,
            renderer,
            row["id"],
            asked_options(row),
        )
        if isinstance(cut, Dropped):
            return cut
        found["prompt"] = cut.prompt
        known = {key: response[key] for key in _KEPT if key in response}
        about = {"outcome": response["score"], "num_leaves": side.num_leaves}
        found |= side_columns(name, {"text": cut.response, "score": side.value, **known, **about})
    kind = "complete" if pair.complete else "siblings"
    about = {"kind": kind, "shared_steps": pair.shared.depth}
    return {**found, **user_fields(row), "step_pair": about}
