"""Engines for policies as they lie on disk: the adapter counts, and nothing is merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefopt.engines.base import Request, SamplingSpec
from prefopt.engines.start import Task, start_engine
from prefopt.errors import ConfigError
from prefopt.recipe.schema import ModelSection
from tests.engines.conftest import engine_section
from tests.engines.policies import CONTEXT, Policies, sampled_logps


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_a_saved_adapter_is_what_answers(policies: Policies, tmp_path: Path, kind: str) -> None:
    adapter = policies.adapters[1]
    engine, context = start_engine(
        engine_section(kind),
        Task(ModelSection(path=str(adapter)), 0, CONTEXT, "cpu", tmp_path),
    )
    try:
        assert context == (128 if kind == "hf" else CONTEXT)
        spec = SamplingSpec(max_new_tokens=8, temperature=1.0)
        prompt = (5, 6, 7)
        (group,) = engine.generate([Request(prompt, (1, 2))], spec)
    finally:
        engine.close()
    truth = policies.truth(adapter)
    for completion in group:
        expected = sampled_logps(truth, prompt, completion.ids, spec)
        assert completion.logps == pytest.approx(expected, abs=2e-4)


def test_the_context_is_bounded_by_the_model(policies: Policies, tmp_path: Path) -> None:
    # vLLM scores with one token more than it is given, so one of the model's 128 stays free.
    _, context = start_engine(
        engine_section("vllm"),
        Task(ModelSection(path=str(policies.base)), 0, 10_000, "cpu", tmp_path),
    )
    assert context == 127


@pytest.mark.parametrize(
    ("change", "named"),
    [({"use_dora": True}, "lora with use_dora"), ({"peft_type": "LOHA"}, "is loha")],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused(
    policies: Policies, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in policies.adapters[0].iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(ConfigError, match=named):
        start_engine(
            engine_section("vllm"),
            Task(ModelSection(path=str(adapter)), 0, CONTEXT, "cpu", tmp_path),
        )
