"""Rules about data sources: what a row must have, and keys that only some sources take."""

from __future__ import annotations

from collections.abc import Iterator

from prefopt.recipe.checks.rules import (
    PROBE_PROMPTS,
    Finding,
    Surroundings,
    named_sources,
    rule,
    was_set,
)
from prefopt.recipe.checks.settings import objective_needs, reads_samples
from prefopt.recipe.local_paths import is_local_data
from prefopt.recipe.registry import Need
from prefopt.recipe.schema import Recipe, SourceSection

HUB_ONLY = ("split", "subset", "revision")


@rule("data", "eval")
def sources_take_their_keys(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    for key, source in named_sources(recipe):
        if is_local_data(source.path):
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


@rule("data", "stage", "regime", "eval", "objective")
def sources_have_their_columns(recipe: Recipe, _: Surroundings) -> Iterator[Finding]:
    for key, source in named_sources(recipe):
        columns = source.columns
        yield from _turns(recipe, key, source)
        if not _is_trained_on(recipe, key):
            continue
        yield from _margins(recipe, key, source)
        if reads_samples(recipe):
            yield from _sample_columns(recipe, key, source)
            continue
        for name in sorted(_OF_SAMPLES & columns.model_fields_set):
            yield Finding(
                f"{key}.columns.{name}",
                "would be ignored: the rows of this run are no samples with a reward. Leave it out",
            )
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


def _turns(recipe: Recipe, key: str, source: SourceSection) -> Iterator[Finding]:
    """Earlier turns carry loss in SFT on dialogues, and nowhere else."""
    name = f"{key}.columns.turns"
    if source.columns.turns == "last":
        return
    if recipe.stage != "sft" or not _is_trained_on(recipe, key):
        yield Finding(
            name,
            "is for rows that stage = 'sft' trains on; elsewhere the last turn alone is a response",
        )
    elif source.format == "text":
        yield Finding(
            name, "plain text has no turns: leave it out, or read dialogues as format: chat"
        )


def _margins(recipe: Recipe, key: str, source: SourceSection) -> Iterator[Finding]:
    """A margin is in the loss of a reward model, for every pair or none."""
    columns, name = source.columns, f"{key}.columns.margin"
    if recipe.stage != "reward_model":
        if columns.margin is not None:
            yield Finding(
                name, "would be ignored: only stage = 'reward_model' has a margin in its loss"
            )
        return
    if columns.margin is not None and (columns.score_chosen or columns.score_rejected):
        yield Finding(
            name, "is what score_chosen minus score_rejected would be: name it or the two"
        )
    if columns.margin is None and recipe.data.has_margins:
        yield Finding(
            name,
            "is missing: other sources have a margin in the loss. Name a column in every source",
        )


_OF_SAMPLES = {"response", "reward", "advantage", "ended"}


def _sample_columns(recipe: Recipe, key: str, source: SourceSection) -> Iterator[Finding]:
    """Of a source of samples, or of pairs that are read as two samples each."""
    columns, named = source.columns, source.columns.model_fields_set
    of_pairs = columns.score_chosen is not None and columns.score_rejected is not None
    by_advantage = recipe.data.sampling.name == "advantage"
    if of_pairs and (by_advantage or Need.ADVANTAGES in objective_needs(recipe)):
        yield Finding(
            f"{key}.columns",
            "says that its rows are pairs with scores, and this run goes by advantages. Make samples of them "
            "first: the pipeline stage `advantage`",
        )
    for name in sorted(_OF_PAIRS & named) if _OF_SAMPLES & named else ():
        yield Finding(
            f"{key}.columns.{name}",
            f"is of a pair, and columns.{min(_OF_SAMPLES & named)} of a sample. Keep one of the two",
        )
    if source.drop_ties:
        yield Finding(f"{key}.drop_ties", "samples are weighed one by one. Leave it out")


_OF_PAIRS = {"chosen", "rejected", "score_chosen", "score_rejected"}


def _is_trained_on(recipe: Recipe, key: str) -> bool:
    """False for sources of prompts: rollouts read those without their responses, or with one of them."""
    if key.startswith(("data.prompts", PROBE_PROMPTS)):
        return False
    only_prompts = recipe.rollouts is not None and not recipe.rollouts.offline_pairs
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
                "is also trained on, so its numbers say how well it is learnt by heart. To see more, take "
                "another split, or hold out a share with data.eval_frac",
                is_note=True,
            )


def _rows(source: SourceSection) -> tuple[str | None, ...]:
    return source.path, source.subset, source.split
