"""The pages of ``prefopt eval list`` and ``prefopt eval keys``, made from signatures, docstrings and schema."""

from __future__ import annotations

import inspect
import textwrap

from eval.registry import get_task, task_names
from eval.settings import EvalSettings
from prefopt.recipe.explain import show_value
from prefopt.recipe.help_pages import schema_page


def tasks_page() -> str:
    """A few lines a task."""
    pages = [_summary(name) for name in sorted(task_names())]
    pages.append(
        'lm_eval:NAME\n    any task of lm-evaluation-harness (pip install "prefopt[eval]"), e.g. lm_eval:mmlu'
    )
    return "\n".join(pages)


def task_page(name: str) -> str:
    """One task in full. Raises: ConfigError for an unknown name."""
    spec = get_task(name)
    options = [
        f"tasks.{name}.{key}" + (" (required)" if default is ... else f"={show_value(default)}")
        for key, (_, default) in spec.fields.items()
    ]
    # its first line stands in the summary
    text = (inspect.getdoc(spec.fn) or "").partition("\n")[2].strip("\n")
    return "\n".join(
        [_summary(name), "", textwrap.indent(text, "  "), "", *(f"  {o}" for o in options)]
    )


def settings_page(only: str | None = None) -> str:
    """Every key of `EvalSettings`, or of one section. Raises: ConfigError for a section there is none of."""
    return schema_page(EvalSettings, only)


def _summary(name: str) -> str:
    spec = get_task(name)
    first = (inspect.getdoc(spec.fn) or "").splitlines()[0]
    return (
        f"{name} (version {spec.version})  {first}\n"
        f"    headline {spec.headline}; {spec.source}; data: {spec.data}"
    )
