"""A plugin for tests of the runner: rows out of nothing, and a stage whose speed and failures can be set."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.base import Dropped, Place, Result, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind


@stage("made_up", works="whole", gives=RowKind.GROUPS, source="tests")
class MadeUp(StageSettings):
    """Groups of four scored responses, drawn by the place's own generator."""

    num_rows: int
    """How many."""
    keep: tuple[str, ...] = ()
    """Unused columns the rows claim to have."""

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        for index in range(self.num_rows):
            rng = place.rng(f"row {index}")
            if rng.random() < 0.05:
                yield Dropped("unlucky", id=f"q{index}")
                continue
            responses = [
                {
                    "text": f"answer {rng.randint(0, 3)} to {index}",
                    "score": float(rng.randint(0, 4)),
                }
                for _ in range(4)
            ]
            yield {"id": f"q{index}", "prompt": f"question {index}", "responses": responses}


@stage("slow", works="map", reads={RowKind.GROUPS}, gives=RowKind.GROUPS, source="tests")
class Slow(StageSettings):
    """Adds a drawn number to every row; writes down which process did which shard."""

    shard_s: float = 0.0
    """Seconds a shard takes."""
    log: str | None = None
    """File that each shard's first row and process are added to."""
    company: bool = False
    """Begin only once two processes have written themselves into the log: a busy machine starts them slowly."""
    lose: bool = False
    """Forget a row of each shard, as a broken stage would."""
    silent: bool = False
    """Answer for a row with nothing at all."""

    def open(self, place: Place) -> Worker:
        return Worker(self, place)


class Worker:
    def __init__(self, settings: Slow, place: Place) -> None:
        self.settings = settings
        self.place = place

    def process(self, rows: Sequence[Row]) -> Sequence[Result]:
        time.sleep(self.settings.shard_s)
        if self.settings.log is not None:
            log = Path(self.settings.log)
            with log.open("a") as file:
                file.write(f"{rows[0]['id']} {os.getpid()}\n")
            deadline = time.monotonic() + 120
            while self.settings.company and len(_processes(log)) < 2:
                assert time.monotonic() < deadline, "no second process came"
                time.sleep(0.02)
        results: list[Result] = [
            {**row, "drawn": self.place.rng(row["id"]).random()} for row in rows
        ]
        if self.settings.silent:
            results[0] = []
        return results[1:] if self.settings.lose else results

    def close(self) -> None:
        """Nothing to free."""


def _processes(log: Path) -> set[str]:
    return {line.split()[1] for line in log.read_text().splitlines() if len(line.split()) == 2}
