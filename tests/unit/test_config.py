"""Recipes from YAML: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.recipe.load import draft_recipe, load_recipe
from prefopt.recipe.schema import Recipe
from prefopt.recipe.walk import sections

RECIPE = """\
model:
  path: org/model
data:
  train:
    - path: org/pairs
      split: train
objective: {name: simpo, beta: 2.0}
train:
  learning_rate: 1e-6
run:
  output_dir: runs/x
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def write(path: Path, old: str, new: str) -> Path:
    assert RECIPE.count(old) == 1
    path.write_text(RECIPE.replace(old, new))
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def problem(path: Path, *overrides: str) -> str:
    found = problems(path, *overrides)
    assert len(found) == 1, found
    return found[0]


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("5.0e-7", 5e-7), (".5", 0.5), ("+1e-3", 1e-3), ("2", 2.0)],
)
def test_floats_are_read_as_people_write_them(recipe_file: Path, text: str, value: float) -> None:
    # PyYAML alone reads 1e-6 as the string "1e-6".
    recipe = load_recipe(write(recipe_file, "learning_rate: 1e-6", f"learning_rate: {text}"))
    assert recipe.train.learning_rate == value
    assert load_recipe(recipe_file, [f"train.learning_rate={text}"]).train.learning_rate == value


def test_integers_stay_integers(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.seed=7", "objective.beta=3"])
    assert type(recipe.train.seed) is int
    assert recipe.train.seed == 7


def test_strings_that_look_like_exponents_stay_strings(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["run.name='1e-6'"]).run.name == "1e-6"
    assert load_recipe(recipe_file, ["run.name=v1e-6"]).run.name == "v1e-6"


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: 1 problem\n  - no such file"):
        load_recipe(tmp_path / "nope.yaml")


def test_syntax_error_gives_the_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model:\n  path: [a\ntrain: 1\n")
    with pytest.raises(ConfigError, match=r"not valid YAML: .*line 3"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="a recipe is a mapping of sections"):
        load_recipe(path)


def test_a_key_that_cannot_be_one_is_a_syntax_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("{[a]: 1}: 2\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(path)


def test_duplicate_keys_are_refused_with_both_lines(recipe_file: Path) -> None:
    write(recipe_file, "  learning_rate: 1e-6", "  learning_rate: 1e-6\n  learning_rate: 2e-6")
    assert problem(recipe_file) == "train.learning_rate: given twice, on lines 9 and 10; keep one"


# --- overrides -----------------------------------------------------------------------------------


def test_overrides_reach_sections_lists_and_absent_sections(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "train.learning_rate=8e-7",
            "data.train.0.path=org/others",
            "data.train.0.columns.prompt=null",
            "peft.r=8",
            "run.trackers=[]",
        ],
    )
    assert recipe.train.learning_rate == 8e-7
    assert recipe.data.train[0].path == "org/others"
    assert recipe.data.train[0].columns.prompt is None
    assert recipe.peft is not None
    assert recipe.peft.options == {"r": 8}


def test_null_takes_a_section_away(recipe_file: Path) -> None:
    write(recipe_file, "model:\n", "peft: {r: 8}\nmodel:\n")
    assert load_recipe(recipe_file).peft is not None
    assert load_recipe(recipe_file, ["peft=null"]).peft is None


def test_overrides_apply_in_order_and_leave_the_file_alone(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["train.seed=1", "train.seed=2"])
    assert recipe.train.seed == 2
    assert recipe_file.read_text() == RECIPE


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.seed", "must be section.key=value"),
        ("=3", "must be section.key=value"),
        ("train..seed=3", "must be section.key=value"),
        ("data.train.1.path=x", "data.train has 1 item(s), numbered from 0"),
        ("data.train.path=x", "data.train is a list; address an item by its number"),
        ("train.learning_rate.x=3", "train.learning_rate is a value, not a section"),
        ("run.name=[a", "expected ',' or ']'"),
    ],
)
def test_bad_overrides_say_what_is_wrong(recipe_file: Path, override: str, message: str) -> None:
    found = problem(recipe_file, override)
    assert found.startswith(f"override {override!r}: ")
    assert message in found


def test_a_bad_value_from_an_override_is_not_blamed_on_a_line(recipe_file: Path) -> None:
    found = problem(recipe_file, "train.learning_rate=fast")
    assert found.startswith("override: train.learning_rate = 'fast': must be a number")


# --- types and bounds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch_size='two'", "= 'two': must be a whole number."),
        ("train.global_batch_size='2'", "= '2': must be a whole number, without quotes."),
        ("train.global_batch_size=2.5", "= 2.5: must be a whole number."),
        ("train.global_batch_size=true", "= true: must be a whole number."),
        ("train.global_batch_size=0", "= 0: must be > 0."),
        ("train.learning_rate=true", "= true: must be a number."),
        ("train.learning_rate='1e-6'", "must be a number, without quotes."),
        ("train.learning_rate=-1e-6", "= -1e-06: must be > 0."),
        ("train.learning_rate=.nan", "must be a finite number."),
        ("train.learning_rate=.inf", "must be a finite number."),
        ("train.warmup_frac=1.5", "= 1.5: must be <= 1."),
        ("train.gradient_checkpointing=1", "= 1: must be true or false"),
        ("train.gradient_checkpointing='yes'", "must be true or false"),
        ("model.path=3", "= 3: must be text; put it in quotes."),
        ("model.path=true", "= true: must be text; put it in quotes."),
        ("model.revision=2024", "must be text; put it in quotes."),
        ("model.dtype=bf16", "write bfloat16."),
        ("stage=preferences", "did you mean 'preference'?"),
        ("run.trackers=wandb", "must be a list: [wandb]."),
        ("run.trackers=[1]", "run.trackers.0 = 1: must be text"),
        ("reference=initial", "must be a section of keys"),
        ("train=null", "train = null: must be a section of keys"),
        ("objective=simpo", "must be a section of keys"),
        ("objective.beta='2'", "objective.beta = '2': must be a number, without quotes."),
        ("objective.beta=0", "objective.beta = 0: must be > 0."),
        ("objective.beta=.inf", "must be a finite number."),
        ("objective.beta=true", "= true: must be a number."),
        ("data.eval_frac=1.0", "= 1.0: must be < 1."),
    ],
)
def test_values_are_strict_and_errors_say_what_is_required(
    recipe_file: Path, override: str, message: str
) -> None:
    assert message in problem(recipe_file, override)


def test_an_error_says_what_the_key_is(recipe_file: Path) -> None:
    assert "Share of all steps with linear warm-up." in problem(recipe_file, "train.warmup_frac=2")


def test_missing_keys_are_listed_with_their_documentation(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("model: {}\ntrain: {learning_rate: 1e-6}\nrun: {output_dir: x}\n")
    found = problems(path)
    assert found[0].startswith("line 1: model.path is missing: Hub id or local directory")
    assert found[1].startswith("data is missing")
    assert len(found) == 2


# --- unknown keys --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lerning_rate=1", "train.lerning_rate: unknown key; did you mean 'learning_rate'?"),
        ("model.learning_rate=1e-6", "did you mean train.learning_rate?"),
        ("learning_rate=1e-6", "did you mean train.learning_rate?"),
        ("train.beta=0.1", "it is a key of the objective: objective.beta"),
        ("beta=0.1", "it is a key of the objective: objective.beta"),
        ("label_smoothing=0.1", "objective.label_smoothing"),
        ("train.batch_size=8", "here it is train.global_batch_size"),
        ("model.load_in_4bit=true", "write model.quantization: 4bit"),
        ("train.early_stopping_patience=3", "here it is eval.best.patience"),
        ("load_best_model_at_end=true", "set eval.best"),
        ("data.packing=true", "automatic: rows are packed without padding"),
        ("train.neftune_noise_alpha=5", "not there: embeddings get no noise"),
        ("data.streaming=true", "automatic: rows are read one by one"),
        ("train.deepspeed=ds.json", "accelerate launch --config_file"),
        ("objective.loss_type=ipo", "here it is objective.name"),
        ("perf.r=8", "did you mean 'peft'?"),
        ("data.train.0.wieght=2", "did you mean 'weight'?"),
        ("data.train.0.columns.chosn=c", "did you mean 'chosen'?"),
        ("train.per_device_train_batch_size=2", "here it is train.micro_batch_size"),
        (
            "train.gradient_accumulation_steps=2",
            "automatic: it is derived from train.global_batch_size. Leave it out",
        ),
        ("objective.gamma_beta_ratio=0.5", "objective.gamma = gamma_beta_ratio * beta"),
        ("objective.bta=1", "did you mean 'beta'?"),
        ("objective.name=simop", "did you mean 'simpo'?"),
        ("stage=dpo", "'reward_model'; write objective: {name: dpo}."),
        ("objective.name=3", "objective.name = 3: unknown"),
        ("objective.name=sigmoid", "is dpo (TRL names the function of the loss). Known: a_lol"),
        ("objective.name=KTO", "not there: it is for answers that are good or bad each by itself"),
    ],
)
def test_unknown_keys_lead_to_the_right_one(recipe_file: Path, override: str, message: str) -> None:
    assert message in problem(recipe_file, override)


def test_an_objective_without_a_name_lists_the_names(recipe_file: Path) -> None:
    found = problem(recipe_file, "objective={beta: 2.0}")
    assert "objective.name is missing" in found
    assert "simpo" in found


# --- everything at once --------------------------------------------------------------------------


def test_all_problems_are_reported_at_once(recipe_file: Path) -> None:
    found = problems(
        recipe_file,
        "train.seed=x",
        "model.pth=1",
        "objective.beta=-1",
        "broken",
        "plugins=[nowhere.py]",
        "data.train.0.weight=0",
    )
    assert len(found) == 6, found


def test_an_item_that_fails_is_not_also_reported_as_an_empty_list(recipe_file: Path) -> None:
    assert len(problems(recipe_file, "data.train.0.split=3")) == 1


def test_a_draft_keeps_the_sections_that_are_sound(recipe_file: Path) -> None:
    draft = draft_recipe(recipe_file, ["train.seed=x", "data.max_length_tokens=77"])
    assert draft.broken == {"train"}
    assert draft.recipe.data.max_length_tokens == 77
    assert draft.recipe.model.path == "org/model"


def test_error_text_has_the_file_once_and_one_line_a_problem(recipe_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe_file, ["train.seed=x", "train.log_every=0"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{recipe_file}: 2 problems"
    assert [line[:4] for line in lines[1:]] == ["  - "] * 2


# --- plugins -------------------------------------------------------------------------------------

PLUGIN = """\
from prefopt.recipe.registry import objective
from prefopt.types import ObjectiveOutput, ResponseLogps

@objective("config_test_margin", source="this test")
def config_test_margin(lp: ResponseLogps, *, scale: float) -> ObjectiveOutput:
    \"\"\"A loss of one term.\"\"\"
    return ObjectiveOutput(-scale * lp.policy.sum(-1)[lp.pairs[:, 0]])
"""


def test_a_plugin_beside_the_recipe_brings_its_objective(recipe_file: Path) -> None:
    (recipe_file.parent / "margin.py").write_text(PLUGIN)
    overrides = ["plugins=[margin.py]", "objective={name: config_test_margin, scale: 2.0}"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.objective is not None
    assert recipe.objective.given == {"name": "config_test_margin", "scale": 2.0}
    assert "objective.scale is missing" in problem(
        recipe_file, *overrides[:1], overrides[1][:-12] + "}"
    )


def test_a_plugin_that_fails_is_named_with_its_error(recipe_file: Path) -> None:
    (recipe_file.parent / "broken.py").write_text("raise RuntimeError('boom')\n")
    for _ in range(2):  # a half-imported plugin must not count as imported the second time
        found = problem(recipe_file, "plugins=[broken.py]")
        assert "plugins.0 = 'broken.py': importing it raised RuntimeError: boom" in found


# --- without torch -------------------------------------------------------------------------------


def test_structural_errors_need_no_torch(recipe_file: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from prefopt.recipe.load import load_recipe\n"
        "from prefopt.errors import ConfigError\n"
        "try:\n    load_recipe(sys.argv[1], ['train.lerning_rate=1', 'objective.name=simop'])\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(recipe_file)], capture_output=True, text=True, check=True
    ).stdout
    assert "did you mean 'learning_rate'?" in output
    assert "did you mean 'simpo'?" in output


def test_every_key_is_documented() -> None:
    for name, section in sections(Recipe):
        for key, field in section.model_fields.items():
            nested = (
                key in {"model", "data", "train", "eval", "run", "regime"} and section is Recipe
            )
            # what a name stands for is said by the section that it chooses
            said = section.__doc__ if key == "name" and name else field.description
            assert said or nested, f"{name}.{key} has no docstring"


def test_home_is_expanded_in_every_path(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A literal ~ directory under the current one is nobody's wish."""
    monkeypatch.setenv("HOME", "/home/someone")
    overrides = [
        "model.path=~/m",
        "run.output_dir=~/r",
        "data.cache_dir=~/c",
        "data.train.0.path=~/d.jsonl",
    ]
    recipe = load_recipe(recipe_file, [*overrides, "train.resume=~/x"])
    found = [recipe.model.path, recipe.run.output_dir, recipe.data.cache_dir, recipe.train.resume]
    assert [*found, recipe.data.train[0].path] == [
        f"/home/someone/{name}" for name in ("m", "r", "c", "x", "d.jsonl")
    ]
