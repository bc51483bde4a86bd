"""Asynchronous against synchronous online DPO: same recipe, same steps, trainer and engine on a core each.

    python bench/async_rollouts.py            # about 6 minutes on two quiet cores
    python bench/async_rollouts.py --quick    # does it run; about 1 minute, one seed

The claim of Asynchronous RLHF (arXiv:2410.18252) in miniature, on the quickstart's task: generating a step's
rollouts while the trainer trains on the last one's hides the shorter of the two, and costs little accuracy.
Both kinds train `recipes/quickstart/online.yaml` with larger batches through `recipes/online_dpo.py`, with a
Hugging Face engine in a process of its own, bound to one core, the trainer to another; weights are pushed
every step, over the disk. The only difference is ``regime.max_lag``: 0 or 1. Runs take turns, seed by seed.

Wall time is of the training loop, from its first step to its last, without the engine's start; the pipeline's
filling (nothing to train on while the first batch is sampled) counts. Sizes are such that training and
generating take about equally long, where overlap pays most: the ratio cannot be much below 0.5.

The learning rate is below the quickstart's 1e-3: the further one step moves the policy, the staler a lag of
one makes its samples. At 1e-3 a lag of one did cost accuracy (one seed, 40 steps: 0.84 synchronous, 0.68
asynchronous; after 8 steps 0.68 and 0.64). ``--learning-rate 1e-3`` shows it.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `recipes`, which is not an installed package

LAGS = {"sync": 0, "async": 1}
PHASES = {
    "generate": "generate",
    "score": "score",
    "sync": "sync",
    "train": "train",
    "wait": "idle",
}
NUM_SFT, MAX_PROMPTS, NUM_HELD_OUT, BASE_SEED = 25600, 40960, 1500, 0
Row = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """What one training run took and reached."""

    wall_s: float
    startup_s: float
    accuracy: float
    split: Mapping[str, float]
    """Seconds a step by phase, medians over all steps but the first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all rounds, prints the table and the line of results."""
    arguments = _parse(argv)
    directory = Path(arguments.directory).absolute()
    os.chdir(ROOT)
    from recipes.quickstart.run import set_environment

    set_environment()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    splits = make_splits()
    write_inputs(directory, splits, arguments.steps * arguments.prompts)
    before = accuracy(directory, splits, adapter=None)
    print(f"base policy: held-out accuracy {before:.3f}", flush=True)
    runs: dict[str, list[Run]] = {name: [] for name in LAGS}
    for seed in range(arguments.rounds):
        for name in _turns(seed):
            run = train_once(arguments, directory, splits, name, seed)
            runs[name].append(run)
            print(
                f"seed {seed} {name:5}: loop {run.wall_s:6.1f} s (start-up {run.startup_s:4.1f} s not in it), "
                f"accuracy {run.accuracy:.3f}, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    report(runs, arguments.steps)
    return 0


def make_splits() -> Any:
    """The quickstart's problems: demonstrations, prompts to train on, held-out prompts."""
    from recipes.quickstart import task

    return task.make_splits(
        num_sft=NUM_SFT, num_preference=MAX_PROMPTS, num_held_out=NUM_HELD_OUT, seed=BASE_SEED
    )


def write_inputs(directory: Path, splits: Any, num_prompts: int) -> None:
    """The prompts, and the quickstart's SFT policy unless an earlier bench left it: always of one seed."""
    from recipes.quickstart.prepare import sft_rows, write_base, write_jsonl
    from recipes.quickstart.run import SFT_FLAWED_FRAC, SFT_RECIPE

    prompts = [{"prompt": problem.prompt} for problem in splits.preference[:num_prompts]]
    write_jsonl(directory / "prompts.jsonl", prompts)  # each is met once: one epoch
    if (directory / "sft" / "final" / "config.json").is_file():
        return
    demonstrations = sft_rows(splits.sft, flawed_frac=SFT_FLAWED_FRAC, seed=BASE_SEED)
    write_jsonl(directory / "sft.jsonl", demonstrations)
    write_base(directory / "base", seed=BASE_SEED)
    command = [
        *(sys.executable, "recipes/sft.py", SFT_RECIPE),
        f"model.path={directory / 'base'}",
        f"data.train=[{{path: {directory / 'sft.jsonl'}, format: text, "
        "columns: {chosen: response, rejected: null}}]",
        f"data.cache_dir={directory / 'cache'}",
        f"train.seed={BASE_SEED}",
        f"run.output_dir={directory / 'sft'}",
    ]
    _launch(command, directory / "sft.log")


def train_once(
    arguments: argparse.Namespace, directory: Path, splits: Any, name: str, seed: int
) -> Run:
    """Trains one seed in a process bound to the trainer's core."""
    from prefopt.training.metrics import read_metrics

    run_dir = directory / f"{name}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [
        *(sys.executable, "recipes/online_dpo.py", "recipes/quickstart/online.yaml"),
        f"model.path={directory / 'sft' / 'final'}",
        f"data.prompts=[{{path: {directory / 'prompts.jsonl'}, format: text}}]",
        f"data.cache_dir={directory / 'cache'}",
        f"regime.max_lag={LAGS[name]}",
        f"regime.samples_per_prompt={arguments.samples}",
        f"engine.cpus=[{arguments.cores[1]}]",
        f"engine.batch_size={arguments.engine_batch}",
        f"train.global_batch_size={arguments.prompts}",
        f"train.learning_rate={arguments.learning_rate}",
        f"train.seed={seed}",
        f"run.output_dir={run_dir}",
    ]
    _launch(command, directory / f"{name}-{seed}.log", core=arguments.cores[0])
    rows = read_metrics(run_dir / "metrics.jsonl")
    startup_s = _startup_s(rows[0])
    wall_s = sum(row["time/window_s"] for row in rows) - startup_s
    split = {
        phase: statistics.median(row[f"time/{phase}_s"] for row in rows[1:]) for phase in PHASES
    }
    return Run(wall_s, startup_s, accuracy(directory, splits, adapter=run_dir / "final"), split)


def accuracy(directory: Path, splits: Any, *, adapter: Path | None) -> float:
    """Share of held-out prompts whose greedy answer is right."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from recipes.quickstart.evaluate import task_accuracy

    base = directory / "sft" / "final"
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    prompts = [problem.prompt for problem in splits.held_out]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return task_accuracy(model.eval(), tokenizer, prompts, label="held-out accuracy").value


def report(runs: Mapping[str, Sequence[Run]], num_steps: int) -> None:
    """The table of medians over seeds, and the line of results."""
    print(
        "\nseconds a step, medians; idle: the trainer waits for generating and scoring (sync: all of it)"
    )
    print(f"{'':6}" + "".join(f"{title:>12}" for title in (*PHASES.values(), "whole step")))
    for name, found in runs.items():
        split = [statistics.median(run.split[phase] for run in found) for phase in PHASES]
        split.append(statistics.median(run.wall_s for run in found) / num_steps)
        print(f"{name:6}" + "".join(f"{seconds:12.3f}" for seconds in split))
    print(f"\n{'':6}{'loop s':>12}{'accuracy':>12}{'± s.e.':>12}  (over seeds)")
    for name, found in runs.items():
        wall_s = statistics.median(run.wall_s for run in found)
        mean, error = mean_and_error([run.accuracy for run in found])
        print(f"{name:6}{wall_s:12.1f}{mean:12.3f}{error:12.3f}")
    ratios = [b.wall_s / a.wall_s for a, b in zip(runs["sync"], runs["async"], strict=True)]
    print(f"\nratio seed by seed: {', '.join(f'{ratio:.2f}' for ratio in ratios)}", end="")
    print(f"; sync's phases in perfect overlap: {_ideal_ratio(runs['sync'], num_steps):.2f}")
    walls = {name: statistics.median(run.wall_s for run in found) for name, found in runs.items()}
    means = {name: mean_and_error([r.accuracy for r in found])[0] for name, found in runs.items()}
    print(
        f"wall_ratio={walls['async'] / walls['sync']:.3f} accuracy_sync={means['sync']:.3f} "
        f"accuracy_async={means['async']:.3f}"
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; NaN for a single seed, which has no spread."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def _ideal_ratio(runs: Sequence[Run], num_steps: int) -> float:
    """The ratio if the engine's part of every step and the trainer's overlapped in full, filling included."""
    engine_s = statistics.median(run.split["generate"] for run in runs)
    whole_s = statistics.median(run.wall_s for run in runs) / num_steps
    trainer_s = whole_s - engine_s
    return (engine_s + num_steps * max(engine_s, trainer_s)) / (num_steps * whole_s)


def _startup_s(first: Row) -> float:
    """Seconds of the first step that went to the engine's start: it waits, and nothing is sampled or scored."""
    waited = first["time/sync_s"] + first["time/wait_s"]
    return waited - first["time/generate_s"] - first["time/score_s"]


def _turns(seed: int) -> list[str]:
    """Which goes first changes with the seed, so that a machine growing slower favours neither."""
    return list(LAGS) if seed % 2 == 0 else list(reversed(LAGS))


def _launch(command: Sequence[str], log: Path, core: int | None = None) -> None:
    """Runs a recipe, bound to ``core`` if given. Raises SystemExit with the end of its log if it fails."""
    bind = None if core is None else functools.partial(os.sched_setaffinity, 0, {core})
    with log.open("w", encoding="utf-8") as output:
        status = subprocess.run(
            command, stdout=output, stderr=output, check=False, preexec_fn=bind
        ).returncode
    if status:
        end = "\n".join(log.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(
            f"failed with status {status}: {' '.join(command)}\nthe end of {log}:\n{end}"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(parser.add_argument, type=int)
    add("--rounds", default=3, help="seeds, each trained both ways (default %(default)s)")
    add("--steps", default=40, help="optimizer steps (default %(default)s)")
    add("--prompts", default=256, help="prompts a step (default %(default)s)")
    add("--samples", default=4, help="responses a prompt (default %(default)s)")
    add("--engine-batch", default=512, help="responses generated at once (default %(default)s)")
    add("--cores", nargs=2, metavar=("TRAINER", "ENGINE"), help="default: the first two allowed")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="default %(default)s")
    parser.add_argument("--directory", default="runs/async-rollouts", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 8
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        parser.error(f"needs two cores, this process may use {allowed}")
    if arguments.steps * arguments.prompts > MAX_PROMPTS:
        parser.error(f"--steps times --prompts: at most {MAX_PROMPTS}, every prompt is met once")
    arguments.cores = arguments.cores or allowed[:2]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
