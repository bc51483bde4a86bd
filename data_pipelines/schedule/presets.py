"""The files that make a schedule: one with its steps, and presets whose settings expand to steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipelines.schedule.base import LoopSettings, Schedule
from data_pipelines.schedule.kinds import KINDS
from data_pipelines.schedule.rest import load_rest
from data_pipelines.schedule.rest_settings import RestSettings
from data_pipelines.schedule.rounds import RoundsSettings, load_rounds
from data_pipelines.schedule.settings import ScheduleSettings, load_schedule
from prefopt.recipe.help_pages import schema_page
from prefopt.recipe.schema import Section

_Loader = Callable[[Path, Sequence[str]], Schedule]
_FILES: dict[str, tuple[_Loader, tuple[type[Section], ...]]] = {
    "schedule": (load_schedule, (ScheduleSettings, *KINDS.values(), LoopSettings)),
    "round": (load_rounds, (RoundsSettings,)),
    "rest": (load_rest, (RestSettings,)),
}
"""By `prefopt data` command: what reads its file, and the sections of that."""


def load(command: str, path: Path, overrides: Sequence[str] = ()) -> Schedule:
    """The schedule of a file. Raises: ConfigError with every problem and its line."""
    return _FILES[command][0](path, overrides)


def keys_page(command: str) -> str:
    """Every key of the file."""
    return "\n\n".join(map(schema_page, _FILES[command][1]))
