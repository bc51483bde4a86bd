"""From prompts to a better policy: ``python -m recipes.quickstart.from_prompts``, or `make quickstart-prompts`.

prompts → sample (vLLM) → verify → pair → SimPO → evaluate, each step the command a user would type. It starts
from the quickstart's SFT policy, made first unless an earlier quickstart of this seed left it. What it writes is
under ``runs/quickstart-prompts``, a policy it had to make under ``runs/quickstart``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.quickstart.prepare import write_jsonl
from recipes.quickstart.run import RUN_DIR as QUICKSTART
from recipes.quickstart.run import (
    SUMMARY,
    begin,
    console,
    have_policy,
    launch,
    results,
    reward_gain,
    reward_settings,
    run_prefopt,
    verdict,
    write_summary,
)

RUN_DIR = Path("runs/quickstart-prompts")  # as pipeline.yaml has it, relative to ROOT
PIPELINE = "recipes/quickstart/pipeline.yaml"
LAST_STAGE = "filter"
NUM_PROMPTS = 2000
NUM_HELD_OUT = 500


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 0 if held-out reward beats its start by two standard errors, else 1."""
    seed, clock = begin("make quickstart-prompts", __doc__, argv)
    splits, done = have_policy(seed, clock)
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
        *reward_settings(RUN_DIR / "held_out.jsonl"),
    )


def report(seconds: Mapping[str, float]) -> int:
    """Prints and writes the summary; returns the exit status."""
    rewards = {
        name: results(RUN_DIR / name)["signals"]["metrics"]["reward"]
        for name in ("before", "after")
    }
    gain, noise = reward_gain(**rewards)
    stages = json.loads((RUN_DIR / "data" / "manifest.json").read_text(encoding="utf-8"))["stages"]
    summary = {
        "reward": rewards,
        "num_pairs": stages[-1]["counts"]["rows_out"],
        "run_dir": str(RUN_DIR / "simpo"),
    }
    total = write_summary(RUN_DIR, summary, seconds)
    console.print(
        f"right answers on held-out prompts: {rewards['before']['value']:.3f} → "
        f"{rewards['after']['value']:.3f} (± {noise:.3f}), from {summary['num_pairs']:,} pairs of "
        f"{stages[0]['counts']['rows_out']:,} prompts; {total:.0f} s\n"
        f"what was made of what: {RUN_DIR / 'data' / 'manifest.json'}\n"
        f"the same numbers: {RUN_DIR / SUMMARY}",
        highlight=False,
        soft_wrap=True,
    )
    return verdict(gain > 2 * noise)


if __name__ == "__main__":
    sys.exit(main())
