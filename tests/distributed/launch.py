"""Runs of several processes on CPU from the shipped accelerate configurations, and what they train on."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from tests.recipes.commands import HANG_S, Command, forked
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
AFTER_A_FAILURE_S = 60.0


def cpu_config(name: str, num_processes: int, directory: Path) -> Path:
    """The shipped accelerate configuration ``name``, for ``num_processes`` CPU processes.

    A configuration of type MULTI_CPU starts one process and says nothing (accelerate 1.15), so the GPU
    types are kept and ``use_cpu`` turned on.
    """
    config = yaml.safe_load(
        (ROOT / "accelerate_configs" / f"{name}.yaml").read_text(encoding="utf-8")
    )
    config |= {"use_cpu": True, "num_processes": num_processes}
    config.pop("gpu_ids", None)
    path = directory / f"{name}-{num_processes}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Launched:
    """How a launch ended."""

    returncode: int
    stderr: str
    """What all of its processes wrote."""


def launch(
    config: Path,
    script: str,
    recipe: Path,
    *overrides: str,
    variables: Mapping[str, str] | None = None,
    of_rank: Callable[[int], Mapping[str, str]] = lambda rank: {},
) -> Launched:
    """``accelerate launch recipes/<script>.py`` on processes that are forked with torch already imported.

    accelerate reads ``config`` and sets the variables itself; only who starts the processes differs from
    `accelerate_launch`.

    Args:
        variables: what the person sets; default: what a machine without GPUs needs.
        of_rank: what differs between the processes, as between machines.
    """
    with launched(
        config, script, recipe, *overrides, variables=variables, of_rank=of_rank
    ) as commands:
        codes = _codes(commands)
    return Launched(
        next((code for code in codes if code), 0), "".join(each.output for each in commands)
    )


@contextlib.contextmanager
def launched(
    config: Path,
    script: str,
    recipe: Path,
    *overrides: str,
    variables: Mapping[str, str] | None = None,
    of_rank: Callable[[int], Mapping[str, str]] = lambda rank: {},
) -> Iterator[list[Command]]:
    """The processes of `launch` while they run."""
    words = [str(ROOT / "recipes" / f"{script}.py"), str(recipe), *overrides]
    processes, environment = _as_accelerate_sets_it(
        config, words, _variables(config) if variables is None else variables
    )
    ranks = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    with contextlib.ExitStack() as stack:
        commands = []
        for rank in range(processes):
            if processes > 1:
                ranks |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                environment |= ranks
            own = {**environment, **of_rank(rank)}
            log = recipe.parent / f"log-{rank}"
            commands.append(stack.enter_context(forked(_script, *words, log=log, environment=own)))
        yield commands


def accelerate_launch(config: Path, script: str, recipe: Path, *overrides: str) -> Launched:
    """The same as a person types it: fresh interpreters, torchrun's agent."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *_options(config)]
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / f"{script}.py"), str(recipe), *overrides],
        capture_output=True,
        text=True,
        env={**os.environ, **_variables(config)},
        timeout=HANG_S,
        cwd=ROOT,
        check=False,
    )
    return Launched(done.returncode, done.stderr)


@contextlib.contextmanager
def accelerate_launching(
    config: Path, script: str, recipe: Path, *overrides: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher of `accelerate_launch` while it runs; what it and its processes say goes to ``log``."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *_options(config)]
    with (recipe.parent / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, str(ROOT / "recipes" / f"{script}.py"), str(recipe), *overrides],
            stdout=log,
            stderr=log,
            env={**os.environ, **_variables(config)},
            cwd=ROOT,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _options(config: Path) -> list[str]:
    return ["--config_file", str(config), "--main_process_port", "0"]


def _variables(config: Path) -> dict[str, str]:
    """What a person sets on a machine without GPUs (accelerate_configs/cpu.yaml says so)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, for DeepSpeed
    # Without ACCELERATE_USE_CPU, DDP processes on CPU do not know of each other; with it, DeepSpeed is off.
    is_deepspeed = "deepspeed_config" in config.read_text(encoding="utf-8")
    return {
        "OMP_NUM_THREADS": "1",
        "PATH": path,
        **({} if is_deepspeed else {"ACCELERATE_USE_CPU": "true"}),
    }


def _as_accelerate_sets_it(
    config: Path, words: list[str], variables: Mapping[str, str]
) -> tuple[int, dict[str, str]]:
    """Number and variables of the processes that ``accelerate launch`` would start with ``words``."""
    arguments = launch_command_parser().parse_args([*_options(config), *words])
    found: list[tuple[int, dict[str, str]]] = []

    def torchrun(options: argparse.Namespace) -> None:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(options.master_port)}
        found.append((int(options.nproc_per_node), {**os.environ, **address}))

    def one_process(options: argparse.Namespace) -> None:
        _, set_there = prepare_simple_launcher_cmd_env(options)
        found.append((1, set_there))

    with (
        mock.patch.dict(os.environ, variables),
        mock.patch("torch.distributed.run.run", torchrun),
        mock.patch("accelerate.commands.launch.simple_launcher", one_process),
    ):
        launch_command(arguments)
    return found[0]


def _script(path: str, *arguments: str) -> int:
    """Runs a script as the interpreter does; leaves with the exit code that it ends with."""
    os.chdir(ROOT)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
    return 0


def _codes(commands: list[Command]) -> list[int]:
    """Exit codes. Where one fails, the others are given time to fail too before they are ended."""
    deadline = time.monotonic() + HANG_S
    while any(each.process.exitcode is None for each in commands):
        if any(each.process.exitcode for each in commands):
            deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE_S)
        if time.monotonic() > deadline:
            for each in commands:
                each.process.kill()
        multiprocessing.connection.wait(
            [each.process.sentinel for each in commands if each.process.exitcode is None], 1.0
        )
    return [each.process.exitcode or 0 for each in commands]


def write_model(directory: Path, seed: int = 0) -> Path:
    """A tiny Llama and its tokenizer on disk."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Preference pairs of ragged random words."""
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon"]

    def text(longest: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, longest)))

    rows = [
        {"prompt": text(8), "chosen": f" {text(9)} a", "rejected": f" {text(9)} b"}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_samples(path: Path, count: int, seed: int = 0) -> Path:
    """Samples of ragged random words, with rewards and advantages of both signs."""
    rng = np.random.default_rng(seed)
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon"]

    def text(longest: int) -> str:
        return " ".join(rng.choice(words, rng.integers(1, longest)))

    rows = [
        {
            "prompt": text(8),
            "response": f" {text(9)} a",
            "reward": float(rng.random()),
            "advantage": float(rng.normal()) / 10,
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(path: Path, model: Path, pairs: Path, **sections: Any) -> Path:
    """A small recipe; ``sections`` replace or add to the defaults, key by key."""
    recipe: dict[str, Any] = {
        "model": {"path": str(model)},
        "peft": {"type": "lora", "r": 4, "lora_alpha": 8},
        "data": {"train": [{"path": str(pairs)}], "cache_dir": str(path.parent / "cache")},
        "objective": {"name": "dpo", "beta": 0.1},
        "train": {"learning_rate": 1e-3, "global_batch_size": 8, "num_epochs": 2},
        "run": {"output_dir": str(path.parent / "run")},
    }
    for name, section in sections.items():
        if section is None:
            recipe.pop(name)
        else:
            merged = {**recipe.get(name, {}), **section}
            recipe[name] = {key: value for key, value in merged.items() if value is not None}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
