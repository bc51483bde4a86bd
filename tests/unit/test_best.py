"""The best step by a metric: kept, stopped after, and what `final/` is made of."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefopt.data.bundle import source_names
from prefopt.data.groups import GroupList
from prefopt.errors import ConfigError
from prefopt.recipe.schema import BestSection, SourceSection
from prefopt.training.best import Best
from prefopt.training.metrics import read_metrics
from prefopt.training.trainer import PreferenceTrainer
from prefopt.types import Group
from tests.unit.memory_trainer import make_trainer, random_pairs, trained_weights

DPO = {"name": "dpo", "beta": 0.1}
ALONE = SimpleNamespace(num_processes=1)


def follow(values: list[float | None], **section: Any) -> tuple[Best, list[bool]]:
    best = Best(BestSection(metric="x", **section), ALONE)
    rows = [{} if value is None else {"x": value} for value in values]
    return best, [best.consider(row, step) for step, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("values", "section", "better", "step", "worse"),
    [
        ([3.0, 2.0, 2.5, 1.0], {"mode": "min"}, [True, True, False, True], 4, 0),
        ([3.0, 2.0, 2.5, 1.0], {"mode": "max"}, [True, False, False, False], 1, 3),
        ([1.0, 0.95, 0.85], {"mode": "min", "min_delta": 0.1}, [True, False, True], 3, 0),
        ([math.nan, 1.0, math.nan], {"mode": "max"}, [False, True, False], 2, 1),
        ([1.0, None, None, 0.5], {"mode": "max"}, [True, False, False, False], 1, 1),
        ([math.inf, 1.0], {"mode": "max"}, [False, True], 2, 0),
    ],
    ids=["min", "max", "min_delta", "NaN is never better", "a row without it says nothing", "inf"],
)
def test_what_is_better(
    values: list[float | None], section: dict[str, Any], better: list[bool], step: int, worse: int
) -> None:
    best, found = follow(values, **section)
    assert (found, best.step, best.worse) == (better, step, worse)


def test_it_stops_after_as_many_values_in_a_row_as_patience_says() -> None:
    best, _ = follow([1.0, 2.0], mode="min", patience=2)
    assert not best.stopped
    best, _ = follow([1.0, 2.0, 3.0], mode="min", patience=2)
    assert best.stopped
    best, _ = follow([1.0, 2.0, 0.5, 3.0], mode="min", patience=2)
    assert not best.stopped


def reversed_pairs(pairs: list[Group]) -> list[Group]:
    """Learning the one is unlearning the other."""
    return [Group(f"not-{p.id}", p.prompt_ids, p.responses[::-1], p.pairs) for p in pairs]


def overfitting(run_dir: Path, **best: Any) -> PreferenceTrainer:
    """Its held-out loss rises from the first step on."""
    pairs = random_pairs(8)
    section = {"metric": "eval/loss/total", "mode": "min", "patience": 2, **best}
    return make_trainer(
        run_dir, GroupList(pairs), objective=DPO, eval_source=GroupList(reversed_pairs(pairs)),
        evaluation={"every": 1, "best": section}, max_steps=9, keep_checkpoints=1, warmup_frac=0.0,
    )  # fmt: skip


def test_a_run_that_gets_no_better_stops_and_ends_with_its_best_weights(tmp_path: Path) -> None:
    trainer = overfitting(tmp_path)
    result = trainer.train()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses = [row["eval/loss/total"] for row in rows]
    assert losses == sorted(losses) and len(losses) == 4  # the start, and three steps
    assert (result.step, result.finished, result.final_step) == (3, True, 1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-1", "step-3"]  # keep_checkpoints = 1, and the best one
    best = load_file(tmp_path / "checkpoints" / "step-1" / "model.safetensors")
    assert {n: t for n, t in trained_weights(trainer).items() if not torch.equal(t, best[n])} == {}
    assert trainer.evaluate(1)["eval/loss/total"] == pytest.approx(losses[1])


def test_the_last_weights_are_kept_where_the_recipe_says_so(tmp_path: Path) -> None:
    trainer = overfitting(tmp_path, final="last", patience=None)
    result = trainer.train()
    assert (result.step, result.final_step) == (9, 9)
    assert (tmp_path / "checkpoints" / "step-1").is_dir()


def test_a_resumed_run_remembers_its_best_and_its_patience(tmp_path: Path) -> None:
    """Killed after step 2, whose value was the first that was no better; and started again after its end."""
    calm = overfitting(tmp_path / "calm")
    calm.train()
    killed = overfitting(tmp_path / "killed", patience=1)
    assert killed.train().step == 2
    resumed = overfitting(tmp_path / "killed")
    result = resumed.train(tmp_path / "killed" / "checkpoints" / "step-2")
    assert (result.step, result.final_step) == (3, 1)
    again = overfitting(tmp_path / "killed")
    result = again.train(tmp_path / "killed" / "checkpoints" / "step-3")
    assert (result.step, result.final_step) == (3, 1)
    for trainer in (resumed, again):
        ours, theirs = trained_weights(trainer), trained_weights(calm)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shutil.rmtree(tmp_path / "killed")


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("eval/loss/totl", "did you mean 'eval/loss/total'?"),
        ("rewards/acuracy", "did you mean 'rewards/accuracy'?"),
    ],
)
def test_a_metric_that_is_not_logged_is_refused_by_the_first_row(
    tmp_path: Path, metric: str, said: str
) -> None:
    trainer = overfitting(tmp_path, metric=metric)
    with pytest.raises(ConfigError, match="this run does not log it") as caught:
        trainer.train()
    assert said in str(caught.value)
    assert trainer.regime.step <= 1


def test_held_out_metrics_come_for_each_source_too(tmp_path: Path) -> None:
    """Each as if it were alone, and over all rows as if there were one."""
    pairs = random_pairs(11)
    alone, whole = (
        [make_trainer(tmp_path, GroupList(pairs), objective=DPO, eval_source=GroupList(part))
         for part in parts]
        for parts in ((pairs[:4], pairs[4:]), (pairs, pairs))
    )  # fmt: skip
    parts = (("easy", range(4)), ("hard", range(4, 11)))
    whole[1].eval_source.parts = parts  # type: ignore[union-attr]
    found = whole[1].evaluate(0)
    expected = whole[0].evaluate(0)
    for (name, _), trainer in zip(parts, alone, strict=True):
        for key, value in trainer.evaluate(0).items():
            expected[key.replace("eval/", f"eval/{name}/", 1)] = value
    assert found == pytest.approx(expected, rel=1e-6)


def test_sources_are_called_by_their_name_or_file() -> None:
    paths = ["a/test.jsonl.gz", "b/test.jsonl", "org/ultra", "./part-*.parquet"]
    sections = [SourceSection(path=path) for path in paths]
    sections.append(SourceSection(path="c.jsonl", name="mine"))
    assert source_names(sections) == ["test-1", "test-2", "ultra", "part-*", "mine"]
