"""The online quickstart: ``python -m recipes.quickstart.online``, or `make quickstart-online`.

The quickstart's SFT policy (made first, unless an earlier quickstart of this seed left it) answers prompts,
the task's own program says which answers are right, and DPO trains on each fresh pair at once. Everything
it writes is under ``runs/quickstart-online``, a policy it had to make under ``runs/quickstart``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from recipes.quickstart.run import (
    SUMMARY,
    begin,
    changes_table,
    console,
    have_policy,
    launch,
    load_policy,
    verdict,
    write_summary,
)

RUN_DIR = Path("runs/quickstart-online")  # as online.yaml has it, relative to ROOT
TRAINING = "dpo"
CURVE_POINTS = 10
BAR_WIDTH = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 0 if held-out task accuracy beats its start by two standard errors, else 1."""
    seed, clock = begin("make quickstart-online", __doc__, argv)
    splits, done = have_policy(seed, clock)
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    with clock.phase("before", f"{done + 1}/{done + 3}  the SFT policy on held-out prompts"):
        write_prompts(splits)
        before = measure(splits, "before")
    with clock.phase("online", f"{done + 2}/{done + 3}  online DPO with LoRA"):
        launch("recipes/online_dpo.py", "recipes/quickstart/online.yaml", seed=seed)
    with clock.phase("after", f"{done + 3}/{done + 3}  the trained policy on the same prompts"):
        after = measure(splits, "after", adapter=RUN_DIR / TRAINING / "final")
    return report(before, after, clock.seconds)


def write_prompts(splits: Any) -> None:
    """The prompts to train on: those that the offline quickstart makes its pairs from."""
    from recipes.quickstart.prepare import write_jsonl

    rows = [{"prompt": problem.prompt} for problem in splits.preference]
    write_jsonl(RUN_DIR / "data" / "prompts.jsonl", rows)


def measure(splits: Any, when: str, *, adapter: Path | None = None) -> Any:
    """Held-out task accuracy of the SFT policy, or of an adapter on it; greedy."""
    from recipes.quickstart.evaluate import task_accuracy

    model, tokenizer = load_policy(adapter)
    prompts = [problem.prompt for problem in splits.held_out]
    return task_accuracy(model, tokenizer, prompts, label=f"task accuracy ({when})")


def report(before: Any, after: Any, seconds: Mapping[str, float]) -> int:
    """Prints accuracy, reward curve and where things are; returns 1 if accuracy did not improve, else 0."""
    from prefopt.training.metrics import read_metrics
    from prefopt.training.run_record import versions
    from recipes.quickstart.evaluate import Change

    change, run_dir = Change(before, after), RUN_DIR / TRAINING
    curve = reward_curve(read_metrics(run_dir / "metrics.jsonl"))
    summary = {
        "task_accuracy": change.as_dict(),
        "reward": [{"step": step, "mean": reward} for step, reward in curve],
        "run_dir": str(run_dir),
    }
    total = write_summary(RUN_DIR, summary, seconds, versions=versions())
    console.print(curve_table(curve))
    console.print(changes_table({"task_accuracy": change}))
    console.print(
        f"{total:.0f} s in all\nrun directory: {run_dir}\nevery response, its scores and its label: "
        f"{run_dir / 'rollouts'}\n  prefopt show {run_dir} --rollouts\n"
        f"the same numbers: {RUN_DIR / SUMMARY}",
        highlight=False,
        soft_wrap=True,
    )
    return verdict(change.is_improvement, ": task_accuracy")


def reward_curve(
    rows: Sequence[Mapping[str, Any]], points: int = CURVE_POINTS
) -> list[tuple[int, float]]:
    """``(last step, mean reward)`` of at most ``points`` equal stretches of the steps that were logged."""
    rewards = [(row["step"], row["rollout/reward"]) for row in rows if "rollout/reward" in row]
    size = max(1, -(-len(rewards) // points))
    parts = [rewards[start : start + size] for start in range(0, len(rewards), size)]
    return [(part[-1][0], sum(reward for _, reward in part) / len(part)) for part in parts]


def curve_table(curve: Sequence[tuple[int, float]]) -> Table:
    """The curve as bars; a full one is a reward of 1, every sample right."""
    table = Table(title="share of right answers among the policy's own samples (temperature 1)")
    table.add_column("to step", justify="right")
    table.add_column("reward", justify="right")
    table.add_column("", width=BAR_WIDTH)
    for step, reward in curve:
        table.add_row(str(step), f"{reward:.3f}", "█" * round(reward * BAR_WIDTH))
    return table


if __name__ == "__main__":
    sys.exit(main())
