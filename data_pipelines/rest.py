"""Runs a ReST schedule: grow, improve above rising thresholds, validate, and again; each in a process of its own.

Nothing is kept but what the steps leave: which policy is best, and whether to go on, is read anew from their
records. So a schedule that was killed goes on with the same command, and to the same weights.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from data_pipelines.filling import final_policy
from data_pipelines.folder import StageFolder
from data_pipelines.rest_plan import ImproveStep, check_rest, plan_grow, validation_pipeline
from data_pipelines.rest_settings import RestFile, ValidationSection
from data_pipelines.steps import refuse_changes, run_prefopt, train, write_files
from prefopt.errors import DataError
from prefopt.storage.cache import atomic_write

logger = logging.getLogger("prefopt.data")
RESULT = "rest.json"


@dataclass(frozen=True)
class Reward:
    """Reward on held-out prompts."""

    mean: float
    standard_error: float | None
    """Over prompts; None of a single one."""
    prompts: int

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3f}"
        return f"{self.mean:.3f}{error}"


@dataclass(frozen=True)
class Taken:
    """One policy of the schedule: the first (grow 0, improve 0), or what an improve step made."""

    grow: int
    improve: int
    policy: str
    kept: dict[str, Any] | None = None
    """What its threshold came to: the report of the `threshold` stage."""
    learning_rate: float | None = None
    reward: Reward | None = None
    """None without `validation`."""


@dataclass(frozen=True)
class Outcome:
    """A finished schedule."""

    steps: tuple[Taken, ...]
    best: Taken
    """With `validation` the policy of the highest reward, else the last."""
    ended: str
    """Why there is no further step."""


def run_rest(file: RestFile) -> Outcome:
    """Runs what is not done yet; what came of it is also written to ``rest.json``.

    Raises: ConfigError for a schedule that cannot work, or that changed since a step of it began; TrainingError,
        DataError for a step that failed: the same command goes on there.
    """
    first = final_policy(file.settings.policy)
    check_rest(file, first)
    outcome = follow(file, first, Commands(file))
    with atomic_write(Path(file.settings.output_dir) / RESULT) as temporary:
        temporary.write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
    return outcome


def follow(file: RestFile, first: str, doing: Doing) -> Outcome:
    """Takes the steps of a schedule in order, as far as they bring something.

    Args:
        file: the schedule.
        first: its first policy.
        doing: does each step, or knows that it is done.
    """
    section = file.settings.validation
    start = Taken(0, 0, first, reward=_measured(file, doing, first, 0, 0))
    steps = [start]
    for grow in range(1, file.settings.grow.steps + 1):
        before = best_of(steps)
        plan = plan_grow(file, grow, before.policy, first)
        # All data first: a threshold that keeps nothing is met before anything is trained.
        kept = doing.grow(plan)
        steps += _improved(file, doing, plan, kept, before)
        if section is not None and not _gains(best_of(steps), before, section):
            return Outcome(tuple(steps), best_of(steps), f"grow step {grow} brought no gain")
    return Outcome(tuple(steps), best_of(steps), "every grow step is done")


def best_of(steps: Sequence[Taken]) -> Taken:
    """The policy of the highest validation reward, of equal ones the first; without rewards the newest."""
    if steps[0].reward is None:
        return steps[-1]
    return max(steps, key=lambda each: each.reward.mean if each.reward else -math.inf)


def _improved(
    file: RestFile,
    doing: Doing,
    plan: Sequence[ImproveStep],
    kept: Sequence[dict[str, Any]],
    before: Taken,
) -> list[Taken]:
    """The policies of one grow step's improve steps, up to the last one that is worth taking."""
    section = file.settings.validation
    found: list[Taken] = []
    best, misses = before, 0
    for step, report in zip(plan, kept, strict=True):
        logger.info(
            "%s: %s keeps %s of %s samples; trains %s", step.name, report["rule"], f"{report['kept']:,}",
            f"{report['samples']:,}", step.start,
        )  # fmt: skip
        doing.train(step)
        reward = _measured(file, doing, str(step.final), step.grow, step.number)
        rate = file.settings.improve.learning_rate(step.number)
        found.append(Taken(step.grow, step.number, str(step.final), report, rate, reward))
        if section is None:
            continue
        misses = 0 if _gains(found[-1], best, section) else misses + 1
        best = best_of([best, found[-1]])
        if misses >= section.patience:
            logger.info("%s: no gain; the rest of grow step %d is left out", step.name, step.grow)
            break
    return found


def _measured(file: RestFile, doing: Doing, policy: str, grow: int, improve: int) -> Reward | None:
    if file.settings.validation is None:
        return None
    folder = Path(file.settings.output_dir) / f"grow-{grow}" / f"improve-{improve}"
    reward = doing.validate(policy, folder)
    logger.info("grow %d, improve %d: validation reward %s", grow, improve, reward)
    return reward


def _gains(now: Taken, before: Taken, section: ValidationSection) -> bool:
    assert now.reward is not None and before.reward is not None
    return now.reward.mean > before.reward.mean + section.min_gain


class Doing(Protocol):
    """Does the steps of a schedule. What is done already is left alone."""

    def grow(self, plan: Sequence[ImproveStep]) -> list[dict[str, Any]]:
        """Samples, and keeps what is above each threshold; the report of each `threshold` stage."""
        ...

    def train(self, step: ImproveStep) -> None:
        """Trains until ``step.final`` is there."""
        ...

    def validate(self, policy: str, folder: Path) -> Reward:
        """Measures a policy; its answers go below ``folder``."""
        ...


class Commands:
    """Each step as a command.

    Args:
        file: the schedule.
        prefopt: runs ``prefopt ARGUMENTS`` for a step; default: in a process of its own. (Small models may do
            without: `bench.claims_rest`.)
    """

    def __init__(
        self, file: RestFile, prefopt: Callable[[Sequence[str], str], None] | None = None
    ) -> None:
        self.file = file
        self.first = final_policy(file.settings.policy)
        self.prefopt = prefopt or run_prefopt

    def grow(self, plan: Sequence[ImproveStep]) -> list[dict[str, Any]]:
        for step in plan:
            refuse_changes(step.files, step.name, f"{step.folder} and the steps after it")
        for step in plan:
            write_files(step.files)
            if not _kept(step).done_record.is_file():
                self.prefopt(["data", "build", str(step.folder / "data.yaml")], step.name)
        return [_record(_kept(step))["report"]["threshold"] for step in plan]

    def train(self, step: ImproveStep) -> None:
        if not step.final.is_dir():
            settings, recipe = self.file.settings, step.folder / "recipe.yaml"
            launch, script = settings.launch, settings.script
            train(step.name, recipe, step.final, launch, script, self.prefopt)

    def validate(self, policy: str, folder: Path) -> Reward:
        raw = validation_pipeline(self.file, policy, self.first, folder)
        files = [(folder / "validation.yaml", raw)]
        refuse_changes(files, f"the validation of {policy}", str(folder / "validation*"))
        last = raw["stages"][-1]
        scored = StageFolder(Path(raw["output_dir"]), str(last.get("id") or last["stage"]))
        if not scored.done_record.is_file():
            write_files(files)
            self.prefopt(["data", "build", str(files[0][0])], f"the validation of {policy}")
        return _reward(scored)


def print_outcome(outcome: Outcome) -> None:
    """A line a policy: threshold, samples kept, reward."""
    table = Table(title="ReST")
    for name in (
        "grow",
        "improve",
        "threshold",
        "kept",
        "their reward",
        "rate",
        "validation reward",
    ):
        table.add_column(name, justify="left" if name == "threshold" else "right")
    for each in outcome.steps:
        cells = ["", "", "", ""]
        if each.kept is not None:
            share = f"{each.kept['kept']:,} of {each.kept['samples']:,}"
            mean = f"{each.kept['reward_kept']['mean']:.3f}"
            cells = [each.kept["rule"], share, mean, f"{each.learning_rate:g}"]
        if each.reward is not None:
            mark = " *" if each is outcome.best else ""
            cells.append(f"{each.reward}{mark}")
        table.add_row(str(each.grow), str(each.improve), *cells)
    console = Console()
    console.print(table)
    console.print(
        f"{outcome.ended}; the policy to take: {outcome.best.policy}",
        highlight=False,
        soft_wrap=True,
    )


def _reward(scored: StageFolder) -> Reward:
    """Mean over prompts of their answers' mean score."""
    rows = scored.output(_record(scored)).rows()
    means = [statistics.fmean(each["score"] for each in row["responses"]) for row in rows]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return Reward(statistics.fmean(means), error, len(means))


def _kept(step: ImproveStep) -> StageFolder:
    return StageFolder(step.data, step.stage)


def _record(folder: StageFolder) -> dict[str, Any]:
    record = folder.done()
    if record is None:
        raise DataError(f"{folder.done_record}: is missing; run the same command again")
    return record
