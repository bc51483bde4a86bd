"""Files beside a model that strangers bring, and settings of adapters: a sentence, or nothing to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from prefopt.commands.look import _json, _names_in_weights
from prefopt.errors import PrefoptError
from prefopt.model.end_tokens import saved_end_ids
from prefopt.recipe.checks.peft import adapter_fits_base, peft_keys_exist
from prefopt.recipe.checks.rules import Surroundings
from prefopt.recipe.schema import Recipe
from prefopt.storage import model_files
from prefopt.storage.holder import HOLDER_FILE, _read
from tests.fuzz.mutations import as_json, fuzzed, mutated_bytes, mutated_value, steps

RECIPE = {
    "model": {"path": "org/m"},
    "data": {},
    "train": {"learning_rate": 1e-6},
    "run": {"output_dir": "o"},
}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/m", "target_modules": ["q_proj"],
    "init_lora_weights": True, "kasa_config": {"beta": 0, "gamma": 0}, "alora_invocation_tokens": None,
        "use_dora": False,
    "revision": None, "modules_to_save": ["lm_head"],
}  # fmt: skip
FILES: dict[str, Any] = {
    "adapter_config.json": ADAPTER,
    "config.json": {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoConfig": "x.Y"},
        "model_type": "llama"},
    "prefopt_base.json": {"base": "org/m", "hash": "ab"},
    "model.safetensors.index.json": {"weight_map": {"model.layers.0.q_proj.weight": "a.safetensors"}},
    "generation_config.json": {"eos_token_id": [2, 7], "_from_model_config": False},
    HOLDER_FILE: {"host": "h", "system": "s", "pid": 7, "started": "9", "since": "x", "command": "c",
        "token": "t"},
}  # fmt: skip


def _recipe(**peft: Any) -> Recipe:
    return Recipe.model_validate({**RECIPE, "peft": peft})


def read_adapter(folder: Path) -> None:
    model_files.read_adapter_config(folder)
    for finding in adapter_fits_base(_recipe(adapter=str(folder)), Surroundings()):
        finding.text.encode()


READERS: dict[str, Callable[[Path], object]] = {
    "adapter_config.json": read_adapter,
    "config.json": model_files.read_model_config,
    "prefopt_base.json": model_files.read_base_record,
    "model.safetensors.index.json": lambda folder: (
        _names_in_weights(folder),
        model_files.shard_names(folder / "model.safetensors.index.json"),
    ),
    "generation_config.json": lambda folder: (saved_end_ids([folder]), _json(folder / "generation_config.json")),
    HOLDER_FILE: _read,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_files_that_are_mutated_are_right(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(as_json(FILES[name]))
    found = READERS[name](tmp_path)
    assert name != HOLDER_FILE or found is not None


def check(folder: Path, case: tuple[str, bytes]) -> None:
    name, data = case
    own = folder / "model"
    own.mkdir(exist_ok=True)
    for each in own.iterdir():
        each.unlink()
    (own / name).write_bytes(data)
    try:
        with steps():
            READERS[name](own)
    except PrefoptError as error:
        str(error).encode()


def check_section(folder: Path, options: Any) -> None:
    del folder
    if not isinstance(options, dict) or not all(isinstance(key, str) for key in options):
        return
    try:
        recipe = _recipe(**json.loads(json.dumps(options)))
    except ValueError:  # the schema's own words
        return
    with steps():
        for finding in peft_keys_exist(recipe, Surroundings()):
            finding.text.encode("utf-8", "backslashreplace")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kasa_config": 1}, "kasa_config"), ({"kasa_config": [1]}, "kasa_config"),
        ({"init_lora_weights": ["eva"]}, "init_lora_weights"),
        ({"target_modules": {"a": 1}}, "list[str]"),
        ({"modules_to_save": 3}, "list[str]"),
        ({"type": "ia3", "target_modules": 3}, "list[str]"),
        ({"rank_pattern": [1]}, "must be dict"),
    ],
)  # fmt: skip
def test_an_option_of_another_type_is_said_by_name(options: dict[str, Any], said: str) -> None:
    found = [
        f"{each.key} {each.text}" for each in peft_keys_exist(_recipe(**options), Surroundings())
    ]
    assert any(said in each for each in found), found


CASE = st.sampled_from(sorted(FILES)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.one_of(
            mutated_bytes([as_json(FILES[name])]),
            mutated_value([FILES[name]]).map(as_json),
            st.integers(200, 100_000).map(lambda deep: b'{"a":' * deep),
        ),
    )
)
SECTIONS: list[Any] = [
    {"type": "lora", "r": 8, "target_modules": ["q_proj"], "init_lora_weights": True,
        "kasa_config": {"beta": 0, "gamma": 0}},
    {"type": "ia3", "target_modules": ["k", "d"], "feedforward_modules": ["d"]},
    {"type": "lora", "use_dora": True, "rank_pattern": {"q": 2}, "layers_to_transform": [1],
        "modules_to_save": None},
]  # fmt: skip
test_files, test_many_files = fuzzed(CASE, check, share=0.5)
test_sections, test_many_sections = fuzzed(mutated_value(SECTIONS), check_section, share=0.5)


@pytest.mark.parametrize(
    "base", ["\x00", "a" * 5000, "~nobody-of-that-name/x", "\ud83d", "./" + "b" * 300]
)
def test_a_saved_adapter_whose_base_is_no_path_is_one_for_another_base(
    base: str, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes(
        as_json({**ADAPTER, "base_model_name_or_path": base})
    )
    found = list(adapter_fits_base(_recipe(adapter=str(tmp_path)), Surroundings()))
    assert any("another base" in each.text for each in found)
