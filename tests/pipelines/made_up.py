"""A plugin for tests of the runner: rows out of nothing, and a stage whose failures can be set."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.base import Dropped, Needs, Place, Result, StageSettings
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

    log: str | None = None
    """File that each shard's first row and process are added to."""
    company: bool = False
    """Begin only once two processes have written themselves into the log: a busy machine starts them slowly."""
    gate: str | None = None
    """Begin only once there is such a file."""
    deadly: str | None = None
    """The shard whose first row has this id kills its worker."""
    stays: bool = False
    """Say that the worker holds a model."""
    lose: bool = False
    """Forget a row of each shard, as a broken stage would."""
    silent: bool = False
    """Answer for a row with nothing at all."""

    def recorded(self) -> dict[str, Any]:
        """Without what changes no row."""
        return {"lose": self.lose, "silent": self.silent}

    def needs(self) -> Needs:
        return Needs(stays=self.stays)

    def open(self, place: Place) -> Worker:
        return Worker(self, place)


class Worker:
    def __init__(self, settings: Slow, place: Place) -> None:
        self.settings = settings
        self.place = place

    def process(self, rows: Sequence[Row]) -> Sequence[Result]:
        if self.settings.log is not None:
            log = Path(self.settings.log)
            with log.open("a") as file:  # one write: processes share it
                file.write(f"{rows[0]['id']} {os.getpid()}\n")
            if self.settings.company:
                _wait(lambda: len({line.split()[-1] for line in log.read_text().splitlines()}) > 1)
        if rows[0]["id"] == self.settings.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if (gate := self.settings.gate) is not None:
            _wait(Path(gate).exists)
        results: list[Result] = [
            {**row, "drawn": self.place.rng(row["id"]).random()} for row in rows
        ]
        if self.settings.silent:
            results[0] = []
        return results[1:] if self.settings.lose else results

    def close(self) -> None:
        """Nothing to free."""


def _wait(reached: Callable[[], bool]) -> None:
    """Until it is so; a machine that is busy may take its time."""
    deadline = time.monotonic() + 240
    while not reached():
        assert time.monotonic() < deadline, "what was waited for never came"
        time.sleep(0.02)
