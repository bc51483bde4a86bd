"""The files that make a schedule: one with its steps, and presets whose settings expand to steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipelines.schedule.base import LoopSettings, Schedule
from data_pipelines.schedule.kinds import KINDS
from data_pipelines.schedule.rest import load_rest
from data_pipelines.schedule.rest_settings import RestSettings
from data_pipelines.schedule.rounds import RoundsSettings, load_rounds
from data_pipelines.schedule.settings import ScheduleSettings, load_schedule
from prefopt.recipe.help_pages import schema_page
from prefopt.recipe.schema import Section


@dataclass(frozen=True)
class ScheduleFile:
    """A kind of file that a `prefopt data` command runs."""

    load: Callable[[Path, Sequence[str]], Schedule]
    """Raises ConfigError with every problem and its line."""
    sections: tuple[type[Section], ...]
    summary: str
    example: str

    def keys_page(self) -> str:
        """Every key of the file."""
        return "\n\n".join(map(schema_page, self.sections))


_KILLED = "Killed, it goes on where it was."
FILES = {
    "schedule": ScheduleFile(
        load_schedule,
        (ScheduleSettings, *KINDS.values(), LoopSettings),
        "Steps (pipelines, recipes, evaluations), each a process of its own, where later ones name what earlier "
        f"ones came to, in order and in loops. {_KILLED}",
        "prefopt data schedule recipes/schedule/quickstart/chain.yaml --dry-run",
    ),
    "round": ScheduleFile(
        load_rounds,
        (RoundsSettings,),
        f"Rounds: data from the newest policy, training on it, the next round. {_KILLED}",
        "prefopt data round recipes/iterative_dpo/quickstart/rounds.yaml num_rounds=2",
    ),
    "rest": ScheduleFile(
        load_rest,
        (RestSettings,),
        f"ReST, ReST-EM: grow a set of samples, improve on the best of it. {_KILLED}",
        "prefopt data rest recipes/rest/quickstart.yaml grow.steps=1",
    ),
}
"""By command."""
