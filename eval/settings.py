"""What an evaluation is run with: sections of ``--config`` files and of ``section.key=value`` overrides.

The string under a field is its documentation and its ``--help``. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from eval.registry import has_option
from prefopt.errors import ConfigError
from prefopt.recipe.load import load_settings as validated_settings
from prefopt.recipe.schema import (
    Engine,
    HFSection,
    ModelSection,
    NoEffect,
    NonNegativeFloat,
    PathText,
    Section,
)
from prefopt.recipe.section import Newer
from prefopt.recipe.thinking import DEFAULT_TAGS, Thinking
from prefopt.recipe.yaml_file import Document, apply_overrides, read_yaml


class JudgeSection(Section):
    """The chat model that judges: any OpenAI-compatible endpoint."""

    base_url: Annotated[str, NoEffect("rows")]
    """Up to and including the version, e.g. http://localhost:8000/v1 (``vllm`` serves the protocol, too)."""
    model: str
    """Name of the model there."""
    api_key_env: Annotated[str | None, NoEffect("rows")] = None
    """Environment variable that holds the key; leave out for none. The key is never stored or logged."""
    temperature: NonNegativeFloat | None = None
    """Default: what the benchmark published."""
    max_tokens: PositiveInt | None = None
    """Longest answer; default: what the benchmark published."""
    thinking: Annotated[Thinking, Newer()] = DEFAULT_TAGS
    """The marks between which the judge thinks: what stands there is no verdict, and a reply that never leaves its
    thinking has none. Default: the marks of the usual models. `null` reads replies as they are."""
    sampling: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request (`{seed: 1}`); one that is null is taken out of the benchmark's own."""
    concurrency: Annotated[PositiveInt, NoEffect("rows")] = 8
    """Requests under way at a time."""
    timeout_s: Annotated[PositiveFloat, NoEffect("rows")] = 120.0
    """Longest wait for one answer."""
    deadline_s: Annotated[PositiveFloat, NoEffect("rows")] = 900.0
    """Longest wait for one request with its retries (429, 5xx, connection errors)."""
    cache_dir: Annotated[PathText | None, NoEffect("rows")] = None
    """Of the answers; default: `$PREFOPT_CACHE` or `~/.cache/prefopt`."""
    usd_per_million_prompt_tokens: Annotated[NonNegativeFloat, NoEffect("rows")] = 0.0
    """For the cost in the result."""
    usd_per_million_completion_tokens: Annotated[NonNegativeFloat, NoEffect("rows")] = 0.0
    """As above."""


class DecodingSection(Section):
    """In place of every task's published preset, and said in the result: leave it out to be comparable."""

    temperature: NonNegativeFloat | None = None
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus sampling."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Sample from the k likeliest tokens; 0 takes all."""
    max_new_tokens: PositiveInt | None = None
    """Longest answer in tokens."""


class EvalSettings(Section):
    """A whole evaluation."""

    model: ModelSection
    """What is evaluated; `path` comes from the command line: a model, an adapter, or a run directory."""
    baseline: ModelSection | None = None
    """What it is compared with: the other side of pairwise judges, the reference of implicit rewards and KL."""
    baseline_answers: PathText | None = None
    """A file of answers in place of a baseline that generates."""
    engine: Engine = HFSection()
    """What generates."""
    judge: JudgeSection | None = None
    """Leave out where no task needs a judge."""
    decoding: DecodingSection = DecodingSection()
    """In place of the tasks' presets."""
    tasks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options by task: `tasks: {gsm8k: {max_new_tokens: 512}}`. `prefopt eval list TASK` shows them."""
    thinking: Thinking = DEFAULT_TAGS
    """The marks between which the model thinks, `["<think>", "</think>"]` or a list of such pairs: what stands
    outside them is the answer that tasks score and judges see, and a response that never leaves its thinking has
    none (`unended_thinking`). Default: the marks of the usual models. `null` takes responses as they are. The task
    `signals` goes by each signal's own `thinking`."""
    seed: int = 0
    """Of sampling: every example, sample and turn has a seed of its own made from it."""
    limit: PositiveInt | None = None
    """Only the first examples of each task; the result says so and is not compared with whole ones."""
    device: str | None = None
    """Torch device of what is scored by log-prob or reward; default: CUDA where there is one, else the CPU."""
    batch_tokens: PositiveInt = 16384
    """Most tokens in one forward of what is scored by log-prob."""


def load_settings(
    config: Path | None,
    overrides: Sequence[str],
    *,
    model: str,
    baseline: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> EvalSettings:
    """The validated settings; what the command line names wins over the file.

    Raises: ConfigError with every problem.
    """
    document = apply_overrides(read_yaml(config) if config else Document({}), overrides)
    raw = dict(document.raw)
    for key, path in (("model", model), ("baseline", baseline)):
        if path is not None:
            section = raw.get(key) or {}
            raw[key] = {**section, "path": path} if isinstance(section, dict) else section
    raw |= {key: value for key, value in (("limit", limit), ("seed", seed)) if value is not None}
    return validated_settings(EvalSettings, replace(document, raw=raw), config)


def score_options(task: str, given: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Options of a task for `prefopt eval score`: ``--calibration``, ``--data`` and ``key=value``.

    ``key`` may be written ``tasks.<task>.key``, as a whole evaluation has it.
    Raises: ConfigError for an option that the task does not take, or that does not parse.
    """
    prefix = f"tasks.{task}."
    document = apply_overrides(Document({}), [item.removeprefix(prefix) for item in overrides])
    problems = list(document.problems)
    options = dict(document.raw)
    for name, value in given.items():
        if value is None:
            continue
        if not has_option(task, name):
            problems.append(f"--{name} = {value!r}: {task} takes none; `prefopt eval list {task}`")
        options[name] = value
    if problems:
        raise ConfigError(problems)
    return options
