"""The models of an evaluation: which files, which tokenizer, which engine. Adapters are never merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.settings import EvalSettings, JudgeSection
from prefopt.errors import ModelError
from prefopt.recipe.schema import ConditionSection, EngineSection, ModelSection
from prefopt.storage.run_files import RUN_FILE, read_run


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

    Its recipe's chat template and tokenizer are already in there, and the code of its model is run as the run did.
    A checkpoint is named by its own path.
    Raises: ModelError for a run that has not ended.
    """
    section = section.model_copy(update=run_trust(section))
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


def run_trust(section: ModelSection) -> dict[str, Any]:
    """Whether the code of a run's model is run: as asked, or as the run did."""
    model = (run_recipe(section.path) or {}).get("model") or {}
    trusted = section.trust_remote_code or bool(model.get("trust_remote_code"))
    return {"trust_remote_code": trusted}


def run_recipe(path: str) -> dict[str, Any] | None:
    """The recipe of the run that ``path`` is, or is ``final`` of; None for anything else."""
    return _run_record(path).get("recipe")


def run_condition(path: str) -> ConditionSection | None:
    """How the run that ``path`` is, or is ``final`` of, wrote rewards into prompts; None if it wrote none."""
    recipe = _run_record(path).get("recipe") or {}
    if (recipe.get("objective") or {}).get("name") != "reward_conditioned":
        return None
    try:
        return ConditionSection.model_validate((recipe.get("data") or {}).get("condition") or {})
    except ValueError as error:
        raise ModelError(f"{path}: its {RUN_FILE} has another data.condition: {error}") from error


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
    labels = (_run_record(path).get("data") or {}).get("labels") or {}
    rewards = labels.get("rewards") or {}
    if all(isinstance(rewards.get(end), float | int) for end in ("min", "max")):
        found.append(target_problem(asked.target, rewards["min"], rewards["max"]))
    return [problem for problem in found if problem is not None]


def _run_record(path: str) -> dict[str, Any]:
    """What the run that ``path`` is, or is ``final`` of, says of itself; empty for anything else."""
    for directory in (Path(path).expanduser(), Path(path).expanduser().parent):
        if (directory / RUN_FILE).is_file():
            return read_run(directory, ModelError)
    return {}
