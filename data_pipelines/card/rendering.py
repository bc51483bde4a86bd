"""What training will make of the pairs with a tokenizer: lengths in tokens, BOS, end tokens, prompt as prefix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.card.findings import Section, TableView, share_check
from data_pipelines.card.measures import length_section
from data_pipelines.card.pairs import PairView

_BATCH = 500


def rendered_sections(sample: Sequence[PairView], tokenizer: Any) -> list[Section]:
    """Renders a sample as training does, and looks at the ids.

    Raises: ModelError for chat messages and a tokenizer without a chat template.
    """
    from prefopt.data.render import Renderer

    renderer = Renderer(tokenizer)
    refused: Counter[str] = Counter()
    bos = 0
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    for start in range(0, len(sample), _BATCH):
        for found in _render(renderer, sample[start : start + _BATCH], refused):
            prompt, sides = found.prompt_ids, found.responses
            bos += any(_num_bos((*prompt, *ids), tokenizer) > 1 for ids in sides)
            for name, ids in zip(lengths, (prompt, *sides), strict=True):
                lengths[name].append(len(ids))
    total = len(sample)
    checks = (
        share_check(
            "rows the template refuses", sum(refused.values()), total, look=0.0, stop=0.01, unit="sampled pairs",
            advice="training would reject them: " + (", ".join(refused) or ""),
        ),
        share_check(
            "more than one BOS", bos, total, look=0.0, stop=0.0, unit="sampled pairs",
            advice="the texts hold a BOS of their own in their midst: take it out",
        ),
    )  # fmt: skip
    tables = ()
    if refused:
        rows = tuple((name, f"{n:,}") for name, n in refused.most_common())
        tables = (TableView("Refused, by reason", ("reason", "sampled pairs"), rows),)
    numbers = {
        "num_sampled": total,
        "refused": dict(refused),
        "num_double_bos": bos,
    }
    note = f"{total:,} pairs drawn by hash, rendered as training renders them."
    sections = [
        Section("template", "Template and tokenizer", checks, numbers, tables=tables, note=note)
    ]
    if lengths["chosen"]:
        arrays = {name: np.asarray(values, dtype=np.int32) for name, values in lengths.items()}
        sections.append(length_section(arrays, "tokens", note))
    return sections


def _render(renderer: Any, batch: Sequence[PairView], refused: Counter[str]) -> list[Any]:
    from prefopt.data.render import Request
    from prefopt.data.rows import Refused

    requests = [Request(pair.prompt, pair.responses, options=pair.options) for pair in batch]
    found = []
    for each in renderer.render_batch(requests):
        if isinstance(each, Refused):
            refused[str(each.reason)] += 1
        else:
            found.append(each)
    return found


def _num_bos(ids: Sequence[int], tokenizer: Any) -> int:
    """BOS tokens of a row; a tokenizer whose BOS is also its end token cannot tell."""
    bos = tokenizer.bos_token_id
    return 0 if bos is None or bos == tokenizer.eos_token_id else ids.count(bos)
