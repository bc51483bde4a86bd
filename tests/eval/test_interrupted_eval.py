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
PROMPTS = 400


def _verdict(body: dict[str, Any]) -> Answer:
    """Slow enough to be killed in between, and a function of what it reads; some answers hold no verdict."""
    text = body["messages"][0]["content"]
    letter = "ABC?"[sum(map(ord, text)) % 4]
    return Answer(f"[[{letter}]]", delay_s=0.01)


def _progress(output: Path) -> tuple[int, int]:
    """Bytes of everything stored so far, by answers and by judgments."""
    sizes = [
        sum(p.stat().st_size for p in output.glob(f"*/{name}.jsonl"))
        for name in ("generations", "judgments")
    ]
    return sizes[0], sizes[1]


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
        started = time.monotonic()
        code, said = run(*command, "--output", str(calm), log=tmp_path / "calm.log", **environment)
        assert code == 0, said
        took = time.monotonic() - started
        environment = {"PREFOPT_CACHE": str(tmp_path / "cache-of-killed")}
        generating, judging = _kill_repeatedly(
            [*command, "--output", str(killed)], killed, took, tmp_path, environment
        )
        code, said = run(*command, "--output", str(killed), log=tmp_path / "end.log", **environment)
        assert code == 0, said
    assert generating and judging, "kills must hit both phases"
    for name in ("results.json", "win_rate/examples.jsonl"):
        assert (killed / name).read_bytes() == (calm / name).read_bytes()
    stored = [record["id"] for record in read_jsonl(killed / "win_rate" / "judgments.jsonl")[1:]]
    assert len(stored) == len(set(stored))


def _kill_repeatedly(
    command: list[str], output: Path, took: float, tmp_path: Path, environment: dict[str, str]
) -> tuple[int, int]:
    """Kills that came while answers, and while judgments, were being stored."""
    rng = random.Random(0)
    generating = judging = 0
    for number in range(KILLS):
        with prefopt(*command, log=tmp_path / f"killed-{number}.log", **environment) as started:
            before = _progress(output)
            started.wait_until(
                lambda before=before: _progress(output) != before, "storing something"
            )
            time.sleep(rng.uniform(0, took / KILLS / 3))
            answers, judgments = _progress(output)
            assert started.process.is_alive(), started.output
            started.send(9)
            started.wait()
        judging += judgments > 0
        generating += judgments == 0 and answers > 0
    return generating, judging
