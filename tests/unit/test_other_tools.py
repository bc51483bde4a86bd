"""Recipes of a stranger: the keys and values of other tools, through the loader, one at a time."""

from __future__ import annotations

import ast
import copy
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.pipeline import PipelineSettings
from prefopt.cli import main
from prefopt.recipe import other_tools
from prefopt.recipe.load import draft_document
from prefopt.recipe.other_tools import ABSENT, AUTOMATIC, OBJECTIVES, RENAMED, value_hint
from prefopt.recipe.registry import CREDITS, SIGNALS, objective_keys, objective_names
from prefopt.recipe.schema import Recipe
from prefopt.recipe.walk import sections
from prefopt.recipe.yaml_file import Document

RECIPE: dict[str, Any] = {
    "model": {"path": "./m"},
    "data": {"train": [{"path": "a.jsonl"}]},
    "objective": {"name": "dpo"},
    "regime": {"name": "rollouts"},
    "train": {"learning_rate": 1e-6},
    "run": {"output_dir": "o"},
}
SECTIONS = ("", "model", "data", "objective", "regime", "train", "run")


def problems(path: str, value: Any) -> str:
    """What the loader says of one more key in an otherwise sound recipe; empty if it takes it."""
    raw = copy.deepcopy(RECIPE)
    *section, key = path.split(".")
    target: Any = raw
    for part in section:
        target = target[int(part)] if part.isdigit() else target.setdefault(part, {})
    target[key] = value
    return " ".join(draft_document(Document(raw), Path("x.yaml")).problems)


def misleading(key: str) -> list[str]:
    """Where, of all sections, a stranger is left with a list of names, or with one that is only spelt alike."""
    raw = copy.deepcopy(RECIPE)
    for section in SECTIONS:
        (raw[section] if section else raw).setdefault(key, "x-y-z")
    found = draft_document(Document(raw), Path("x")).problems
    said = [each.partition("unknown key; ") for each in found]
    return [f"{at}{why}" for at, _, why in said if why.startswith(("Known:", "did you mean '"))]


# --- every field of the TRL that is installed ----------------------------------------------------

MAIN = {
    "DPOConfig", "SFTConfig", "RewardConfig", "GRPOConfig", "RLOOConfig", "KTOConfig", "OnlineDPOConfig",
     "CPOConfig",
    "ORPOConfig", "ModelConfig", "ScriptArguments", "DatasetMixtureConfig", "_BaseConfig", "TrainingArguments",
}  # fmt: skip


def _fields(path: Path) -> Iterator[tuple[str, str]]:
    """``(class, field)`` of the settings classes of a module, read and not imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Arguments")):
            for each in node.body:
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    yield node.name, each.target.id


def _source(package: str, *below: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent.joinpath(*below).with_suffix(".py" if below else "")


def _members(path: Path, enum: str) -> set[str]:
    """The values of an enumeration of texts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == enum)
    return {
        each.value.value
        for each in found.body
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)
    }


def trl_fields() -> dict[str, set[str]]:
    """Field -> the classes that have it."""
    found: dict[str, set[str]] = {}
    for package, pattern in (("trl", "**/*config*.py"), ("trl", "scripts/utils.py"),
                             ("transformers", "training_args.py")):  # fmt: skip
        for file in sorted(_source(package).glob(pattern)):
            for owner, name in _fields(file):
                found.setdefault(name, set()).add(owner)
    return {name: owners for name, owners in found.items() if not name.startswith("_")}


def test_every_setting_of_trl_leads_to_what_it_is_here() -> None:
    """A rename, "automatic", or what to do instead, in whichever section it was written.

    Of the settings that only TRL's experimental trainers have, none may lead to a name that is merely spelt alike.
    """
    fields = trl_fields()
    main = {name for name, owners in fields.items() if owners & MAIN}
    assert {"beta", "loss_type", "per_device_train_batch_size", "vllm_mode", "lora_r"} <= main
    assert len(main) > 200
    found = {name: misleading(name) for name in fields}
    assert {name: said for name, said in found.items() if said and name in main} == {}
    assert [each for said in found.values() for each in said if "did you mean" in each] == []


@pytest.mark.parametrize(
    ("key", "said"),
    [
        # axolotl
        ("base_model", "model.path"), ("adapter", "peft.type"), ("lora_target_linear", "all-linear"),
        ("pad_to_sequence_len", "no padding"), ("evals_per_epoch", "eval.every"), ("rl", "objective.name"),
        ("special_tokens", "no token is added"), ("saves_per_epoch", "train.save_every"),
        ("flash_attention", "model.layout"),
        ("wandb_entity", "run.trackers"), ("dataset_prepared_path", "data.train"),
        ("micro_batch_size", "train.micro_batch_size"),
        # LLaMA-Factory
        ("finetuning_type", "peft"), ("template", "chat template"), ("cutoff_len", "data.max_length_tokens"),
        ("pref_beta", "objective.beta"), ("quantization_bit", "model.quantization"), ("plot_loss", "automatic"),
        ("use_galore", "train.optimizer"), ("additional_target", "peft.modules_to_save"),
        ("overwrite_cache", "data.cache_dir"),
        # OpenRLHF
        ("pretrain", "model.path"), ("max_epochs", "train.num_epochs"), ("prompt_data", "data.prompts"),
        ("n_samples_per_prompt", "regime.samples_per_prompt"), ("zero_stage", "accelerate launch"),
        ("remote_rm_url", "signals"), ("advantage_estimator", "credit.name"),
        ("vllm_num_engines", "engine.num_servers"),
        ("ds.zero_stage", "accelerate launch"), ("adam.lr", "train.learning_rate"),
        ("rollout.n_samples_per_prompt", "samples_per_prompt"),
        # verl
        ("actor_rollout_ref", "model.path"), ("trainer", "train.num_epochs"), ("algorithm", "objective.name"),
        ("clip_ratio_high", "objective.epsilon_high"), ("total_epochs", "train.num_epochs"),
        ("n_gpus_per_node", "accelerate launch"),
        # torchtune, alignment-handbook, other spellings
        ("checkpointer", "model.path"), ("_component_", "go by name"), ("compile", "not there"),
        ("loss", "objective.name"),
        ("dataset_mixer", "data.train"), ("per-device-train-batch-size", "train.micro_batch_size"),
        ("--learning_rate", "train.learning_rate"), ("Learning_Rate", "train.learning_rate"),
        ("train.learning_rate", "nested: write learning_rate under train"),
    ],
)  # fmt: skip
def test_keys_of_other_tools_at_the_top_lead_to_the_right_section(key: str, said: str) -> None:
    raw = {**copy.deepcopy(RECIPE), key: "x-y-z"}
    (found,) = draft_document(Document(raw), Path("x.yaml")).problems
    assert said in found
    assert "Known:" not in found


@pytest.mark.parametrize(
    "typed", ["lerning_rate", "save_evry", "log_evry", "max_grad_nrom", "warmup_frc", "optimiser",
     "weight_dcay"]
)  # fmt: skip
def test_a_slip_of_the_pen_is_not_taken_for_a_key_of_another_tool(typed: str) -> None:
    assert "did you mean '" in problems(f"train.{typed}", 1)


def test_a_key_of_another_objective_says_whose_it_is() -> None:
    found = problems("objective.gamma", 1.0)
    assert "belongs to objective.name = " in found
    assert "'simpo'" in found and "objective.name is 'dpo'" in found
    assert "did you mean 'epsilon_low'" in problems("objective", {"name": "grpo", "epsilon": 0.2})


def test_a_pipeline_is_not_told_of_a_recipes_sections() -> None:
    from data_pipelines.pipeline import parse_pipeline
    from prefopt.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        parse_pipeline(
            Document({"stages": [{"name": "prompts"}], "learning_rate": 1, "lease_s": 2}), Path("x")
        )
    said = "\n".join(caught.value.problems)
    assert "train.learning_rate" not in said
    assert "there are no leases" in said


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("objective", "dpo", "write {name: dpo}."),
        ("objective", "sigmoid", "write {name: …}; sigmoid is dpo"),
        ("objective", ["dpo"], "leave out the brackets"),
        ("objective", {"name": "kto_pair"}, "apo_zero instead"),
        ("objective", {"name": ["sigmoid", "sft"]},
         "a run has one objective, and NLL beside it is nll_weight; sigmoid is dpo"),
        ("objective", {"name": "DPO"}, "did you mean 'dpo'?"),
        ("objective.loss_type", ["sigmoid", "sft"],
         "objective.name; ['sigmoid', 'sft']: one name: a run has one objective"),
        ("objective.loss_type", "exo_pair", "objective.name; 'exo_pair': not there; dpo instead"),
        ("objective.beta", "0.1", "must be a number, without quotes."),
        ("objective.beta", [0.1], "it is a list: write 0.1."),
        ("objective.beta", None, "leave the key out for its default, 0.1."),
        ("train.optim", "adamw_torch", "here it is train.optimizer; 'adamw_torch': write adamw"),
        ("train.optimizer", "paged_adamw_8bit", "float32; write adamw."),
        ("train.lr_scheduler_type", "cosine_with_min_lr",
         "train.lr_scheduler; 'cosine_with_min_lr': not there: write cosine"),
        ("train.lr_scheduler", "constant_with_warmup", "write constant, with train.warmup_frac."),
        ("model.torch_dtype", "bf16", "here it is model.dtype; 'bf16': write bfloat16"),
        ("model.dtype", "torch.float16", "write float16."),
        ("model.quantization", 4, "write 4bit"),
        ("train.precision", False, "write fp32."),
        ("train.learning_rate", "1e-6", "must be a number, without quotes."),
        ("train.learning_rate", True, "must be a number."),
        ("train.gradient_checkpointing", "true", "write true."),
        ("train.seed", None, "leave the key out for its default, 42."),
        ("train.max_steps", -1, "leave it out for all of num_epochs."),
        ("train.max_grad_norm", 0, "write null for no clipping."),
        ("train.save_every", "epoch", "give a number of steps, or leave it out."),
        ("train", None, "train = null: must be a section of keys."),
        ("model", "gpt2", "write {path: gpt2}."),
        ("model.path", None, "must be text."),
        ("data.train", "a.jsonl", "must be a list: [{path: a.jsonl}]."),
        ("data.train", {"path": "a.jsonl"}, "a dash (-) before the first key of each item."),
        ("data.train", ["a.jsonl"],
         "data.train.0 = 'a.jsonl': must be a section of keys; write {path: a.jsonl}."),
        ("data.train.0.path", ["a", "b"], "must be text, and is a list."),
        ("data.train.0.format", "chatml", "write chat."),
        ("data.train.0.type", "chat_template", "data.train.0.format"),
        ("run", "out", "write {output_dir: out}."),
        ("run.trackers", "none", "leave it out, or write []."),
        ("run.report_to", "none", "here it is run.trackers; 'none': leave it out"),
        ("regime", "online", "write {name: …}; online write rollouts"),
        ("regime.name", "on_policy", "write rollouts;"),
        ("engine", "vllm", "write {name: vllm}."),
        ("engine", {"name": "sglang"}, "not there: write vllm, vllm_server or hf."),
        ("reference", "ema", "write {name: ema}."),
        ("peft", "lora", "write {type: lora}."),
        ("signals", "math", "must be a list: [{name: math}]."),
        ("signals", ["math"], "signals.0 = 'math': must be a section of keys; write {name: math}."),
        ("signals", [{"name": "accuracy_reward"}], "signals.0.name = 'accuracy_reward': write math."),
        ("credit", {"name": "grpo"}, "write group_mean_std."),
        ("stage", "rm", "write reward_model."),
        ("stage", "kto", "of objectives kto not there"),
        ("stage", "DPO", "write objective: {name: dpo}."),
        ("eval.every", "epoch", "give a number of steps, or leave it out."),
        ("plugins", "my.py", "must be a list: [my.py]."),
    ],
)  # fmt: skip
def test_values_of_other_tools_lead_to_what_to_write(path: str, value: Any, said: str) -> None:
    found = problems(path, value)
    assert said in found, found


def test_every_optimizer_and_schedule_of_transformers_has_its_word() -> None:
    ours = {"linear", "cosine", "constant", "rmsprop"}
    for key, module, enum in (
        ("optimizer", "training_args", "OptimizerNames"),
        ("lr_scheduler", "trainer_utils", "SchedulerType"),
    ):
        names = _members(_source("transformers", module), enum)
        assert len(names) > 8
        for name in names - ours:
            assert value_hint("train", key, name) is not None, name
            assert "write" in problems(f"train.{key}", name)


def test_every_loss_of_trl_has_its_word() -> None:
    """Names are found in the trainers' sources, where they are compared with ``loss_type``."""
    source = "".join(
        _source("trl", "trainer", f"{name}_trainer").read_text(encoding="utf-8")
        for name in ("dpo", "grpo")
    )
    losses = set(re.findall(r'loss_type == "(\w+)"', source))
    assert {"sigmoid", "exo_pair", "bnpo"} <= losses
    assert losses - objective_names() <= OBJECTIVES.keys()


# --- the tables themselves -----------------------------------------------------------------------

# Their hint names a whole section or a file, or none.
_A_SECTION = re.compile(
    r"\b(signals|peft|plugins|data\.train|objective|stage: \w+|prefopt \w+|regime|reference|final/)"
)
_FILES = {"metrics.jsonl", "config.json", "torch.backends", "etc."}


def test_hints_for_keys_of_other_tools_name_what_exists() -> None:
    both = (*sections(Recipe), *sections(PipelineSettings))
    known = {f"{name}.{key}".lstrip(".") for name, s in both for key in s.model_fields}
    known = {key.replace(".N.", ".0.") for key in known}
    last = {key.split(".")[-1] for key in known}
    known |= {f"objective.{key}" for key in objective_keys()}
    families = [(each, said) for each, said in other_tools.families.FAMILIES]
    for old, text in (*RENAMED.items(), *AUTOMATIC.items(), *ABSENT.items(), *families):
        words = [word.strip(",.;:(){}").split("=")[0] for word in text.split()]
        keys = {w for w in words if "." in w and not w.startswith(("peft.", "accelerate_configs/"))}
        keys = {key for key in keys if not key.startswith("arXiv:") and "…" not in key}
        assert keys - _FILES <= known | {"columns.margin", "objective.name", "credit.name"}, old
        assert old not in last, f"{old} exists"
        if old in RENAMED:
            assert keys or _A_SECTION.search(text), old


def test_hints_for_objectives_of_other_tools_name_what_exists() -> None:
    """The first word of ``is x`` is an objective of ours or a stage; no hint hides a name that is known."""
    for old, text in OBJECTIVES.items():
        assert old not in objective_names()
        if text.startswith("is ") and not text.startswith("is stage:"):
            assert text.split()[1].strip(",") in objective_names(), old


def test_no_hint_for_a_value_hides_one_that_is_right() -> None:
    for key, names in (("credit", CREDITS), ("signals", SIGNALS)):
        for name in names:
            assert (
                problems(key, {"name": name} if key == "credit" else [{"name": name}]).find("write")
                < 0
            )


def test_the_keys_of_an_adapter_elsewhere_are_said_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "a.yaml"
    recipe.write_text("model: {path: org/m}\ndata: {train: [{path: org/d}]}\nobjective: {name: simpo}\n"
                      "train: {learning_rate: 1e-6}\nrun: {output_dir: x}\n")  # fmt: skip
    for override, said in (
        ("peft={type: lora, lora_target_linear: true}", "write peft.target_modules: all-linear"),
        ("peft={type: lora, rank: 8}", "here it is peft.r"),
        ("peft={type: qlora}", "model.quantization: 4bit"),
        ("peft={type: none}", "leave the section out"),
        ('peft={type: lora, r: "8"}', "peft.r = '8': must be a whole number"),
        ("peft={type: lora, lora_dropuot: 0.1}", "did you mean 'lora_dropout'?"),
    ):
        assert main(["check", str(recipe), override]) == 2
        assert said in capsys.readouterr().err
