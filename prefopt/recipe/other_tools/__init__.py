"""Keys and values that people bring from other tools, and what to write here: the one list.

A key is looked up by its name, or by its section and itself (``train.batch_size``) where the name alone is a key
of some other section here. Each is of one of three kinds: it has another name, nothing need be set, or it is not
there, and then what to do instead. What no table has is known by its kind: `families`.
"""

from __future__ import annotations

from prefopt.recipe.other_tools.absent import ABSENT
from prefopt.recipe.other_tools.automatic import AUTOMATIC
from prefopt.recipe.other_tools.families import family_hint
from prefopt.recipe.other_tools.inputs import INPUTS
from prefopt.recipe.other_tools.settings import SETTINGS
from prefopt.recipe.other_tools.values import OBJECTIVES, PEFT, value_hint

__all__ = [
    "ABSENT", "AUTOMATIC", "OBJECTIVES", "OF_PIPELINES", "PEFT", "RENAMED", "family_hint", "hint_for",
    "value_hint", "written_here",
]  # fmt: skip

RENAMED = {**INPUTS, **SETTINGS}
"""Here it has another name; the sentence names a key that exists."""

OF_PIPELINES = {
    "lease_s": "there are no leases: one command hands out the shards, on several machines through "
    "executor.name=ray; leave it out",
}
"""Keys of data pipelines, evaluations and schedules, in which the names of a recipe's sections mean "
 "nothing."""


def written_here(key: str) -> str:
    """A key as this project would spell it: ``--learning-rate`` is learning_rate."""
    return key.strip().lstrip("-").replace("-", "_").lower()


def hint_for(section: str, key: str) -> str | None:
    """What to write in a recipe instead of ``key`` in ``section``; None for a key that no table here has."""
    key = written_here(key)
    for name in (f"{section}.{key}", key):
        if name in RENAMED:
            return RENAMED[name]
        if name in AUTOMATIC:
            return f"automatic: {AUTOMATIC[name]}. Leave it out"
        if name in ABSENT:
            return ABSENT[name]
    return None
