"""Which rank the others wait for: a pure function of what each last said of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SILENT_S = 5.0


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, every second or so."""

    rank: int
    host: str
    pid: int
    local_rank: int
    number: int
    """Of this beat: it is alive while this rises."""
    place: int
    """`Progress.place`: the rank with the lowest is the one that the others wait for."""
    what: str
    idle_s: float
    limit_s: float | None
    """Longest time without progress in its phase; None: any."""
    where: str = ""
    """The line of ours that its main thread is at, once it has been idle for a while."""
    waits: bool = False
    """Is that inside a collective or a backward pass, which may wait for others?"""
    done: bool = False

    @property
    def who(self) -> str:
        """``rank 3 (node-7, process 4242)``."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Seen:
    """A rank's last beat, and for how long there has been no newer one."""

    beat: Beat
    silent_s: float

    @property
    def is_silent(self) -> bool:
        """Has it stopped saying anything? Then what it said last is old news."""
        return self.silent_s > max(self.beat.idle_s, _SILENT_S)

    def late(self, longest: float | None) -> bool:
        """Has it been where it is for too long? A silent one may have got to where the others are."""
        limit = longest if self.is_silent else self.beat.limit_s
        return limit is not None and max(self.beat.idle_s, self.silent_s) > limit


def stuck(seen: Sequence[Seen]) -> list[Seen]:
    """The ranks that the run waits for in vain; none while it gets on.

    Those furthest behind, once all of them have been idle for too long; of these the ones that are not waiting in
    a collective themselves, if there are such.
    """
    running = [each for each in seen if not each.beat.done]
    if not running:
        return []
    longest = max(each.beat.limit_s or 0.0 for each in running) or None
    place = min(each.beat.place for each in running)
    behind = [each for each in running if each.beat.place == place]
    if not all(each.late(longest) for each in behind):
        return []
    return [each for each in behind if each.is_silent or not each.beat.waits] or behind


def verdict(found: Sequence[Seen], seen: Sequence[Seen]) -> str:
    """What to say of the ranks that are `stuck` among those ``seen``."""
    limit = max(each.beat.limit_s or 0.0 for each in seen)
    said = "; ".join(map(_described, found))
    if len(found) == len(seen):
        reason = "all wait for each other: the collective itself, or storage that all use, does not answer"
    else:
        reason = "the others wait for it" if len(found) == 1 else "the others wait for them"
    return (
        f"the run has not got on for more than {limit:g} s (run.stuck_after_s): {said}; {reason}. Raise "
        "run.stuck_after_s if a forward, a file or a reply may take as long; else see the stack below or above"
    )


def _described(seen: Seen) -> str:
    beat = seen.beat
    if seen.is_silent:
        return (
            f"{beat.who} does not answer, for {seen.silent_s:.0f} s (stopped, swapped out, or its machine is "
            f"gone); it was last {beat.what}"
        )
    where = f", at {beat.where}" if beat.where else ""
    return f"{beat.who} has been {beat.what} for {beat.idle_s:.0f} s{where}"
