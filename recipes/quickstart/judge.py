"""A judge small enough to train in place: its tokenizer and template, its comparisons, and serving it by vLLM."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.quickstart.prepare import make_model, make_tokenizer
from recipes.quickstart.task import ALPHABET, Problem, score_group

TEMPLATE = "{prompt}{response_a}|{response_b}>"
"""What the judge reads; `prefopt eval` fills it as it would a page of English."""
VERDICTS = {"a": "[[A]]", "b": "[[B]]", "tie": "[[C]]"}
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[0]['content'] }}"
NAME = "judge"
KEY_VARIABLE = "QUICKSTART_JUDGE_KEY"
"""For `api_key_env`: what the server asks for, in the environment while it runs."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one problem."""

    problem: Problem
    first: str
    second: str

    @property
    def prompt(self) -> str:
        values = {
            "prompt": self.problem.prompt,
            "response_a": self.first,
            "response_b": self.second,
        }
        return TEMPLATE.format(**values)

    @property
    def verdict(self) -> str:
        """By the task's program: the right one, or a tie of two right or two wrong ones."""
        a, b = score_group(self.problem.prompt, [self.first, self.second])
        return VERDICTS["a" if a > b else "b" if b > a else "tie"]

    @property
    def swapped(self) -> Comparison:
        return Comparison(self.problem, self.second, self.first)


def write_judge_base(directory: Path, *, seed: int) -> None:
    """An untrained model that also knows the signs of comparisons and verdicts."""
    tokenizer = make_tokenizer(ALPHABET + "|>[]ABC")
    tokenizer.chat_template = CHAT_TEMPLATE
    model = make_model(tokenizer, seed=seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def comparisons(problems: Sequence[Problem], *, seed: int) -> list[Comparison]:
    """One a problem: right, careless and otherwise wrong answers against each other, in random order."""
    draw = random.Random(seed)
    found = []
    for problem in problems:
        wrong = _corrupted(problem.answer, draw)
        kinds = [
            (problem.answer, problem.careless_answer),
            (problem.answer, wrong),
            (problem.careless_answer, wrong),
        ]
        first, second = draw.choices(kinds, weights=(6, 3, 1))[0]
        comparison = Comparison(problem, first, second)
        found.append(comparison.swapped if draw.random() < 0.5 else comparison)
    return found


def judge_rows(found: Sequence[Comparison]) -> list[dict[str, str]]:
    """Demonstrations for SFT."""
    return [{"prompt": each.prompt, "response": each.verdict} for each in found]


@contextlib.contextmanager
def served(model: Path, log: Path) -> Iterator[str]:
    """The base URL of a vLLM server with ``model``, until the block ends. Raises: EngineError if it cannot."""
    from prefopt.engines.vllm.hosts import StartedHost

    arguments: dict[str, Any] = {
        "model": str(model),
        "served_model_name": NAME,
        "dtype": "float32",
        "max_model_len": 64,
        "enforce_eager": True,
        "generation_config": "vllm",
        "kv_cache_memory_bytes": 2**28,
    }
    host = StartedHost(arguments, log=log, startup_timeout_s=600.0, max_restarts=0)
    try:
        host.begin()
        host.wait_until_ready()
        os.environ[KEY_VARIABLE] = host.key
        yield f"{host.client.url}/v1"
    finally:
        os.environ.pop(KEY_VARIABLE, None)
        host.close()


def _corrupted(answer: str, draw: random.Random) -> str:
    """Two neighbours swapped, or one digit replaced or left out: as a policy errs that is not careless."""
    at = draw.randrange(len(answer) - 1)
    kind = draw.randrange(3)
    if kind == 0 and answer[at] != answer[at + 1]:
        return answer[:at] + answer[at + 1] + answer[at] + answer[at + 2 :]
    if kind == 1:
        return answer[:at] + answer[at + 1 :]
    other = draw.choice([digit for digit in "0123456789" if digit != answer[at]])
    return answer[:at] + other + answer[at + 1 :]
