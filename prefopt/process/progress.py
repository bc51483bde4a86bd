"""Where this process is: what a message about it says, and what tells a slow one from a stuck one."""

from __future__ import annotations

import time


class Progress:
    """The phase of this process, and how long ago it last got on.

    `enter` is called in code that every rank of a launch runs alike: ``place`` counts the calls, so the rank with
    the lowest is the one that the others wait for. `tick` may be called by any of them as often as it likes.
    """

    def __init__(self) -> None:
        self.what = "starting"
        self.detail = ""
        self.stands = ""
        """What is on disk of the run by now, as the end of a sentence."""
        self.place = 0
        self.stuck_after_s: float | None = None
        """Longest time without a `tick`, where a phase says nothing else; None: no limit."""
        self.limit_s: float | None = None
        self._since = time.monotonic()

    def enter(self, what: str, *, at_most_s: float | None = None) -> None:
        """A new phase begins.

        Args:
            what: continues "while …" and "it is …": ``loading the model``.
            at_most_s: longest time without a `tick` where more than ``stuck_after_s`` is no sign of trouble.
        """
        self.what, self.detail = what, ""
        self.place += 1
        limit = self.stuck_after_s
        self.limit_s = None if limit is None else max(limit, at_most_s or 0.0)
        self._since = time.monotonic()

    def tick(self, detail: str = "") -> None:
        """The phase has got on; ``detail`` says to where."""
        self.detail = detail
        self._since = time.monotonic()

    @property
    def idle_s(self) -> float:
        """Seconds since it last got on."""
        return time.monotonic() - self._since

    def __str__(self) -> str:
        return f"{self.what} ({self.detail})" if self.detail else self.what


progress = Progress()
"""Of this process, which has only one main thread."""
