"""What is refused before an engine starts, and the probe after a push."""

from __future__ import annotations

import importlib.util
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from prefopt.engines.probe import Gap, check_gap, compare_logps
from prefopt.engines.start import InTraining, Task, start_engine
from prefopt.engines.vllm.settings import (
    LORA_RANKS,
    ServedModel,
    allowed_lora_rank,
    command_line,
    engine_arguments,
)
from prefopt.errors import ConfigError, EngineError
from prefopt.model.load import LoadedPolicy
from prefopt.recipe.schema import ModelSection, VllmKeys, VllmSection, VllmServerSection
from tests.engines.policies import Policies
from tests.unit.tiny_models import tiny_model


def build(policies: Policies, policy: Any, cls: type[VllmKeys] = VllmSection, **keys: Any) -> Any:
    training = InTraining(LoadedPolicy(policy, "hash", "words", True), None, seed=0)
    task = Task(ModelSection(path=str(policies.base)), 0, 64, "cpu", Path("logs"), training)
    return start_engine(cls(**keys), task).engine


def adapter(**settings: Any) -> Any:
    return get_peft_model(
        tiny_model("llama"), LoraConfig(**{"target_modules": ["q_proj"], **settings})
    )


@pytest.mark.parametrize(
    ("rank", "size"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)]
)
def test_max_lora_rank_is_the_smallest_size_that_holds_the_adapter(rank: int, size: int) -> None:
    assert allowed_lora_rank(rank) == size


def test_the_sizes_are_those_vllm_allows() -> None:
    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == LORA_RANKS


def test_an_adapter_rank_above_vllms_largest_names_the_key(policies: Policies) -> None:
    with pytest.raises(ConfigError, match=r"peft\.r = 600.*512"):
        build(policies, adapter(r=600))
    with pytest.raises(ConfigError, match=r"peft\.r = 600"):
        build(policies, adapter(r=4, rank_pattern={"q_proj": 600}))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_an_adapter_vllm_cannot_serve_is_refused_by_its_key(
    policies: Policies, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"peft\.{key}.*engine\.name = hf"):
        build(policies, adapter(**settings))


@pytest.mark.parametrize("cls", [VllmSection, VllmServerSection])
def test_vllm_that_is_not_installed_names_the_extra(
    policies: Policies, cls: type[VllmSection], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "vllm" else find(n, *a)
    )
    with pytest.raises(
        ConfigError, match=rf"engine\.name = {cls().name}.*prefopt\[vllm\].*make install"
    ):
        build(policies, adapter(r=4), cls)
    # needs none here
    build(policies, adapter(r=4), VllmServerSection, urls=("http://127.0.0.1:9",))


def test_devices_must_name_one_entry_a_server(policies: Policies) -> None:
    with pytest.raises(ConfigError, match=r"engine\.devices.*num_servers = 3"):
        build(policies, adapter(r=4), VllmServerSection, num_servers=3, devices=("0", "1"))


def test_options_reach_vllm_and_what_the_engine_relies_on_cannot_be_overridden() -> None:
    model = ServedModel("m", "float32", 100, context=4096, lora_rank=5)
    arguments = engine_arguments(VllmSection(options={"max_num_seqs": 9}), model, cuda=False)
    assert arguments["max_num_seqs"] == 9 and arguments["max_lora_rank"] == 8
    assert "gpu_memory_utilization" not in arguments
    for name in ("logprobs_mode", "generation_config"):
        with pytest.raises(ConfigError, match=rf"engine\.options\.{name}"):
            engine_arguments(VllmSection(options={name: "x"}), model, cuda=False)


def test_arguments_become_flags_that_vllms_own_parser_reads_back() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    model = ServedModel("m", "float32", 100, lora_rank=5, revision="abc")
    section = VllmSection(options={"hf_overrides": {"a": 1}}, enforce_eager=True)
    arguments = engine_arguments(section, model, cuda=False)
    parsed = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(command_line(arguments)))
    assert {name: parsed[name] for name in arguments} == arguments


def test_the_probe_measures_mean_and_largest_difference() -> None:
    gap = compare_logps([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]])
    assert gap == Gap(mean=0.5, max=1.0)
    check_gap(gap, 0.5, 7)
    with pytest.raises(EngineError, match=r"version 7.*0\.5 nats.*1 at most.*max_logp_gap = 0\.49"):
        check_gap(gap, 0.49, 7)


def test_a_log_prob_that_is_not_finite_fails_the_probe() -> None:
    gap = compare_logps([[math.nan, -1.0]], [[-1.0, -1.0]])
    assert math.isnan(gap.mean)
    with pytest.raises(EngineError):
        check_gap(gap, 1e9, 1)
    with pytest.raises(ValueError):
        compare_logps([[-1.0]], [[-1.0, -2.0]])
