"""ReST's claim in miniature: does the reward rise with improve steps, and again with the second grow step?

    python -m bench.claims_rest           # three seeds; about 8 minutes on one core
    python -m bench.claims_rest --tune    # the learning rates, on validation prompts with a seed of its own
    python -m bench.claims_rest --quick   # one seed; to see it work

The claim (arXiv:2308.08998): with every improve step, each on the samples above a higher threshold, the reward
rises, and a second grow step raises it further; plain training on all samples does not, and online RL gains less.
Here the policy is the quickstart's, which sorts digits after half careless demonstrations, the reward the share of
digits in place. Every arm has the same base policy, 400 prompts and 6,400 samples:

    ReST            two grow steps of 8 samples a prompt; everything, then above 0.5, 0.75, 0.99
    one grow step   16 samples a prompt at once; its first step is SFT on all of them
    online DPO      4 samples a prompt and step, best against worst, 100 steps
    online RLOO     the same with the leave-one-out baseline

The schedules run as `prefopt data rest` runs them, but for the processes: every step is a command in this one.
What is chosen by validation there (which policy grows) is chosen on other prompts than the table's, which is the
mean reward of one answer to each of 1,000 test prompts at temperature 1 (in brackets: the share of right ones).
What came out is in docs/log.md.

Everything is written to runs/bench-claims-rest: runs, results.json, rest.svg. A measurement that results.json
already has is not repeated, unless --fresh.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench._svg import Chart, Line, Point, write_svg
from prefopt.recipe.yaml_file import read_yaml
from recipes.quickstart import run as quickstart

RUN_DIR = Path("runs/bench-claims-rest")  # as the YAML files have it
SCHEDULE, ONLINE = Path("bench/claims_rest.yaml"), "bench/claims_rest_online.yaml"
TASK_SEED, TUNING_SEED, SEEDS = 0, 1000, (1, 2, 3)
NUM_PROMPTS, NUM_VALIDATION, NUM_TEST = 400, 400, 1000
TWICE = ("grow.steps=1", "grow.stages.sample.samples_per_seed=16")
REST_SCALES = (1.0, 3.0)
"""Of the schedule's learning rates; the first is as claims_rest.yaml has them."""
ONLINE_RATES = (1e-4, 3e-4, 1e-3)
ARMS: dict[str, tuple[str, ...]] = {
    "dpo": ("credit={name: best_worst}",),
    "rloo": ("objective={name: rloo}",),
}
TITLES = {"dpo": "online DPO", "rloo": "online RLOO"}
BEST = {"rest": 3.0, "dpo": 3e-4, "rloo": 3e-4}
"""What `--tune` chose."""

Measure = dict[str, float]
"""``reward`` and ``right``."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, to see it work")
    parser.add_argument("--tune", action="store_true", help="the grid of learning rates instead")
    parser.add_argument("--fresh", action="store_true", help="repeat what has been measured")
    arguments = parser.parse_args(argv)
    os.chdir(quickstart.ROOT)
    quickstart.set_environment()
    os.environ.setdefault("TQDM_DISABLE", "1")
    if arguments.fresh:
        shutil.rmtree(RUN_DIR, ignore_errors=True)
    validation, test = prepare()
    known = Known(RUN_DIR / "results.json")
    if arguments.tune:
        tune(known, validation)
        return
    seeds = SEEDS[:1] if arguments.quick else SEEDS
    begun = time.perf_counter()
    base = known.once("base test", lambda: {"0.0": measured(RUN_DIR / "base", test)})
    found = {
        arm: [run_arm(known, arm, BEST.get(arm, BEST["rest"]), seed, test) for seed in seeds]
        for arm in ("rest", "one", "dpo", "rloo")
    }
    report(base["0.0"], found, time.perf_counter() - begun)


def prepare() -> tuple[list[str], list[str]]:
    """Makes the base policy and the prompts if they are missing; returns validation and test prompts."""
    from recipes.quickstart.prepare import write_jsonl
    from recipes.quickstart.task import make_splits

    base = RUN_DIR / "base"
    if not base.is_dir():
        if not quickstart.has_policy(TASK_SEED):
            quickstart.make_policy(TASK_SEED, quickstart.Clock(), num_phases=2)
        shutil.copytree(quickstart.RUN_DIR / "sft" / "final", base)
    splits = make_splits(
        num_sft=quickstart.NUM_SFT,
        num_preference=NUM_PROMPTS,
        num_held_out=NUM_VALIDATION + NUM_TEST,
        seed=TASK_SEED,
    )
    # The base policy's own demonstrations: no prompt below was among them.
    assert splits.sft == quickstart.make_splits(TASK_SEED).sft
    held_out = [problem.prompt for problem in splits.held_out]
    validation, test = held_out[:NUM_VALIDATION], held_out[NUM_VALIDATION:]
    for name, prompts in (
        ("prompts", [problem.prompt for problem in splits.preference]),
        ("validation", validation),
    ):
        write_jsonl(RUN_DIR / "data" / f"{name}.jsonl", [{"prompt": text} for text in prompts])
    return validation, test


class Known:
    """Measurements, kept on disk as they are made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def once(self, key: str, measure: Callable[[], dict[str, Measure]]) -> dict[str, Measure]:
        """What is known under ``key``, measured if it is not: rewards of policies by their place."""
        if key not in self._found:
            begun = time.perf_counter()
            self._found[key] = measure()
            self.path.write_text(json.dumps(self._found, indent=1) + "\n")
            say(f"{key}: {time.perf_counter() - begun:.0f} s")
        return self._found[key]


def run_arm(
    known: Known, arm: str, rate: float, seed: int, prompts: Sequence[str], phase: str = "test"
) -> dict[str, Measure]:
    """The policies of one arm, measured on ``prompts``: of a schedule each step's, ``1.0`` to ``2.3``."""
    if arm in ARMS:
        return known.once(
            f"{phase} {arm} {rate:g} {seed}", lambda: online(arm, rate, seed, prompts)
        )
    extra = TWICE if arm == "one" else ()
    return known.once(
        f"{phase} {arm} x{rate:g} {seed}", lambda: rest(arm, rate, seed, extra, prompts)
    )


def rest(
    arm: str, scale: float, seed: int, extra: Sequence[str], prompts: Sequence[str]
) -> dict[str, Measure]:
    """Runs a schedule; every policy it made, by grow and improve step, improve steps counted from 0."""
    from data_pipelines.schedule.commands import run_schedule
    from data_pipelines.schedule.rest import load_rest

    rates = read_yaml(SCHEDULE).raw["improve"]["learning_rates"]
    folder = RUN_DIR / "runs" / f"{arm}-{scale:g}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [
        *(f"output_dir={folder}", f"grow.seed={100 * seed}", f"recipe.train.seed={seed}"),
        f"improve.learning_rates={[rate * scale for rate in rates]}",
        *extra,
    ]
    with quiet():
        walk = run_schedule(load_rest(SCHEDULE, overrides), in_this_process)
    trained = [task for task, _ in walk.found if task.settings.name == "train"]
    return {
        f"{task.place.turns['grow']}.{task.place.turns['improve'] - 1}": measured(
            Path(task.settings.result(task)), prompts
        )
        for task in trained
    }


def in_this_process(command: Sequence[str]) -> int:
    """A step of a schedule without the start of a Python."""
    from prefopt.cli import main as prefopt

    return prefopt(list(command[3:]))


def online(arm: str, rate: float, seed: int, prompts: Sequence[str]) -> dict[str, Measure]:
    """Trains on rollouts; the final policy, under ``online``."""
    from prefopt.wiring import train

    folder = RUN_DIR / "runs" / f"{arm}-{rate:g}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    with quiet():
        train(
            ONLINE,
            [
                *(f"run.output_dir={folder}", f"train.seed={seed}"),
                *(f"train.learning_rate={rate}", *ARMS[arm]),
            ],
        )
    return {"online": measured(folder / "final", prompts)}


def measured(policy: Path, prompts: Sequence[str]) -> Measure:
    """Mean reward of one answer a prompt at temperature 1, and the share of right ones."""
    from transformers import AutoModelForCausalLM

    from recipes.quickstart.prepare import make_tokenizer
    from recipes.quickstart.sample import generate
    from recipes.quickstart.task import share_in_place

    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    groups = generate(model, make_tokenizer(), prompts, temperature=1.0, seed=TASK_SEED)
    rewards = [share_in_place(p, group[0]) for p, group in zip(prompts, groups, strict=True)]
    return {
        "reward": statistics.fmean(rewards),
        "right": statistics.fmean(reward == 1 for reward in rewards),
    }


def tune(known: Known, prompts: Sequence[str]) -> None:
    """Validation reward by learning rate, one seed."""
    grid = [("rest", scale) for scale in REST_SCALES]
    grid += [(arm, rate) for arm in ARMS for rate in ONLINE_RATES]
    for arm, rate in grid:
        found = run_arm(known, arm, rate, TUNING_SEED, prompts, phase="tune")
        best = max(each["reward"] for each in found.values())
        say(f"{arm:6}{rate:10g}{best:8.3f}   {shown(found)}")


def shown(found: dict[str, Measure]) -> str:
    return "  ".join(f"{place} {each['reward']:.3f}" for place, each in found.items())


def report(base: Measure, found: dict[str, list[dict[str, Measure]]], seconds: float) -> None:
    """Prints the table and writes the plot."""
    seeds = len(found["rest"])
    say(
        f"\nreward (share right) on {NUM_TEST:,} test prompts, mean of {seeds} seed(s) ± standard error"
    )
    say(f"{'base (G0 I0)':42}{base['reward']:.3f}          ({base['right']:.3f})")
    for arm, title in (("rest", "ReST"), ("one", "one grow step, 16 samples")):
        for place in found[arm][0]:
            grow, improve = place.split(".")
            note = ": SFT on all" if arm == "one" and improve == "0" else ""
            row(
                f"{title}, G{grow} I{improve}{note}",
                [run[place] for run in found[arm] if place in run],
            )
    for arm in ARMS:
        row(TITLES[arm], [run["online"] for run in found[arm]])
    plot = RUN_DIR / "rest.svg"
    write_svg(plot, [chart(base, found)])
    say(f"{seconds:.0f} s; plot: {plot}; results: {RUN_DIR / 'results.json'}")


def row(title: str, values: Sequence[Measure]) -> None:
    rewards, right = ([each[name] for each in values] for name in ("reward", "right"))
    error = statistics.stdev(rewards) / len(rewards) ** 0.5 if len(rewards) > 1 else float("nan")
    say(f"{title:42}{statistics.fmean(rewards):.3f} ± {error:.3f}  ({statistics.fmean(right):.3f})")


def chart(base: Measure, found: dict[str, list[dict[str, Measure]]]) -> Chart:
    """Mean reward after each improve step; the online arms at the end."""
    places = list(found["rest"][0])
    ticks = ["base", *(f"G{place[0]} I{place[2]}" for place in places)]

    def mean(arm: str, place: str) -> float:
        return statistics.fmean(run[place]["reward"] for run in found[arm] if place in run)

    def climb(arm: str) -> list[Point]:
        values = [base["reward"], *(mean(arm, place) for place in found[arm][0])]
        return [Point(x, y) for x, y in enumerate(values)]

    ends = [
        Line(TITLES[arm], [Point(len(places), mean(arm, "online"))], joined=False) for arm in ARMS
    ]
    return Chart(
        f"test reward, mean of {len(found['rest'])} seed(s)",
        [Line("ReST", climb("rest")), Line("one grow step, 16 samples", climb("one")), *ends],
        x_ticks=list(enumerate(ticks)),
        level=("base", base["reward"]),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What commands say goes nowhere."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
