"""What holds for every signal in the table."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ConfigDict, create_model

from prefopt.recipe.registry import SIGNALS, get_signal

DOCS = Path(__file__).resolve().parents[2] / "docs" / "signals.md"


@pytest.mark.parametrize("name", SIGNALS)
def test_signature_is_a_strict_schema_and_every_key_is_documented(name: str) -> None:
    spec = get_signal(name)
    fields = spec.fields
    model = create_model(name, __config__=ConfigDict(strict=True, extra="forbid"), **fields)  # type: ignore[call-overload]
    assert set(spec.needs_fields) <= set(fields)
    required = {key for key, (_, default) in fields.items() if default is ...}
    # the defaults are values that a recipe may write
    given = {key: default for key, (_, default) in fields.items() if default is not ...}
    model.model_validate({**given, **dict.fromkeys(required, "x")})
    documentation = inspect.getdoc(spec.fn) or ""
    assert not [key for key in fields if f"{key}:" not in documentation]


@pytest.mark.parametrize("name", SIGNALS)
def test_signal_and_each_of_its_keys_is_on_the_page(name: str) -> None:
    page = DOCS.read_text(encoding="utf-8")
    _, _, rest = page.partition(f"### `{name}`")
    section = rest.partition("\n### ")[0]
    assert section, f"{name} has no section in docs/signals.md"
    assert not [key for key in get_signal(name).fields if f"`{key}`" not in section]


def test_looking_signals_up_imports_no_torch() -> None:
    script = (
        "import sys\nfrom prefopt.recipe.registry import SIGNALS, get_signal\n"
        "for name in SIGNALS: get_signal(name)\nimport prefopt.signals.combine\nprint(*sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in found.stdout.split()}
    assert not loaded & {"torch", "transformers", "peft", "vllm", "sympy", "math_verify"}
