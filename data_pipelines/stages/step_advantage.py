"""Steps with their advantage over the other steps from the same state, out of sampled solutions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from data_pipelines.base import Dropped, Place, Result, RowByRow, StageSettings, Tally
from data_pipelines.cut_turns import cut_turn, renderer_basis, template_problems, turn_renderer
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind, asked_options, user_fields
from data_pipelines.stages.pair import is_scored
from data_pipelines.step_tree import Node, State, grow, split_steps, step_advantages
from prefopt.recipe.schema import NonNegativeFloat, PathText
from prefopt.recipe.yaml_file import Document, KeyPath

if TYPE_CHECKING:
    from prefopt.data.render import Renderer


@stage(
    "step_advantage",
    works="map",
    reads={RowKind.GROUPS},
    gives=RowKind.SAMPLES,
    source="Direct Advantage Policy Optimisation (arXiv:2412.18279); values by Monte Carlo instead of its critic",
)
class StepAdvantage(StageSettings):
    """Builds a tree of each group's solutions and gives every step its advantage over its siblings.

    A response is a solution, its `score` the outcome. V(s) is the mean outcome of the solutions that begin with s;
    A(s,a) = V(s·a) - the mean of V over the different steps taken from s. The row's prompt is the prompt with the
    steps of s, its `response` the one step a, `reward` V(s·a), `value` that mean. `ended` is false for a step that
    another follows: name it in the recipe (`columns: {ended: ended}`), or the policy is trained to end there.

    The paper trains a critic on 16 completions of every state and asks it; here the solutions themselves are the
    completions, so sample many (32 a problem), and set `min_leaves` where an estimate of one is too little.

    Plain prompts just grow; a dialogue needs `tokenizer`, as in `tree`, and trains as plain text in
    which control tokens stand (`format: text`, `control_tokens: [all]`).

    Dropped: `fewer_than_two_scored`, `no_gap`; a single step whose dialogue cannot be rendered under `cut_turn`'s
    reason. The stage's record counts states and the share of negative advantages.
    """

    separator: str = Field(default="\n", min_length=1)
    """What ends a step. It stays with its step; several in a row end one."""
    min_gap: NonNegativeFloat = 0.1
    """Keep states whose best and worst step are at least so far apart, in the units of the score (paper: 0.1)."""
    min_leaves: PositiveInt = 1
    """Least solutions behind a step's value; other steps are left out."""
    tokenizer: PathText | None = None
    """Model or tokenizer directory that renders dialogues: the one that will be trained."""
    chat_template: PathText | None = None
    """Jinja file that replaces the tokenizer's chat template."""

    def problems(self, reads: RowKind | None, document: Document, path: KeyPath) -> list[str]:
        return template_problems(
            "step_advantage", self.tokenizer, self.chat_template, document, path
        )

    def basis(self) -> Mapping[str, Any]:
        return renderer_basis(self.tokenizer, self.chat_template)

    def code(self) -> tuple[Any, ...]:
        return (step_advantages, cut_turn)

    def report(self, rows: Iterator[Row], tally: Tally) -> dict[str, Any]:
        num_steps = num_negative = 0
        states: set[str] = set()
        for row in rows:
            num_steps += 1
            num_negative += row["advantage"] < 0
            states.add(row["step_state"]["id"])
        share = num_negative / num_steps if num_steps else None
        return {"steps": {"steps": num_steps, "states": len(states), "negative_frac": share}}

    def open(self, place: Place) -> RowByRow:
        renderer = turn_renderer(self.tokenizer, self.chat_template)
        return RowByRow(lambda row: self._steps(row, renderer))

    def _steps(self, row: Row, renderer: Renderer | None) -> Result:
        responses = [each for each in row["responses"] if is_scored(each)]
        if len(responses) < 2:
            return Dropped("fewer_than_two_scored", f"{len(responses)} of {len(row['responses'])}")
        outcomes = [float(each["score"]) for each in responses]
        root = grow([split_steps(each["text"], self.separator) for each in responses])
        states = step_advantages(root, outcomes, min_gap=self.min_gap, min_leaves=self.min_leaves)
        if not states:
            return Dropped("no_gap")
        texts = [each["text"] for each in responses]
        return [
            _row(row, texts, state, f"{row['id']}/{number}", index, renderer)
            for number, state in enumerate(states)
            for index in range(len(state.actions))
        ]


def _row(
    row: Row,
    texts: Sequence[str],
    state: State,
    state_id: str,
    index: int,
    renderer: Renderer | None,
) -> Row | Dropped:
    """One action of a state as a sample."""
    action, shared = state.actions[index], state.prefix.text
    id_ = f"{state_id}#{index}"
    cut = cut_turn(
        row["prompt"], texts[action.leaves[0]], shared, renderer, id_, asked_options(row)
    )
    if isinstance(cut, Dropped):
        return Dropped(cut.reason, cut.detail, id_)
    ended = _ends(action)
    # at the end of a dialogue's turn the template's own end follows: the cut has it
    step = cut.response if ended else cut.response[: len(action.text) - len(shared)]
    about = {
        "id": state_id,
        "shared_steps": state.prefix.depth,
        "num_actions": len(state.actions),
        "num_leaves": len(action.leaves),
    }
    return {
        "id": id_,
        "prompt": cut.prompt,
        "response": step,
        "reward": state.values[index],
        "value": state.values[index] - state.advantages[index],
        "advantage": state.advantages[index],
        "ended": ended,
        **user_fields(row),
        "step_state": about,
    }


def _ends(action: Node) -> bool:
    """Whether nothing follows the step in any solution."""
    return not action.children
