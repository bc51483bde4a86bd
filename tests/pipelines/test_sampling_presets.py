"""The presets that sample: as shipped they are sound, and run with small models in place of the named ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.pipeline import load_pipeline
from prefopt.cli import main
from prefopt.storage.packed import unpack_ids
from tests.pipelines.pipelines import counts, rows
from tests.pipelines.test_score import write_armorm
from tests.signals.chat_server import Answer, chat_server
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer

PRESETS = Path(__file__).resolve().parents[2] / "data_pipelines" / "presets"
QUESTIONS = [f"What is {n} and {n}?" for n in range(1, 9)]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chat model with 256 tokens of context."""
    directory = tmp_path_factory.mktemp("policy")
    tokenizer = make_tokenizer("chatml")
    tiny_model("llama", len(tokenizer), max_position_embeddings=256).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def run(
    name: str, directory: Path, policy: Path, rows_in: list[dict[str, Any]], *keys: str
) -> Path:
    """Builds a preset with what it names replaced by what is here, and responses of 12 tokens."""
    data = directory / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_in))
    section = load_pipeline(PRESETS / f"{name}.yaml").stages[0].settings.sources[0]
    source = {"path": str(data), "format": section.format, "columns": section.columns.model_dump()}
    overrides = [
        f"output_dir={directory / 'out'}",
        "shard_rows=3",
        f"stages.prompts.sources={json.dumps([source])}",
        f"stages.sample.model.path={policy}",
        "stages.sample.engine.name=hf",
        "stages.sample.max_new_tokens=12",
        *keys,
    ]
    assert main(["data", "build", str(PRESETS / f"{name}.yaml"), *overrides]) == 0
    return directory / "out"


def test_simpo_v02_is_best_against_worst_of_five_seeds(tmp_path: Path, policy: Path) -> None:
    armorm = tmp_path / "armorm"
    armorm.mkdir()
    write_armorm(armorm)
    signal = {"name": "armorm", "path": str(armorm), "dtype": "float32",
              "header": "<|im_end|>\n<|im_start|>assistant\n"}  # fmt: skip
    folder = run(
        "simpo_v02", tmp_path, policy, [{"prompt": text} for text in QUESTIONS],
        f"stages.score.signals={json.dumps([signal])}", "stages.sample.max_prompt_tokens=200",
    )  # fmt: skip
    groups = {row["id"]: row for row in rows(folder / "score")}
    tokenizer = make_tokenizer("chatml")
    for row in groups.values():
        assert [each["seed"] for each in row["responses"]] == [13, 21, 42, 79, 100]
        assert {each["temperature"] for each in row["responses"]} == {0.8}
        prompt = tokenizer.decode(list(unpack_ids(row["prompt_ids"])))
        assert str(prompt).startswith("<|im_start|>user\nWhat is")  # through the chat template
    pairs = rows(folder / "pair")
    assert len(pairs) == len(groups) == 8
    for pair in pairs:
        scores = {each["text"]: each["score"] for each in groups[pair["id"]]["responses"]}
        assert pair["score_chosen"] == scores[pair["chosen"]] == max(scores.values())
        assert pair["score_rejected"] == scores[pair["rejected"]] == min(scores.values())


def test_lions_online_asks_for_every_two_answers_in_both_orders(
    tmp_path: Path, policy: Path
) -> None:
    """5 answers: 10 pairs, 20 requests a prompt. A judge that always says A makes every game a tie."""
    with chat_server(lambda body: Answer("[[A]]")) as server:
        keys = (
            f"stages.score.signals.0.base_url={server.base_url}",
            f"stages.score.signals.0.cache_dir={tmp_path / 'cache'}",
            "stages.sample.max_prompt_tokens=200",
            "stages.pair.rule={name: none_such}",
        )
        with pytest.raises(AssertionError):
            run("lions_online", tmp_path, policy, [{"prompt": QUESTIONS[0]}], *keys)
        assert not server.requests  # a wrong rule is known before anything is asked
        with pytest.raises(AssertionError):  # all ties: no pair is left, and the pipeline says so
            run("lions_online", tmp_path, policy, [{"prompt": QUESTIONS[0]}], *keys[:3])
        assert len(server.requests) == 20
    (scored,) = rows(tmp_path / "out" / "score")
    assert [each["score"] for each in scored["responses"]] == [0.5] * 5
    assert counts(tmp_path / "out", "pair")["dropped"] == {"tie": 1}


def test_gsm8k_keeps_problems_that_are_sometimes_solved(tmp_path: Path, policy: Path) -> None:
    """A random model solves none: too hard, all of them, and the pipeline says that nothing is left."""
    given = [{"question": text, "answer": "#### 4"} for text in QUESTIONS]
    keys = ("stages.sample.max_prompt_tokens=200", "stages.prompts.decontaminate=null")
    with pytest.raises(AssertionError):
        run("gsm8k_verifiable", tmp_path, policy, given, *keys)
    assert counts(tmp_path / "out", "filter")["dropped"] == {"too_hard": 8}
    assert all(row["answer"] == "#### 4" for row in rows(tmp_path / "out" / "score"))
