"""``prefopt eval MODEL``: generate, judge, score and summarise every task, each step stored as it is done.

Everything that ends in ``results.json`` is a function of the stores, and these of the settings: an evaluation
that was killed any number of times ends with the file of one that was not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.base import Adopting, Example, JudgedTask
from eval.models import Models, open_models, run_recipe
from eval.phases import Planned, TaskRun
from eval.provenance import (
    data_hash,
    describe_engine,
    describe_model,
    package_versions,
    task_folder,
)
from eval.registry import TaskSpec, get_task, make_task
from eval.responses import answers_from_file
from eval.settings import EvalSettings
from prefopt.errors import ConfigError, DataError
from prefopt.shown import redacted
from prefopt.storage.cache import write_whole
from prefopt.storage.holder import held
from prefopt.storage.reading import load_json, reading

logger = logging.getLogger("prefopt.eval")

RESULTS_FILE = "results.json"
HARNESS_PREFIX = "lm_eval:"
_FORMAT = 1


def plan(settings: EvalSettings, names: Sequence[str]) -> list[Planned]:
    """The tasks with their examples; whatever can be wrong before a model loads is found here, at once.

    Raises: ConfigError with every problem; DataError for a broken file.
    """
    problems: list[str] = []
    unused = sorted(set(settings.tasks) - {_own_name(name) for name in names})
    problems += [f"tasks.{name}: would be ignored: it is not among --tasks" for name in unused]
    made: list[tuple[str, TaskSpec, Any]] = []
    recipe = run_recipe(settings.model.path)
    for name in dict.fromkeys(name for name in names if not name.startswith(HARNESS_PREFIX)):
        try:
            spec, task = get_task(name), make_task(name, settings.tasks.get(name))
        except ConfigError as error:
            problems += error.problems
            continue
        if isinstance(task, Adopting) and recipe is not None:
            task.adopt_run(recipe)
        made.append((name, spec, task))
        problems += _missing_parts(settings, name, task)
    harness = _harness_names(names)
    if harness:
        from eval.harness import harness_problems

        problems += harness_problems(harness, settings.tasks.get("lm_eval", {}))
    if problems:
        raise ConfigError(problems)
    return [_planned(settings, name, spec, task) for name, spec, task in made]


def evaluate(settings: EvalSettings, names: Sequence[str], output: Path) -> dict[str, Any]:
    """Runs the tasks and returns what ``results.json`` in ``output`` then holds.

    Raises: ConfigError, DataError, ModelError, EngineError, SignalError; what was done stays, and the same
        command goes on from there.
    """
    planned = plan(settings, names)
    with held(output, work="evaluation", advice="Another --output is free"):
        return _evaluate(settings, names, planned, output)


def _evaluate(
    settings: EvalSettings, names: Sequence[str], planned: Sequence[Planned], output: Path
) -> dict[str, Any]:
    models = open_models(settings)
    head = _head(settings, models)
    results = _open_results(output / RESULTS_FILE, head)
    run = TaskRun(settings, models, output, head["model"]["hash"], head["baseline"])
    try:
        for each in planned:
            results["tasks"][each.name] = run.task(each)
            _write(output / RESULTS_FILE, results)
    finally:
        run.close()
    if harness := _harness_names(names):
        results["tasks"] |= _run_harness(harness, settings, models, output)
        _write(output / RESULTS_FILE, results)
    return results


def dry_run(settings: EvalSettings, names: Sequence[str]) -> list[dict[str, Any]]:
    """What an evaluation would do, a line a task; nothing is loaded but examples, nothing is asked."""
    from eval.judging import placeholder_questions

    lines = []
    for each in plan(settings, names):
        line: dict[str, Any] = {"task": each.name, "examples": len(each.examples)}
        if each.spec.kind in ("generate", "judge"):
            decodings = [each.task.decoding(example) for example in each.examples]
            line["responses"] = sum(
                decoding.num_samples * example.num_turns
                for decoding, example in zip(decodings, each.examples, strict=True)
            )
        if isinstance(each.task, JudgedTask):
            samples = max((d.num_samples for d in decodings), default=1)
            questions = placeholder_questions(each.task, each.examples, samples)
            characters = sum(len(m["content"]) for q in questions for m in q.messages)
            line |= {
                "judge_questions": len(questions),
                "judge_requests_at_most": len(questions) * each.task.max_asks,
                "judge_characters_without_answers": characters,
            }
        lines.append(line)
    return lines


def _harness_names(names: Sequence[str]) -> list[str]:
    """The tasks of lm-evaluation-harness, by its own names."""
    return [name.removeprefix(HARNESS_PREFIX) for name in names if name.startswith(HARNESS_PREFIX)]


def _own_name(name: str) -> str:
    return "lm_eval" if name.startswith(HARNESS_PREFIX) else name


def _missing_parts(settings: EvalSettings, name: str, task: Any) -> list[str]:
    """What a judged task needs and the settings do not have."""
    if not isinstance(task, JudgedTask):
        return []
    problems = []
    if settings.judge is None:
        problems.append(
            f"judge.base_url is missing: {name} asks a judge. Set judge.base_url=http://…/v1 and judge.model=NAME"
        )
    if task.baseline == "required" and settings.baseline is None and not settings.baseline_answers:
        problems.append(
            f"--baseline is missing: {name} compares two models' answers. Give --baseline OTHER, or "
            "baseline_answers=FILE"
        )
    return problems


def _planned(settings: EvalSettings, name: str, spec: TaskSpec, task: Any) -> Planned:
    examples = task.examples()
    keys = {example.key for example in examples}
    if not examples:
        raise DataError(f"{name}: there are no examples")
    if len(keys) < len(examples):
        raise DataError(f"{name}: {len(examples) - len(keys)} examples share a key with another")
    _require_baseline(settings, task, examples[: settings.limit])
    return Planned(name, spec, task, examples[: settings.limit], data_hash(examples))


def _require_baseline(settings: EvalSettings, task: Any, examples: list[Example]) -> None:
    """Raises what reading the baseline's answers raises: better now than when the model has answered."""
    if not isinstance(task, JudgedTask) or task.baseline == "none":
        return
    if settings.baseline_answers:
        answers_from_file(Path(settings.baseline_answers), examples)
    elif settings.baseline is None:
        task.baseline_answers(examples)


def _head(settings: EvalSettings, models: Models) -> dict[str, Any]:
    judge = models.judge
    return {
        "format": _FORMAT,
        "model": describe_model(models.policy),
        "baseline": describe_model(models.baseline) if models.baseline else None,
        "engine": describe_engine(models.engine, models.policy),
        "judge": {"model": judge.model, "base_url": redacted(judge.base_url)} if judge else None,
        "seed": settings.seed,
        "limit": settings.limit,
    }


def _open_results(path: Path, head: Mapping[str, Any]) -> dict[str, Any]:
    """The results so far, where ``path`` holds those of the same models and settings; else new ones.

    Raises: ConfigError if it is of something else.
    """
    fresh = {**head, "tasks": {}, "versions": package_versions()}
    if not path.is_file():
        return fresh
    with reading(path, "a results file", "Delete it or take another --output"):
        found = load_json(path, {"tasks": dict})
        changed = [key for key in head if json.loads(json.dumps(head[key])) != found[key]]
    # A judge or baseline that the tasks there did not have does not change them.
    changed = [key for key in changed if found[key] is not None or key in ("limit", "model")]
    if changed:
        raise ConfigError(
            [
                f"{path}: {key} was {json.dumps(found[key])} and is now {json.dumps(head[key])}. Take another "
                "--output"
                for key in changed
            ]
        )
    return {**fresh, "tasks": found["tasks"]}


def _run_harness(
    names: Sequence[str], settings: EvalSettings, models: Models, output: Path
) -> dict[str, Any]:
    from eval.harness import harness_results

    found = harness_results(
        names,
        models,
        options=settings.tasks.get("lm_eval", {}),
        limit=settings.limit,
        output=output / task_folder("lm_eval"),
    )
    return {f"{HARNESS_PREFIX}{name}": result for name, result in found.items()}


def _write(path: Path, results: Mapping[str, Any]) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False, sort_keys=False)
    write_whole(path, f"{text}\n", advice="")
