"""Takes the steps of a schedule in order: what is next is a function of what is done.

Nothing is kept but what the steps leave, so that a schedule that was killed decides as the first time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.schedule.base import (
    NOTHING,
    Do,
    Found,
    Known,
    Loop,
    Place,
    Schedule,
    Step,
    Task,
)
from data_pipelines.schedule.filling import filled, unknown_problem
from prefopt.recipe.yaml_file import Document, KeyPath

_BEFORE = ("previous.", "best.")


@dataclass
class Walk:
    """One walk through a schedule; after `take`, or an error in it, what came of it so far."""

    schedule: Schedule
    do: Do
    found: list[tuple[Task, Found]] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)
    """What each name stands for at the end."""
    ended: list[str] = field(default_factory=list)
    """Loops that ended early, and why."""
    problems: list[str] = field(default_factory=list)
    """Placeholders that stand for nothing, and loops that nothing could end."""
    _known: Known = field(default_factory=Known)

    def take(self) -> Walk:
        """Takes every step, as far as they bring something. Raises: as ``do`` does."""
        place = Place(self.schedule.output_dir, self.names)
        self.names["output_dir"] = str(self.schedule.output_dir)
        for name, value in self.schedule.values.items():
            self.names |= self._fill({name: value}, self.names, NOTHING, "values")
        self._items(self.schedule.steps, place)
        return self

    def _items(self, items: Sequence[Step | Loop], place: Place) -> None:
        now = "later" if place.turns and list(place.turns.values())[-1] > 1 else "first"
        for item in items:
            if isinstance(item, Loop):
                self._loop(item, place)
            elif item.settings.when in ("always", now):
                self._step(item, place)

    def _step(self, step: Step, place: Place) -> None:
        own = step.settings.model_dump(include=set(step.settings.FILLED))
        own = self._fill(own, place.names, step.own, step.label)
        settings = step.settings.model_copy(update=own)
        raw = self._fill(step.document.raw, place.names, step.document, step.label)
        task = Task(step, settings, place, raw, self._known)
        settings.prepare(task)
        found = self.do(task)
        self.found.append((task, found))
        result = settings.result(task)
        self._known.results.add(result)
        for name in (settings.name, *settings.also):
            place.names[name] = result
            if found.score is not None:
                place.names[f"{name}.score"] = found.score

    def _loop(self, loop: Loop, place: Place) -> None:
        settings, turns = loop.settings, loop.settings.turns
        best = last = self._fill(settings.start, place.names, loop.own, f"{settings.name}: start")
        misses = 0
        for number, turn in enumerate(turns, 1):
            inner = self._turn(loop, place, number, turn, last, best)
            self._items(loop.steps, inner)
            new = [name for name in inner.names if name not in place.names]
            last = {name: inner.names[name] for name in new if not name.startswith(_BEFORE)}
            if settings.best is None:
                best = last
                continue
            key = f"{settings.best.by}.score"
            before = best.get(key, -math.inf)
            if key not in last or not isinstance(before, int | float):
                self.problems.append(
                    f"{settings.name}: ends by the score of {settings.best.by!r}, which has none: an evaluation "
                    "has one, and a pipeline with a `score` stage that writes `score`, and groups at its end"
                )
                break
            misses = 0 if last[key] > before + settings.best.min_gain else misses + 1
            best = last if last[key] > before else best
            if misses >= settings.best.patience and number < len(turns):
                self.ended.append(
                    f"{inner.title} of {len(turns)} brought no gain; the rest is left out"
                )
                break
        of_turn = {settings.name, *settings.values, *settings.each}
        place.names.update({name: each for name, each in best.items() if name not in of_turn})

    def _turn(
        self, loop: Loop, place: Place, number: int, turn: Mapping[str, Any],
        last: Mapping[str, Any], best: Mapping[str, Any],
    ) -> Place:  # fmt: skip
        name = loop.settings.name
        names = {**place.names, name: number, **turn}
        for prefix, of in zip(_BEFORE, (last, best), strict=True):
            names |= {f"{prefix}{each}": value for each, value in of.items()}
        for key, value in loop.settings.values.items():
            names |= self._fill({key: value}, names, loop.own, f"{name}: values")
        turns, values = {**place.turns, name: number}, {**place.values, **turn}
        return Place(place.folder / f"{name}-{number}", names, turns, values)

    def _fill(self, value: Any, names: Mapping[str, Any], document: Document, label: str) -> Any:
        unknown: list[tuple[KeyPath, str]] = []
        result = filled(value, names, unknown)
        steps = self.schedule.names
        self.problems += [
            f"{label}: {unknown_problem(document, path, name, names, steps)}"
            for path, name in unknown
        ]
        return result
