"""From prompts to a better policy: ``python -m recipes.quickstart.from_prompts``, or `make quickstart-prompts`.

prompts → sample (vLLM) → verify → pair → SimPO → evaluate, each step the command a user would type. It starts
from the quickstart's SFT policy, made first unless an earlier quickstart of this seed left it. What it writes is
under ``runs/quickstart-prompts``, a policy it had to make under ``runs/quickstart``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.quickstart.prepare import write_jsonl
from recipes.quickstart.run import (
    ROOT,
    SUMMARY,
    Clock,
    console,
    has_policy,
    launch,
    make_policy,
    make_splits,
    run_prefopt,
    set_environment,
)
from recipes.quickstart.run import RUN_DIR as QUICKSTART

RUN_DIR = Path("runs/quickstart-prompts")  # as pipeline.yaml has it, relative to ROOT
PIPELINE = "recipes/quickstart/pipeline.yaml"
LAST_STAGE = "filter"
NUM_PROMPTS = 2000
NUM_HELD_OUT = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 0 if held-out reward beats its start by two standard errors, else 1."""
    parser = argparse.ArgumentParser(prog="make quickstart-prompts", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of task, model, samples and training")
    seed = parser.parse_args(argv).seed
    os.chdir(ROOT)
    set_environment()
    clock = Clock()
    if has_policy(seed):
        splits, done = make_splits(seed), 0
    else:
        splits, done = make_policy(seed, clock, num_phases=5), 2
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    write_prompts(splits)
    with clock.phase("data", f"{done + 1}/{done + 3}  prompts → sample → verify → pair"):
        run_prefopt("data", "build", PIPELINE, f"seed={seed}")
    with clock.phase("simpo", f"{done + 2}/{done + 3}  SimPO with LoRA on the pairs"):
        launch(
            "recipes/simpo.py",
            "recipes/quickstart/simpo.yaml",
            *training_overrides(),
            seed=seed,
        )
    with clock.phase("evaluate", f"{done + 3}/{done + 3}  both policies on held-out prompts"):
        for name, policy in (("before", QUICKSTART / "sft"), ("after", RUN_DIR / "simpo")):
            evaluate(policy, RUN_DIR / name)
    return report(clock.seconds)


def write_prompts(splits: Any) -> None:
    """Prompts to sample for, and others to evaluate on."""
    for name, problems in (
        ("prompts", splits.preference[:NUM_PROMPTS]),
        ("held_out", splits.held_out[:NUM_HELD_OUT]),
    ):
        rows = [{"id": problem.digits, "prompt": problem.prompt} for problem in problems]
        write_jsonl(RUN_DIR / f"{name}.jsonl", rows)


def training_overrides() -> list[str]:
    """What is other than in the quickstart's SimPO recipe: the pipeline's last folder, a tenth of it held out."""
    return [
        f"data.train.0.path={RUN_DIR / 'data' / LAST_STAGE}",
        "data.eval=[]",
        "data.eval_frac=0.1",
        f"run.output_dir={RUN_DIR / 'simpo'}",
    ]


def evaluate(policy: Path, output: Path) -> None:
    """Greedy answers to the held-out prompts, scored by the task's own program."""
    run_prefopt(
        *("eval", policy, "--tasks", "signals", "--output", output),
        "engine.name=hf",  # 500 short answers: done before vLLM would have started
        *("decoding.temperature=0", "decoding.max_new_tokens=10"),
        f"tasks.signals.data={RUN_DIR / 'held_out.jsonl'}",
        "tasks.signals.format=text",
        "tasks.signals.signals=[{name: sorted_digits}]",
        "tasks.signals.plugins=[recipes/quickstart/online_signal.py]",
    )


def report(seconds: Mapping[str, float]) -> int:
    """Prints and writes the summary; returns the exit status."""
    rewards = {name: _reward(RUN_DIR / name) for name in ("before", "after")}
    gain = rewards["after"]["value"] - rewards["before"]["value"]
    noise = (rewards["before"]["stderr"] ** 2 + rewards["after"]["stderr"] ** 2) ** 0.5
    stages = json.loads((RUN_DIR / "data" / "manifest.json").read_text(encoding="utf-8"))["stages"]
    summary = {
        "reward": rewards,
        "num_pairs": stages[-1]["counts"]["rows_out"],
        "run_dir": str(RUN_DIR / "simpo"),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
    }
    (RUN_DIR / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"right answers on held-out prompts: {rewards['before']['value']:.3f} → "
        f"{rewards['after']['value']:.3f} (± {noise:.3f}), from {summary['num_pairs']:,} pairs of "
        f"{stages[0]['counts']['rows_out']:,} prompts; {summary['seconds']['total']:.0f} s\n"
        f"what was made of what: {RUN_DIR / 'data' / 'manifest.json'}\n"
        f"the same numbers: {RUN_DIR / SUMMARY}",
        highlight=False,
        soft_wrap=True,
    )
    improved = gain > 2 * noise
    if not improved:
        console.print("[bold red]no improvement beyond two standard errors[/bold red]")
    return 0 if improved else 1


def _reward(directory: Path) -> dict[str, float]:
    tasks = json.loads((directory / "results.json").read_text(encoding="utf-8"))["tasks"]
    return tasks["signals"]["metrics"]["reward"]


if __name__ == "__main__":
    sys.exit(main())
