"""Real vLLM servers under real launches: two training processes, a server that dies, a run that goes on."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from prefopt.engines.vllm.door import KEY_VARIABLE
from prefopt.engines.vllm.hosts import StartedHost
from prefopt.rollouts.experience import read_log
from prefopt.training.metrics import read_metrics
from tests.distributed.launch import write_pairs
from tests.distributed.test_rollouts import PLUGIN, started, write_rollout_recipe
from tests.recipes.commands import Command, prefopt, run
from tests.recipes.test_interrupted_runs import checkpoints
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

NUM_STEPS = 12
ENGINE = {"name": "vllm_server", "timeout_s": 600.0, "startup_timeout_s": 800.0}
OWN_SERVER = {
    **ENGINE,
    "enforce_eager": True,
    "options": {"max_num_seqs": 32, "kv_cache_memory_bytes": 2**28},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for the other rollouts; heads of 32, the smallest that vLLM's attention takes on CPU."""
    directory = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    write_pairs(directory / "prompts.jsonl", 20)
    (directory / "plugin.py").write_text(PLUGIN)
    return directory


@pytest.fixture(scope="module")
def server(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that somebody else started, with what a LoRA run needs of one."""
    arguments = {
        "model": str(inputs / "model"), "skip_tokenizer_init": True, "dtype": "float32",
        "max_model_len": 96, "enable_lora": True, "max_lora_rank": 8, "enforce_eager": True,
        "logprobs_mode": "processed_logprobs", "max_num_seqs": 32,
        "kv_cache_memory_bytes": 2**28,
    }  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "log"
    host = StartedHost(arguments, log=log, startup_timeout_s=800.0)
    host.begin()
    try:
        host.wait_until_ready()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(KEY_VARIABLE, host.key)
            yield host.client.url
    finally:
        host.close()


@pytest.mark.parametrize("config", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_two_processes_train_a_lora_policy_on_one_server(
    tmp_path: Path, inputs: Path, server: str, config: str
) -> None:
    recipe = recipe_on(server, tmp_path / "recipe.yaml", inputs)
    result = started(config, 2, recipe, "train.max_steps=4")
    assert result.returncode == 0, result.stderr
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        # The adapter on the server is the one in training, at every push; fp32 in two libraries.
        assert row["rollout/probe_gap_max"] < 1e-3
        assert row["rollout/policy_gap"] < 1e-3
        assert row["rollout/lag"] == 0
    assert abs(rows[-1]["kl/reference"]) > 1e-4  # the policy moved, and its samples with it
    assert len(list((tmp_path / "run" / "rollouts").iterdir())) == 1  # the main process samples


def recipe_on(server: str, path: Path, inputs: Path, **sections: Any) -> Path:
    engine = {**ENGINE, "urls": [server]}
    return write_rollout_recipe(path, inputs, engine=engine, model={"dtype": "float32"}, **sections)


AHEAD = {"regime": {"max_lag": 1}, "train": {"max_steps": NUM_STEPS}}
"""Asynchronous, one step ahead."""
FULL = {"peft": None, "train": {**AHEAD["train"], "learning_rate": 1e-3}}
"""Full fine-tuning: a server takes whole weights over another path than adapters."""


def test_a_server_that_dies_without_a_restart_ends_the_run_and_another_engine_goes_on(
    tmp_path: Path, inputs: Path
) -> None:
    """The run's own server, which full weights are pushed to, is killed; the run goes on with an `hf` engine."""
    recipe, run_dir = dead_end(tmp_path, inputs, **FULL), tmp_path / "run"
    on_the_server = rows_until(run_dir, checkpoints(run_dir)[-1])
    # Of the first weights and of later ones; how small the gaps are is asked below.
    assert sum("rollout/probe_gap_max" in row for row in on_the_server) >= 2
    written = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**written, "engine": {"name": "hf"}}))
    accept = "train.accept_changes=true"  # another engine's samples differ by its rounding
    code, output = run("train", str(recipe), accept, log=tmp_path / "log")
    assert code == 0, output
    assert "resumed from" in output
    assert_nothing_is_lost(run_dir)
    assert rows_until(run_dir, len(on_the_server)) == on_the_server


@pytest.mark.slow  # with adapters; another server and not `hf`
def test_a_run_whose_server_died_goes_on_on_one_that_somebody_else_started(
    tmp_path: Path, inputs: Path, server: str
) -> None:
    dead_end(tmp_path, inputs)
    recipe = recipe_on(server, tmp_path / "recipe.yaml", inputs, **AHEAD)
    accept = "train.accept_changes=true"  # what the other server is started with is not ours to say
    code, output = run("train", str(recipe), accept, log=tmp_path / "log")
    assert code == 0, output
    assert "resumed from" in output
    assert_nothing_is_lost(tmp_path / "run")


@pytest.mark.slow  # that a server is started again with the adapter in training: tests/engines/test_vllm.py
def test_a_server_that_dies_in_a_run_is_started_again(tmp_path: Path, inputs: Path) -> None:
    recipe, run_dir = dead_end(tmp_path, inputs), tmp_path / "run"
    saved = checkpoints(run_dir)
    with prefopt("train", str(recipe), "engine.max_restarts=1", log=tmp_path / "log") as command:
        reached = saved[-1] + 2
        command.wait_until(lambda: len(steps(run_dir)) >= reached, "two steps more")
        kill_server(command)
        assert command.wait() == 0, command.output
        output = command.output
    assert "resumed from" in output and "starting it again" in output
    assert_nothing_is_lost(run_dir)


def dead_end(tmp_path: Path, inputs: Path, **sections: Any) -> Path:
    """A run whose server died after it sampled five steps, with no restart allowed; returns its recipe."""
    recipe = write_rollout_recipe(
        tmp_path / "recipe.yaml", inputs, engine=OWN_SERVER, **{**AHEAD, **sections}
    )
    run_dir = tmp_path / "run"
    with prefopt("train", str(recipe), "engine.max_restarts=0", log=tmp_path / "log") as command:
        command.wait_until(lambda: len(steps(run_dir)) >= 5, "five steps")
        kill_server(command)
        assert command.wait() == 1
        output = command.output
    assert "the vLLM server died" in output and "engine.max_restarts" in output
    assert "Traceback" not in output
    saved = checkpoints(run_dir)
    assert saved and 1 <= saved[-1] < NUM_STEPS
    return recipe


def rows_until(run_dir: Path, step: int) -> list[dict[str, Any]]:
    return [row for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] <= step]


def assert_nothing_is_lost(run_dir: Path) -> None:
    """Every batch was sampled and logged once, by both lives together, and trained on once."""
    assert steps(run_dir) == list(range(NUM_STEPS))
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert all(row["rollout/lag"] <= 1 for row in rows)
    assert all(
        row["rollout/probe_gap_max"] < 1e-3 for row in rows if "rollout/probe_gap_max" in row
    )


def test_a_server_that_is_not_there_or_serves_another_model_is_said_at_once(
    tmp_path: Path, inputs: Path, server: str
) -> None:
    recipe = write_rollout_recipe(tmp_path / "recipe.yaml", inputs)
    base = ("train", str(recipe), "engine.name=vllm_server")
    code, output = run(
        *base,
        "engine.urls=[http://127.0.0.1:9]",
        "engine.startup_timeout_s=3.0",
        log=tmp_path / "log",
    )
    assert code == 1 and "http://127.0.0.1:9" in output
    assert "Traceback" not in output
    other = tmp_path / "other"
    other.mkdir()
    for file in (inputs / "model").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    code, output = run(
        *base, f"engine.urls=[{server}]", f"model.path={other}", log=tmp_path / "log"
    )
    assert code == 1 and str(inputs / "model") in output and str(other) in output


def steps(run_dir: Path) -> list[int]:
    """Steps whose rollouts are in the experience log, in the order they were written."""
    return [commit["commit"] for commit, _ in read_log(run_dir)]


def kill_server(command: Command) -> None:
    """SIGKILL to every process of the server that the command started, as an out-of-memory killer would."""
    found = []
    for process in psutil.Process(command.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "vllm.entrypoints" in " ".join(process.cmdline()):
                found += [process, *process.children(recursive=True)]
    assert found
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
