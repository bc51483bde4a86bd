"""``--tasks lm_eval:NAME``: any task of lm-evaluation-harness, run on the model as the project loads it.

Adapters stay on their base and the tokenizer is the project's, chat template included; prompts, metrics and
standard errors are lm-evaluation-harness's own. Every answer is kept as it comes, so that an evaluation that
was killed goes on.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from eval.harness_rows import HarnessResult, harness_entries
from eval.models import Models
from eval.provenance import digest, task_folder
from eval.results import metrics_json
from prefopt.errors import ConfigError
from prefopt.recipe.load import validated
from prefopt.recipe.schema import PathText, Section
from prefopt.storage.cache import atomic_write

PREFIX = "lm_eval:"
_BOOTSTRAP = 1000
"""Resamples for metrics without a formula for their standard error; lm_eval's own 100,000 take minutes."""


class HarnessOptions(Section):
    """``tasks.lm_eval.key``: what is the same for all ``lm_eval:`` tasks of an evaluation."""

    num_fewshot: NonNegativeInt | None = None
    """Examples before each question; default: the task's own. Tasks that fix 0 keep it, and the result says so."""
    apply_chat_template: bool = False
    """Ask through the model's chat template; by default tasks are plain text, as leaderboards run them."""
    fewshot_as_multiturn: bool = True
    """With a chat template: each example a turn of its own."""
    system_instruction: str | None = None
    """Put before every question."""
    batch_size: PositiveInt | Literal["auto"] = 8
    """Sequences in one forward; `auto` tries what fits."""
    include_path: PathText | None = None
    """Directory with task files (YAML) of your own."""


def harness_problems(names: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """What is wrong with ``lm_eval:`` tasks and their options, a sentence each; nothing is loaded but names.

    Args:
        names: without ``lm_eval:``.
        options: of the settings' ``tasks.lm_eval``.
    """
    if importlib.util.find_spec("lm_eval") is None:
        return [
            f"--tasks {PREFIX}{names[0]}: needs lm-evaluation-harness, which is not installed. "
            'pip install "prefopt[eval]"'
        ]
    found = validated(HarnessOptions, dict(options), place=("tasks", "lm_eval"))
    parsed = found.value
    if parsed is None:
        return list(found.problems)
    if parsed.include_path is not None and not Path(parsed.include_path).is_dir():
        return [f"tasks.lm_eval.include_path = {parsed.include_path!r}: no such directory"]
    known = _task_manager(parsed.include_path).all_tasks
    return [_unknown(name, known) for name in names if name not in known]


def harness_results(
    names: Sequence[str],
    models: Models,
    *,
    options: Mapping[str, Any],
    limit: int | None,
    output: Path,
) -> dict[str, dict[str, Any]]:
    """The entries of ``results.json``, by name without ``lm_eval:``; a tag stands for its tasks.

    Args:
        names: tasks, groups or tags of lm-evaluation-harness, without ``lm_eval:``.
        models: the policy is loaded by transformers, whatever the engine: most tasks need log-probs.
        options: see `HarnessOptions`.
        limit: only the first examples of each task.
        output: folder for the answers; each task's ``examples.jsonl`` is in its own folder beside it.

    Raises: ConfigError for a missing package, a task, option or data set that is not there; ModelError.
    """
    if problems := harness_problems(names, options):
        raise ConfigError(problems)
    parsed = HarnessOptions.model_validate(dict(options))
    language_model = _language_model(models, parsed)
    entries: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(names):
        raw = _evaluate(name, language_model, parsed, limit, models.seed, output)
        for found in harness_entries(name, raw):
            entries[found.name] = _entry(found, models, parsed, language_model.tokenizer)
            folder = output.with_name(task_folder(f"{PREFIX}{found.name}"))
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(folder / "examples.jsonl") as temporary:
                temporary.write_text("".join(found.lines), encoding="utf-8")
    return entries


@functools.lru_cache(maxsize=1)
def _task_manager(include_path: str | None) -> Any:
    """The index of all task files: seconds to build, so one an evaluation."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(f'{PREFIX}{each}' for each in near)}? " if near else ""
    return (
        f"--tasks {PREFIX}{name}: no such task, group or tag of lm-evaluation-harness; {hint}It has "
        f"{len(known):,}: lm_eval ls tasks. Task files of your own: tasks.lm_eval.include_path=DIR"
    )


def _language_model(models: Models, options: HarnessOptions) -> Any:
    """The policy, in the class that lm-evaluation-harness asks."""
    from lm_eval.models.huggingface import HFLM

    from prefopt.model.load import check_vocabulary, load_policy, load_tokenizer

    tokenizer = load_tokenizer(models.policy)
    if options.apply_chat_template and tokenizer.chat_template is None:
        raise ConfigError(
            f"tasks.lm_eval.apply_chat_template = true: {models.policy.path!r} has no chat template. Leave it "
            "out, or name a Jinja file: model.chat_template=FILE"
        )
    loaded = load_policy(models.policy, None, seed=0, trainable=False)
    check_vocabulary(loaded.model, tokenizer)
    model: Any = loaded.model
    if models.policy.quantization is None:  # bitsandbytes has placed it, and refuses to be moved
        model = model.to(models.device)
    with _quiet():
        make: Any = HFLM  # a decorator hides its signature
        return make(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)


def _evaluate(
    name: str,
    language_model: Any,
    options: HarnessOptions,
    limit: int | None,
    seed: int,
    output: Path,
) -> dict[str, Any]:
    """lm-evaluation-harness's own result object.

    Which few-shot examples are drawn is left to its fixed seeds, so that prompts are those of published
    numbers; ``seed`` is that of sampled answers.
    """
    import lm_eval

    evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its signature
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some of its messages are printed
            found = evaluate(
                language_model,
                tasks=[name],
                task_manager=_task_manager(options.include_path),
                num_fewshot=options.num_fewshot,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.fewshot_as_multiturn,
                system_instruction=options.system_instruction,
                limit=limit,
                use_cache=str(output / "answers"),
                bootstrap_iters=_BOOTSTRAP,
                torch_random_seed=seed,
            )
    # OSError: its data cannot be had; ImportError: a package of its own; ValueError: what lm_eval refuses
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(_failed(name, error)) from error
    assert found is not None, "only processes of rank > 0 get none"
    return dict(found)


def _failed(name: str, error: Exception) -> str:
    message = f"--tasks {PREFIX}{name}: lm-evaluation-harness cannot run it: {type(error).__name__}: {error}"
    if "marked as unsafe" in str(error):
        message += ". It runs model-written code without a sandbox; the task humaneval has one"
    return message


def _entry(
    found: HarnessResult, models: Models, options: HarnessOptions, tokenizer: Any
) -> dict[str, Any]:
    """One task of ``results.json``."""
    template = tokenizer.chat_template if options.apply_chat_template else None
    asked = options.model_dump(
        include={"apply_chat_template", "fewshot_as_multiturn", "system_instruction"}
    )
    decoding = [{**each, **asked} for each in found.decoding]
    notes = [*found.summary.notes]
    if not models.engine.holds_weights:
        notes.append(f"run by transformers, not by {models.engine.name}")
    if tokenizer.chat_template is not None and template is None:
        notes.append("asked as plain text, without the model's chat template")
    given = options.num_fewshot
    if given is not None and any(each["num_fewshot"] != given for each in decoding):
        notes.append(f"num_fewshot = {given} does not hold for tasks that fix their own")
    return {
        "version": found.version,
        "kind": "harness",
        "headline": found.headline,
        "direction": found.direction,
        **metrics_json(found.summary),
        "notes": notes,
        "data_hash": found.data_hash,
        "decoding": decoding,
        "decoding_hash": digest(decoding),
        "chat_template_hash": None
        if template is None
        else hashlib.sha256(str(template).encode()).hexdigest(),
        "template": None,
        "options": options.model_dump(exclude_defaults=True),
        "config_hash": found.config_hash,
        "usage": {},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm_eval's warnings about settings that nobody here set."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
