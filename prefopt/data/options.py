"""What a prompt is rendered with beside its messages: what the chat template is given, and what it may do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from jinja2 import Environment, TemplateSyntaxError, meta

from prefopt.errors import ConfigError, ModelError, suggest

Omits = Literal["nothing", "history", "anything"]
KeptControls = Sequence[str] | Literal["all"]

TEMPLATE_COLUMNS = ("tools", "documents", "chat_template_kwargs")
"""Columns that chat templates are given; a row of a pipeline carries them under these names."""

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What a template is given anyhow: no keyword may stand in its place."""


@dataclass(frozen=True)
class RenderOptions:
    """Of one row: what its chat template is given beside the messages, and what is allowed of its rendering."""

    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the template, e.g. ``enable_thinking``."""
    omits: Omits = "nothing"
    """What the template may leave out of what is said: ``history`` is what the assistant's earlier turns say."""
    control_tokens: KeptControls = ()
    """Control tokens that may stand in texts, and are read as such."""

    @property
    def given(self) -> dict[str, Any]:
        """What the template is given, by name."""
        found: dict[str, Any] = {**self.keywords}
        if self.tools:
            found["tools"] = list(self.tools)
        if self.documents:
            found["documents"] = list(self.documents)
        return found

    @property
    def columns(self) -> dict[str, Any]:
        """The same as columns of a row: only those that it has."""
        values = (list(self.tools), list(self.documents), dict(self.keywords))
        return {name: value for name, value in zip(TEMPLATE_COLUMNS, values, strict=True) if value}


PLAIN = RenderOptions()
AS_RENDERED = RenderOptions(control_tokens="all")
"""For a text that a chat template has rendered already."""


def given_options(given: Mapping[str, Any], omits: Omits) -> RenderOptions:
    """Options with what another template was given (`RenderOptions.given`)."""
    keywords = {name: value for name, value in given.items() if name not in RESERVED}
    return RenderOptions(given.get("tools", ()), given.get("documents", ()), keywords, omits)


@lru_cache(maxsize=64)
def template_variables(template: str) -> frozenset[str]:
    """The names that a chat template reads. Raises: jinja2's TemplateSyntaxError."""
    # Our environment does not know transformers' `generation` tags, which only mark what they enclose.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    return frozenset(meta.find_undeclared_variables(environment.parse(plain)))


def template_with(template: Any, keywords: Mapping[str, Any]) -> Any:
    """A tokenizer's ``template`` (or each of several) with ``keywords`` as what they are where nobody gives them.

    Written into the template, they reach all that renders with it, and stay with the saved tokenizer: a policy is
    served as it was trained. What a row or a server gives wins.

    Raises: ConfigError for a keyword that the template does not read; ModelError for one that is no Jinja.
    """
    setting = "model.chat_template_kwargs"
    if template is None:
        raise ConfigError(
            f"{setting} = {dict(keywords)}: the tokenizer has no chat template that could take them; set "
            "model.chat_template, or leave them out"
        )
    several = template if isinstance(template, dict) else {"": template}
    try:
        reads = frozenset[str]().union(*map(template_variables, several.values()))
    except TemplateSyntaxError as error:
        raise ModelError(broken(error)) from error
    for name, value in keywords.items():
        if name in RESERVED or name not in reads:
            known = sorted(reads - RESERVED)
            raise ConfigError(
                f"{setting}.{name} = {value!r}: the chat template reads no such keyword; "
                f"{suggest(name, known) if known else 'it reads none'}"
            )
    found = {name: _with_defaults(each, keywords) for name, each in several.items()}
    return found if isinstance(template, dict) else found[""]


def broken(error: TemplateSyntaxError) -> str:
    """What to say of a chat template that is no Jinja."""
    return (
        f"the chat template is broken: line {error.lineno}: {error.message}; set model.chat_template to a Jinja "
        "file that renders"
    )


def _with_defaults(template: str, keywords: Mapping[str, Any]) -> str:
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} -%}}"
        for name, value in keywords.items()
    ]
    # The empty expression: a block would take a line break at the template's start with it.
    return "".join([*lines, "{{ '' }}"]) + template


def _literal(value: Any) -> str:
    """A YAML value in Jinja's notation."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        pairs = (f"{_literal(str(key))}: {_literal(each)}" for key, each in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
