"""The models of an evaluation: which files, which tokenizer, which engine. Adapters are never merged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.settings import EvalSettings, JudgeSection
from prefopt.errors import ModelError
from prefopt.recipe.schema import ConditionSection, EngineSection, ModelSection

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Models:
    """What a `ModelTask` may load."""

    policy: ModelSection
    """What is evaluated; ``path`` is a model or adapter, never a run."""
    baseline: ModelSection | None
    engine: EngineSection
    judge: JudgeSection | None
    seed: int
    device: str
    batch_tokens: int


def open_models(settings: EvalSettings) -> Models:
    """The models of an evaluation, run directories resolved; nothing is loaded yet.

    Raises: ModelError for a directory that holds neither.
    """
    from prefopt.model.frozen import default_device

    return Models(
        policy=resolve_run(settings.model),
        baseline=resolve_run(settings.baseline) if settings.baseline else None,
        engine=settings.engine,
        judge=settings.judge,
        seed=settings.seed,
        device=str(default_device(settings.device)),
        batch_tokens=settings.batch_tokens,
    )


def resolve_run(section: ModelSection) -> ModelSection:
    """``section`` with a run directory replaced by the policy that it ended with (``final``).

    Its recipe's chat template and tokenizer are already in there. A checkpoint is named by its own path.
    Raises: ModelError for a run that has not ended.
    """
    directory = Path(section.path).expanduser()
    if not (directory / RUN_FILE).is_file():
        return section
    final = directory / "final"
    if not final.is_dir():
        raise ModelError(
            f"{section.path}: a run that has not ended: it holds no final/. Finish it, or name one of its "
            "checkpoints' adapter or model directories"
        )
    return section.model_copy(update={"path": str(final)})


def run_recipe(path: str) -> dict[str, object] | None:
    """The recipe of the run that ``path`` is, or is ``final`` of; None for anything else."""
    return _run_record(path).get("recipe")


def run_condition(path: str) -> ConditionSection | None:
    """How the run that ``path`` is, or is ``final`` of, wrote rewards into prompts; None if it wrote none."""
    recipe = _run_record(path).get("recipe") or {}
    if (recipe.get("objective") or {}).get("name") != "reward_conditioned":
        return None
    return ConditionSection.model_validate(recipe["data"].get("condition") or {})


def asked(
    prompt: str | Sequence[Mapping[str, Any]], condition: ConditionSection | None
) -> str | list[dict[str, Any]]:
    """A prompt as the policy is asked it: with the target reward of its run, where it was trained with rewards."""
    from prefopt.data.render import conditioned

    content = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    return (
        content if condition is None else conditioned(content, condition.template, condition.target)
    )


def condition_problems(path: str, asked: ConditionSection | None) -> list[str]:
    """What is odd about asking the policy of a run with these rewards in its prompts, or with none."""
    from prefopt.data.samples import target_problem

    trained = run_condition(path)
    if trained is None:
        return []
    if asked is None:
        return [
            "the policy was trained with rewards in its prompts, and is asked without one: set condition"
        ]
    found = []
    if asked.template != trained.template:
        found.append(
            f"the policy was trained with the template {trained.template!r}, and is asked with another"
        )
    rewards = _run_record(path).get("data", {}).get("labels", {}).get("rewards")
    if rewards is not None:
        found.append(target_problem(asked.target, rewards["min"], rewards["max"]))
    return [problem for problem in found if problem is not None]


def _run_record(path: str) -> dict[str, Any]:
    """What the run that ``path`` is, or is ``final`` of, says of itself; empty for anything else."""
    for directory in (Path(path).expanduser(), Path(path).expanduser().parent):
        record = directory / RUN_FILE
        if record.is_file():
            return json.loads(record.read_text(encoding="utf-8"))
    return {}
