"""An `hf` engine with cores of its own: in another process, and the same run as without."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.recipes.commands import run
from tests.rollouts.test_interrupted_rollouts import (
    command_of,
    computed,
    inputs,  # noqa: F401 (a fixture)
    recipe_in,
    sampled,
)


def without_probe(run_dir: Path) -> list[dict[str, Any]]:
    """What was computed, but for the probe: shared weights are compared with themselves."""
    return [
        {key: value for key, value in row.items() if not key.startswith("rollout/probe")}
        for row in computed(run_dir)
    ]


def test_an_engine_on_cores_of_its_own_gives_the_run_that_shares_weights(
    tmp_path: Path,
    inputs: Path,  # noqa: F811
) -> None:
    """Bit for bit: the same weights arrive over the disk, and sampling depends on seeds alone."""
    runs = {"shared": [], "apart": [f"engine.cpus=[{max(os.sched_getaffinity(0))}]"]}
    for name, overrides in runs.items():
        (tmp_path / name).mkdir()
        recipe = recipe_in(tmp_path / name, inputs, "online")
        code, output = run(*command_of(recipe), *overrides, log=tmp_path / "log")
        assert code == 0, output
    shared, apart = (tmp_path / name / "run" for name in runs)
    assert (apart / "engine" / "hf-engine.log").is_file()
    assert not (shared / "engine").exists()
    assert sampled(apart) == sampled(shared)
    assert without_probe(apart) == without_probe(shared)
    weights = "final/adapter_model.safetensors"
    assert (apart / weights).read_bytes() == (shared / weights).read_bytes()


def test_cores_the_machine_does_not_have_are_named(tmp_path: Path, inputs: Path) -> None:  # noqa: F811
    recipe = recipe_in(tmp_path, inputs, "online")
    code, output = run(*command_of(recipe), "engine.cpus=[9999]", log=tmp_path / "log")
    assert code != 0
    assert "engine.cpus = [9999]" in output
