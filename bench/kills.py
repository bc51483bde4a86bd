"""Kills runs of every kind at random moments and compares what they end with to a run that nothing happened to.

    .venv/bin/python -m bench.kills [--kills 100] [--seed 0] [--kinds eval,ddp]

Each run is a fork of one warm process, so a start costs milliseconds. It is killed up to four times (SIGKILL;
every fourth time SIGTERM, which must end it in order), each time after a random part of the time that a calm run
takes; of several processes every third time only one is killed, and the other must end by itself. Then the same
command runs to its end. Prints a table and a line of JSON; the exit code is 1 if anything differs, or a code is
wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.distributed.launch import cpu_config, launched, write_model, write_pairs, write_recipe
from tests.eval.runs import write_chat_model, write_jsonl
from tests.pipelines import schedules
from tests.pipelines.pipelines import made, write_pipeline
from tests.pipelines.pipelines import output as output_of
from tests.pipelines.test_rounds import weights, write_rounds
from tests.recipes.commands import Command, prefopt
from tests.recipes.test_interrupted_runs import command_of, recipe_in
from tests.recipes.test_interrupted_runs import rows as metrics
from tests.rollouts import test_interrupted_rollouts as rollouts
from tests.signals.chat_server import Answer, chat_server

MOST_KILLS_A_RUN = 4
HANG_S = 600.0
TERMINATED = 128 + signal.SIGTERM
Processes = AbstractContextManager[list[Command]]


@dataclass(frozen=True)
class Kind:
    """A kind of run: how it is started in a directory of its own, and what it must end with."""

    name: str
    share: int
    """Of a hundred kills."""
    prepare: Callable[[Path], Any]
    """Writes what the command reads; called once a run."""
    start: Callable[[Path], Processes]
    result: Callable[[Path], dict[str, Any]]


@dataclass
class Count:
    """What came of a kind."""

    kind: str
    kills: int = 0
    terminated: int = 0
    """Of the kills, those by SIGTERM."""
    alone: int = 0
    """Of the kills, those of one process of several."""
    runs: int = 0
    """Runs that were compared."""
    different: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@contextmanager
def one(*arguments: str, log: Path, **options: Any) -> Iterator[list[Command]]:
    """A command in one process."""
    with prefopt(*arguments, log=log, **options) as command:
        yield [command]


# -- the kinds -----------------------------------------------------------------------------------------------


def offline(inputs: Path) -> Kind:
    """DPO with LoRA and dropout in one process, a checkpoint every second step, held-out rows."""
    return Kind(
        "training",
        20,
        lambda folder: recipe_in(folder, inputs),
        lambda folder: one(*command_of(folder / "recipe.yaml"), log=folder / "log"),
        lambda folder: trained(folder / "run"),
    )


def of_two(config: str, share: int, inputs: Path) -> Kind:
    """The same on two processes, every step a checkpoint."""

    def prepare(folder: Path) -> None:
        train = {"num_epochs": 3, "save_every": 1, "micro_batch_size": 2}
        write_recipe(folder / "recipe.yaml", inputs / "model", inputs / "pairs.jsonl", train=train)

    def start(folder: Path) -> Processes:
        return launched(cpu_config(config, 2, folder), "dpo", folder / "recipe.yaml")

    return Kind(
        f"training, {config}", share, prepare, start, lambda folder: trained(folder / "run")
    )


def sampling(inputs: Path) -> Kind:
    """Asynchronous online DPO."""
    name = "asynchronous, far ahead"

    def result(folder: Path) -> dict[str, Any]:
        run = folder / "run"
        final = {"weights": (run / "final" / "adapter_model.safetensors").read_bytes()}
        return {"rows": rollouts.computed(run), "sampled": rollouts.sampled(run), **final}

    return Kind(
        "rollouts",
        20,
        lambda folder: rollouts.recipe_in(folder, inputs, name),
        lambda folder: one(*rollouts.command_of(folder / "recipe.yaml"), log=folder / "log"),
        result,
    )


def evaluation(inputs: Path, judge: str) -> Kind:
    """A policy and a baseline answer, and a judge compares them."""

    def start(folder: Path) -> Processes:
        words = [
            "eval",
            str(inputs / "chat"),
            "--tasks",
            "win_rate",
            "--baseline",
            str(inputs / "other"),
        ]
        words += [f"tasks.win_rate.data={inputs / 'prompts.jsonl'}", "decoding.max_new_tokens=16"]
        words += [
            "decoding.temperature=1.0",
            f"judge.base_url={judge}",
            "judge.model=j",
            "judge.concurrency=2",
        ]
        words += ["--output", str(folder / "out")]
        return one(*words, log=folder / "log", PREFOPT_CACHE=str(folder / "cache"))

    def result(folder: Path) -> dict[str, Any]:
        names = ("results.json", "win_rate/examples.jsonl")
        return {name: (folder / "out" / name).read_bytes() for name in names}

    return Kind("evaluation", 20, lambda folder: None, start, result)


def pipeline() -> Kind:
    """A build of small shards."""

    def prepare(folder: Path) -> None:
        stages = [{"stage": "made_up", "num_rows": 600}, {"stage": "slow"}, {"stage": "pair"}]
        write_pipeline(folder / "build.yaml", stages, shard_rows=5)

    def result(folder: Path) -> dict[str, Any]:
        files = made(output_of(folder / "build.yaml"))
        return {
            k: v
            for k, v in files.items()
            if k != "manifest.json" and "/.tmp-" not in k and k[0] != "."
        }

    def start(folder: Path) -> Processes:
        return one("data", "build", str(folder / "build.yaml"), log=folder / "log")

    return Kind("pipeline build", 12, prepare, start, result)


def schedule(inputs: Path) -> Kind:
    """Two rounds of sampling, scoring, pairing and training, each step a process."""
    return Kind(
        "pipeline schedule",
        8,
        lambda folder: write_rounds(folder, inputs / "chat"),
        lambda folder: one(
            "data", "round", str(folder / "rounds.yaml"), log=folder / "log", entry=schedules.main
        ),
        lambda folder: weights(folder / "out"),
    )


def trained(run: Path) -> dict[str, Any]:
    """What a run computed, without what a clock or the system measured."""
    measured = ("time/", "memory/", "tokens/per_s")
    rows = [{k: v for k, v in row.items() if not k.startswith(measured)} for row in metrics(run)]
    return {"rows": rows, "weights": (run / "final" / "adapter_model.safetensors").read_bytes()}


# -- the rounds ----------------------------------------------------------------------------------------------


def ended(processes: Sequence[Command]) -> list[int]:
    """Their exit codes. Raises: TimeoutError if one hangs."""
    deadline = time.monotonic() + HANG_S
    while waiting := [each.process.sentinel for each in processes if each.process.exitcode is None]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still running after {HANG_S:g} s: {processes[0].output[-2000:]}")
        multiprocessing.connection.wait(waiting, 1.0)
    return [each.process.exitcode or 0 for each in processes]


def to_its_end(kind: Kind, folder: Path) -> None:
    with kind.start(folder) as processes:
        codes = ended(processes)
        if any(codes):
            raise RuntimeError(f"ended with {codes}: {processes[0].output[-3000:]}")


def killed(kind: Kind, folder: Path, after_s: float, draw: random.Random, count: Count) -> bool:
    """One start that is killed; False if it was done before."""
    number = signal.SIGTERM if count.kills % 4 == 3 else signal.SIGKILL
    with kind.start(folder) as processes:
        sentinels = [each.process.sentinel for each in processes]
        if multiprocessing.connection.wait(sentinels, after_s) and not any(ended(processes)):
            return False
        only = len(processes) > 1 and number == signal.SIGKILL and count.kills % 3 == 2
        hit = [draw.choice(processes)] if only else processes
        for each in hit:
            with contextlib.suppress(ProcessLookupError):
                each.send(number)
        codes = ended(processes)
        said = "".join(each.output for each in processes)
    if not any(codes):
        return False  # the signal came too late
    count.kills += 1
    count.terminated += number == signal.SIGTERM
    count.alone += only
    # -SIGTERM: before the command began, in the fork's own first lines
    fine = {TERMINATED, -signal.SIGTERM} if number == signal.SIGTERM else {-signal.SIGKILL}
    if not only and not set(codes) <= fine:
        count.problems.append(f"{signal.Signals(number).name}: exit codes {codes}: {said[-1500:]}")
    return True


def compare(kind: Kind, folder: Path, calm: dict[str, Any], count: Count) -> None:
    found = kind.result(folder)
    count.runs += 1
    differs = [name for name in calm.keys() | found.keys() if calm.get(name) != found.get(name)]
    if differs:
        count.different += 1
        count.problems.append(f"different: {', '.join(map(str, sorted(differs)))[:500]}")


def rounds(kind: Kind, kills: int, root: Path, draw: random.Random) -> Count:
    """So many kills of a kind, spread over as many runs as it takes."""
    count, began = Count(kind.name), time.monotonic()
    folder = root / "calm"
    folder.mkdir(parents=True)
    kind.prepare(folder)
    to_its_end(kind, folder)  # and once more, with everything warm, for the time
    shutil.rmtree(folder)
    folder.mkdir()
    kind.prepare(folder)
    started = time.monotonic()
    to_its_end(kind, folder)
    takes_s, calm = time.monotonic() - started, kind.result(folder)
    number = 0
    while count.kills < kills:
        number += 1
        folder = root / f"run-{number}"
        folder.mkdir()
        kind.prepare(folder)
        try:
            for _ in range(min(MOST_KILLS_A_RUN, kills - count.kills)):
                if not killed(kind, folder, draw.uniform(0, takes_s), draw, count):
                    break
            to_its_end(kind, folder)
            compare(kind, folder, calm, count)
        except (RuntimeError, TimeoutError, OSError) as error:
            count.different += 1
            count.problems.append(str(error))
        shutil.rmtree(folder)
    count.seconds = round(time.monotonic() - began, 1)
    return count


def verdict(body: dict[str, Any]) -> Answer:
    """A judge whose answer is a function of what it reads, slow enough to be interrupted."""
    text = body["messages"][0]["content"]
    return Answer(f"[[{'ABC?'[sum(map(ord, text)) % 4]}]]", delay_s=0.01)


@contextmanager
def kinds(root: Path) -> Iterator[list[Kind]]:
    """All of them, with what they share made once."""
    inputs = root / "inputs"
    inputs.mkdir()
    write_model(inputs / "model")
    write_pairs(inputs / "pairs.jsonl", 26)
    write_chat_model(inputs / "chat")
    write_chat_model(inputs / "other", seed=1)
    asked = [{"prompt": f"Tell me about {n * 37 % 101}, {n}.", "key": f"k{n}"} for n in range(80)]
    write_jsonl(inputs / "prompts.jsonl", asked)
    words = [{"prompt": f"red {n} blue {n * 7 % 13}"} for n in range(20)]
    write_jsonl(inputs / "rollout-prompts.jsonl", words)
    (inputs / "plugin.py").write_text(rollouts.PLUGIN)
    online = root / "online"
    online.mkdir()
    shutil.copytree(inputs / "model", online / "model")
    shutil.copy(inputs / "rollout-prompts.jsonl", online / "prompts.jsonl")
    shutil.copy(inputs / "plugin.py", online / "plugin.py")
    with chat_server(verdict) as server:
        yield [
            offline(inputs),
            of_two("ddp", 12, inputs),
            of_two("zero2", 8, inputs),
            sampling(online),
            evaluation(inputs, server.base_url),
            pipeline(),
            schedule(inputs),
        ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100, help="in all (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--kinds", help="only those whose names hold one of these, e.g. eval,ddp")
    arguments = parser.parse_args(argv)
    wanted = arguments.kinds.split(",") if arguments.kinds else [""]
    with tempfile.TemporaryDirectory(prefix="kills-") as name, kinds(Path(name)) as every:
        chosen = [kind for kind in every if any(each in kind.name for each in wanted)]
        total = sum(kind.share for kind in chosen)
        counts = []
        print(
            f"{'kind':<20}{'kills':>7}{'SIGTERM':>9}{'one of 2':>10}{'runs':>6}{'different':>11}{'seconds':>9}"
        )
        for place, kind in enumerate(chosen):
            done = sum(each.kills for each in counts)
            kills = (
                arguments.kills - done
                if kind is chosen[-1]
                else round(arguments.kills * kind.share / total)
            )
            draw = random.Random(f"{arguments.seed} {kind.name}")
            found = rounds(kind, max(1, kills), Path(name) / str(place), draw)
            counts.append(found)
            print(
                f"{found.kind:<20}{found.kills:>7}{found.terminated:>9}{found.alone:>10}{found.runs:>6}"
                f"{found.different:>11}{found.seconds:>9}", flush=True,
            )  # fmt: skip
            for problem in found.problems:
                print(f"  {problem}", flush=True)
    bad = sum(len(each.problems) for each in counts)
    kills, runs = sum(each.kills for each in counts), sum(each.runs for each in counts)
    print(
        json.dumps(
            {"kills": kills, "runs": runs, "problems": bad, "kinds": [asdict(c) for c in counts]}
        )
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
