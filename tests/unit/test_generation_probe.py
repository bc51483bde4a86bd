"""The generation probe: what it measures, and that training does not notice it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from prefopt.cli import main
from prefopt.engines.base import Completion, Request, SamplingSpec
from prefopt.errors import ConfigError
from prefopt.recipe.checks import check
from prefopt.recipe.only_where import Rows
from prefopt.signals.base import per_response
from prefopt.signals.combine import Part, WeightedSignals
from prefopt.training.generation_probe import GenerationProbe, ProbeParts
from prefopt.training.metrics import read_metrics
from prefopt.types import Prompt
from tests.distributed.launch import write_model, write_pairs, write_recipe

P = "eval/generation"


class Scripted:
    """An engine that answers from a list, a call at a time."""

    name = "scripted"
    version = 0

    def __init__(self, *calls: Sequence[tuple[tuple[int, ...], bool]]) -> None:
        self.calls = list(calls)
        self.seeds: list[tuple[int, ...]] = []

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[Completion]]:
        self.seeds.append(tuple(request.seeds[0] for request in requests))
        return [
            [Completion(ids, (0.0,) * len(ids), "eos" if ended else "length")]
            for ids, ended in self.calls.pop(0)
        ]

    def score(self, sequences: Any) -> Any: ...
    def load_policy(self, policy: Any) -> None: ...
    def close(self) -> None: ...


def make_probe(
    directory: Path, engine: Scripted, signals: WeightedSignals | None = None
) -> GenerationProbe:
    prompts = [Prompt(str(n), (n, n), f"prompt {n}", {"wanted": n}) for n in range(2)]
    parts = ProbeParts(
        engine,
        prompts,
        SamplingSpec(8),
        seed=7,
        decode=lambda rows: [" ".join(map(str, ids)) for ids in rows],
        signals=signals,
    )
    return GenerationProbe(parts, Accelerator(cpu=True), directory)


REPEATS = ((1, 2, 3, 4, 1, 2, 3, 4), False)  # 5 four-grams: 1234 2341 3412 4123 1234, 4 distinct
PLAIN = ((5, 6, 7, 9), True)


def test_numbers_by_hand(tmp_path: Path) -> None:
    engine = Scripted([REPEATS, PLAIN], [PLAIN, ((5, 6), True)])
    probe = make_probe(tmp_path, engine)
    first, later = probe.measure(0), probe.measure(10)
    assert first == pytest.approx(
        {f"{P}/eos_frac": 0.5, f"{P}/tokens": 6.0, f"{P}/repetition_frac": 0.1, f"{P}/length_ratio": 1.0}
    )  # fmt: skip
    assert later == pytest.approx(
        {f"{P}/eos_frac": 1.0, f"{P}/tokens": 3.0, f"{P}/repetition_frac": 0.0, f"{P}/length_ratio": 0.5}
    )  # fmt: skip
    assert engine.seeds == [(7, 8), (7, 8)], "the same seeds every time"


def test_answers_are_written_for_people(tmp_path: Path) -> None:
    make_probe(tmp_path, Scripted([REPEATS, PLAIN])).measure(3)
    lines = (tmp_path / "eval" / "generations-3.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {
        "prompt": "prompt 1", "answer": "5 6 7 9", "tokens": 4, "ended": True, "reward": None,
    }  # fmt: skip


def test_rewards_are_of_what_could_be_scored(tmp_path: Path) -> None:
    def score(prompt: Prompt, text: str) -> float:
        return float("nan") if prompt.fields["wanted"] == 0 else len(text.split())

    signals = WeightedSignals([Part("words", 2.0, per_response(score))])
    row = make_probe(tmp_path, Scripted([REPEATS, PLAIN]), signals).measure(0)
    assert row[f"{P}/reward"] == 8.0 and row[f"{P}/reward/words"] == 4.0
    assert row[f"{P}/failed_frac"] == 0.5


def test_rewards_of_tasks_side_by_side_are_over_their_own_rows(tmp_path: Path) -> None:
    """The first prompt's answer has 8 words; the second's is 1 to its own signal, whatever its words."""
    words = per_response(lambda prompt, text: len(text.split()))
    one = per_response(lambda prompt, text: 1.0)
    parts = [
        Part("words", 1.0, words, Rows({"wanted": 0})),
        Part("one", 1.0, one, Rows({"wanted": 1})),
    ]
    row = make_probe(tmp_path, Scripted([REPEATS, PLAIN]), WeightedSignals(parts)).measure(0)
    told = {name.removeprefix(f"{P}/reward/"): row[name] for name in row if "reward/" in name}
    assert told == {"words": 8.0, "one": 1.0}
    assert row[f"{P}/failed_frac"] == 0.0


def test_a_policy_that_stops_stopping_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut = ((5, 6, 7, 9), False)
    probe = make_probe(tmp_path, Scripted([PLAIN, PLAIN], [cut, cut], [cut, cut]))
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            probe.measure(step)
    assert [record.getMessage()[:6] for record in caplog.records] == ["step 1"]


def test_the_start_is_kept_over_a_resume(tmp_path: Path) -> None:
    probe = make_probe(tmp_path, Scripted([REPEATS, PLAIN]))
    probe.measure(0)
    resumed = make_probe(tmp_path, Scripted([PLAIN, ((5, 6), True)]))
    resumed.load_state_dict(json.loads(json.dumps(probe.state_dict())))
    assert resumed.measure(5)[f"{P}/length_ratio"] == 0.5


def _train(directory: Path, *overrides: str, peft: dict[str, Any] | None = None) -> Path:
    model = write_model(directory / "model")
    pairs = write_pairs(directory / "pairs.jsonl", 24)
    held_out = write_pairs(directory / "held_out.jsonl", 6, seed=1)
    recipe = write_recipe(directory / "recipe.yaml", model, pairs, peft=peft)
    arguments = [f"data.eval=[{{path: {held_out}}}]", "eval.every=2", *overrides]
    code = main(["train", str(recipe), *arguments])
    assert code == 0
    return directory / "run"


@pytest.mark.parametrize(
    "peft", [{"type": "lora", "lora_dropout": 0.5}, None], ids=["lora", "full"]
)
def test_training_does_not_notice_the_probe(tmp_path: Path, peft: dict[str, Any] | None) -> None:
    keep_dropout = "model.disable_dropout=false"
    probe = "eval.generation={num_prompts: 4, max_new_tokens: 8}"
    plain = _train(tmp_path / "plain", keep_dropout, "train.gradient_checkpointing=true", peft=peft)
    probed = _train(
        tmp_path / "probed", keep_dropout, "train.gradient_checkpointing=true", probe, peft=peft
    )
    rows, others = read_metrics(probed / "metrics.jsonl"), read_metrics(plain / "metrics.jsonl")
    assert [row["step"] for row in rows if f"{P}/tokens" in row] == [0, 2, 4, 6]
    for row, other in zip(rows, others, strict=True):
        own = {
            k: v for k, v in other.items() if not k.startswith(("time/", "memory/", "tokens/per_s"))
        }
        assert {k: row[k] for k in own} == own
    for file in (plain / "final").glob("*.safetensors"):
        ours, theirs = load_file(probed / "final" / file.name), load_file(file)
        assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_the_probe_answers_with_the_weights_in_training(tmp_path: Path) -> None:
    probe = "eval.generation={num_prompts: 6, max_new_tokens: 12, temperature: 0}"
    run = _train(tmp_path, probe, "train.learning_rate=0.05")
    answers = [(run / "eval" / f"generations-{step}.jsonl").read_text() for step in (0, 6)]
    assert answers[0] != answers[1]
    rows = read_metrics(run / "metrics.jsonl")
    assert all(0 <= row["eval/logps/accuracy"] <= 1 for row in rows if "eval/logps/accuracy" in row)


def test_a_probe_without_prompts_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", write_model(tmp_path / "m"), write_pairs(tmp_path / "p.jsonl", 8)
    )
    with pytest.raises(ConfigError, match=r"eval\.generation\.prompts.*no held-out prompts"):
        check(recipe, ["eval.generation={num_prompts: 2}"])
    with pytest.raises(ConfigError, match="generates nothing"):
        held_out = ["eval.generation={}", "data.eval_frac=0.1"]
        check(recipe, ["stage=reward_model", "objective=null", *held_out])
    with pytest.raises(ConfigError, match=r"eval\.generation\.prompts\.0\.path.*no such file"):
        check(recipe, ["eval.generation.prompts=[{path: nowhere.jsonl}]"])


def test_the_old_key_names_the_new_one(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml", write_model(tmp_path / "m"), write_pairs(tmp_path / "p.jsonl", 8)
    )
    with pytest.raises(
        ConfigError, match=r"train\.eval_every: unknown key; here it is eval\.every"
    ):
        check(recipe, ["train.eval_every=5"])
