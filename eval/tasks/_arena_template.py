"""Judge prompts of Arena-Hard: our own, or a ``judge_config.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.base import Message, Template
from prefopt.errors import ConfigError
from prefopt.recipe.yaml_file import read_yaml
from prefopt.signals.judge import fill

_NAME = "pairwise, five labels"
_PLACEHOLDERS = (
    ("question_1", "answer_1", "answer_2"),
    ("QUESTION", "ANSWER_A", "ANSWER_B"),
)
"""Of v0.1's published template and ours, and of v2's."""


def load_template(option: str, path: str | None, own: Mapping[str, str]) -> Template:
    """Our own texts, or those of a file with ``system_prompt`` and ``prompt_template``.

    ``system_prompt_<category>`` is the system prompt of one category.
    Raises: ConfigError naming what the file lacks.
    """
    if path is None:
        return Template(_NAME, "prefopt", own)
    data = _read_config(option, path)
    prompt = data.get("prompt_template")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    texts = {
        name.replace("system_prompt", "system"): text
        for name, text in data.items()
        if str(name).startswith("system_prompt") and isinstance(text, str)
    }
    if "system" not in texts or not isinstance(prompt, str):
        raise ConfigError(
            f"{option} = {path!r}: needs system_prompt (a text) and prompt_template (a text, or a list of one), "
            "as judge_config.yaml has"
        )
    if not any(all(f"{{{name}}}" in prompt for name in names) for names in _PLACEHOLDERS):
        choices = " or ".join(", ".join(f"{{{name}}}" for name in names) for names in _PLACEHOLDERS)
        raise ConfigError(f"{option} = {path!r}: prompt_template must hold {choices}")
    return Template(_NAME, Path(path).name, {**texts, "prompt": prompt})


def judge_messages(
    template: Template, category: str, question: str, answer_a: str, answer_b: str
) -> tuple[Message, ...]:
    """What the judge is asked; braces inside question and answers stay what they are."""
    system = template.texts.get(f"system_{category}", template.texts["system"])
    values: dict[str, str] = {}
    for names in _PLACEHOLDERS:
        values |= zip(names, (question, answer_a, answer_b), strict=True)
    prompt = fill(template.texts["prompt"], values)
    return ({"role": "system", "content": system}, {"role": "user", "content": prompt})


def _read_config(option: str, path: str) -> Mapping[Any, Any]:
    try:
        document = read_yaml(Path(path).expanduser())
    except ConfigError as error:
        problems = error.problems
    else:
        problems = document.problems
    if problems:
        raise ConfigError(
            f"{option} = {path!r}: must be a mapping with system_prompt and prompt_template: {problem}"
            for problem in problems
        )
    return document.raw
