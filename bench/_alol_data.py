"""What bench/claims_alol.py trains on: the base policy, a value head of it, data weighed against that head."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench._sorting_rewards import pair_rows, train_rows
from recipes.quickstart import run as quickstart
from recipes.quickstart.prepare import read_jsonl, write_jsonl

RUN_DIR = Path("runs/bench-claims-alol")  # as claims_alol.yaml has it
PLUGIN = Path(__file__).with_name("alol_signal.py")
TASK_SEED = 0
NUM_DEV, NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 600, 800, 300, 500
RESPONSES_PER_PROMPT = 2


def data_dir(share: int) -> Path:
    return RUN_DIR / "data" / f"bad-{share}"


def prepare(shares: Sequence[int]) -> tuple[list[str], list[str]]:
    """Makes base policy, value head and weighed data where they are missing.

    Args:
        shares: of bad responses, percent.

    Returns: validation and test prompts.
    """
    from recipes.quickstart.task import make_splits

    if not (RUN_DIR / "base").is_dir():
        if not quickstart.has_policy(TASK_SEED):
            quickstart.make_policy(TASK_SEED, quickstart.Clock(), num_phases=2)
        shutil.copytree(quickstart.RUN_DIR / "sft" / "final", RUN_DIR / "base")
    splits = make_splits(
        num_sft=quickstart.NUM_SFT,
        num_preference=NUM_DEV + NUM_TRAIN,
        num_held_out=NUM_VALIDATION + NUM_TEST,
        seed=TASK_SEED,
    )
    dev, train = splits.preference[:NUM_DEV], splits.preference[NUM_DEV:]
    write_jsonl(RUN_DIR / "data" / "dev.jsonl", [{"prompt": p.prompt} for p in dev])
    _build(RUN_DIR / "data" / "dev.yaml", _value_pipeline())
    for share in shares:
        rows = train_rows(
            train, bad_frac=share / 100, num_responses=RESPONSES_PER_PROMPT, seed=TASK_SEED
        )
        write_jsonl(data_dir(share) / "rows.jsonl", rows)
        if share:
            write_jsonl(data_dir(share) / "pairs.jsonl", pair_rows(rows))
        _build(data_dir(share) / "weighed.yaml", _advantage_pipeline(share))
    prompts = [problem.prompt for problem in splits.held_out]
    return prompts[:NUM_VALIDATION], prompts[NUM_VALIDATION:]


def _value_pipeline() -> dict[str, Any]:
    model = {"path": str(RUN_DIR / "base")}
    sampling = {"temperatures": [0], "max_new_tokens": 10, "max_prompt_tokens": 16}
    return {
        "output_dir": str(RUN_DIR / "data" / "dev"),
        "plugins": [str(PLUGIN)],
        "stages": [
            {"stage": "prompts", "sources": [{"path": str(RUN_DIR / "data" / "dev.jsonl"), "format": "text"}]},
            {"stage": "sample", "model": model, **sampling},
            {"stage": "score", "signals": [{"name": "graded_digits"}]},
            # the states are 128 wide: a rate a hundred times that of the paper's 4,096
            {"stage": "value", "model": model, "learning_rate": 1e-3},
        ],
    }  # fmt: skip


def _advantage_pipeline(share: int) -> dict[str, Any]:
    source = {"path": str(data_dir(share) / "rows.jsonl"), "format": "text"}
    responses = {"column": "responses", "text": "text", "score": "reward"}
    return {
        "output_dir": str(data_dir(share) / "samples"),
        "stages": [
            {"stage": "rated", "sources": [source], "responses": responses},
            {"stage": "advantage", "head": str(RUN_DIR / "data" / "dev" / "value" / "head")},
        ],
    }


def _build(path: Path, pipeline: dict[str, Any]) -> None:
    """Runs a data pipeline as a user would; one that is there already makes nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(pipeline, indent=1), encoding="utf-8")  # JSON is YAML
    quickstart.run_prefopt("data", "build", path)


def mean_reward(share: int) -> float:
    """Of the training responses."""
    rows = read_jsonl(data_dir(share) / "rows.jsonl")
    return statistics.fmean(each["reward"] for row in rows for each in row["responses"])


def negative_frac(share: int) -> float:
    """Share of the training responses with a negative advantage, as the pipeline has recorded it."""
    path = data_dir(share) / "samples" / "manifest" / "advantage" / "done.json"
    return json.loads(path.read_text(encoding="utf-8"))["report"]["advantages"]["negative_frac"]
