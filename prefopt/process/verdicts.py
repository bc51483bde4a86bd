"""Which rank the others wait for: a pure function of what each last said of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
    """Is that inside a collective, waiting for others?"""
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
    def late(self) -> bool:
        limit = self.beat.limit_s
        return limit is not None and max(self.beat.idle_s, self.silent_s) > limit


def stuck(seen: Sequence[Seen]) -> list[Seen]:
    """The ranks that the run waits for in vain; none while it gets on.

    Those furthest behind, once all of them have been idle for too long; of these the ones that are not waiting in
    a collective themselves, if there are such.
    """
    running = [each for each in seen if not each.beat.done]
    if not running:
        return []
    place = min(each.beat.place for each in running)
    behind = [each for each in running if each.beat.place == place]
    if not all(each.late for each in behind):
        return []
    busy = [each for each in behind if not each.beat.waits or each.silent_s > each.beat.idle_s]
    return busy or behind


def verdict(found: Sequence[Seen], num_ranks: int) -> str:
    """What to say of ranks that are `stuck`."""
    limit = max(each.beat.limit_s or 0.0 for each in found)
    said = "; ".join(map(_described, found))
    if len(found) == num_ranks:
        reason = "all wait for each other: the collective itself, or storage that all use, does not answer"
    else:
        reason = "the others wait for it" if len(found) == 1 else "the others wait for them"
    return (
        f"the run has not got on for more than {limit:g} s (run.stuck_after_s): {said}; {reason}. Raise "
        "run.stuck_after_s if a forward, a file or a reply may take as long; else see the stack below or above"
    )


def _described(seen: Seen) -> str:
    beat = seen.beat
    if seen.silent_s > beat.idle_s:
        return (
            f"{beat.who} does not answer, for {seen.silent_s:.0f} s (stopped, swapped out, or its machine is "
            f"gone); it was last {beat.what}"
        )
    where = f", at {beat.where}" if beat.where else ""
    return f"{beat.who} has been {beat.what} for {beat.idle_s:.0f} s{where}"
