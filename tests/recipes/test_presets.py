"""Every shipped recipe passes `prefopt check` offline, and says what its source says."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from prefopt.recipe.checks import check, examine
from prefopt.recipe.load import load_recipe
from prefopt.recipe.schema import Recipe
from prefopt.recipe.scripts import script_of

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if not {"quickstart", "iterative_dpo", "rest"} & set(path.parts)
)
NAMES = [str(path.relative_to(ROOT)) for path in PRESETS]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

# SimPO authors' README (princeton-nlp/SimPO@1b3e8f3): beta, gamma/beta, learning rate of SimPO; learning
# rate of DPO (beta 0.01 in every row); prompt and total length of training_configs/*.yaml.
SIMPO_TABLE = {
    "mistral-7b-base": (2.0, 0.8, 3e-7, 5e-7, 512, 1024),
    "mistral-7b-instruct": (2.5, 0.1, 5e-7, 5e-7, 1800, 2048),
    "llama3-8b-base": (2.0, 0.5, 6e-7, 5e-7, 1800, 2048),
    "llama3-8b-instruct": (2.5, 0.55, 1e-6, 7e-7, 1800, 2048),
    "llama3-8b-instruct-v0.2": (10.0, 0.3, 1e-6, 3e-7, 1800, 2048),
    "gemma2-9b-it": (10.0, 0.5, 8e-7, 5e-7, 1800, 2048),
}


@pytest.fixture(scope="module")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the folders of samples that presets read, as their headers say."""
    directory = tmp_path_factory.mktemp("made")
    for path in PRESETS:
        for source in load_recipe(path).data.train:
            if source.path.startswith("data/"):
                assert re.search(rf"(in|from) {source.path}\b", path.read_text())
                folder = directory / source.path
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "00000.jsonl").touch()
    return directory


@pytest.fixture(autouse=True)
def beside_made_data(made_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made_data)


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_every_preset_passes_the_check_without_network(path: Path) -> None:
    notes = check(path, assume_cuda=True, num_processes=4)
    notes = [note for note in notes if "needs vLLM, which is not installed here" not in note]
    # A preset that trips our own advice would be a preset or an advice to correct.
    assert len(notes) == 1, notes
    assert notes[0].startswith("not checked, on the hub: ")


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_every_preset_opens_with_source_hardware_and_a_launch_that_exists(path: Path) -> None:
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header, "a preset opens with a comment"
    text = header.group()
    assert re.search(r"^# (Reproduces|After): ", text, flags=re.MULTILINE)
    assert re.search(r"^# Theirs: .*\b(GPU|GPUs|H100|A100|device)\b", text, flags=re.MULTILINE)
    assert re.search(r"@[0-9a-f]{7}", text), "which commit of which repository"
    command = text[text.index("accelerate launch") :].replace("\\\n#", " ")
    words = shlex.split(command)
    config, script, recipe = (word for word in words if re.search(r"\.(yaml|py)$", word))
    assert ROOT / recipe == path
    assert (ROOT / config).is_file()
    assert (ROOT / script).is_file()
    assert Path(script).stem == script_of(load_recipe(path))


def test_no_two_presets_share_a_run_directory() -> None:
    directories = [load_recipe(path).run.output_dir for path in PRESETS]
    assert len(set(directories)) == len(directories)


@pytest.mark.parametrize("name", SIMPO_TABLE)
def test_simpo_presets_are_the_authors_table(name: str) -> None:
    beta, ratio, learning_rate, _, prompt, total = SIMPO_TABLE[name]
    recipe = load_recipe(ROOT / "recipes" / "simpo" / f"{name}.yaml")
    assert recipe.objective is not None
    assert recipe.objective.params["beta"] == beta
    assert math.isclose(recipe.objective.params["gamma"], beta * ratio)
    assert recipe.train.learning_rate == learning_rate
    assert (recipe.data.max_prompt_tokens, recipe.data.max_length_tokens) == (prompt, total)
    _assert_common(name, recipe)


@pytest.mark.parametrize("name", SIMPO_TABLE)
def test_dpo_counterparts_are_the_authors_baselines(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / "dpo" / f"{name}.yaml")
    simpo = load_recipe(ROOT / "recipes" / "simpo" / f"{name}.yaml")
    assert recipe.objective is not None
    assert recipe.objective.given == {"name": "dpo", "beta": 0.01}
    assert recipe.train.learning_rate == SIMPO_TABLE[name][3]
    assert recipe.model == simpo.model
    assert recipe.data == simpo.data
    _assert_common(name, recipe)


def _assert_common(name: str, recipe: Recipe) -> None:
    train = recipe.train
    assert (train.global_batch_size, train.num_epochs, train.seed) == (128, 1.0, 42), name
    assert (train.optimizer, train.lr_scheduler, train.warmup_frac) == ("adamw", "cosine", 0.1)
    assert train.precision == "bf16"
    assert recipe.peft is None


def test_lion_sft_and_dpo_are_a_pair() -> None:
    sft = load_recipe(ROOT / "recipes" / "sft" / "lion-llama3-8b.yaml")
    dpo_path = ROOT / "recipes" / "dpo" / "lion-llama3-8b.yaml"
    # What the DPO header tells the reader to do: start from the SFT run's output.
    start = f"{sft.run.output_dir}/final"
    assert f"model.path={start}" in dpo_path.read_text()
    # LionAlignment@a144ae5, configs/llama-3-8b
    dpo, _ = examine(dpo_path)
    assert (sft.train.learning_rate, dpo.train.learning_rate) == (2e-5, 5e-7)
    assert dpo.model_dump()["objective"] == {"name": "dpo", "beta": 0.01}
    assert [s.weight for s in dpo.data.train] == [1, 1, 1, 1, 1, 1, 0.1]
    assert (dpo.data.max_length_tokens, dpo.data.max_prompt_tokens) == (2048, 1024)


def test_zephyr_presets_are_the_handbooks() -> None:
    full = load_recipe(ROOT / "recipes" / "dpo" / "zephyr-7b-full.yaml")
    qlora = load_recipe(ROOT / "recipes" / "dpo" / "zephyr-7b-qlora.yaml")
    # alignment-handbook@925acdf: 8 pairs x 2 steps x 8 GPUs, and 4 pairs x 4 steps on one.
    assert (full.train.learning_rate, full.train.global_batch_size) == (5e-7, 128)
    assert (qlora.train.learning_rate, qlora.train.global_batch_size) == (5e-6, 16)
    assert full.objective == qlora.objective
    assert full.model_dump()["objective"] == {"name": "dpo", "beta": 0.01}
    assert qlora.peft is not None
    assert (qlora.peft.options["r"], qlora.peft.options["lora_alpha"]) == (128, 128)
    assert qlora.model.quantization == "4bit"


# --- rollouts --------------------------------------------------------------------------------------

# arXiv:2506.21495, Table 4: folder and name, beta, Adam epsilon, reference, response tokens, prompts a step.
BRIDGING_TABLE = {
    "online_dpo/bridging-math": (0.1, 1e-4, "synced", 2048, 64),
    "online_dpo/bridging-math-group": (0.1, 1e-4, "synced", 2048, 64),
    "online_dpo/bridging-chat": (0.01, 1e-8, "initial", 1024, 32),
    "grpo/bridging-math": (0.001, 1e-4, "initial", 2048, 64),
    "grpo/bridging-chat": (0.001, 1e-8, "initial", 1024, 32),
}


@pytest.mark.parametrize("name", BRIDGING_TABLE)
def test_bridging_presets_are_the_papers_table(name: str) -> None:
    beta, epsilon, reference, tokens, batch = BRIDGING_TABLE[name]
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.objective is not None and recipe.objective.params["beta"] == beta
    train, regime = recipe.train, recipe.rollouts
    assert regime is not None
    assert (train.adam_epsilon, train.learning_rate, train.max_grad_norm) == (epsilon, 1e-6, 0.1)
    assert (recipe.reference_name, regime.max_new_tokens) == (reference, tokens)
    assert (train.global_batch_size, regime.samples_per_prompt, regime.temperature) == (batch, 8, 1)
    assert (recipe.model.path, recipe.peft) == ("meta-llama/Llama-3.1-8B-Instruct", None)


@pytest.mark.parametrize("path", PRESETS, ids=NAMES)
def test_every_override_that_a_header_offers_passes_the_check(path: Path) -> None:
    """Lines such as ``#   s = 5:   regime.sync_every=5   (...)`` of a preset's header."""
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header
    offers = re.findall(r"^#   +[^:\n]+: {2,}(.+?)(?: {2,}.*)?$", header.group(), re.MULTILINE)
    for offer in offers:
        overrides = re.findall(r"[\w.]+=(?:\{.*?\}|\S+)", offer)
        assert overrides, offer
        check(path, overrides, assume_cuda=True, num_processes=4)


def test_headers_offer_every_sync_interval_of_the_bridging_paper() -> None:
    intervals = {"bridging-math": "1 10 100 null", "bridging-chat": "1 5 10 null"}
    for name, wanted in intervals.items():
        path = ROOT / "recipes" / "online_dpo" / f"{name}.yaml"
        offered = re.findall(r"regime\.sync_every=(\w+)", path.read_text())
        shipped = load_recipe(path).rollouts
        assert shipped is not None
        assert {*offered, str(shipped.sync_every)} == set(wanted.split())


def test_async_tldr_is_the_authors_configuration() -> None:
    recipe = load_recipe(ROOT / "recipes" / "online_dpo" / "async-tldr.yaml")
    regime, train = recipe.rollouts, recipe.train
    assert regime is not None
    assert (regime.sync_every, regime.max_lag, regime.samples_per_prompt) == (1, 1, 2)
    assert (regime.temperature, regime.max_new_tokens) == (0.7, 53)
    assert (train.learning_rate, recipe.model_dump()["objective"]) == (
        3e-6,
        {"name": "dpo", "beta": 0.1},
    )
    assert train.global_batch_size == 21 * 8 * 3
    assert train.max_steps == 131_072 // (21 * 8 * 3)


# --- weighted samples ------------------------------------------------------------------------------


def test_a_lol_presets_are_the_papers_settings() -> None:
    """The settings of LoL-RL@9f8d816; steps and draws as its code has them."""
    hh = load_recipe(ROOT / "recipes" / "a_lol" / "hh-qlora.yaml")
    assert hh.model_dump()["objective"] == {"name": "a_lol", "epsilon": 0.9}
    assert (hh.train.learning_rate, hh.train.global_batch_size, hh.train.max_steps) == (
        2e-4,
        16,
        9000,
    )
    assert (hh.train.lr_scheduler, hh.train.max_grad_norm) == ("constant", 0.3)
    assert (hh.data.max_prompt_tokens, hh.data.max_length_tokens) == (640, 640 + 128)
    sampling = hh.data.sampling
    assert (sampling.name, sampling.replacement, sampling.scale_steps) == ("advantage", True, True)
    comet = load_recipe(ROOT / "recipes" / "a_lol" / "comet-gpt2-xl.yaml")
    assert (comet.train.learning_rate, comet.train.global_batch_size) == (2e-5, 16)
    assert (comet.train.num_epochs, comet.train.lr_scheduler) == (1, "linear")


def test_the_quickstarts_a_lol_reads_what_its_pipeline_writes() -> None:
    folder = ROOT / "recipes" / "quickstart"
    pipeline = yaml.safe_load((folder / "samples.yaml").read_text())
    recipe = load_recipe(folder / "a_lol.yaml")
    assert (
        recipe.data.train[0].path == f"{pipeline['output_dir']}/{pipeline['stages'][-1]['stage']}"
    )
    assert script_of(recipe) == "a_lol"


@pytest.mark.parametrize("name", ["conditioned", "rwr", "filtered"])
def test_offline_rl_presets_are_the_authors_scripts(name: str) -> None:
    """OpenRLHF@95ac56d: rate, batch, length, one epoch; z-scores over the whole file."""
    recipe = load_recipe(ROOT / "recipes" / "offline_rl" / f"llama2-7b-{name}.yaml")
    train = recipe.train
    assert (train.learning_rate, train.global_batch_size, train.num_epochs) == (5e-6, 128, 1)
    assert (recipe.data.max_length_tokens, recipe.data.normalize_rewards) == (2048, "z_score")
    if name == "conditioned":
        assert recipe.data.condition is not None and recipe.data.condition.target == 5.0


# --- accelerate_configs --------------------------------------------------------------------------


def test_the_shipped_accelerate_configs_are_these() -> None:
    names = "cpu ddp fsdp2 zero1 zero2 zero2_offload zero3 zero3_multinode zero3_offload"
    assert [path.stem for path in CONFIGS] == names.split()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config_and_every_key_is_one_of_its_flags(path: Path) -> None:
    config = load_config_from_file(str(path))  # raises on an unknown top-level key
    parser = launch_command_parser()
    flags = {action.dest for action in parser._actions}
    # `accelerate launch` copies these onto its flags and says nothing about one it does not have.
    for section in (config.deepspeed_config, config.fsdp_config):
        assert set(section or {}) <= flags
    assert config.mixed_precision == "no", "train.precision of the recipe decides"
    assert path.read_text().startswith("# "), "opens with what it is for"


def test_configs_are_the_strategies_they_are_named_after() -> None:
    configs = {path.stem: load_config_from_file(str(path)) for path in CONFIGS}
    for name, config in configs.items():
        if not name.startswith("zero"):
            continue
        assert config.distributed_type == DistributedType.DEEPSPEED
        assert config.deepspeed_config["zero_stage"] == int(name[4])
        devices = {"cpu"} if "offload" in name else {"none"}
        assert config.deepspeed_config["offload_optimizer_device"] in devices
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1
        assert config.deepspeed_config.get("zero3_save_16bit_model") == (
            True if name[4] == "3" else None
        )
    assert configs["zero3_offload"].deepspeed_config["offload_param_device"] == "cpu"
    assert configs["cpu"].use_cpu
    assert (configs["cpu"].distributed_type, configs["cpu"].num_processes) == (
        DistributedType.NO,
        1,
    )
    assert configs["ddp"].distributed_type == DistributedType.MULTI_GPU
    assert configs["fsdp2"].fsdp_config["fsdp_version"] == 2
    assert configs["zero3_multinode"].num_machines == 2
    single = set(configs) - {"cpu", "zero3_multinode"}
    assert {configs[name].num_processes for name in single} == {8}
