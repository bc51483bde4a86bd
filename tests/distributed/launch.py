"""Starting real `accelerate launch` runs on CPU from the shipped configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


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


def launch(
    config: Path, script: str, recipe: Path, *overrides: str, timeout_s: float = 600
) -> subprocess.CompletedProcess[str]:
    """Runs ``accelerate launch recipes/<script>.py`` and returns when it ends."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [
        "--main_process_port",
        "0",
        str(ROOT / "recipes" / f"{script}.py"),
        str(recipe),
        *overrides,
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Without it, DDP processes on CPU do not know of each other; with it, DeepSpeed is turned off.
        **(
            {}
            if "deepspeed_config" in config.read_text(encoding="utf-8")
            else {"ACCELERATE_USE_CPU": "true"}
        ),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja, for DeepSpeed
    }
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout_s,
        cwd=ROOT,
        check=False,
    )


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
