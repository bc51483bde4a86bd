"""The quickstart from nothing to numbers: ``python -m recipes.quickstart.run``, or `make quickstart`.

Untrained model → SFT on half careless demonstrations → pairs from that policy's own answers → SimPO with
LoRA → held-out accuracy before and after. Everything it writes is under ``runs/quickstart``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RUN_DIR = Path("runs/quickstart")  # as sft.yaml and simpo.yaml have it, relative to ROOT
SFT_RECIPE = "recipes/quickstart/sft.yaml"
OWN_DIRECTORIES = ("base", "data", "sft", "simpo")
SUMMARY = "summary.json"

NUM_SFT = 25600  # 200 steps of 128
NUM_PREFERENCE = 4000
NUM_HELD_OUT = 1500
SFT_FLAWED_FRAC = 0.5
SAMPLES_PER_PROMPT = 4

console = Console()


@dataclass
class Clock:
    """Wall-clock seconds by phase, announced as they start."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        console.rule(title)
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the quickstart; 0 if both held-out numbers beat their start by two standard errors, else 1."""
    seed, clock = begin("make quickstart", __doc__, argv)
    from recipes.quickstart.prepare import write_jsonl

    splits = make_policy(seed, clock, num_phases=5)
    with clock.phase("sample", "3/5  the policy's own answers, right and wrong, become pairs"):
        model, tokenizer = load_policy()
        train_pairs, held_out_pairs = _sample_pairs(model, tokenizer, splits, seed)
        write_jsonl(RUN_DIR / "data" / "pairs.jsonl", train_pairs.rows)
        write_jsonl(RUN_DIR / "data" / "held_out_pairs.jsonl", held_out_pairs.rows)
        before = _measure(model, tokenizer, splits, held_out_pairs.rows, "before")
    with clock.phase("simpo", "4/5  SimPO with LoRA"):
        launch("recipes/simpo.py", "recipes/quickstart/simpo.yaml", seed=seed)
    with clock.phase("evaluate", "5/5  held-out accuracy"):
        model, tokenizer = load_policy(adapter=RUN_DIR / "simpo" / "final")
        after = _measure(model, tokenizer, splits, held_out_pairs.rows, "after")
    return report(before, after, clock.seconds, num_pairs=len(train_pairs.rows))


def begin(
    command: str,
    describes: str | None,
    argv: Sequence[str] | None,
    seeds: str = "of task, model, samples and training",
) -> tuple[int, Clock]:
    """The command line's seed, and a clock; folder and environment are set for all that follows."""
    parser = argparse.ArgumentParser(prog=command, description=describes)
    parser.add_argument("--seed", type=int, default=0, help=seeds)
    seed = parser.parse_args(argv).seed
    os.chdir(ROOT)
    set_environment()
    return seed, Clock()


def have_policy(seed: int, clock: Clock) -> tuple[Any, int]:
    """The problems' splits, and how many of five phases it took to have an SFT policy: none if there was one."""
    if has_policy(seed):
        return make_splits(seed), 0
    return make_policy(seed, clock, num_phases=5), 2


def make_policy(seed: int, clock: Clock, *, num_phases: int) -> Any:
    """Makes the SFT policy anew, in the first two of ``num_phases`` phases; returns the problems' splits."""
    from recipes.quickstart.prepare import write_base

    # What an earlier quickstart left goes; its caches stay, they are keyed by content.
    for name in OWN_DIRECTORIES:
        shutil.rmtree(RUN_DIR / name, ignore_errors=True)
    with clock.phase(
        "prepare",
        f"1/{num_phases}  an untrained model, and demonstrations half of which are careless",
    ):
        splits = make_splits(seed)
        _write_sft_data(splits, seed)
        size = write_base(RUN_DIR / "base", seed=seed)
        console.print(f"{size:,} parameters; {len(splits.sft):,} demonstrations")
    with clock.phase("sft", f"2/{num_phases}  supervised fine-tuning"):
        launch("recipes/sft.py", SFT_RECIPE, seed=seed)
    return splits


def has_policy(seed: int) -> bool:
    """Did a finished SFT phase leave a policy of today's recipe and this seed?"""
    from prefopt.recipe.load import load_recipe
    from prefopt.recipe.run_directory import changed_settings
    from prefopt.storage.run_files import read_run

    directory = RUN_DIR / "sft"
    if not (directory / "final" / "config.json").is_file():
        return False
    wanted = load_recipe(SFT_RECIPE, [f"train.seed={seed}", f"data.seed={seed}"])
    return not any(changed_settings(read_run(directory), wanted, strict=True))


def launch(script: str, recipe: str, *overrides: str, seed: int) -> None:
    """Runs a recipe the way a user would. Raises SystemExit with its status if it fails."""
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", "accelerate_configs/cpu.yaml"),
        *(script, recipe, f"train.seed={seed}", f"data.seed={seed}", *overrides),
    ]
    shown = " ".join(["accelerate launch", *command[3:]])
    console.print(f"[dim]$ {shown}[/dim]", soft_wrap=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise SystemExit(f"quickstart: this command failed with status {status}: {shown}")


def run_prefopt(*arguments: object) -> None:
    """Runs a `prefopt` command as a user would. Raises SystemExit with its status if it fails."""
    words = [str(argument) for argument in arguments]
    console.print(f"$ prefopt {' '.join(words)}", style="dim", markup=False, soft_wrap=True)
    status = subprocess.run([sys.executable, "-m", "prefopt.cli", *words], check=False).returncode
    if status:
        raise SystemExit(f"quickstart: `prefopt {words[0]}` failed with status {status}")


def reward_settings(prompts: Path) -> list[str]:
    """Overrides of `prefopt eval`: greedy answers to these prompts, scored by the task's own program."""
    return [
        *("decoding.temperature=0", "decoding.max_new_tokens=10"),
        *(f"tasks.signals.data={prompts}", "tasks.signals.format=text"),
        "tasks.signals.signals=[{name: sorted_digits}]",
        "tasks.signals.plugins=[recipes/quickstart/online_signal.py]",
    ]


def results(directory: Path) -> dict[str, Any]:
    """The tasks of what `prefopt eval` left."""
    return json.loads((directory / "results.json").read_text(encoding="utf-8"))["tasks"]


def reward_gain(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float]:
    """The difference of two mean rewards, and its standard error, as if their prompts were different ones."""
    return after["value"] - before["value"], math.hypot(before["stderr"], after["stderr"])


def load_policy(adapter: Path | None = None) -> tuple[Any, Any]:
    """The SFT policy, with an adapter where one is given, and its tokenizer, as any user would load them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = RUN_DIR / "sft" / "final"
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval(), AutoTokenizer.from_pretrained(adapter or directory)


def report(before: Any, after: Any, seconds: dict[str, float], *, num_pairs: int) -> int:
    """Prints the table, writes summary.json, and returns the exit status: 1 if a number did not improve."""
    from prefopt.training.run_record import versions
    from recipes.quickstart.evaluate import Change

    changes = {
        "preference_accuracy": Change(before["preference"], after["preference"]),
        "task_accuracy": Change(before["task"], after["task"]),
    }
    run_dir = RUN_DIR / "simpo"
    summary = {
        **{name: change.as_dict() for name, change in changes.items()},
        "num_pairs": num_pairs,
        "run_dir": str(run_dir),
    }
    total = write_summary(RUN_DIR, summary, seconds, versions=versions())
    console.print(changes_table(changes))
    console.print(
        f"trained on {num_pairs:,} pairs; {total:.0f} s in all\n"
        f"run directory: {run_dir}\nthe same numbers: {RUN_DIR / SUMMARY}",
        highlight=False,
    )
    failed = [name for name, change in changes.items() if not change.is_improvement]
    return verdict(not failed, f": {', '.join(failed)}")


def write_summary(
    directory: Path, summary: Mapping[str, Any], seconds: Mapping[str, float], **further: Any
) -> float:
    """Writes summary.json with the seconds of each phase; returns those of all."""
    total = round(sum(seconds.values()), 1)
    found = {**summary, "seconds": {**seconds, "total": total}, **further}
    (directory / SUMMARY).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return total


def verdict(improved: bool, what: str = "") -> int:
    """The exit status; says so where there is no improvement."""
    if not improved:
        console.print(f"[bold red]no improvement beyond two standard errors{what}[/bold red]")
    return 0 if improved else 1


def set_environment() -> None:
    """Set before torch is imported, and inherited by the runs that are launched."""
    # Threads gain little on matrices this small, and where other work shares the cores two that wait for
    # each other took three times as long as one (measured). It also gives every machine the same sums.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning about forking
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # silences DeepSpeed's, that it found no GPU


def make_splits(seed: int) -> Any:
    """The quickstart's problems, by use."""
    from recipes.quickstart import task

    return task.make_splits(
        num_sft=NUM_SFT, num_preference=NUM_PREFERENCE, num_held_out=NUM_HELD_OUT, seed=seed
    )


def _write_sft_data(splits: Any, seed: int) -> None:
    from recipes.quickstart.prepare import sft_rows, write_jsonl

    rows = sft_rows(splits.sft, flawed_frac=SFT_FLAWED_FRAC, seed=seed)
    write_jsonl(RUN_DIR / "data" / "sft.jsonl", rows)


def _sample_pairs(model: Any, tokenizer: Any, splits: Any, seed: int) -> tuple[Any, Any]:
    """Training pairs and held-out pairs, both from the policy as it is before preference training."""
    from recipes.quickstart.sample import build_pairs, generate

    found = []
    for label, problems in (("train", splits.preference), ("held out", splits.held_out)):
        prompts = [problem.prompt for problem in problems]
        groups = generate(
            model,
            tokenizer,
            prompts,
            num_samples=SAMPLES_PER_PROMPT,
            temperature=1.0,
            seed=seed + len(found),
            label=f"sampling ({label})",
        )
        pairs = build_pairs(prompts, groups, seed=seed)
        console.print(
            f"{label}: {len(pairs.rows):,} pairs from {len(prompts):,} prompts; the others gave "
            f"{SAMPLES_PER_PROMPT} right answers ({pairs.num_all_right:,}) or none ({pairs.num_all_wrong:,})"
        )
        found.append(pairs)
    return found[0], found[1]


def _measure(
    model: Any, tokenizer: Any, splits: Any, pairs: Sequence[Any], when: str
) -> dict[str, Any]:
    from recipes.quickstart.evaluate import preference_accuracy, task_accuracy

    prompts = [problem.prompt for problem in splits.held_out]
    return {
        "task": task_accuracy(model, tokenizer, prompts, label=f"task accuracy ({when})"),
        "preference": preference_accuracy(model, tokenizer, pairs, label=f"preferences ({when})"),
    }


def changes_table(changes: dict[str, Any]) -> Table:
    table = Table(title="held-out prompts, ± one standard error")
    for column in ("", "before", "after", "change", "items"):
        table.add_column(column, justify="left" if not column else "right")
    for name, change in changes.items():
        table.add_row(
            name.replace("_", " "),
            *(f"{a.value:.3f} ± {a.standard_error:.3f}" for a in (change.before, change.after)),
            f"{change.after.value - change.before.value:+.3f} ± {change.standard_error:.3f}",
            f"{change.after.count:,}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
