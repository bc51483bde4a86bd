"""Killed at random moments while it generates and judges, an evaluation ends as if nothing had happened."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from tests.eval.runs import read_jsonl, write_chat_model, write_jsonl
from tests.recipes.commands import prefopt, run
from tests.signals.chat_server import Answer, chat_server

KILLS = 10
PROMPTS = 150
"""Three chunks of answers, the first two of them killed."""


def _verdict(body: dict[str, Any]) -> Answer:
    """Slow enough to be killed in between, and a function of what it reads; some answers hold no verdict."""
    text = body["messages"][0]["content"]
    letter = "ABC?"[sum(map(ord, text)) % 4]
    return Answer(f"[[{letter}]]", delay_s=0.02)


def _stored(output: Path, name: str) -> int:
    """Records in a store so far."""
    file = output / "win_rate" / f"{name}.jsonl"
    return file.read_bytes().count(b"\n") - 1 if file.is_file() else 0


def test_an_evaluation_killed_ten_times_ends_with_the_same_results(tmp_path: Path) -> None:
    policy = write_chat_model(tmp_path / "policy")
    baseline = write_chat_model(tmp_path / "baseline", seed=1)
    rows = [
        {"prompt": f"Tell me about {n * 37 % 101}, {n}.", "key": f"k{n}"} for n in range(PROMPTS)
    ]
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    with chat_server(_verdict) as server:
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
        for number, (name, count) in enumerate(_moments(questions)):
            arguments = [*command, "--output", str(killed)]
            with prefopt(*arguments, log=tmp_path / f"{number}.log", **environment) as started:
                started.wait_until(
                    lambda name=name, count=count: _stored(killed, name) >= count, f"{count} {name}"
                )
                time.sleep(random.uniform(0, 0.02))
                started.send(9)
                assert started.wait() == -9, started.output
        code, said = run(*command, "--output", str(killed), log=tmp_path / "end.log", **environment)
        assert code == 0, said
    for name in ("results.json", "win_rate/examples.jsonl"):
        assert (killed / name).read_bytes() == (calm / name).read_bytes()
    stored = [record["id"] for record in read_jsonl(killed / "win_rate" / "judgments.jsonl")[1:]]
    assert len(stored) == len(set(stored))


def _moments(questions: int) -> list[tuple[str, int]]:
    """Stores and sizes at which to kill: at three chunks of answers, the others while the judge is asked."""
    rng = random.Random(0)
    judging = sorted(rng.randrange(1, questions * 4 // 5) for _ in range(KILLS - 3))
    return [
        ("generations", 1),
        ("generations", PROMPTS // 2),
        ("baseline", 1),
        *(("judgments", count) for count in judging),
    ]
