"""Killed at random moments while it generates and judges, an evaluation ends as if nothing had happened."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.eval.runs import read_jsonl, write_chat_model, write_jsonl
from tests.recipes.commands import prefopt, run
from tests.signals.chat_server import Answer, chat_server

PROMPTS = 150
"""Three chunks of answers, the first two of them killed."""
MORE = 20
"""Verdicts stored beyond those at which it is killed: it dies at work, not waiting."""


class Judge:
    """A verdict is a function of what it reads; some answers hold none.

    An evaluation that is to be killed gets none from some number of stored ones on: it cannot end before, however
    long the killer is kept waiting.
    """

    def __init__(self) -> None:
        self.stored: Callable[[], int] = lambda: 0
        self._life, self._limit = 0, math.inf
        self._changed = threading.Condition()

    def new_life(self, limit: float) -> None:
        with self._changed:
            self._life, self._limit = self._life + 1, limit
            self._changed.notify_all()

    def __call__(self, body: dict[str, Any]) -> Answer:
        with self._changed:
            life = self._life
            if self.stored() >= self._limit:
                self._changed.wait_for(lambda: life != self._life)
        text = body["messages"][0]["content"]
        return Answer(f"[[{'ABC?'[sum(map(ord, text)) % 4]}]]", delay_s=0.01)


def _stored(output: Path, name: str) -> int:
    """Records in a store so far."""
    file = output / "win_rate" / f"{name}.jsonl"
    return file.read_bytes().count(b"\n") - 1 if file.is_file() else 0


# Ten kills find no other kind of moment than three do: answers, the baseline's, verdicts.
@pytest.mark.parametrize("judging", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_an_evaluation_killed_at_random_moments_ends_with_the_same_results(
    tmp_path: Path, judging: int
) -> None:
    policy = write_chat_model(tmp_path / "policy")
    baseline = write_chat_model(tmp_path / "baseline", seed=1)
    rows = [
        {"prompt": f"Tell me about {n * 37 % 101}, {n}.", "key": f"k{n}"} for n in range(PROMPTS)
    ]
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    judge = Judge()
    with chat_server(judge) as server:
        command = [
            *("eval", str(policy), "--tasks", "win_rate", "--baseline", str(baseline)),
            *(
                f"tasks.win_rate.data={data}",
                "decoding.max_new_tokens=32",
                "decoding.temperature=1.0",
            ),
            *(f"judge.base_url={server.base_url}", "judge.model=j", "judge.concurrency=2"),
        ]
        environment = {"PREFOPT_CACHE": str(tmp_path / "cache")}
        calm, killed = tmp_path / "calm", tmp_path / "killed"
        code, said = run(*command, "--output", str(calm), log=tmp_path / "calm.log", **environment)
        assert code == 0, said
        environment = {"PREFOPT_CACHE": str(tmp_path / "cache-of-killed")}
        questions = _stored(calm, "judgments")
        judge.stored = lambda: _stored(killed, "judgments")
        for number, (name, count) in enumerate(_moments(questions, judging)):
            judge.new_life(count + MORE if name == "judgments" else 0)
            arguments = [*command, "--output", str(killed)]
            with prefopt(*arguments, log=tmp_path / f"{number}.log", **environment) as started:
                started.wait_until(
                    lambda name=name, count=count: _stored(killed, name) >= count, f"{count} {name}"
                )
                time.sleep(random.uniform(0, 0.02))
                started.send(9)
                assert started.wait() == -9, started.output
        judge.new_life(math.inf)
        code, said = run(*command, "--output", str(killed), log=tmp_path / "end.log", **environment)
        assert code == 0, said
    for name in ("results.json", "win_rate/examples.jsonl"):
        assert (killed / name).read_bytes() == (calm / name).read_bytes()
    stored = [record["id"] for record in read_jsonl(killed / "win_rate" / "judgments.jsonl")[1:]]
    assert len(stored) == len(set(stored))


def _moments(questions: int, judging: int) -> list[tuple[str, int]]:
    """Stores and sizes at which to kill: at chunks of answers, and ``judging`` times while the judge is asked."""
    rng = random.Random(0)
    counts = sorted(rng.sample(range(1, questions - MORE), judging))
    answers = [("generations", 1), ("baseline", 1)]
    if judging > 1:
        answers.insert(1, ("generations", PROMPTS // 2))
    return [*answers, *(("judgments", count) for count in counts)]
