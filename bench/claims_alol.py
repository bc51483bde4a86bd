"""A-LoL's claim in miniature: with bad responses among the data, filtering by advantage is the more robust.

    python -m bench.claims_alol            # about ten minutes on one core
    python -m bench.claims_alol --quick    # about two: one seed, one rate, one share; to see it work

The claim (arXiv:2305.14718): A-LoL variants keep their quality where half of the training responses are bad,
because a response that is worse than what the reference earns by itself is not trained on. Methods that weigh by
the reward go on imitating it, for a bad response has a positive reward, too.

The policy is the quickstart's, which sorts digits after half careless demonstrations. The data: two responses a
prompt, right ones and, with probability 0, 25 or 50 %, careless ones; the reward is graded (1 less an eighth a
wrong digit), so that a careless answer still earns about 0.7. V(x) is learnt from the policy's own greedy answers
to dev prompts by the pipelines of docs/offline_rl.md; advantages are what that head says. All arms are one recipe
(bench/claims_alol.yaml) through `prefopt.wiring.train`: as many steps of as many responses (DPO: half as many
pairs, of prompts whose two responses differ; without bad responses there are none). Rows are drawn as the paper's
code draws them: by advantage (A-LoL), by reward (R-LoL, wBC), evenly (NLL); unlike there the number of steps is
not scaled by the share of positive advantages. Beside the paper's methods, NLL on the responses whose reward
reaches the mean: what a filter without a value is worth.

Every arm has the learning rate that does best with 25 % bad responses on validation prompts and a seed of their
own, of 3e-5, 1e-4 and 3e-4 (DPO, which falls apart at these: of a tenth of them). Reported: reward and accuracy of
one greedy answer a test prompt; distinct-n (a digit is a word) and length of one answer at temperature 1.

What came out is in docs/log.md. Everything is written to runs/bench-claims-alol: results.json, claims.svg, the
pipelines' folders. A measurement that results.json already has is not repeated, unless --fresh.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench._alol_data import (
    NUM_TEST,
    RUN_DIR,
    TASK_SEED,
    data_dir,
    mean_reward,
    negative_frac,
    prepare,
)
from bench._sorting_rewards import reward
from bench._svg import Chart, Line, Point, write_svg
from bench.regimes import say
from recipes.quickstart import run as quickstart

RECIPE = "bench/claims_alol.yaml"
TUNING_SEED, TUNING_SHARE = 1000, 25
BATCH = 16


@dataclass(frozen=True)
class Arm:
    """One way to train, as overrides of the recipe."""

    name: str
    title: str
    objective: str
    sampling: str | None = None
    """How rows are drawn; None: every row once an epoch."""
    rate_scale: float = 1.0
    """Of the grid of learning rates."""

    @property
    def reads_pairs(self) -> bool:
        return self.name == "dpo"

    def rates(self, grid: Sequence[float]) -> list[float]:
        """The learning rates that this arm is tried at."""
        return [rate * self.rate_scale for rate in grid]

    def overrides(self, share: int) -> list[str]:
        source = "pairs" if self.reads_pairs else "samples/advantage"
        source = f"{data_dir(share)}/{source}{'.jsonl' if self.reads_pairs else ''}"
        batch = BATCH // 2 if self.reads_pairs else BATCH  # as many responses
        found = [
            f"data.train.0.path={source}",
            f"objective={self.objective.replace('MEAN', f'{mean_reward(share):g}')}",
            f"train.global_batch_size={batch}",
        ]
        return [*found, f"data.sampling={self.sampling}"] if self.sampling else found


PRIORITY, PROPORTIONAL, POSITIVE = (
    f"{{name: {by}, scale_steps: false}}" for by in ("advantage", "reward", "positive")
)
ARMS = (
    Arm("nll", "NLL", "{name: filtered_nll, threshold: 0}"),
    Arm("filtered", "filtered NLL", "{name: filtered_nll, threshold: MEAN}", POSITIVE),
    Arm("wbc", "wBC", "{name: wbc}", PROPORTIONAL),
    Arm("r_lol", "R-LoL", "{name: r_lol}", PROPORTIONAL),
    Arm("a_lol", "A-LoL", "{name: a_lol}", PRIORITY),
    Arm("a_lol_ref_free", "A-LoL ref-free", "{name: a_lol_ref_free}", PRIORITY),
    Arm("a_lol_seq", "A-LoL seq", "{name: a_lol_seq}", PRIORITY),
    Arm("a_lol_kl", "A-LoL KL", "{name: a_lol_kl, beta: 0.1}", PRIORITY),
    Arm("dpo", "DPO", "{name: dpo, beta: 0.1}", rate_scale=0.1),
)
IS_ADVANTAGE = frozenset(arm.name for arm in ARMS if arm.name.startswith("a_lol"))


@dataclass(frozen=True)
class Size:
    """How much is run."""

    steps: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    shares: tuple[int, ...]


FULL = Size(80, (3e-5, 1e-4, 3e-4), (1, 2, 3), (0, 25, 50))
QUICK = Size(80, (1e-4,), (1,), (50,))


@dataclass(frozen=True)
class Quality:
    """What a policy answers."""

    reward: float
    """Of greedy answers, mean."""
    accuracy: float
    """Greedy answers that are right."""
    sampled_reward: float
    """Of one answer a prompt at temperature 1, mean."""
    distinct: tuple[float, float, float]
    """Different over all 1-, 2- and 3-grams of digits of the sampled answers, percent."""
    length: float
    """Digits of the sampled answers, mean."""


@dataclass(frozen=True)
class Result:
    """One training run, measured."""

    arm: str
    share: int
    learning_rate: float
    seed: int
    quality: Quality
    seconds: float


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small version, to see it work")
    parser.add_argument("--fresh", action="store_true", help="repeat what has been measured")
    arguments = parser.parse_args(argv)
    os.chdir(quickstart.ROOT)
    quickstart.set_environment()
    os.environ.setdefault("TQDM_DISABLE", "1")
    size = QUICK if arguments.quick else FULL
    if arguments.fresh:
        shutil.rmtree(RUN_DIR, ignore_errors=True)
    begun = time.perf_counter()
    shares = {*size.shares, *((TUNING_SHARE,) if len(size.learning_rates) > 1 else ())}
    validation, test = prepare(sorted(shares))
    measured = Measured(RUN_DIR / "results.json", size.steps)
    base = measured.base(test)
    rates = {arm.name: arm.rates(size.learning_rates)[0] for arm in ARMS}
    if len(size.learning_rates) > 1:
        grid = [
            measured.run("tune", arm, TUNING_SHARE, rate, TUNING_SEED, validation)
            for arm in ARMS
            for rate in arm.rates(size.learning_rates)
        ]
        rates = {arm.name: best_rate(grid, arm.name) for arm in ARMS}
    final = [
        measured.run("test", arm, share, rates[arm.name], seed, test)
        for seed in size.seeds
        for share in size.shares
        for arm in ARMS
        if share or not arm.reads_pairs
    ]
    report(size, base, rates, final)
    say(f"{time.perf_counter() - begun:.0f} s in all")


# -- runs ----------------------------------------------------------------------------------------------------


class Measured:
    """Measurements, kept on disk as they are made."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path = path
        self.steps = steps
        self._found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def base(self, prompts: Sequence[str]) -> Quality:
        """The policy that all arms start from."""
        return _quality(
            self._once("base", lambda: asdict(measure(load_model(RUN_DIR / "base"), prompts)))
        )

    def run(
        self, phase: str, arm: Arm, share: int, rate: float, seed: int, prompts: Sequence[str]
    ) -> Result:
        """Trains an arm and measures it."""
        key = f"{phase} {self.steps} {arm.name} bad {share} lr {rate:g} seed {seed}"
        found = self._once(
            key, lambda: asdict(train_and_measure(self.steps, arm, share, rate, seed, prompts))
        )
        result = Result(**{**found, "quality": _quality(found["quality"])})
        say(
            f"{key:58} reward {result.quality.reward:.3f} accuracy {result.quality.accuracy:.3f} "
            f"({result.seconds:.0f} s)"
        )
        return result

    def _once(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self._found:
            self._found[key] = json.loads(json.dumps(measure()))
            self.path.write_text(json.dumps(self._found, indent=1) + "\n")
        return self._found[key]


def _quality(found: dict[str, Any]) -> Quality:
    return Quality(**{**found, "distinct": tuple(found["distinct"])})


def train_and_measure(
    steps: int, arm: Arm, share: int, rate: float, seed: int, prompts: Sequence[str]
) -> Result:
    """One run in a directory of its own, which goes when it has been measured."""
    from prefopt.wiring import train

    run_dir = RUN_DIR / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    begun = time.perf_counter()
    overrides = [
        *(f"train.learning_rate={rate}", f"train.seed={seed}", f"train.max_steps={steps}"),
        *(f"run.output_dir={run_dir}", *arm.overrides(share)),
    ]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        train(RECIPE, overrides)
    quality = measure(load_model(run_dir / "final"), prompts)
    shutil.rmtree(run_dir)
    return Result(arm.name, share, rate, seed, quality, time.perf_counter() - begun)


def load_model(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def measure(model: Any, prompts: Sequence[str]) -> Quality:
    """One greedy answer a prompt, and one at temperature 1."""
    from eval.tasks.diversity import corpus_distinct
    from recipes.quickstart.prepare import make_tokenizer
    from recipes.quickstart.sample import generate

    tokenizer = make_tokenizer()
    greedy = [found[0] for found in generate(model, tokenizer, prompts)]
    sampled = [
        found[0] for found in generate(model, tokenizer, prompts, temperature=1.0, seed=TASK_SEED)
    ]
    rewards = [reward(prompt, text) for prompt, text in zip(prompts, greedy, strict=True)]
    others = [reward(prompt, text) for prompt, text in zip(prompts, sampled, strict=True)]
    distinct = corpus_distinct([" ".join(text) for text in sampled])
    return Quality(
        statistics.fmean(rewards),
        statistics.fmean(each == 1 for each in rewards),
        statistics.fmean(others),
        (distinct["distinct_1"].value, distinct["distinct_2"].value, distinct["distinct_3"].value),
        statistics.fmean(map(len, sampled)),
    )


def best_rate(grid: Sequence[Result], arm: str) -> float:
    """The learning rate of an arm's highest validation reward; the smallest of equals."""
    mine = sorted((r for r in grid if r.arm == arm), key=lambda r: r.learning_rate)
    return max(mine, key=lambda r: r.quality.reward).learning_rate


# -- report --------------------------------------------------------------------------------------------------


def report(size: Size, base: Quality, rates: dict[str, float], final: Sequence[Result]) -> None:
    """Prints a table a share and the drop from the first share to the last; writes the plot."""
    for share in size.shares:
        say(
            f"\n{share} % bad responses ({negative_frac(share):.1%} of the advantages are negative); test, "
            f"{NUM_TEST} prompts, mean of {len(size.seeds)} seeds ± its standard error"
        )
        say(
            f"{'':16}{'lr':>8}{'reward':>16}{'accuracy':>16}{'at T = 1':>10}{'distinct-1/2/3':>22}{'length':>8}"
        )
        say(f"{'base':24}{_cells([base])}")
        for arm in ARMS:
            mine = of(final, arm.name, share)
            if mine:
                say(f"{arm.title:16}{rates[arm.name]:8g}{_cells([r.quality for r in mine])}")
    if len(size.shares) > 1:
        say(f"\nreward lost from {size.shares[0]} to {size.shares[-1]} % bad responses:")
        for arm in ARMS:
            drop = lost(final, arm.name, size.shares)
            say(f"{arm.title:16}" + ("no pairs at 0 %" if drop is None else f"{drop:8.3f}"))
    plot = RUN_DIR / "claims.svg"
    write_svg(plot, charts(size, base, final))
    say(f"\nplot: {plot}\nresults: {RUN_DIR / 'results.json'}")
    say(verdict(final, size.shares[-1]))


def of(results: Sequence[Result], arm: str, share: int) -> list[Result]:
    return [result for result in results if (result.arm, result.share) == (arm, share)]


def lost(final: Sequence[Result], arm: str, shares: Sequence[int]) -> float | None:
    """Mean reward with the first share of bad responses less that with the last; None without the first."""
    means = [[r.quality.reward for r in of(final, arm, share)] for share in (shares[0], shares[-1])]
    return statistics.fmean(means[0]) - statistics.fmean(means[1]) if all(means) else None


def verdict(final: Sequence[Result], share: int) -> str:
    """The worst advantage method against the best of the others that learn from every response.

    Decided if they are apart by more than two standard errors of the difference (over seeds).
    """
    rewards = {arm.name: [r.quality.reward for r in of(final, arm.name, share)] for arm in ARMS}
    means = {name: statistics.fmean(found) for name, found in rewards.items()}
    others = means.keys() - IS_ADVANTAGE - {"filtered"}
    worst = min(IS_ADVANTAGE, key=lambda name: means[name])
    best = max(others, key=lambda name: means[name])
    gap, error = means[worst] - means[best], standard_error(rewards[worst], rewards[best])
    holds = "holds" if gap > 0 else "does not hold"
    says = f"the claim {holds}" if abs(gap) > 2 * error else "the seeds do not decide"
    return (
        f"{share} % bad: worst by advantage {worst} {means[worst]:.3f}, best other {best} {means[best]:.3f}, gap "
        f"{gap:.3f} ± {error:.3f}: {says}; a plain filter, reward >= mean: {means['filtered']:.3f}"
    )


def standard_error(*samples: Sequence[float]) -> float:
    """Of a sum or difference of independent means; 0 where there is one seed."""
    return sum(statistics.variance(each) / len(each) for each in samples if len(each) > 1) ** 0.5


def _cells(found: Sequence[Quality]) -> str:
    distinct = "/".join(f"{statistics.fmean(q.distinct[n] for q in found):.1f}" for n in range(3))
    return (
        f"{spread([q.reward for q in found]):>16}{spread([q.accuracy for q in found]):>16}"
        f"{statistics.fmean(q.sampled_reward for q in found):10.3f}{distinct:>22}"
        f"{statistics.fmean(q.length for q in found):8.2f}"
    )


def spread(values: Sequence[float]) -> str:
    """Mean ± standard error of the mean; the mean alone of one."""
    if len(values) < 2:
        return f"{statistics.fmean(values):.3f}"
    return f"{statistics.fmean(values):.3f} ± {standard_error(values):.3f}"


def charts(size: Size, base: Quality, final: Sequence[Result]) -> list[Chart]:
    """Reward and accuracy by the share of bad responses, means of the seeds."""

    def lines(number: Callable[[Quality], float]) -> list[Line]:
        return [
            Line(
                arm.title,
                [
                    Point(
                        share,
                        statistics.fmean(number(r.quality) for r in of(final, arm.name, share)),
                    )
                    for share in size.shares
                    if of(final, arm.name, share)
                ],
            )
            for arm in ARMS
        ]

    ticks = [(share, f"{share} % bad") for share in size.shares]
    return [
        Chart("reward of greedy answers (mean of seeds)", lines(lambda q: q.reward), ticks, ("base", base.reward)),
        Chart("accuracy of greedy answers", lines(lambda q: q.accuracy), ticks, ("base", base.accuracy)),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
