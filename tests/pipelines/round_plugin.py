"""What the rounds of the tests are made of: prompts out of nothing, and a reward for the letter a."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind
from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal, per_response


@stage("questions", works="whole", gives=RowKind.PROMPTS, source="tests")
class Questions(StageSettings):
    """A few prompts of a round."""

    round: int
    """Whose."""

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        for number in range(12):
            text = f"say a word {self.round} {number}"
            yield {"id": f"{self.round}-{number}", "prompt": [{"role": "user", "content": text}]}


@signal("letter_a", source="tests")
def letter_a() -> Signal:
    return per_response(lambda prompt, text: float(text.count("a")) - 0.01 * len(text))
