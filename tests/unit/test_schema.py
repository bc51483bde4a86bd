"""Choices, entries and marks of the schema: what they refuse, how they are recorded, what they never import."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from peft import LoraConfig

from data_pipelines.stages.battle import BattleStage
from data_pipelines.stages.sample import Sample
from data_pipelines.stages.score import Score
from prefopt.errors import ConfigError
from prefopt.recipe import choices
from prefopt.recipe.checks.peft import _PLAIN_LORA
from prefopt.recipe.declared import is_declaration
from prefopt.recipe.help_pages import keys_page
from prefopt.recipe.load import load_recipe
from prefopt.recipe.registry import REGISTRIES, BoundObjective
from prefopt.recipe.run_directory import changed_settings
from prefopt.recipe.schema import HFSection, Recipe, Section
from prefopt.recipe.section import NoEffect, choice_name
from prefopt.recipe.specs import Registry
from prefopt.recipe.walk import recorded
from prefopt.training.run_record import settings_that_count

ROOT = Path(__file__).resolve().parents[2]
NoEffectText = Annotated[str, NoEffect("rows")]
RECIPE = """\
model: {path: org/model}
data:
  prompts:
    - {path: org/prompts, split: train}
objective: {name: dpo, beta: 1}
regime:
  name: rollouts
  sync_every: 2
signals:
  - {name: judge, base_url: "http://a/v1", model: m, weight: 2}
train: {learning_rate: 1e-6}
run: {output_dir: out}
"""
SERVER = "engine={name: vllm_server, urls: ['http://a:1'], max_model_len: 512, timeout_s: 5.0}"
HF = "engine={name: hf, batch_size: 3, device: cpu, cpus: [1]}"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


# --- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "regime.name=offline",
            "line 8: regime.sync_every = 2: belongs to regime.name = 'rollouts', and regime.name is 'offline'. "
            "Leave it out, or choose another name",
        ),
        (
            "engine={name: vllm, urls: [a]}",
            "override: engine.urls: belongs to engine.name = 'vllm_server', and engine.name is 'vllm'. Leave it "
            "out, or choose another name",
        ),
        (
            "reference.path=org/ref",
            "override: reference.path = 'org/ref': belongs to reference.name = 'model', and reference.name is "
            "'initial'. Leave it out, or choose another name",
        ),
        (
            "reference.name=model",
            "reference.path is missing: reference.name = 'model' needs it. Hub id or directory of the "
            "reference. Same tokenizer as the policy.",
        ),
        (
            "regime.name=rolouts",
            "regime.name = 'rolouts': must be 'offline' or 'rollouts'; did you mean",
        ),
        (
            "regime.name=null",
            "regime.name = null: must be 'offline' or 'rollouts'; leave the key out for its default, offline.",
        ),
        ("engine.name=[hf]", "engine.name: must be 'hf', 'vllm' or 'vllm_server'"),
        ("engine=hf", "engine = 'hf': must be a section of keys; write {name: hf}."),
        ("regime.sync_evry=2", "regime.sync_evry: unknown key; did you mean 'sync_every'?"),
        (
            "engine.batch_size=0",
            "override: engine.batch_size = 0: must be > 0. Most responses generated at once.",
        ),
    ],
)
def test_a_name_decides_which_keys_there_are(
    recipe_file: Path, override: str, problem: str
) -> None:
    (found,) = problems(recipe_file, override)
    assert problem in found


def test_a_name_that_is_left_out_is_the_first(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["engine={batch_size: 3}", "reference={cache_dir: c}"])
    assert isinstance(recipe.engine, HFSection) and recipe.reference_name == "initial"
    assert load_recipe(recipe_file, [SERVER, "engine=null"]).engine is None


def test_every_key_of_an_engine_reads_alike_in_the_others() -> None:
    """One page, one record: a key that two choices have is the same key."""
    for union in (choices.Regime, choices.Engine, choices.Reference):
        seen: dict[str, Any] = {}
        for member in get_args(get_args(union)[0]):
            for key, field in member.model_fields.items():
                if key != "name":
                    same = (field.annotation, field.default, field.description)
                    assert seen.setdefault(key, same) == same, (choice_name(member), key)


def test_the_page_says_which_name_a_key_goes_with_and_reads_well() -> None:
    page = keys_page("engine")
    assert "engine.name  hf | vllm | vllm_server, default hf" in page
    _, _, servers = page.partition("  with engine.name = vllm_server:\n")
    assert "engine.urls  list of text" in servers and "engine.batch_size" not in servers
    assert "engine.cpus  list of whole numbers >= 0\n" in page
    assert "data.train  list of sections\n" in keys_page("data")


# --- entries -------------------------------------------------------------------------------------


def test_an_entry_is_validated_once_and_bound(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    objective, (judge,) = recipe.objective, recipe.signals
    assert isinstance(objective, BoundObjective)
    assert objective.params == {"beta": 1.0} and objective.value("label_smoothing") == 0.0
    assert objective.needs_reference and objective.fn.__module__ == "prefopt.objectives.dpo"
    assert (judge.name, judge.weight, "weight" in judge.params) == ("judge", 2.0, False)
    assert recipe.credit_in_force is not None and recipe.credit_in_force.name == "best_worst"
    dumped = recipe.model_dump(mode="json")
    assert dumped["objective"] == {"name": "dpo", "beta": 1}  # as written
    assert Recipe.model_validate(json.loads(json.dumps(dumped))) == recipe


def _type(annotation: Any) -> str:
    return re.sub(r" at 0x\w+", "", repr(annotation))  # of a validator's function


@pytest.mark.parametrize("section", sorted(REGISTRIES))
def test_a_declaration_says_what_the_module_registers(section: str) -> None:
    """A registry of its own, so that nothing is there before: each entry is read, then imported."""
    built_in = REGISTRIES[section]
    for name in built_in.table:
        real = built_in.get(name)
        known, built_in._specs = built_in._specs, {}
        built_in._declared.pop(name, None)
        try:
            read = built_in.declared(name)
        finally:
            built_in._specs = known
        assert is_declaration(read.fn) and read.fn.__doc__ == real.fn.__doc__
        assert read.fields.keys() == real.fields.keys()
        for key, (annotation, default) in read.fields.items():
            assert _type(annotation) == _type(real.fields[key][0])
            assert default == real.fields[key][1]
        traits = vars(real).keys() - {"fn"}
        assert {key: getattr(read, key) for key in traits} == {
            key: getattr(real, key) for key in traits
        }
        with pytest.raises(RuntimeError, match="read, not called"):
            read.fn(*([None] if section != "signals" else []), **dict.fromkeys(read.fields))


def test_what_the_source_does_not_say_plainly_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_rules.py").write_text(
        "from prefopt.recipe.registry import credit\n"
        "if True:\n    Share = float\n"
        "@credit('odd_rule', gives=set(), source='this test')\n"
        "def odd_rule(scores, *, share: Share = 0.5): return share\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    real = REGISTRIES["credit"]
    registry: Registry[Any] = Registry("credit.name", {"odd_rule": "odd_rules"}, "credit")
    monkeypatch.setattr(registry, "_specs", real._specs)
    assert registry.declared("odd_rule").fn(None) == 0.5
    real._specs.pop("odd_rule")


# --- records -------------------------------------------------------------------------------------


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("overrides", "hash_"),
    [
        ([], "3c5b07e78a9fb191"),
        ([SERVER], "9dccada132937a65"),
        ([HF, "reference={name: ema, ema_rate: 0.5}"], "e0f423ad3d7a2afe"),
    ],
)
def test_settings_of_a_run_hash_as_they_did(
    recipe_file: Path, overrides: list[str], hash_: str
) -> None:
    """What it sampled is found again by them after a kill."""
    recipe = load_recipe(recipe_file, [*overrides, "train.precision=fp32"])
    assert digest(settings_that_count(recipe)) == hash_


JUDGE = {"base_url": "http://a/v1", "model": "m", "timeout_s": 3.0}


@pytest.mark.parametrize(
    ("schema", "settings", "hash_"),
    [
        (
            Sample,
            {"model": {"path": "m"}, "engine": {"name": "vllm", "enforce_eager": True}},
            "9a6ab307c9f9c5d6",
        ),
        (
            Sample,
            {"model": {"path": "m"}, "engine": {"device": "cpu", "timeout_s": 3.0}},
            "d1ddda59f82eface",
        ),
        (
            Score,
            {"signals": [{"name": "judge", **JUDGE}, {"name": "math", "num_workers": 3}]},
            "20705ff8e8ed0e3b",
        ),
        (BattleStage, {"judge": JUDGE}, "210ed1fcab141ebc"),
    ],
)
def test_settings_of_a_stage_hash_as_they_did(
    schema: type[Any], settings: dict[str, Any], hash_: str
) -> None:
    assert digest(schema.model_validate(settings).recorded()) == hash_


def test_a_run_of_before_is_continued_without_a_word(recipe_file: Path) -> None:
    """Its run.json holds the keys of every choice."""
    recipe = load_recipe(recipe_file, [SERVER])
    flat = json.loads(json.dumps(recipe.model_dump(mode="json")))
    flat["engine"] |= {"device": None, "cpus": [], "batch_size": 256}
    assert not list(changed_settings({"recipe": flat}, recipe))
    flat["regime"]["top_p"], flat["engine"]["timeout_s"] = 0.9, 1.0
    assert list(map(str, changed_settings({"recipe": flat}, recipe))) == ["regime.top_p: 0.9 → 1.0"]


def test_a_mark_counts_for_what_it_names() -> None:
    class Inner(Section):
        where: NoEffectText = "here"
        what: str = "x"

    class Outer(Section):
        inner: Inner = Inner()
        many: tuple[Inner, ...] = (Inner(),)

    dump = Outer().model_dump(mode="json")
    assert recorded(Outer, dump, "rows") == {"inner": {"what": "x"}, "many": [{"what": "x"}]}
    assert recorded(Outer, dump, "run") == dump


# --- what a check loads --------------------------------------------------------------------------

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "numpy",
    "vllm",
    "trl",
    "httpx2",
}


def test_a_check_imports_nothing_heavy() -> None:
    """Every shipped recipe with LoRA or full fine-tuning, whatever its objective, signals and engine."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom prefopt.errors import ConfigError\n"
        "from prefopt.recipe.checks import check\n"
        "for path in sys.argv[1:]:\n"
        "    try: check(path, assume_cuda=True)\n"
        "    except ConfigError as error: print(error, file=sys.stderr)\n"
        "    print(Path(path).name, *{name.split('.')[0] for name in sys.modules})\n"
    )
    recipes = [str(path) for path in sorted((ROOT / "recipes").glob("*/*.yaml"))]
    recipes = [path for path in recipes if "\nobjective:" in Path(path).read_text()]
    assert len(recipes) > 30
    recipes = [path for path in recipes if "\nplugins:" not in Path(path).read_text()]
    found = subprocess.run(
        [sys.executable, "-c", script, *recipes],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert len(found.stdout.splitlines()) == len(recipes)
    for line in found.stdout.splitlines():
        name, *loaded = line.split()
        assert not HEAVY & set(loaded), name


def test_keys_of_plain_lora_are_pefts() -> None:
    """What is taken without asking peft: its class has these keys, and takes such values."""
    values: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["q"],
    }  # fmt: skip
    assert values.keys() == _PLAIN_LORA.keys()
    assert all(_PLAIN_LORA[key](value) for key, value in values.items())
    config = LoraConfig(**values)
    assert {key: getattr(config, key) for key in values} == values | {"target_modules": {"q"}}
    wrong = {"r": 0, "lora_alpha": True, "lora_dropout": "0", "use_rslora": 1, "target_modules": []}
    assert not any(_PLAIN_LORA[key](value) for key, value in wrong.items())
