"""An indexable set of groups: what everything that trains, sweeps or samples rows works on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from prefopt.types import Group


class GroupSource(Protocol):
    """An indexable set of groups that knows all but their tokens without reading (`data.TokenSet`)."""

    @property
    def prompt_lengths(self) -> np.ndarray:
        """(n,) tokens of each prompt."""
        ...

    @property
    def response_lengths(self) -> Sequence[np.ndarray] | np.ndarray:
        """n arrays (K,): tokens of each response of a row; K may differ between rows."""
        ...

    @property
    def num_loss_tokens(self) -> Sequence[np.ndarray] | np.ndarray:
        """As ``response_lengths``, of the tokens that carry loss (`Response.loss_mask`)."""
        ...

    @property
    def rewards(self) -> np.ndarray:
        """(n,) score of each row's first response, NaN where it has none: what sample rows are drawn by."""
        ...

    @property
    def advantages(self) -> np.ndarray:
        """(n,) advantage of each row's first response, NaN where it has none."""
        ...

    @property
    def parts(self) -> Sequence[tuple[str, Sequence[int]]]:
        """The rows of each source, under its name; together all rows."""
        ...

    @property
    def fingerprint(self) -> str:
        """Content hash of the rows."""
        ...

    def __len__(self) -> int: ...

    def group(self, index: int) -> Group: ...

    def pairs(self, index: int) -> tuple[tuple[int, int], ...]:
        """`Group.pairs` of a row."""
        ...

    def samples(self, index: int) -> tuple[bool, ...]:
        """`Group.samples` of a row."""
        ...


class GroupList:
    """Groups in memory as a `GroupSource`, of any number of responses each."""

    def __init__(self, groups: Sequence[Group]) -> None:
        source = object()  # this list's name: equal to no other's, however alike
        self.groups = tuple(replace(g, source_row=(source, i)) for i, g in enumerate(groups))
        self.prompt_lengths = np.array([len(g.prompt_ids) for g in self.groups])
        self.response_lengths = [np.array([len(r.ids) for r in g.responses]) for g in self.groups]
        self.num_loss_tokens = [
            np.array([len(r.loss_places) for r in g.responses]) for g in self.groups
        ]
        self.rewards = _or_nan([g.responses[0].score for g in self.groups])
        self.advantages = _or_nan([g.responses[0].advantage for g in self.groups])
        self.parts = (("in memory", range(len(self.groups))),)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for group in self.groups:
            labels = [
                (len(r.ids), r.score, r.version, r.logps, r.advantage) for r in group.responses
            ]
            digest.update(repr((group.id, len(group.prompt_ids), group.pairs, labels)).encode())
            ids = [group.prompt_ids, *(r.ids for r in group.responses)]
            digest.update(np.concatenate(ids).tobytes())
            masks = [r.loss_places.tobytes() for r in group.responses if r.loss_mask is not None]
            digest.update(b"".join(masks))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.groups)

    def group(self, index: int) -> Group:
        return self.groups[index]

    def pairs(self, index: int) -> tuple[tuple[int, int], ...]:
        return self.groups[index].pairs

    def samples(self, index: int) -> tuple[bool, ...]:
        return self.groups[index].samples


def _or_nan(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], np.float64)
