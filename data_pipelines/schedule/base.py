"""What a schedule is: named steps, each a command in a process of its own, in order and in loops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PositiveInt

from data_pipelines.rows import RowKind
from prefopt.recipe.schema import NonNegativeFloat, Section
from prefopt.recipe.yaml_file import Document

NOTHING = Document({})


class StepSettings(Section):
    """What every kind of step has. A kind says what its file holds, what is run and what came of it."""

    FILLED: ClassVar[tuple[str, ...]] = ()
    """Keys that hold placeholders and are no part of what its file holds."""
    HAS_FILE: ClassVar[bool] = False
    """The key of its kind holds the path of a YAML file, or what would be in it."""

    name: str
    """Of the step; later steps name what it came to as `${NAME}`."""
    when: Literal["always", "first", "later"] = "always"
    """In a loop: in every turn, in the first alone, or in all but the first."""
    also: tuple[str, ...] = Field(default=(), strict=False)
    """Further names of its result. Several steps may share one: the newest of them counts."""

    def prepare(self, task: Task) -> None:
        """Puts into ``task.raw`` what the schedule decides: where to write, what to train."""
        raise NotImplementedError

    def result(self, task: Task) -> str:
        """What `${NAME}` stands for; known before the step has run."""
        raise NotImplementedError

    def problems(self, task: Task) -> Iterator[str]:
        """What can be known to be wrong with it before the first step."""
        yield from ()

    def is_scored(self, task: Task) -> bool:
        """Does it come to a score?"""
        return False

    def is_done(self, task: Task) -> bool:
        """Has it run to its end?"""
        raise NotImplementedError

    def command(self, task: Task) -> list[str]:
        """Program and arguments; `prefopt` is this one."""
        raise NotImplementedError

    def found(self, task: Task) -> Found:
        """What a finished step came to."""
        raise NotImplementedError


class BestSettings(Section):
    """The end of a loop that is to bring something; of its turns the best counts, and not the last."""

    by: str
    """The step whose score is meant: an evaluation, or a pipeline that ends with scored groups."""
    min_gain: NonNegativeFloat = 0.0
    """A gain is a score that is higher by more than this than the best one before."""
    patience: PositiveInt = 1
    """Turns in a row without a gain after which the loop ends."""


class LoopSettings(Section):
    """A loop. In it, `${LOOP}` is the turn's number; `${previous.NAME}` and `${best.NAME}` are of turns before."""

    name: str
    """Of the loop. After it, `${NAME}` of a step in it is that of the last turn, with `best` of the best one."""
    steps: tuple[dict[str, Any], ...] = Field(default=(), strict=False)
    """Of a turn."""
    rounds: PositiveInt | None = None
    """How many turns; or `each` says it."""
    each: dict[str, list[Any]] = Field(default_factory=dict)
    """Lists with an entry a turn, by name: `each: {rate: [1.0e-5, 5.0e-6]}` gives two turns and `${rate}`."""
    start: dict[str, Any] = Field(default_factory=dict)
    """What `${previous.NAME}` and `${best.NAME}` are in the first turn, e.g. `train: ${sft}`."""
    values: dict[str, Any] = Field(default_factory=dict)
    """As of the schedule, filled in as a turn begins."""
    best: BestSettings | None = None
    """Leave out to take every turn."""

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Values of each turn."""
        count = self.rounds or min(map(len, self.each.values()), default=0)
        return [{name: each[turn] for name, each in self.each.items()} for turn in range(count)]


@dataclass(frozen=True)
class Step:
    """One step as its file has it."""

    settings: StepSettings
    document: Document
    """What its own file will hold, with placeholders."""
    source: Path
    """The file that ``document`` is written in."""
    label: str
    """What messages call it."""
    own: Document = NOTHING
    """``settings`` as written in the schedule, for their lines."""
    file: str = ""
    """Its own file in the folder of the turn; default: NAME.yaml."""
    output: str = ""
    """The folder that it writes; default: NAME."""


@dataclass(frozen=True)
class Loop:
    """Steps that are taken several times; those of a turn are in the folder LOOP-NUMBER."""

    settings: LoopSettings
    steps: Sequence[Step | Loop]
    own: Document = NOTHING


@dataclass(frozen=True)
class Schedule:
    """A schedule whose settings are sound by themselves."""

    title: str
    source: Path
    output_dir: Path
    steps: Sequence[Step | Loop]
    values: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()
    """What is wrong with what its steps run, where its file knows more of them than they do."""

    @property
    def names(self) -> frozenset[str]:
        """Of all steps, those in loops included."""
        return frozenset(each.settings.name for each in all_steps(self.steps))


def all_steps(items: Sequence[Step | Loop]) -> Iterator[Step]:
    """Every step, in order, those in loops included."""
    for item in items:
        yield from all_steps(item.steps) if isinstance(item, Loop) else (item,)


@dataclass(frozen=True)
class Known:
    """What a walk has learnt of results, by path."""

    results: set[str] = field(default_factory=set)
    """What the steps so far came to."""
    bases: dict[str, str] = field(default_factory=dict)
    """The full model below each adapter that a step makes."""
    kinds: dict[str, RowKind] = field(default_factory=dict)
    """What each pipeline gives."""
    without_advantages: set[str] = field(default_factory=set)
    """Samples that never had any."""


@dataclass(frozen=True)
class Place:
    """A turn, or the outside of all loops."""

    folder: Path
    names: dict[str, Any]
    """What each placeholder stands for so far."""
    turns: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the turns it is in, by loop."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the turns' lists have for them."""

    @property
    def title(self) -> str:
        """``grow 1, improve 2``; empty outside of loops."""
        return ", ".join(f"{name} {number}" for name, number in self.turns.items())


@dataclass(frozen=True)
class Task:
    """One step in one turn, with every placeholder filled in."""

    step: Step
    settings: StepSettings
    """Those of the step, filled in."""
    place: Place
    raw: dict[str, Any]
    """What its file is to hold."""
    known: Known

    @property
    def title(self) -> str:
        """What messages begin with."""
        return self.place.title or self.settings.name

    @property
    def file(self) -> Path:
        return self.place.folder / (self.step.file or f"{self.settings.name}.yaml")

    @property
    def output(self) -> Path:
        folder = self.place.folder / (self.step.output or self.settings.name)
        return Path(os.path.normpath(folder))

    @property
    def document(self) -> Document:
        """``raw`` with the lines that its keys have where they are written."""
        written = self.step.document
        return Document(self.raw, written.origins, written.problems)


@dataclass(frozen=True)
class Found:
    """What a step came to."""

    score: float | None = None
    """Higher is better; None of a step that measures nothing."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """For the table, by column."""


Do: TypeAlias = Callable[[Task], Found]
"""Does a step of a schedule, or only looks at it. What is done already is left alone."""
