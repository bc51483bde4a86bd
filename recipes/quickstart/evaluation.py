"""The evaluation quickstart: ``python -m recipes.quickstart.evaluation``, or `make quickstart-eval`.

Trains a small judge, serves it with vLLM, and has `prefopt eval` compare the quickstart's two checkpoints: their
answers sampled by vLLM (the LoRA one unmerged on its base), scored by the task's program and by the judge in both
orders, their preferences by log-prob. Everything it writes is under ``runs/quickstart-eval``.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.quickstart.judge import (
    KEY_VARIABLE,
    NAME,
    TEMPLATE,
    Comparison,
    comparisons,
    judge_rows,
    served,
    write_judge_base,
)
from recipes.quickstart.prepare import write_jsonl
from recipes.quickstart.run import RUN_DIR as QUICKSTART
from recipes.quickstart.run import (
    SUMMARY,
    Clock,
    begin,
    console,
    has_policy,
    launch,
    make_splits,
    results,
    reward_gain,
    reward_settings,
    run_prefopt,
    verdict,
    write_summary,
)

RUN_DIR = Path("runs/quickstart-eval")  # as judge.yaml has it, relative to ROOT
CHECKPOINTS = {"sft": QUICKSTART / "sft", "simpo": QUICKSTART / "simpo"}
NUM_PROMPTS = 300
NUM_HELD_OUT = 300
"""Comparisons on which the judge itself is measured, in both orders."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it; 0 if SimPO beats SFT by two standard errors in reward and under the judge, else 1."""
    seeds = "of task, judge and samples"
    seed, clock = begin("make quickstart-eval", __doc__, argv, seeds)
    if not has_policy(seed) or not (CHECKPOINTS["simpo"] / "final").is_dir():
        raise SystemExit(
            "quickstart-eval: there is no checkpoint of this seed: run `make quickstart` first"
        )
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    splits = make_splits(seed)
    with clock.phase("judge", "1/4  a judge learns which of two answers is right"):
        held_out = comparisons(splits.preference[:NUM_HELD_OUT], seed=seed + 1)
        _write_data(splits, seed)
        launch("recipes/sft.py", "recipes/quickstart/judge.yaml", seed=seed)
    with (
        clock.phase("evaluate", "2/4  two checkpoints, answered by vLLM and judged through vLLM"),
        served(RUN_DIR / "judge" / "final", RUN_DIR / "judge.log") as url,
    ):
        _evaluate(url)
        judge = measure_judge(url, held_out)
    with clock.phase("compare", "3/4  is the difference more than noise?"):
        made = (RUN_DIR / name for name in CHECKPOINTS)
        run_prefopt("eval", "compare", *made, "--output", RUN_DIR / "comparison")
    return _report(judge, clock)


def measure_judge(url: str, held_out: Sequence[Comparison]) -> dict[str, float]:
    """Share of held-out comparisons that the judge gets right, and right in both orders."""
    from prefopt.signals.chat_client import ChatClient, Endpoint
    from prefopt.signals.chat_replies import Reply

    client = ChatClient(
        Endpoint(url, NAME, KEY_VARIABLE), {"temperature": 0.0, "max_tokens": 8}, None
    )
    asked = [each for pair in held_out for each in (pair, pair.swapped)]
    replies = client.complete_all([[{"role": "user", "content": e.prompt}] for e in asked])
    right = [
        isinstance(reply, Reply) and reply.text == each.verdict
        for reply, each in zip(replies, asked, strict=True)
    ]
    both = [a and b for a, b in zip(right[::2], right[1::2], strict=True)]
    return {"accuracy": sum(right) / len(right), "accuracy_both_orders": sum(both) / len(both)}


def _write_data(splits: Any, seed: int) -> None:
    """Comparisons to learn from, prompts and pairs to evaluate on, the judge's template."""
    data = RUN_DIR / "data"
    write_judge_base(RUN_DIR / "judge-base", seed=seed)
    write_jsonl(data / "judgments.jsonl", judge_rows(comparisons(splits.sft, seed=seed)))
    prompts = splits.held_out[:NUM_PROMPTS]
    write_jsonl(data / "prompts.jsonl", [{"prompt": p.prompt, "key": p.digits} for p in prompts])
    (data / "judge_template.txt").write_text(TEMPLATE, encoding="utf-8")


def _evaluate(url: str) -> None:
    """Both checkpoints on a verifier and on pairs, the later one also against the earlier under the judge."""
    data = RUN_DIR / "data"
    common = [
        "engine.name=vllm",
        "engine.enforce_eager=true",
        *reward_settings(data / "prompts.jsonl"),
        f"tasks.pair_accuracy.data={QUICKSTART / 'data' / 'held_out_pairs.jsonl'}",
        "tasks.pair_accuracy.format=text",
        "tasks.pair_accuracy.by=mean_logp",
    ]
    run_prefopt(
        *("eval", CHECKPOINTS["sft"], "--tasks", "signals,pair_accuracy"),
        *("--output", RUN_DIR / "sft", *common),
    )
    run_prefopt(
        *("eval", CHECKPOINTS["simpo"], "--tasks", "signals,pair_accuracy,win_rate"),
        *("--baseline", CHECKPOINTS["sft"], "--output", RUN_DIR / "simpo", *common),
        f"tasks.win_rate.data={data / 'prompts.jsonl'}",
        "tasks.win_rate.format=text",
        f"tasks.win_rate.template={data / 'judge_template.txt'}",
        *(f"judge.base_url={url}", f"judge.model={NAME}", "judge.max_tokens=8"),
        f"judge.api_key_env={KEY_VARIABLE}",
        f"judge.cache_dir={RUN_DIR / 'cache'}",
    )


def _report(judge: dict[str, float], clock: Clock) -> int:
    """Prints and writes the summary; returns the exit status."""
    tasks = {name: results(RUN_DIR / name) for name in CHECKPOINTS}
    rewards = {name: each["signals"]["metrics"]["reward"] for name, each in tasks.items()}
    win = tasks["simpo"]["win_rate"]["metrics"]["win_rate"]
    gain, noise = reward_gain(rewards["sft"], rewards["simpo"])
    summary = {"reward": rewards, "win_rate": win, "judge": judge}
    total = write_summary(RUN_DIR, summary, clock.seconds)
    console.rule("4/4  what came out")
    console.print(
        f"reward {rewards['sft']['value']:.3f} → {rewards['simpo']['value']:.3f} (± {noise:.3f}); "
        f"win rate of SimPO over SFT {win['value']:.1f} ± {win['stderr']:.1f} %, by a judge that is right on "
        f"{100 * judge['accuracy']:.1f} % of held-out comparisons ({100 * judge['accuracy_both_orders']:.1f} % in "
        f"both orders); {total:.0f} s\n"
        f"page: {RUN_DIR / 'comparison' / 'comparison.html'}\nthe same numbers: {RUN_DIR / SUMMARY}",
        highlight=False,
    )
    return verdict(gain > 2 * noise and win["value"] > 50 + 2 * win["stderr"])


if __name__ == "__main__":
    sys.exit(main())
