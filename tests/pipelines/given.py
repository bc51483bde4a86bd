"""A plugin for tests: the rows of a JSON lines file as they are, of whatever kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from data_pipelines.base import Dropped, Place, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import Row, RowKind


@stage("given", works="whole", gives="either", source="tests")
class Given(StageSettings):
    """Rows as a file has them."""

    path: str
    """JSON lines."""
    kind: str = "prompts"
    """Of the rows."""
    keep: tuple[str, ...] = Field(default=("answer",), strict=False)
    """Columns of the user's that the rows have."""

    @property
    def gives_kind(self) -> RowKind:
        return RowKind(self.kind)

    def run(self, place: Place) -> Iterator[Row | Dropped]:
        for line in Path(self.path).read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
