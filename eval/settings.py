"""What an evaluation is run with: sections of ``--config`` files and of ``section.key=value`` overrides.

The string under a field is its documentation and its ``--help``. No torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from prefopt.recipe.schema import (
    Engine,
    HFSection,
    ModelSection,
    NoEffect,
    NonNegativeFloat,
    PathText,
    Section,
)


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
    seed: int = 0
    """Of sampling: every example, sample and turn has a seed of its own made from it."""
    limit: PositiveInt | None = None
    """Only the first examples of each task; the result says so and is not compared with whole ones."""
    device: str | None = None
    """Torch device of what is scored by log-prob or reward; default: CUDA where there is one, else the CPU."""
    batch_tokens: PositiveInt = 16384
    """Most tokens in one forward of what is scored by log-prob."""
