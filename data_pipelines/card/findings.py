"""What a card says: checks with a verdict, numbers, tables and histograms, by section. Plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["ok", "look", "stop", "none"]
"""``none``: the data does not have what the check needs."""
SEVERITY: Mapping[Verdict, int] = {"none": 0, "ok": 1, "look": 2, "stop": 3}


@dataclass(frozen=True)
class Check:
    """One question to the data, its answer, and what to do about it."""

    name: str
    verdict: Verdict
    value: str
    """The answer, as people read it."""
    number: float | None = None
    """The answer, as it was judged."""
    threshold: str = ""
    """From where on it would have been another verdict."""
    advice: str = ""
    """What to do; empty where there is nothing to do."""


@dataclass(frozen=True)
class Histogram:
    """Counts of one or two series over common bins."""

    title: str
    edges: tuple[float, ...]
    series: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TableView:
    """A table of texts."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One theme of a card."""

    name: str
    title: str
    checks: tuple[Check, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Everything measured, JSON."""
    histograms: tuple[Histogram, ...] = ()
    tables: tuple[TableView, ...] = ()
    note: str = ""
    """How it was measured, where that is not all rows."""


@dataclass(frozen=True)
class Card:
    """A whole card."""

    title: str
    sections: tuple[Section, ...]

    @property
    def checks(self) -> list[Check]:
        return [check for section in self.sections for check in section.checks]

    def worst(self) -> Verdict:
        """The gravest verdict of all checks."""
        gravest = max(self.checks, key=lambda check: SEVERITY[check.verdict], default=None)
        return "none" if gravest is None else gravest.verdict

    def record(self) -> dict[str, Any]:
        """The card as JSON."""
        sections = [dataclasses.asdict(section) for section in self.sections]
        return {"format": 1, "title": self.title, "verdict": self.worst(), "sections": sections}


def grade(number: float, *, look: float, stop: float | None = None) -> Verdict:
    """``stop`` above the one, ``look`` above the other, else ``ok``."""
    if stop is not None and number > stop:
        return "stop"
    return "look" if number > look else "ok"


def judged(
    name: str, verdict: Verdict, value: str, number: float, threshold: str, advice: str
) -> Check:
    """A check whose advice is given where it is needed."""
    return Check(name, verdict, value, number, threshold, advice if verdict != "ok" else "")


def share_check(
    name: str,
    count: int,
    total: int,
    *,
    look: float,
    stop: float | None,
    advice: str,
    unit: str = "rows",
) -> Check:
    """A check of how many of all rows have a defect; bounds are shares, 0 for none at all."""
    share = count / total if total else 0.0
    verdict = grade(share, look=look, stop=stop)
    bounds = [f"look above {look:.2%}" if look else "look at any"]
    bounds += [f"stop above {stop:.2%}"] if stop is not None else []
    value = f"{count:,} of {total:,} {unit} ({share:.2%})"
    return judged(name, verdict, value, share, "; ".join(bounds), advice)


def histogram(title: str, values: Mapping[str, Any], edges: Sequence[float]) -> Histogram:
    """Counts of each series in the bins; values outside count in the first and last one."""
    import numpy as np

    series = {}
    for name, numbers in values.items():
        clipped = np.clip(np.asarray(numbers, dtype=np.float64), edges[0], edges[-1])
        series[name] = tuple(
            int(count) for count in np.histogram(clipped, bins=np.asarray(edges))[0]
        )
    return Histogram(title, tuple(map(float, edges)), series)
