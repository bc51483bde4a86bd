"""`prefopt check`: what is refused before anything loads, what is only noted, and that nothing is missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.recipe.checks import check, examine
from prefopt.recipe.checks.rules import _RULES
from prefopt.recipe.load import load_recipe

RECIPE = """\
model:
  path: org/model
data:
  train:
    - path: org/pairs
      split: train
objective: {name: simpo}
train:
  learning_rate: 1e-6
run:
  output_dir: OUT
"""

SFT = ["stage=sft", "objective=null"]
RM = ["stage=reward_model", "objective=null"]
DPO = ["objective={name: dpo}"]
LORA = ["peft={type: lora, r: 8}"]
A_LOL, WBC = ["objective={name: a_lol}"], ["objective={name: wbc}"]
CONDITIONED = ["objective={name: reward_conditioned}"]
SCORES = "data.train.0.columns={score_chosen: a, score_rejected: b}"
BOTH = "data.train.0.columns={chosen: c, response: r}"
BY_ADVANTAGE = "data.sampling.name=advantage"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return path


def problems(path: Path, overrides: list[str], **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(path, overrides, **options)  # type: ignore[arg-type]
    return caught.value.problems


def test_a_sound_recipe_passes_offline_and_says_what_it_took_on_trust(recipe_file: Path) -> None:
    assert check(recipe_file) == ["not checked, on the hub: org/model, org/pairs"]


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["objective=null"], "objective", "is missing"),
        (["stage=sft"], "objective", "would be ignored"),
        ([*SFT, "reference={name: initial}"], "reference", "would be ignored"),
        ([*SFT, "regime={name: offline}"], "regime", "would be ignored"),
        ([*RM, *LORA, "model.quantization=4bit"], "model.quantization = '4bit'", "untrained head"),
        ([*RM, "peft={adapter: org/lora}"], "peft.adapter = 'org/lora'", "no reward head"),
        (["reference={name: initial}"], "reference", "'simpo' needs no reference"),
        (
            [*A_LOL, "data.normalize_rewards=sigmoid"],
            "data.normalize_rewards",
            "goes by advantages",
        ),
        ([*A_LOL, SCORES], "data.train.0.columns", "this run goes by advantages"),
        ([*WBC, SCORES, BY_ADVANTAGE], "data.train.0.columns", "this run goes by advantages"),
        ([*WBC, BOTH], "data.train.0.columns.chosen = 'c'", "of a pair"),
        ([*WBC, SCORES, "data.train.0.drop_ties=true"], "data.train.0.drop_ties", "one by one"),
        ([*WBC, "data.sampling.replacement=false"], "data.sampling.replacement", "every row once"),
        ([*WBC, BY_ADVANTAGE, "train.shuffle=false"], "train.shuffle", "draws"),
        ([*WBC, "data.condition={target: 1}"], "data.condition", "would be ignored"),
        (
            [*CONDITIONED, "data.condition={template: x}"],
            "data.condition.template = 'x'",
            "must hold {reward}",
        ),
        (
            [*CONDITIONED, "eval.generation={}", "data.eval_frac=0.1"],
            "eval.generation.prompts",
            "is missing",
        ),
        (["data.train.0.columns.reward=r"], "data.train.0.columns.reward", "would be ignored"),
        ([BY_ADVANTAGE], "data.sampling.name", "no advantage or reward"),
        (["data.normalize_rewards=z_score"], "data.normalize_rewards", "no rewards of samples"),
        ([*DPO, "reference={name: none}"], "reference.name = 'none'", "against a reference"),
        (
            [*DPO, "reference={name: model}"],
            "reference.path is missing",
            "reference.name = 'model'",
        ),
        (
            [*DPO, "reference={path: org/ref}"],
            "reference.path = 'org/ref'",
            "belongs to reference.name = 'model'",
        ),
        (
            [*DPO, "reference={revision: v1}"],
            "reference.revision = 'v1'",
            "belongs to reference.name = 'model'",
        ),
        (
            ["reference={name: none, cache_dir: c}"],
            "reference.cache_dir = 'c'",
            "reference.name is 'none'",
        ),
        (["train.optimizer=rmsprop", "train.adam_beta2=0.9"], "train.adam_beta2 = 0.9", "ignored"),
        (
            ["train.optimizer=rmsprop", "train.weight_decay=0.1"],
            "train.weight_decay = 0.1",
            "rmsprop",
        ),
        (["train.max_steps=5", "train.num_epochs=2"], "train.num_epochs = 2.0", "max_steps = 5"),
        (["eval.every=5"], "eval.every = 5", "nothing to evaluate on"),
        (
            ["data.eval_frac=0.1", "eval.best={metric: eval/loss/total, mode: min}"],
            "eval.best.metric = 'eval/loss/total'",
            "no best to find",
        ),
        (
            ["eval={every: 5, generation: {}, best: {metric: eval/loss/total, mode: min}}"],
            "eval.best.metric = 'eval/loss/total'",
            "of held-out rows",
        ),
        (
            [
                "data.eval_frac=0.1",
                "eval.every=5",
                "eval.best={metric: eval/generation/reward, mode: max}",
            ],
            "eval.best.metric = 'eval/generation/reward'",
            "Add eval.generation",
        ),
        (["train.resume=nowhere"], "train.resume = 'nowhere'", "no such checkpoint"),
        (
            ["data.max_prompt_tokens=2048"],
            "data.max_prompt_tokens = 2048",
            "no room for a response",
        ),
        (["data.train.0.split=null"], "data.train.0.path = 'org/pairs'", "say which split"),
        (["data.train.0.columns={rejected: null}"], "data.train.0.columns.rejected", "is null"),
        (
            [*SFT, "data.train.0.columns={rejected: r}"],
            "data.train.0.columns.rejected",
            "chosen only",
        ),
        (["data.train.0.columns={score_chosen: s}"], "data.train.0.columns", "both score columns"),
        (["data.train.0.drop_ties=true"], "data.train.0.drop_ties = true", "two equal scores"),
        (
            ["data.eval=[{path: org/pairs, split: test}]", "data.eval_frac=0.1"],
            "data.eval_frac = 0.1",
            "would be ignored",
        ),
        (["data.train=[]"], "data.train", "is missing"),
        (["model.quantization=4bit"], "model.quantization = '4bit'", "nothing to train without"),
        (
            ["model.dtype=bfloat16", "train.precision=fp32"],
            "model.dtype = 'bfloat16'",
            "most of them round to nothing",
        ),
        (
            ["model.dtype=float16", "train.precision=fp32"],
            "model.dtype = 'float16'",
            "most of them round to nothing",
        ),
        (
            [*LORA, "model.dtype=float16", "train.precision=fp32"],
            "train.precision = 'fp32'",
            "does not go with",
        ),
        ([*LORA, "model.dtype=bfloat16", "train.precision=fp16"], "train.precision", "float32"),
        ([*LORA, "peft.lora_dropout=0.05"], "peft.lora_dropout = 0.05", "disable_dropout is true"),
        (["peft={type: lorra}"], "peft.type = 'lorra'", "did you mean 'lora'?"),
        (["peft={rnk: 8}"], "peft.rnk = 8", "unknown key of peft's LoraConfig; did you mean"),
        (["peft={rank: 8}"], "peft.rank = 8", "here it is peft.r"),
        (["peft={r: 8, load_in_4bit: true}"], "peft.load_in_4bit", "model.quantization: 4bit"),
        (["peft={lora_alfa: 8}"], "peft.lora_alfa = 8", "did you mean 'lora_alpha'?"),
        (["peft={r: eight}"], "peft.r = 'eight'", "must be a whole number"),
        (["peft={r: 0}"], "peft.r = 0", "must be >= 1"),
        (["peft={use_dora: 1}"], "peft.use_dora = 1", "must be true or false"),
        (["peft={task_type: CAUSAL_LM}"], "peft.task_type", "is set by prefopt"),
        (["peft={layers_pattern: h}"], "peft", "cannot be used when `target_modules`"),
        (["peft={adapter: org/lora, r: 8}"], "peft.r = 8", "brings its own configuration"),
        (["peft={adapter: org/lora, type: lora}"], "peft.type = 'lora'", "brings its own"),
        (
            ["run.trackers=[tensorbord]"],
            "run.trackers.0 = 'tensorbord'",
            "did you mean 'tensorboard'?",
        ),
        (["model.path=./nowhere"], "model.path = './nowhere'", "no such directory"),
        (["model.tokenizer=/no/where"], "model.tokenizer = '/no/where'", "no such directory"),
        (["model.chat_template=t.jinja"], "model.chat_template = 't.jinja'", "no such file"),
        (["data.train.0={path: pairs.jsonl}"], "data.train.0.path = 'pairs.jsonl'", "no such file"),
        (["data.train.0={path: 'd/*.jsonl'}"], "data.train.0.path = 'd/*.jsonl'", "no such file"),
    ],
)
def test_what_would_be_ignored_or_cannot_work_is_refused(
    recipe_file: Path, overrides: list[str], key: str, words: str
) -> None:
    found = [p for p in problems(recipe_file, overrides, assume_cuda=True) if words in p]
    assert len(found) == 1, problems(recipe_file, overrides, assume_cuda=True)
    assert f"{key}: " in found[0] or f"{key} = " in found[0]


@pytest.mark.parametrize(
    "overrides",
    [
        SFT,
        [*RM, *LORA],
        DPO,
        [*DPO, "reference={name: model, path: org/ref, revision: v1}"],
        ["reference={name: none}"],
        [*SFT, "data.train.0.columns={prompt: null, chosen: messages, rejected: null}"],
        [
            "data.train.0.columns={score_chosen: a, score_rejected: b}",
            "data.train.0.drop_ties=true",
        ],
        ["data.eval=[{path: org/pairs, split: test}]", "eval.every=5"],
        ["data.eval_frac=0.1", "eval.every=5"],
        ["train.optimizer=rmsprop"],
        ["train.max_steps=5"],
        ["train.lr_scheduler=constant", "train.warmup_frac=0.1"],
        [*LORA, "model.disable_dropout=false", "peft.lora_dropout=0.1"],
        [*LORA, "peft.target_modules=[q_proj, v_proj]", "peft.use_dora=true", "peft.lora_alpha=16"],
        ["peft={type: ia3}"],
        ["peft={adapter: org/lora}"],
        [*LORA, "model.dtype=float16", "train.precision=fp16"],
        [*LORA, "model.dtype=float16"],
        [*LORA, "model.quantization=4bit", "model.dtype=bfloat16"],
    ],
)
def test_settings_that_go_together_pass(recipe_file: Path, overrides: list[str]) -> None:
    check(recipe_file, overrides, assume_cuda=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_weights_are_fully_trained_only_where_the_launch_keeps_masters(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Known by whoever starts a run: one process and DDP have no masters, DeepSpeed and FSDP do."""
    overrides = [f"model.dtype={dtype}"]
    with pytest.raises(ConfigError, match="Or launch with DeepSpeed or FSDP"):
        check(recipe_file, overrides, num_processes=1, assume_cuda=True)
    check(recipe_file, [*overrides, *LORA], num_processes=1, assume_cuda=True)
    for engine in ("DEEPSPEED", "FSDP"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{engine}", "true")
            check(recipe_file, overrides, num_processes=1, assume_cuda=True)
            with pytest.raises(ConfigError, match="most of them round to nothing"):
                check(recipe_file, [*overrides, "train.precision=fp32"], num_processes=1)


# --- this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [[*LORA, "model.quantization=8bit"], [*LORA, "model.dtype=float16", "train.precision=fp16"]],
)
def test_cuda_only_settings_need_cuda_unless_told_to_assume_it(
    recipe_file: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (found,) = problems(recipe_file, overrides)
    assert "CUDA device, and this machine has none" in found
    check(recipe_file, overrides, assume_cuda=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check(recipe_file, overrides)


def test_a_tracker_that_is_not_installed_is_refused(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["wandb"])
    (found,) = problems(recipe_file, ["run.trackers=[wandb, tensorboard]"])
    assert "run.trackers.1 = 'tensorboard': its package is not installed here" in found


def test_output_directory_must_be_a_place_to_write(recipe_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("")
    (found,) = problems(recipe_file, [f"run.output_dir={file}"])
    assert "is a file" in found
    (found,) = problems(recipe_file, [f"run.output_dir={file}/run"])
    assert f"cannot be made: {file} is a file" in found


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_directory_needs_permission(recipe_file: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    (found,) = problems(recipe_file, [f"run.output_dir={closed}/run"])
    assert "no permission" in found


# --- batches and processes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "processes", "advice"),
    [(7, 2, "Use 6 or 8"), (128, 3, "Use 126 or 129"), (1, 2, "Use 2"), (4, 8, "Use 8")],
)
def test_the_global_batch_divides_over_the_processes(
    recipe_file: Path, batch: int, processes: int, advice: str
) -> None:
    overrides = [f"train.global_batch_size={batch}"]
    (found,) = problems(recipe_file, overrides, num_processes=processes)
    assert f"train.global_batch_size = {batch}: does not divide over {processes} processes" in found
    assert found.endswith(advice)
    check(recipe_file, overrides)


def test_a_micro_batch_larger_than_a_share_is_refused(recipe_file: Path) -> None:
    overrides = ["train.global_batch_size=8", "train.micro_batch_size=4"]
    check(recipe_file, overrides, num_processes=2)
    (found,) = problems(recipe_file, overrides, num_processes=4)
    assert "train.micro_batch_size = 4: is never reached" in found


# --- local files ---------------------------------------------------------------------------------


@pytest.fixture
def model_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def save_adapter(directory: Path, base: str | None) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return directory


def test_local_data_takes_no_hub_keys(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    source = f"data.train.0={{path: {tmp_path}/pairs.jsonl, split: train, revision: v1}}"
    found = problems(recipe_file, [source])
    assert len(found) == 2
    assert all("would be ignored" in line for line in found)


def test_a_missing_file_suggests_its_neighbour(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    (found,) = problems(recipe_file, [f"data.train.0={{path: {tmp_path}/pears.jsonl}}"])
    assert f"did you mean {tmp_path}/pairs.jsonl?" in found


def test_patterns_and_directories_are_local(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl.gz").write_text("")
    check(recipe_file, [f"data.train.0={{path: '{tmp_path}/*.jsonl.gz'}}"])
    check(recipe_file, [f"data.train.0={{path: {tmp_path}}}"])


def test_a_local_model_must_be_one(
    recipe_file: Path, tmp_path: Path, model_directory: Path
) -> None:
    check(recipe_file, [f"model.path={model_directory}"])
    (found,) = problems(recipe_file, [f"model.path={model_directory}", "model.revision=v1"])
    assert "model.revision = 'v1': would be ignored" in found
    (found,) = problems(recipe_file, [f"model.path={tmp_path}"])
    assert "neither config.json nor a readable adapter_config.json" in found


def test_a_local_adapter_as_model_names_its_base(recipe_file: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", "org/base")
    notes = check(recipe_file, [f"model.path={adapter}"])
    assert any("an adapter; its base is org/base" in note for note in notes)
    gone = save_adapter(tmp_path / "orphan", "/no/such/base")
    (found,) = problems(recipe_file, [f"model.path={gone}"])
    assert "whose base /no/such/base is not on this machine" in found


def test_an_adapter_for_another_base_is_refused(
    recipe_file: Path, tmp_path: Path, model_directory: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", "org/other")
    (found,) = problems(recipe_file, [f"peft.adapter={adapter}"])
    assert "an adapter for another base: it was trained on org/other, and model.path is" in found
    same = save_adapter(tmp_path / "same", str(model_directory))
    # The same directory under another spelling is the same base.
    check(recipe_file, [f"peft.adapter={same}", f"model.path={tmp_path}/./model"])
    check(recipe_file, [f"peft.adapter={adapter}", f"model.path={adapter}"])


def test_a_base_recorded_by_content_is_left_to_loading(recipe_file: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", "org/other")
    (adapter / "prefopt_base.json").write_text("{}")
    notes = check(recipe_file, [f"peft.adapter={adapter}"])
    assert any("loading compares their contents" in note for note in notes)


@pytest.mark.parametrize("content", [None, "{not json"])
def test_a_directory_that_is_no_adapter_is_refused(
    recipe_file: Path, tmp_path: Path, content: str | None
) -> None:
    directory = tmp_path / "adapter"
    directory.mkdir()
    if content:
        (directory / "adapter_config.json").write_text(content)
    (found,) = problems(recipe_file, [f"peft.adapter={directory}"])
    assert "has no readable adapter_config.json" in found


# --- notes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["objective={name: simpo, beta: 0.1, gamma: 0.05}"], "the paper uses 2 to 10"),
        (["objective={name: simpo, beta: 2.0, gamma: 3.0}"], "gamma/beta = 1.5"),
        (["objective={name: dpo, beta: 2.5}"], "published values are 0.01 to 0.5"),
        (["objective={name: ipo_mean, beta: 0.1}"], "5 nats a token"),
        (["train.learning_rate=1e-5"], "made SimPO repeat itself"),
        (["model.dtype=bfloat16"], "runs under DeepSpeed and FSDP only"),
    ],
)
def test_unusual_hyper_parameters_are_noted_not_refused(
    recipe_file: Path, overrides: list[str], words: str
) -> None:
    assert any(words in note for note in check(recipe_file, overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective={name: simpo, beta: 10.0, gamma: 5.0}"],
        ["objective={name: dpo, beta: 0.01}"],
        ["objective={name: ipo, beta: 0.1}"],
        [*LORA, "model.dtype=bfloat16", "train.learning_rate=1e-5"],
    ],
)
def test_published_hyper_parameters_are_not_noted(recipe_file: Path, overrides: list[str]) -> None:
    assert all(note.startswith("not checked") for note in check(recipe_file, overrides))


# --- together ------------------------------------------------------------------------------------


def test_an_evaluation_on_what_is_trained_on_is_noted(recipe_file: Path) -> None:
    """Not refused: whether a model can learn a few rows by heart is a thing people look at."""
    notes = check(recipe_file, ["data.eval=[{path: org/pairs, split: train}]"])
    assert any("data.eval.0.path" in note and "also trained on" in note for note in notes)


def test_structural_and_cross_section_problems_come_together(recipe_file: Path) -> None:
    overrides = ["train.lerning_rate=1", "reference={name: initial}", "data.max_prompt_tokens=4096"]
    found = problems(recipe_file, overrides)
    assert len(found) == 3, found


def test_rules_pass_over_a_section_that_is_itself_broken(recipe_file: Path) -> None:
    # eval.every needs eval data, but the data section has a typo that may well be the reason.
    found = problems(recipe_file, ["eval.every=5", "data.eval_fraq=0.1"])
    assert len(found) == 1
    assert "did you mean 'eval_frac'?" in found[0]


def test_problems_carry_the_line_of_their_key(recipe_file: Path) -> None:
    recipe_file.write_text(recipe_file.read_text() + "reference:\n  name: initial\n")
    (found,) = problems(recipe_file, [])
    assert found.startswith("line 12: reference: would be ignored")


def test_a_loaded_recipe_is_checked_as_well(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["reference={name: initial}"])
    with pytest.raises(ConfigError, match="reference: would be ignored"):
        check(recipe)


def test_examine_returns_the_recipe_it_checked(recipe_file: Path) -> None:
    recipe, notes = examine(recipe_file, ["train.seed=5"])
    assert recipe == load_recipe(recipe_file, ["train.seed=5"])
    assert notes == check(recipe_file, ["train.seed=5"])


def test_rules_read_only_the_sections_they_declare(recipe_file: Path) -> None:
    """A rule that reads an undeclared section would fail on a recipe where that section is broken."""
    from prefopt.recipe.checks.rules import Surroundings
    from prefopt.recipe.schema import Recipe

    rich = ["reference={name: initial}", "data.eval_frac=0.1", "model.dtype=bfloat16"]
    recipe = load_recipe(recipe_file, [*DPO, *LORA, *rich, "run.trackers=[wandb]"])
    for names, rule in _RULES:
        partial = Recipe.model_construct(
            **{name: getattr(recipe, name) for name in names & set(Recipe.model_fields)}
        )
        for other in set(Recipe.model_fields) - names:
            partial.__dict__.pop(other, None)
        list(rule(partial, Surroundings(assume_cuda=True)))


def test_without_torch_rules_about_it_become_notes(recipe_file: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from prefopt.recipe.checks import check\n"
        "overrides = ['train.max_steps=3', 'model.quantization=4bit', 'peft={r: 8}']\n"
        "print(*check(sys.argv[1], overrides), sep='\\n')\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(recipe_file)], capture_output=True, text=True, check=True
    ).stdout
    assert "because torch is not installed: quantization has what it needs" in output
