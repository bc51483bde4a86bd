"""Rules about data sources: what a row must have, and keys that only some sources take."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.checks.files import is_local_data
from prefopt.checks.rules import (
    PROBE_PROMPTS,
    Finding,
    Surroundings,
    named_sources,
    rule,
    was_set,
)
from prefopt.config.schema import Recipe, SourceSection

HUB_ONLY = ("split", "subset", "revision")


@rule("data", "eval")
def sources_take_their_keys(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    for key, source in named_sources(recipe):
        if is_local_data(source):
            for name in HUB_ONLY:
                if getattr(source, name) is not None:
                    yield Finding(
                        f"{key}.{name}",
                        f"would be ignored: {source.path} is a local file. Leave it out",
                    )
        elif source.split is None:
            yield Finding(
                f"{key}.path",
                "no such file or directory; if it is a hub data set, say which split, e.g. "
                "split: train",
            )


@rule("data", "stage", "regime", "eval")
def sources_have_their_columns(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    for key, source in named_sources(recipe):
        columns = source.columns
        if not _is_read_as_pairs(recipe, key):
            continue
        if recipe.stage == "sft":
            if was_set(columns, "rejected") and columns.rejected is not None:
                yield Finding(
                    f"{key}.columns.rejected",
                    "would be ignored: stage = 'sft' trains on chosen only",
                )
        elif columns.rejected is None:
            yield Finding(
                f"{key}.columns.rejected",
                f"is null, but stage = '{recipe.stage}' compares two responses: name their column",
            )
        scores = (columns.score_chosen, columns.score_rejected)
        if (scores[0] is None) != (scores[1] is None):
            yield Finding(
                f"{key}.columns", "name both score columns or neither: one compares nothing"
            )
        if source.drop_ties and None in scores:
            yield Finding(
                f"{key}.drop_ties",
                "needs columns.score_chosen and columns.score_rejected: a tie is two equal scores",
            )


def _is_read_as_pairs(recipe: Recipe, key: str) -> bool:
    """False for sources of prompts: rollouts read those without their responses, or with one of them."""
    if key.startswith(("data.prompts", PROBE_PROMPTS)):
        return False
    only_prompts = recipe.has_rollouts and not recipe.regime.offline_pairs
    return not (only_prompts and key.startswith("data.train"))


@rule("data")
def lengths_leave_room(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    data = recipe.data
    if data.max_prompt_tokens is not None and data.max_prompt_tokens >= data.max_length_tokens:
        yield Finding(
            "data.max_prompt_tokens",
            f"must be below max_length_tokens = {data.max_length_tokens}, which bounds prompt and "
            "response together: a prompt that long leaves no room for a response",
        )


@rule("data")
def held_out_rows_are_held_out(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    data = recipe.data
    if data.eval and data.eval_frac:
        yield Finding(
            "data.eval_frac",
            "would be ignored: data.eval already says what to evaluate on. Keep one of the two",
        )
    train = {_rows(source) for source in data.train}
    for index, source in enumerate(data.eval):
        if _rows(source) in train:
            yield Finding(
                f"data.eval.{index}.path",
                "is also trained on, so its accuracy would say nothing. Take another split, or hold "
                "out a share with data.eval_frac",
            )


def _rows(source: SourceSection) -> tuple[str | None, ...]:
    return source.path, source.subset, source.split
