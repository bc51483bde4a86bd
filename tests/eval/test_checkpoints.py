"""Checkpoints become policies that anything can load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.checkpoints import found_checkpoints, start_of
from eval.models import resolve_run
from prefopt.cli import main
from prefopt.commands.export import export_checkpoint
from prefopt.errors import ModelError
from prefopt.model.source import resolve_source
from prefopt.recipe.schema import ModelSection
from tests.distributed.launch import write_model, write_pairs, write_recipe
from tests.eval.runs import problems, write_jsonl

STEPS = 3


def _train(directory: Path, **sections: object) -> Path:
    model = write_model(directory / "model")
    pairs = write_pairs(directory / "pairs.jsonl", 12)
    recipe = write_recipe(directory / "recipe.yaml", model, pairs, **sections)
    run = directory / "run"
    overrides = [
        f"run.output_dir={run}", "train.save_every=1", "train.keep_checkpoints=9",
        "train.num_epochs=1.0", "train.global_batch_size=4", "train.learning_rate=1e-3",
    ]  # fmt: skip
    assert main(["train", str(recipe), *overrides]) == 0
    return run


@pytest.mark.parametrize("peft", [{"type": "lora", "r": 4}, None], ids=["lora", "full"])
def test_the_last_checkpoint_is_the_final_policy(tmp_path: Path, peft: object) -> None:
    run = _train(tmp_path, **({"peft": peft} if peft else {"peft": None}))
    checkpoints = found_checkpoints(run)
    assert list(checkpoints) == list(range(1, STEPS + 1))
    for step in (1, STEPS):
        export_checkpoint(run, checkpoints[step], tmp_path / f"step-{step}")
    final = resolve_source(str(run / "final")).content
    assert resolve_source(str(tmp_path / f"step-{STEPS}")).content == final
    assert resolve_source(str(tmp_path / "step-1")).content != final
    assert (start_of(run) is None) == (peft is not None)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    run = _train(tmp_path, peft={"type": "lora", "r": 4})
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["peft"]["target_modules"] = ["q_proj"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match="holds other weights"):
        export_checkpoint(run, found_checkpoints(run)[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_checkpoint_is_evaluated(tmp_path: Path) -> None:
    run = _train(tmp_path, peft={"type": "lora", "r": 4})
    data = write_jsonl(tmp_path / "problems.jsonl", problems(3))
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ messages[0]['content'][:9] }}:{% if messages[1:] %}{{ messages[1].content }}{% endif %}"
    )
    arguments = [
        str(run), "--checkpoints", "--tasks", "gsm8k", "--output", str(tmp_path / "out"),
        f"tasks.gsm8k.data={data}", "tasks.gsm8k.max_new_tokens=4", f"model.chat_template={template}",
    ]  # fmt: skip
    assert main(["eval", *arguments]) == 0
    hashes = [
        json.loads((tmp_path / "out" / f"step-{step}" / "results.json").read_text())["model"][
            "hash"
        ]
        for step in range(1, STEPS + 1)
    ]
    assert len(set(hashes)) == STEPS


def test_a_run_is_evaluated_by_its_final_policy(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"recipe": {"model": {"path": "base"}}}')
    with pytest.raises(ModelError, match="has not ended"):
        resolve_run(ModelSection(path=str(run)))
    (run / "final").mkdir()
    assert resolve_run(ModelSection(path=str(run))).path == str(run / "final")
    assert resolve_run(ModelSection(path="Qwen/Qwen3-8B")).path == "Qwen/Qwen3-8B"


def test_what_is_no_run_has_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no run\.json"):
        found_checkpoints(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ModelError, match=r"train\.save_every=N"):
        found_checkpoints(tmp_path)


def test_export_changes_no_weight_it_did_not_train(tmp_path: Path) -> None:
    run = _train(tmp_path, peft=None)
    export_checkpoint(run, found_checkpoints(run)[STEPS], tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    final = AutoModelForCausalLM.from_pretrained(run / "final").state_dict()
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
