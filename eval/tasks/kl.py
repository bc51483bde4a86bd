"""KL: how far a policy has moved from its reference, on its own samples."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveInt

from eval.base import Answer, Decoding, Example, Metric, Row, Summary
from eval.preference_data import Format, TaskPrompts, option_sections
from eval.registry import task
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.errors import DataError

_PER_RESPONSE = ("kl", "kl_k3", "kl_rao_blackwell", "length")


@task(
    "kl",
    version="1",
    kind="model",
    headline="kl",
    source="k1, k3: Schulman 2020, Approximating KL divergence; Rao-Blackwell: arXiv:2504.10637",
    data="an option; for a run, the prompts of its data.eval",
    direction="none",
)
def kl(
    *,
    data: str | None = None,
    format: Format = "auto",
    columns: dict[str, str | None] | None = None,
    split: str | None = None,
    samples: PositiveInt = 1,
    max_new_tokens: PositiveInt = 256,
) -> Kl:
    """KL(π ‖ π_ref) in nats a response, on responses sampled from π at temperature 1, cut at ``max_new_tokens``.

    ``kl``: mean over responses of Σ_t log π(y_t) - log π_ref(y_t) (k1; unbiased, may be negative). ``kl_k3``: of
    Σ_t r_t - 1 - log r_t, r = π_ref/π (unbiased, not negative, heavy tails). ``kl_rao_blackwell``: of Σ_t of the
    exact KL of the two next-token distributions (unbiased, the least variance). ``kl_token``: ``kl`` per token.
    ``entropy``: mean over tokens of the exact entropy of π's next-token distribution, nats. ``length`` in tokens;
    ``eos_rate`` and ``likelier_tokens`` (tokens that π finds likelier than π_ref) in percent. Standard errors are
    over prompts. The reference is the baseline, else the base under MODEL's adapter.

    A vLLM engine and the two scored models share the GPU: leave them room (engine.gpu_memory_utilization).

    Args:
        data: file of prompts or pairs, or a hub data set; default: the prompts of what the run held out.
        format: as in a recipe's sources.
        columns: as in a recipe's sources.
        split: of a hub data set.
        samples: responses a prompt.
        max_new_tokens: longest response; the KL is that of responses cut there.
    """
    sections = option_sections("kl", data, format=format, columns=columns, split=split)
    decoding = Decoding(max_new_tokens, temperature=1.0, num_samples=samples)
    return Kl(TaskPrompts("kl", sections), decoding)


@dataclass(frozen=True)
class _Opened:
    """What sampling and scoring need."""

    generator: Any
    policies: Any
    seed: int
    resources: contextlib.ExitStack


class Kl:
    """See `kl`."""

    batch_size = 64
    uses_baseline = True

    def __init__(self, prompts: TaskPrompts, decoding: Decoding) -> None:
        self.prompts = prompts
        self.preset = decoding

    def adopt_run(self, recipe: Mapping[str, Any]) -> None:
        self.prompts.adopt_run(recipe)

    def examples(self) -> list[Example]:
        return self.prompts.rows.examples

    def open(self, models: Any) -> _Opened:
        from eval.engines import Generator
        from eval.logps import load_policies

        with contextlib.ExitStack() as resources:
            policies = load_policies(models, task="kl", reference=True)
            logs = resources.enter_context(tempfile.TemporaryDirectory())
            generator = Generator(
                models.policy, models.engine, device=models.device, log_dir=Path(logs)
            )
            resources.callback(generator.close)
            generator.start(self._longest(generator, policies.context))
            return _Opened(generator, policies, models.seed, resources.pop_all())

    def rows(self, examples: Sequence[Example], opened: _Opened) -> list[Row]:
        from eval.engines import Ask
        from eval.generate import response_seed
        from eval.kl_terms import kl_terms

        numbers = range(self.preset.num_samples)
        seeds = [
            tuple(response_seed(opened.seed, "kl", example.key, number, 0) for number in numbers)
            for example in examples
        ]
        asks = [
            Ask(example.prompt, self.preset, each, example.options)
            for example, each in zip(examples, seeds, strict=True)
        ]
        answers = opened.generator.answer(asks)
        groups = [
            _group(opened, example, each) for example, each in zip(examples, answers, strict=True)
        ]
        terms = iter(kl_terms(opened.policies, [group for group in groups if group is not None]))
        return [
            _row(example, each, [] if group is None else next(terms))
            for example, each, group in zip(examples, answers, groups, strict=True)
        ]

    def close(self, opened: _Opened) -> None:
        opened.resources.close()

    def summarise(self, rows: Sequence[Row]) -> Summary:
        scored = [row for row in rows if row.values.get("kl") is not None]
        if not scored:
            raise DataError(f"kl: no prompt was answered: {problem_counts(rows)}")
        metrics = {name: mean_metric(values_of(scored, name)) for name in _PER_RESPONSE}
        tokens = [float(row.details["num_tokens"]) for row in scored]
        per_token = {
            "kl_token": ("kl_sum", 1),
            "entropy": ("entropy_sum", 1),
            "likelier_tokens": ("num_likelier", 100),
        }
        for name, (total, scale) in per_token.items():
            metrics[name] = _ratio([row.details[total] for row in scored], tokens, scale)
        metrics["eos_rate"] = mean_metric(values_of(scored, "eos_rate"), 100)
        counts = {
            "n": len(rows),
            "n_responses": sum(row.details["num_responses"] for row in scored),
            "n_tokens": int(sum(tokens)),
            **problem_counts(rows),
            **self.prompts.refused_counts(),
        }
        most = self.preset.max_new_tokens
        note = f"samples at temperature 1, at most {most} tokens; entropy is exact, over the whole vocabulary"
        return Summary(metrics, counts, notes=(note,))

    def _longest(self, generator: Any, context: int | None) -> int:
        prompts = [
            generator.prompt_tokens(example.prompt, example.options) or 0
            for example in self.examples()
        ]
        return min(max(prompts) + self.preset.max_new_tokens, context or math.inf)


def _group(opened: _Opened, example: Example, answers: Sequence[Answer]) -> Any:
    """The sampled ids behind the very ids they were sampled after; None if nothing was, or it is too long."""
    from prefopt.types import Group, Response

    if not any(answer.ids for answer in answers):
        return None
    ids = opened.generator.prompt_ids(example.prompt, example.options)
    assert ids is not None  # it was answered
    longest = len(ids) + max(len(answer.ids or ()) for answer in answers)
    if opened.policies.context is not None and longest > opened.policies.context:
        return None  # the reference's context is shorter than the policy's
    return Group(example.key, ids, tuple(Response(answer.ids) for answer in answers if answer.ids))


def _row(example: Example, answers: Sequence[Answer], terms: Sequence[Any]) -> Row:
    """Means over the prompt's responses, and the sums that per-token numbers are made of."""
    if not terms:
        problem = next((answer.problem for answer in answers if answer.problem), "too_long")
        return Row(example.key, dict.fromkeys((*_PER_RESPONSE, "eos_rate")), {}, problem)

    def mean(name: str) -> float:
        return float(np.mean([getattr(each, name) for each in terms]))

    values = {
        "kl": mean("log_ratio"),
        "kl_k3": mean("k3"),
        "kl_rao_blackwell": mean("exact"),
        "length": mean("num_tokens"),
        "eos_rate": float(np.mean([answer.ended for answer in answers if answer.ids])),
    }
    details = {
        "num_responses": len(terms),
        "num_tokens": sum(each.num_tokens for each in terms),
        "kl_sum": sum(each.log_ratio for each in terms),
        "entropy_sum": sum(each.entropy for each in terms),
        "num_likelier": sum(each.num_likelier for each in terms),
    }
    return Row(example.key, values, details)


def _ratio(totals: Sequence[float], tokens: Sequence[float], scale: float) -> Metric:
    """Σ totals / Σ tokens over prompts, and its standard error by linearisation: a ratio of two means."""
    top, bottom = np.asarray(totals, np.float64), np.asarray(tokens, np.float64)
    ratio = float(top.sum() / bottom.sum())
    if len(top) < 2:
        return Metric(scale * ratio)
    residuals = (top - ratio * bottom) / bottom.mean()
    return Metric(scale * ratio, scale * float(residuals.std(ddof=1) / math.sqrt(len(top))))
