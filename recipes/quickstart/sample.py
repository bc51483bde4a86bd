"""Pairs from the policy's own samples: per prompt one right answer against one wrong answer.

Both sides come from the policy that is about to be trained. That makes the pairs on-policy: the
rejected answers are mistakes this model really makes, not mistakes someone imagined.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefopt.data import Renderer
from prefopt.report.bars import Bar
from recipes.quickstart.task import NUM_DIGITS, score_group

MAX_NEW_TOKENS = NUM_DIGITS + 2  # the answer, its EOS, and one more to see an answer run on


@dataclass(frozen=True)
class PairSet:
    """Pair rows, and how many groups could not give one: a group all right or all wrong teaches nothing."""

    rows: tuple[dict[str, Any], ...]
    num_all_right: int
    num_all_wrong: int


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    num_samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 256,
    label: str = "generating",
) -> list[list[str]]:
    """Returns ``num_samples`` responses for each prompt, in order; greedy at temperature 0.

    The same seed, batch size and machine give the same samples.
    """
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # top_k 0 and top_p 1: the policy's own distribution, not a trimmed one.
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    renderer = Renderer(tokenizer)  # prompts reach the policy as training renders them
    groups: list[list[str]] = []
    torch.manual_seed(seed)
    for start in Bar(range(0, len(prompts), batch_size), desc=label, unit="batch"):
        ids = [list(renderer.prompt_ids(prompt)) for prompt in prompts[start : start + batch_size]]
        inputs = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding_side="left")
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            num_return_sequences=num_samples,
            **sampling,
        )
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        groups += [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]
    return groups


def build_pairs(prompts: Sequence[str], groups: Sequence[Sequence[str]], *, seed: int) -> PairSet:
    """Returns one pair for every prompt whose group holds both a right and a wrong answer.

    The rejected side is drawn from the group's wrong samples, so a common mistake is met more often.
    Rows carry ``prompt``, ``chosen``, ``rejected`` and the two scores.
    """
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    degenerate: Counter[bool] = Counter()
    for prompt, responses in zip(prompts, groups, strict=True):
        scores = score_group(prompt, responses)
        right = [text for text, score in zip(responses, scores, strict=True) if score]
        # An empty answer is wrong, but no side of a pair may be empty.
        wrong = [text for text, score in zip(responses, scores, strict=True) if not score and text]
        if not right or not wrong:
            degenerate[bool(right)] += 1
            continue
        rows.append(
            {
                "id": prompt,
                "prompt": prompt,
                "chosen": right[0],
                "rejected": draw.choice(wrong),
                "score_chosen": 1.0,
                "score_rejected": 0.0,
            }
        )
    return PairSet(tuple(rows), num_all_right=degenerate[True], num_all_wrong=degenerate[False])
