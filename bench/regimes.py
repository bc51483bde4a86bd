"""Offline, semi-online and online DPO, and GRPO, from one policy: "Bridging Offline and Online" in miniature.

    python -m bench.regimes            # about 20 minutes on one core
    python -m bench.regimes --quick    # about 2: 40 steps, two seeds, one learning rate; to see it work

The claim (arXiv:2506.21495, verifiable tasks): offline DPO is clearly worse; pushing the policy to the sampler
every 10 or 100 steps is as good as every step; GRPO is no better than online DPO. Here the policy is the
quickstart's, which sorts digits after half careless demonstrations. All arms are the same recipe
(bench/regimes.yaml) through `prefopt.wiring.train`; they differ in ``regime.sync_every`` or the objective, and
take as many optimizer steps and samples.

Accuracy is that of one answer a prompt at temperature 1, the expected reward that all arms train (the paper,
too, samples, at 0.6); greedy accuracy is printed beside it. The same grid of learning rates for every arm is
run with a seed and on prompts of its own (validation). It gives two settings for the seeds and prompts that
are reported: each arm at its own best rate, and, as in the paper, one rate for all: the largest at which every
arm still beats the base.

What came out, and why it is only half of the claim, is in docs/log.md.

Everything is written to runs/bench-regimes: the runs, results.json, and regimes.svg with final accuracies and
learning curves. A measurement that results.json already has is not repeated, unless --fresh.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench._svg import Chart, Line, Point, write_svg
from recipes.quickstart import run as quickstart

RUN_DIR = Path("runs/bench-regimes")  # as regimes.yaml has it
RECIPE = "bench/regimes.yaml"
TASK_SEED, TUNING_SEED = 0, 1000
NUM_VALIDATION, NUM_TEST, NUM_CURVE = 1000, 1500, 500
PROMPTS_PER_STEP = 16


@dataclass(frozen=True)
class Arm:
    """One way to train, as overrides of the recipe."""

    name: str
    title: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """How much is run."""

    steps: int
    long_interval: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    curve_every: int
    overrides: tuple[str, ...] = ()
    """Of the DPO arms."""

    def arms(self) -> list[Arm]:
        """In the order they are shown."""

        def dpo(name: str, title: str, sync_every: str) -> Arm:
            rule = "credit={name: first_right_wrong}"
            return Arm(name, title, (f"regime.sync_every={sync_every}", rule, *self.overrides))

        return [
            dpo("offline", "offline DPO (s = ∞)", "null"),
            *(
                dpo(f"s={s}", f"semi-online DPO (s = {s})", str(s))
                for s in (self.long_interval, 10)
            ),
            dpo("online", "online DPO (s = 1)", "1"),
            Arm("grpo", "online GRPO", ("regime.sync_every=1", "objective={name: grpo}")),
        ]


FULL = Size(200, 100, (3e-6, 1e-5, 3e-5, 1e-4), (1, 2, 3), 25)
QUICK = Size(40, 20, (1e-4,), (1, 2), 20)


@dataclass(frozen=True)
class Result:
    """One training run, measured."""

    arm: str
    learning_rate: float
    seed: int
    greedy: float
    """Accuracy of the greedy answers, on the prompts of this phase."""
    sampled: float
    """Accuracy of one answer a prompt at temperature 1: the expected reward that training raises."""
    curve: tuple[tuple[int, float], ...]
    """``(step, sampled accuracy)``, on the first `NUM_CURVE` of those prompts."""
    drift: float
    """Mean |log π - log π_sampler| of the trained samples, nats a token, over the run."""
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small version, to see it work")
    parser.add_argument(
        "overrides", nargs="*", help="for every DPO arm, e.g. objective.nll_weight=1.0"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat what has been measured")
    arguments = parser.parse_args(argv)
    os.chdir(quickstart.ROOT)
    quickstart.set_environment()
    os.environ.setdefault("TQDM_DISABLE", "1")
    size = replace(QUICK if arguments.quick else FULL, overrides=tuple(arguments.overrides))
    if arguments.fresh:
        shutil.rmtree(RUN_DIR, ignore_errors=True)
    validation, test = prepare(size)
    measured = Measured(RUN_DIR / "results.json", size)
    base = {
        name: measured.base(name, p) for name, p in (("validation", validation), ("test", test))
    }
    grid = [
        measured.run("tune", arm, rate, TUNING_SEED, validation)
        for arm in size.arms()
        for rate in size.learning_rates
    ]
    shared = shared_rate(grid, base["validation"]["sampled"])
    best = {arm.name: best_rate(grid, arm.name) for arm in size.arms()}
    final = [
        measured.run("test", arm, rate, seed, test)
        for seed in size.seeds
        for arm in size.arms()
        for rate in sorted({shared, best[arm.name]})
    ]
    report(size, base, grid, [r for r in final if r.learning_rate == shared],
           [r for r in final if r.learning_rate == best[r.arm]])  # fmt: skip


def prepare(size: Size) -> tuple[list[str], list[str]]:
    """Makes base policy and training prompts if they are missing; returns validation and test prompts."""
    from recipes.quickstart.prepare import write_jsonl
    from recipes.quickstart.task import make_splits

    base = RUN_DIR / "base"
    if not base.is_dir():
        if not quickstart.has_policy(TASK_SEED):
            quickstart.make_policy(TASK_SEED, quickstart.Clock(), num_phases=2)
        shutil.copytree(quickstart.RUN_DIR / "sft" / "final", base)
    num_train = size.steps * PROMPTS_PER_STEP
    splits = make_splits(
        num_sft=quickstart.NUM_SFT,
        num_preference=num_train,
        num_held_out=NUM_VALIDATION + NUM_TEST,
        seed=TASK_SEED,
    )
    # The base policy's own demonstrations: no prompt below was among them.
    assert splits.sft == quickstart.make_splits(TASK_SEED).sft
    write_jsonl(
        RUN_DIR / "data" / "prompts.jsonl", [{"prompt": p.prompt} for p in splits.preference]
    )
    prompts = [problem.prompt for problem in splits.held_out]
    return prompts[:NUM_VALIDATION], prompts[NUM_VALIDATION:]


class Measured:
    """Measurements, kept on disk as they are made."""

    def __init__(self, path: Path, size: Size) -> None:
        self.path = path
        self.size = size
        self._found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def base(self, split: str, prompts: Sequence[str]) -> dict[str, float]:
        """Accuracies of the policy that all arms start from."""
        return self._once(f"base {split}", lambda: accuracies(load_base(), prompts))

    def run(
        self, phase: str, arm: Arm, learning_rate: float, seed: int, prompts: Sequence[str]
    ) -> Result:
        """Trains an arm and measures it."""
        extra = [o for o in arm.overrides if o in self.size.overrides]
        key = " ".join(
            [phase, str(self.size.steps), arm.name, f"{learning_rate:g}", str(seed), *extra]
        )
        found = self._once(
            key, lambda: asdict(train_and_measure(self.size, arm, learning_rate, seed, prompts))
        )
        result = Result(**{**found, "curve": tuple(map(tuple, found["curve"]))})
        say(
            f"{phase:5} {arm.name:8} lr {learning_rate:<7g} seed {seed:<5} greedy {result.greedy:.3f} "
            f"sampled {result.sampled:.3f} ({result.seconds:.0f} s)"
        )
        return result

    def _once(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self._found:
            self._found[key] = measure()
            self.path.write_text(json.dumps(self._found, indent=1) + "\n")
        return self._found[key]


def train_and_measure(
    size: Size, arm: Arm, learning_rate: float, seed: int, prompts: Sequence[str]
) -> Result:
    """One run in its own directory, then greedy and sampled accuracy, and the curve from its checkpoints."""
    from prefopt.training.metrics import read_metrics
    from prefopt.wiring import train

    run_dir = RUN_DIR / "runs" / f"{arm.name}-{learning_rate:g}-{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)
    begun = time.perf_counter()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        train(
            RECIPE,
            [
                *(f"train.learning_rate={learning_rate}", f"train.seed={seed}"),
                *(f"train.max_steps={size.steps}", f"train.save_every={size.curve_every}"),
                *(f"run.output_dir={run_dir}", *arm.overrides),
            ],
        )
    seconds = time.perf_counter() - begun
    rows = read_metrics(run_dir / "metrics.jsonl")
    gaps = [row["rollout/policy_gap"] for row in rows if "rollout/policy_gap" in row]
    final = accuracies(load_run(run_dir, size.steps), prompts)
    curve = [
        (step, accuracies(load_run(run_dir, step), prompts[:NUM_CURVE])["sampled"])
        for step in range(size.curve_every, size.steps + 1, size.curve_every)
    ]
    return Result(
        arm.name, learning_rate, seed, final["greedy"], final["sampled"], tuple(curve),
        statistics.fmean(gaps), seconds,
    )  # fmt: skip


def load_base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(RUN_DIR / "base").eval()


def load_run(run_dir: Path, step: int) -> Any:
    """The policy as it was after ``step`` optimizer steps."""
    from safetensors.torch import load_file

    model = load_base()
    state = load_file(run_dir / "checkpoints" / f"step-{step}" / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    return model


def accuracies(model: Any, prompts: Sequence[str]) -> dict[str, float]:
    """Sampled and greedy accuracy."""
    from recipes.quickstart.prepare import make_tokenizer
    from recipes.quickstart.sample import generate

    made = make_tokenizer()
    sampled = generate(model, made, prompts, temperature=1.0, seed=TASK_SEED)
    greedy = generate(model, made, prompts)
    return {"sampled": share_right(prompts, sampled), "greedy": share_right(prompts, greedy)}


def share_right(prompts: Sequence[str], groups: Sequence[Sequence[str]]) -> float:
    from recipes.quickstart.task import score_group

    return statistics.fmean(score_group(p, g)[0] for p, g in zip(prompts, groups, strict=True))


def best_rate(grid: Sequence[Result], arm: str) -> float:
    """The learning rate of an arm's highest validation accuracy."""
    return max((r for r in grid if r.arm == arm), key=lambda r: r.sampled).learning_rate


def shared_rate(grid: Sequence[Result], base: float) -> float:
    """The largest learning rate at which every arm beats the base on validation; the smallest if none does."""
    rates = sorted({r.learning_rate for r in grid})
    stood = [
        rate for rate in rates if all(r.sampled > base for r in grid if r.learning_rate == rate)
    ]
    return max(stood, default=rates[0])


def report(
    size: Size,
    base: dict[str, dict[str, float]],
    grid: Sequence[Result],
    at_shared: Sequence[Result],
    at_best: Sequence[Result],
) -> None:
    """Prints grid and tables and writes the plot; the last line is of the shared rate."""
    arms, start = size.arms(), base["test"]
    say(f"\naccuracy (greedy) by learning rate: validation, {NUM_VALIDATION:,} prompts, one seed")
    say(f"{'':28}" + "".join(f"{rate:>16g}" for rate in size.learning_rates))
    say(f"{'base':28}" + shown(**base["validation"]) * len(size.learning_rates))
    for arm in arms:
        say(f"{arm.title:28}" + "".join(shown(r.sampled, r.greedy) for r in of(grid, arm)))
    for title, final in (("one learning rate for all", at_shared), ("each at its best", at_best)):
        say(
            f"\n{title}: test, {NUM_TEST:,} prompts, mean of {len(size.seeds)} seeds ± its standard error"
        )
        table(arms, start, final)
    say("drift: mean |log π - log π_sampler| of the samples trained on, nats a token\n")
    plot = RUN_DIR / "regimes.svg"
    write_svg(plot, charts(size, start["sampled"], at_shared, at_best))
    say(f"plot: {plot}\nresults: {RUN_DIR / 'results.json'}; runs: {RUN_DIR / 'runs'}")
    say(f"each at its best: {last_line(arms, start, at_best)}")
    say(f"at {at_shared[0].learning_rate:g}, all of them:\n{last_line(arms, start, at_shared)}")


def shown(sampled: float, greedy: float) -> str:
    return f"{sampled:8.3f} ({greedy:.3f})"


def last_line(arms: Sequence[Arm], start: dict[str, float], final: Sequence[Result]) -> str:
    """Mean accuracy over seeds; semi-online is s = 10."""
    means = {arm.name: statistics.fmean(r.sampled for r in of(final, arm)) for arm in arms}
    return (
        f"offline={means['offline']:.3f} semi_online={means['s=10']:.3f} "
        f"online={means['online']:.3f} grpo={means['grpo']:.3f} base={start['sampled']:.3f}"
    )


def table(arms: Sequence[Arm], start: dict[str, float], final: Sequence[Result]) -> None:
    """One row an arm."""
    say(f"{'':28}{'lr':>9}{'accuracy':>16}{'greedy':>16}{'drift':>9}")
    say(f"{'base':28}{'':9}{start['sampled']:8.3f}{'':8}{start['greedy']:8.3f}")
    for arm in arms:
        mine = of(final, arm)
        sampled, greedy = spread([r.sampled for r in mine]), spread([r.greedy for r in mine])
        drift = statistics.fmean(r.drift for r in mine)
        say(f"{arm.title:28}{mine[0].learning_rate:9g}{sampled:>16}{greedy:>16}{drift:9.4f}")


def of(results: Sequence[Result], arm: Arm) -> list[Result]:
    return [result for result in results if result.arm == arm.name]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error of the mean."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def charts(
    size: Size, base: float, at_shared: Sequence[Result], at_best: Sequence[Result]
) -> list[Chart]:
    """Learning curves at the shared rate, and final accuracies at both, every seed a dot."""
    arms, steps = size.arms(), [step for step, _ in at_shared[0].curve]
    curves = []
    for arm in arms:
        values = [r.curve for r in of(at_shared, arm)]
        means = [statistics.fmean(curve[i][1] for curve in values) for i in range(len(steps))]
        curves.append(Line(arm.title, [Point(0, base), *map(Point, steps, means)]))
    rate = at_shared[0].learning_rate
    return [
        Chart(
            f"accuracy after n steps, learning rate {rate:g} (mean of seeds)",
            curves,
            x_ticks=[(step, str(step)) for step in (0, *steps)],
            level=("base", base),
        ),
        *(
            Chart(
                f"held-out accuracy, {title} (dots are seeds)",
                [
                    Line(arm.title, [Point(i, r.sampled) for r in of(final, arm)], joined=False)
                    for i, arm in enumerate(arms)
                ],
                x_ticks=[(i, arm.name) for i, arm in enumerate(arms)],
                level=("base", base),
            )
            for title, final in (
                (f"learning rate {rate:g}", at_shared),
                ("each at its best rate", at_best),
            )
        ),
    ]


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
