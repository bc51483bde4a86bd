"""`prefopt check` on rollouts: every setting is read, or refused with what to do."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.recipe.checks import check

RECIPE = """\
model: {path: org/model}
data:
  prompts:
    - {path: org/prompts, split: train}
objective: {name: dpo}
regime: {name: rollouts}
signals: [{name: math}]
train: {learning_rate: 1e-6}
run: {output_dir: OUT}
"""
LORA = "peft={type: lora, r: 16}"
SERVER = "engine={name: vllm_server}"
PAIRS = "data.train=[{path: org/pairs, split: train}]"


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    return path


def test_rollouts_draw_their_own_order(recipe_file: Path) -> None:
    (found,) = problems(recipe_file, ["train.shuffle=false"])
    assert "train.shuffle = false: rollouts draw their prompts by train.seed" in found


def problems(path: Path, overrides: list[str], num_processes: int | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(path, overrides, assume_cuda=True, num_processes=num_processes)
    return caught.value.problems


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["regime.sync_every=null"],
        ["regime={name: rollouts, sync_every: 10, max_lag: 2, drop_lag_above: 5}"],
        ["objective={name: grpo}"],
        ["objective={name: grpo, beta: 0.001}", "reference={name: synced}"],
        ["reference={name: behavior}"],
        ["reference={name: ema, ema_rate: 0.1}"],
        ["objective={name: hypo}", "signals=[]", PAIRS, "regime.offline_pairs=true"],
        ["objective={name: sopo}"],
        [LORA, SERVER],
        ["engine={name: vllm_server, urls: ['http://a:8000']}"],
        ["signals=[{name: math}, {name: length_penalty, weight: 0.5}]"],
        ["regime.importance_cap=2.0", "regime.max_lag=1"],
        ["objective={name: a_lol}", "reference={name: behavior}"],
        ["objective={name: filtered_nll, threshold: 0.5}", "regime.samples_per_prompt=1"],
        ["objective={name: direct_advantage}", "credit={name: leave_one_out}"],
    ],
)
def test_settings_that_go_together_pass(recipe_file: Path, overrides: list[str]) -> None:
    check(recipe_file, overrides, assume_cuda=True)


@pytest.mark.parametrize(
    ("overrides", "key", "words"),
    [
        (["regime={sync_every: 2}", PAIRS], "regime.sync_every = 2", "regime.name is 'offline'"),
        (["regime={sync_every: 2}", PAIRS], "regime.sync_every", "belongs to regime.name = 'rollouts'"),
        (["engine.max_restarts=1"], "engine.max_restarts = 1", "ends with it"),
        (["regime={}", PAIRS], "signals", "would be ignored"),
        (["regime={}", PAIRS], "data.prompts", "would be ignored"),
        (["regime={}", PAIRS, "reference={name: ema}"], "reference.name", "while it samples"),
        (["data.prompts=[]"], "data.prompts", "is missing"),
        (["objective={name: hypo}", "regime.offline_pairs=true"], "data.train", "is missing"),
        (["objective={name: hypo}"], "credit", "gives no pairs"),
        (["signals=[]"], "signals", "goes by scores"),
        (["signals=[]", "objective={name: wbc}"], "signals", "weighs samples by their score"),
        (["objective={name: a_lol}", "credit={name: best_worst}"], "credit.name", "gives no advantages"),
        (["objective={name: reward_conditioned}"], "objective.name", "is there before its reward is"),
        (["objective={name: wbc}", "data.normalize_rewards=z_score"], "data.normalize_rewards", "as they come"),
        (["objective={name: a_lol}", "data.sampling.name=advantage"], "data.sampling.name", "are sampled"),
        (["credit={name: none}", "objective={name: grpo}"], "credit.name", "gives no advantages"),
        (["regime.samples_per_prompt=1"], "regime.samples_per_prompt", "use 2 or more"),
        (["objective={name: grpo}", PAIRS, "regime.offline_pairs=true"], "regime.offline_pairs", "takes no pairs"),
        (["objective={name: grpo}", "regime.importance_cap=2.0"], "regime.importance_cap", "of its own"),
        (["objective={name: grpo}", "regime.top_p=0.9"], "regime.top_p", "biased"),
        (["regime.top_k=5", "regime.importance_cap=2.0"], "regime.top_k", "biased"),
        (["regime.drop_lag_above=0"], "regime.drop_lag_above", "is never reached"),
        (["reference={name: initial, ema_rate: 0.1}"], "reference.ema_rate", "belongs to reference.name = 'ema'"),
        (["reference={name: synced}", "regime.sync_every=null"], "reference.name", "never pushes"),
        (["reference={name: initial, cache_dir: c}"], "reference.cache_dir", "as they come"),
        (["engine={name: hf, enforce_eager: true}"], "engine.enforce_eager = true", "'vllm' or 'vllm_server'"),
        (["engine={name: vllm, batch_size: 3}"], "engine.batch_size = 3", "belongs to engine.name = 'hf'"),
        (["engine={name: vllm_server, urls: [a], num_servers: 2}"], "engine.num_servers", "run already"),
        (["peft={type: lora, r: 1024}", SERVER], "peft.r", "ranks up to 512"),
        (["peft={type: ia3}", SERVER], "peft.type", "LoRA adapters only"),
        (["peft={type: lora, use_dora: true}", SERVER], "peft.use_dora", "no DoRA"),
        (["regime.max_new_tokens=2048"], "regime.max_new_tokens", "must be below"),
        (["data.eval_frac=0.1"], "data.eval_frac", "samples its own"),
        (["data.prompts.0.weight=2.0"], "data.prompts.0.weight", "once an epoch"),
        (["data.prompts=[{path: nowhere.jsonl}]"], "data.prompts.0.path", "no such file"),
        (["signals=[{name: maths}]"], "signals.0.name", "did you mean 'math'?"),
        (["signals=[{name: math, gold: a}]"], "signals.0.gold", "unknown key"),
        (["signals=[{name: math, weight: heavy}]"], "signals.0.weight", "must be a number"),
        (["credit={name: best_wurst}"], "credit.name", "did you mean 'best_worst'?"),
        (["credit={name: best_worst, min_margin: -1}"], "credit.min_margin", "must be >= 0"),
        (["stage=sft", "objective=null"], "regime", "has its own loss"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_or_cannot_work_is_refused(
    recipe_file: Path, overrides: list[str], key: str, words: str
) -> None:
    found = [p for p in problems(recipe_file, overrides) if words in p and key in p]
    assert found, problems(recipe_file, overrides)


def test_prompts_divide_over_the_processes(recipe_file: Path) -> None:
    found = problems(recipe_file, ["regime.prompts_per_step=6"], num_processes=4)
    assert any("regime.prompts_per_step = 6: does not divide" in problem for problem in found)


def test_an_engine_that_is_not_installed_names_the_extra(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r'engine.name = .*pip install "prefopt\[vllm\]"'):
        check(recipe_file, [SERVER])
    notes = check(recipe_file, [SERVER], assume_cuda=True)
    assert any("prefopt[vllm]" in note for note in notes)
