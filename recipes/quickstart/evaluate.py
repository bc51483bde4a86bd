"""The two numbers of the quickstart, on held-out prompts, each with its standard error.

Written against plain `transformers`, not against the library: the check must not share its subject's bugs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.report.bars import Bar
from recipes.quickstart.sample import generate
from recipes.quickstart.task import score_group


@dataclass(frozen=True)
class Accuracy:
    """A fraction of ``count`` independent items (one a prompt), with its binomial standard error."""

    value: float
    count: int

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.value * (1 - self.value) / self.count)


@dataclass(frozen=True)
class Change:
    """One measurement before and after training."""

    before: Accuracy
    after: Accuracy

    @property
    def standard_error(self) -> float:
        """Of the difference, as if before and after had different prompts; on the same ones it is less."""
        return math.hypot(self.before.standard_error, self.after.standard_error)

    @property
    def is_improvement(self) -> bool:
        """True when after beats before by more than two standard errors of the difference."""
        return self.after.value - self.before.value > 2 * self.standard_error

    def as_dict(self) -> dict[str, float]:
        return {
            "before": self.before.value,
            "before_se": self.before.standard_error,
            "after": self.after.value,
            "after_se": self.after.standard_error,
            "count": self.after.count,
        }


def task_accuracy(model: Any, tokenizer: Any, prompts: Sequence[str], *, label: str) -> Accuracy:
    """Fraction of prompts whose greedy answer is exactly right."""
    groups = generate(model, tokenizer, prompts, label=label)
    scores = [score_group(prompt, group)[0] for prompt, group in zip(prompts, groups, strict=True)]
    return Accuracy(sum(scores) / len(scores), len(scores))


def preference_accuracy(
    model: Any, tokenizer: Any, pairs: Sequence[dict[str, Any]], *, label: str
) -> Accuracy:
    """Fraction of pairs whose chosen side has the higher implicit SimPO reward, its mean token log-prob."""
    chosen = mean_logps(model, tokenizer, [(p["prompt"], p["chosen"]) for p in pairs], label=label)
    rejected = mean_logps(
        model, tokenizer, [(p["prompt"], p["rejected"]) for p in pairs], label=label
    )
    wins = sum(c > r for c, r in zip(chosen, rejected, strict=True))
    return Accuracy(wins / len(pairs), len(pairs))


@torch.inference_mode()
def mean_logps(
    model: Any,
    tokenizer: Any,
    rows: Sequence[tuple[str, str]],
    *,
    batch_size: int = 256,
    label: str = "log-probs",
) -> list[float]:
    """Mean natural log-prob of each response's tokens given its prompt, terminal EOS included."""
    means: list[float] = []
    for start in Bar(range(0, len(rows), batch_size), desc=label, unit="batch"):
        chunk = rows[start : start + batch_size]
        prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in chunk]
        responses = [
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for _, text in chunk
        ]
        ids, mask, is_response = _pad_right(prompts, responses, tokenizer.pad_token_id)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        token_logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        kept = is_response[:, 1:]
        # No division by zero: every response holds at least its EOS.
        means += ((token_logps * kept).sum(-1) / kept.sum(-1)).tolist()
    return means


def _pad_right(
    prompts: list[list[int]], responses: list[list[int]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and response mask, each (rows, width)."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    starts = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    position = torch.arange(width)[None]
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    mask = position < lengths
    return ids, mask.long(), mask & (position >= starts)
