"""Groups of responses made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefopt.signals.base import Signal
from prefopt.types import Candidates, Prompt


def candidates(
    *texts: str,
    fields: dict[str, Any] | None = None,
    prompt: Any = "Question?",
    ids: Sequence[tuple[int, ...]] | None = None,
    prompt_ids: tuple[int, ...] = (1,),
    truncated: Sequence[bool] = (),
    id: str = "row-7",
) -> Candidates:
    """A group; where no ids are given, each response has one id a character."""
    return Candidates(
        Prompt(id, prompt_ids, prompt, fields or {}),
        texts,
        tuple(ids) if ids is not None else tuple(tuple(map(ord, text)) for text in texts),
        tuple(truncated) or (False,) * len(texts),
    )


def scores(signal: Signal, *texts: str, **columns: Any) -> list[float]:
    """The scores of ``texts`` for a prompt with these columns."""
    return signal.score([candidates(*texts, fields=columns)])[0]
