"""A target reward: in the prompts of probe and evaluation, and warned of. test_sample.py has the stage."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

import eval.kl_terms
from eval.checkpoints import _policy, found_checkpoints
from eval.engines import Generator
from eval.models import condition_problems, open_models, run_condition
from eval.registry import make_task
from eval.scorers import LogpScorer
from eval.settings import EvalSettings
from prefopt.cli import main
from prefopt.data import Renderer, load_prompts
from prefopt.model.load import load_tokenizer
from prefopt.recipe.load import load_recipe
from prefopt.recipe.schema import ConditionSection, DataSection, HFSection, ModelSection
from prefopt.recipe.schema import SourceSection as Source
from prefopt.rollouts.setup import load_run_data
from prefopt.training.draws import warn_of_target
from prefopt.training.metrics import read_metrics
from prefopt.types import Group
from tests.distributed.launch import write_model, write_recipe, write_samples
from tests.unit.tiny_tokenizers import make_tokenizer

TEMPLATE = "{input} <score {reward}>\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of reward_conditioned that probes with prompts of its own; rewards are in [0, 1], its target is 3."""
    root = tmp_path_factory.mktemp("conditioned")
    (root / "prompts.jsonl").write_text('{"prompt": "one two"}\n{"prompt": "sun"}\n')
    recipe = write_recipe(
        root / "recipe.yaml",
        write_model(root / "model"),
        write_samples(root / "samples.jsonl", 12),
        objective={"name": "reward_conditioned", "beta": None},
        data={"condition": {"template": TEMPLATE, "target": 3.0}, "eval_frac": 0.2},
        train={"num_epochs": 1},
        eval={
            "generation": {
                "prompts": [{"path": str(root / "prompts.jsonl"), "format": "text"}],
                "max_new_tokens": 4,
            }
        },
    )
    assert main(["train", str(recipe)]) == 0
    return root / "run"


def test_a_target_outside_the_training_range_is_warned_of_with_the_range(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewards = json.loads((run / "run.json").read_text())["data"]["labels"]["rewards"]
    assert 0 <= rewards["min"] < rewards["max"] <= 1
    said = f"the target reward 3 is outside the rewards trained on, {rewards['min']:g} to {rewards['max']:g}"
    for target, is_odd in ((3.0, True), (rewards["max"], False), (rewards["min"] - 0.01, True)):
        path = run.parent / "recipe.yaml"
        recipe = load_recipe(path, [f"data.condition.target={target}"])
        source = load_run_data(recipe, load_tokenizer(recipe.model)).train
        assert source is not None
        caplog.clear()
        with caplog.at_level(logging.WARNING, "prefopt"):
            warn_of_target(recipe.data, recipe.objective, source)
        assert ("data.condition.target: the target reward" in caplog.text) == is_odd
        assert (said in caplog.text) == (target == 3.0)
    # The same is said of the policy of the run, whoever asks it.
    asked = ConditionSection(template=TEMPLATE, target=3.0)
    (problem,) = condition_problems(str(run / "final"), asked)
    assert problem.startswith(said)
    assert "is asked with another" in condition_problems(str(run), ConditionSection(target=0.5))[0]
    assert "asked without one" in condition_problems(str(run), None)[0]
    assert condition_problems(str(run.parent / "model"), None) == []


def test_the_probe_asks_for_the_target(run: Path) -> None:
    rows = read_metrics(run / "metrics.jsonl")
    assert "eval/generation/tokens" in rows[0]
    found = load_prompts(
        [Source(path=str(run.parent / "prompts.jsonl"), format="text")],
        DataSection(),
        Renderer(make_tokenizer()),
        max_new_tokens=4,
        condition=ConditionSection(template=TEMPLATE, target=3.0),
    )
    ids = make_tokenizer()("one two <score 3.00>\n")["input_ids"]
    assert found.prompts[0].ids == tuple(ids)
    assert found.prompts[0].content == "one two"  # what a signal judges by


def test_an_evaluation_of_the_run_asks_for_its_target(run: Path, tmp_path: Path) -> None:
    def generator(path: Path) -> Generator:
        model = ModelSection(path=str(path))
        return Generator(model, HFSection(), device="cpu", log_dir=tmp_path)

    conditioned, plain = generator(run / "final"), generator(run.parent / "model")
    assert run_condition(str(run / "final")) == ConditionSection(template=TEMPLATE, target=3.0)
    length = len(make_tokenizer()("sun <score 3.00>\n")["input_ids"])
    assert conditioned.prompt_tokens("sun") == length > (plain.prompt_tokens("sun") or 0)
    # Answers are stored under what they were asked with.
    assert conditioned.chat_template_sha256 != plain.chat_template_sha256
    ((_, checkpoint),) = found_checkpoints(run).items()
    exported = _policy(run, checkpoint, tmp_path / "step" / "policy")
    assert run_condition(str(exported)) == run_condition(str(run))


def test_show_prints_the_reward_in_the_prompt_and_both_labels(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(run.parent / "recipe.yaml"), "-n", "1", "--no-color"]) == 0
    said = capsys.readouterr().out.replace("\u2502", "")
    rewards = [json.loads(x)["reward"] for x in (run.parent / "samples.jsonl").open()]
    (shown,) = [
        f"{reward:.2f}" for reward in rewards if f"; scores {reward:g}; advantages " in said
    ]
    assert f" <score {shown}>" in said


def test_what_the_policy_answers_is_scored_after_the_prompt_it_was_asked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL and pair scores of the run's policy read the target reward that sampling writes into the prompts."""
    seen: list[Group] = []

    def spied(module: object, name: str) -> None:
        real = getattr(module, name)

        def spy(first: object, groups: list[Group], *rest: object) -> object:
            seen.extend(groups)
            return real(first, groups, *rest)

        monkeypatch.setattr(module, name, spy)

    spied(eval.kl_terms, "kl_terms")
    spied(LogpScorer, "_values")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "one two", "chosen": " sun", "rejected": " cat"}\n')
    settings = EvalSettings(model=ModelSection(path=str(run)), device="cpu")
    for name, more in (("kl", {"max_new_tokens": 4}), ("pair_accuracy", {})):
        task = make_task(name, {"data": str(pairs), **more})
        opened = task.open(open_models(settings))
        (row,) = task.rows(task.examples(), opened)
        task.close(opened)
        assert row.problem is None
    asked = tuple(make_tokenizer()("one two <score 3.00>\n")["input_ids"])
    assert [tuple(map(int, group.prompt_ids)) for group in seen] == [asked, asked]
