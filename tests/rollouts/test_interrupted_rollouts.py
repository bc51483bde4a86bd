"""Runs with rollouts, killed at any moment: the same command ends with the same losses and the same weights.

Each is a process of its own (tests/recipes/commands.py). Dropout stays on, so that a lost random state shows.
"""

from __future__ import annotations

import functools
import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from prefopt.rollouts.experience import read_log
from tests.distributed.launch import write_model, write_recipe
from tests.recipes.commands import prefopt, run
from tests.recipes.test_interrupted_runs import checkpoints, held_at, logged, rows

NUM_STEPS = 14
PLUGIN = """
from prefopt.recipe.registry import signal
from prefopt.signals.base import per_response

@signal("vowels", source="tests")
def vowels():
    return per_response(lambda prompt, text: sum(c in "aeiou" for c in text) / (1 + len(text)))
"""
REGIMES: dict[str, dict[str, Any]] = {
    "online": {},
    "semi-online": {"regime": {"sync_every": 3}},
    "asynchronous": {"regime": {"max_lag": 1}},
    "asynchronous, far ahead": {"regime": {"sync_every": 2, "max_lag": 3}},
    "moving reference": {"reference": {"name": "ema", "ema_rate": 0.2}},
    "behavior reference": {"regime": {"sync_every": 2}, "reference": {"name": "behavior"}},
    "policy gradient": {"objective": {"name": "grpo"}, "credit": None},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    write_model(directory / "model")
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(words, k=draw.randint(2, 6))) for _ in range(20)]
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (directory / "prompts.jsonl").write_text("".join(lines))
    (directory / "plugin.py").write_text(PLUGIN)
    return directory


ACCEPT = ("train.accept_changes=true",)


def recipe_in(directory: Path, inputs: Path, name: str) -> Path:
    """Checkpoints every 4 steps, which fall between pushes and between rows of metrics.jsonl."""
    changed = {key: dict(value or {}) for key, value in REGIMES[name].items()}
    objective = changed.pop("objective", {"name": "dpo", "beta": 0.1})
    sections: dict[str, Any] = {
        "peft": {"r": 8, "lora_dropout": 0.2},
        "data": {"train": None, "prompts": [{"path": str(inputs / "prompts.jsonl")}]},
        "regime": {
            "name": "rollouts", "samples_per_prompt": 3, "max_new_tokens": 6,
            **changed.pop("regime", {}),
        },
        "train": {
            "global_batch_size": 4, "num_epochs": None, "max_steps": NUM_STEPS, "save_every": 4,
            "log_every": 3, "learning_rate": 1e-2,
        },
    }  # fmt: skip
    sections |= {key: value for key, value in changed.items() if key != "credit"}
    path = write_recipe(
        directory / "recipe.yaml", inputs / "model", inputs / "prompts.jsonl", **sections
    )
    import yaml

    recipe = yaml.safe_load(path.read_text())
    recipe |= {
        "objective": objective,
        "signals": [{"name": "vowels"}],
        "plugins": [str(inputs / "plugin.py")],
    }
    path.write_text(yaml.safe_dump(recipe))
    return path


def command_of(recipe: Path) -> tuple[str, ...]:
    return "train", str(recipe), "model.disable_dropout=false"


def computed(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock or the system measured.

    Nor what a push measured: killed between a push and the first batch of its version, a resumed run loads those
    weights from disk when the trainer holds later ones, and has nothing to probe them against.
    """
    measured = ("time/", "memory/", "tokens/per_s", "rollout/probe_gap")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in rows(run_dir)]


def sampled(run_dir: Path) -> dict[int, list[Any]]:
    """Responses by step; of a step that was logged twice, the last."""
    return {
        commit["commit"]: [[r["ids"] for r in group["responses"]] for group in groups]
        for commit, groups in read_log(run_dir)
    }


# Each is five starts of the command; the others resume less than these two do, and run in `make test-all`.
_QUICK = {"asynchronous, far ahead", "moving reference"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in _QUICK else pytest.mark.slow) for name in REGIMES],
)
def test_killed_runs_end_bit_for_bit_as_undisturbed_ones(
    tmp_path: Path, inputs: Path, name: str
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = recipe_in(tmp_path / "whole", inputs, name)
    code, output = run(*command_of(whole), log=tmp_path / "log")
    assert code == 0, output
    recipe, run_dir = recipe_in(tmp_path / "killed", inputs, name), tmp_path / "killed" / "run"
    delays = random.Random(name)
    moments = {
        "the first rollouts": lambda: any(run_dir.glob("rollouts/*/*")),
        "a checkpoint": lambda: bool(checkpoints(run_dir)),
        "late rows": lambda: logged(run_dir) >= 3,
    }
    held = functools.partial(held_at, NUM_STEPS)
    for what, reached in moments.items():
        with prefopt(*command_of(recipe), log=tmp_path / "log", entry=held) as command:
            command.wait_until(reached, what)
            time.sleep(delays.uniform(0, 0.1))
            command.send(signal.SIGKILL)
            assert command.wait() == -signal.SIGKILL, command.output
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 0, output
    assert "resumed from" in output
    undisturbed = tmp_path / "whole" / "run"
    assert computed(run_dir) == computed(undisturbed)
    weights = "final/adapter_model.safetensors"
    assert (run_dir / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert sampled(run_dir) == sampled(undisturbed)


def test_logged_rollouts_are_not_sampled_again(tmp_path: Path, inputs: Path) -> None:
    """Killed after checkpoint 4 with later steps in the log: those come from the log, once each."""
    recipe, run_dir = recipe_in(tmp_path, inputs, "online"), tmp_path / "run"
    held = functools.partial(held_at, NUM_STEPS)
    with prefopt(*command_of(recipe), log=tmp_path / "log", entry=held) as command:
        command.wait_until(lambda: len(sampled(run_dir)) >= 7, "step 7")
        command.send(signal.SIGKILL)
        command.wait()
    before = len(list(read_log(run_dir)))
    code, output = run(*command_of(recipe), log=tmp_path / "log")
    assert code == 0, output
    commits = [commit["commit"] for commit, _ in read_log(run_dir)]
    assert before >= 7
    assert commits == list(range(NUM_STEPS))


def killed_after_a_checkpoint(recipe: Path, run_dir: Path) -> None:
    held = functools.partial(held_at, NUM_STEPS)
    with prefopt(*command_of(recipe), log=recipe.parent / "log", entry=held) as command:
        command.wait_until(lambda: bool(checkpoints(run_dir)), "a checkpoint")
        command.send(signal.SIGKILL)
        command.wait()


def test_changed_settings_do_not_train_on_what_others_sampled(tmp_path: Path, inputs: Path) -> None:
    recipe, run_dir = recipe_in(tmp_path, inputs, "online"), tmp_path / "run"
    killed_after_a_checkpoint(recipe, run_dir)
    kept = len(list(read_log(run_dir)))
    start = checkpoints(run_dir)[-1]
    code, output = run(
        *command_of(recipe), *ACCEPT, "train.learning_rate=1e-4", log=tmp_path / "log"
    )
    assert code == 0, output
    commits = [commit["commit"] for commit, _ in read_log(run_dir)]
    assert commits[kept:] == list(range(start, NUM_STEPS))


def test_other_sampling_settings_cannot_resume(tmp_path: Path, inputs: Path) -> None:
    recipe, run_dir = recipe_in(tmp_path, inputs, "online"), tmp_path / "run"
    killed_after_a_checkpoint(recipe, run_dir)
    code, output = run(
        *command_of(recipe), *ACCEPT, "regime.samples_per_prompt=5", log=tmp_path / "log"
    )
    assert code == 2
    assert "made with other prompts, another train.seed, or other regime settings" in output
