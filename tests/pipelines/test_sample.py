"""Sampling as a stage: what it samples, what it refuses, and that shards, kills and workers change nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import engines
from prefopt.engines.base import SamplingSpec
from prefopt.storage.packed import unpack_ids
from tests.engines.policies import sampled_logps
from tests.pipelines.pipelines import (
    build,
    counts,
    interrupted,
    made,
    refused,
    rows,
    write_pipeline,
)
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import TokenizerFactory

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

GIVEN = str(Path(__file__).with_name("given.py"))
TEXTS = [
    f"{word}, what is the best way to cook rice?"[: 12 + 3 * i] for i, word in enumerate("abcdefg")
]
PROMPTS = [{"id": f"q{i}", "prompt": text, "answer": str(i)} for i, text in enumerate(TEXTS)]
STOP = {2, 4}
"""Of the tiny tokenizer: </s> and <|im_end|>."""

Pipeline = Callable[..., Path]


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: TokenizerFactory) -> Path:
    """Two models of one tokenizer, `first` and `second`, and one of another, `foreign`; vLLM takes them, too."""
    directory = tmp_path_factory.mktemp("policies")
    for seed, name in enumerate(("first", "second", "foreign")):
        tokenizer = tiny_tokenizer("chatml", add_bos=name == "foreign")
        model = tiny_model(
            "llama", len(tokenizer), seed=seed, hidden_size=64, intermediate_size=96,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        )  # fmt: skip
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


@pytest.fixture
def pipeline(tmp_path: Path, policies: Path) -> Pipeline:
    """``pipeline(name, {keys of sample}, …, later=[…])``: samples responses to `PROMPTS`, stage by stage."""

    def write(
        name: str,
        *stages: dict[str, Any],
        prompts: list[dict[str, Any]] = PROMPTS,
        kind: str = "prompts",
        later: Sequence[dict[str, Any]] = (),
        **settings: Any,
    ) -> Path:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in prompts))
        sections: list[dict[str, Any]] = [{"stage": "given", "path": str(data), "kind": kind}]
        for number, keys in enumerate(stages):
            defaults = {
                "stage": "sample",
                "id": f"sample{number}",
                "max_new_tokens": 12,
                "temperatures": [1.0],
            }
            model = {"path": str(policies / keys.pop("of", "first"))}
            sections.append({**defaults, "model": model, "max_prompt_tokens": 100, **keys})
        return write_pipeline(
            tmp_path / f"{name}.yaml",
            [*sections, *later],
            **{"shard_rows": 5, **settings},
            plugins=[GIVEN],
        )

    return write


def test_responses_are_the_models_own_and_say_where_they_come_from(
    pipeline: Pipeline, policies: Path
) -> None:
    """Ids against a forward of plain transformers: every token lies in what top-p leaves, its text is theirs."""
    folder = build(pipeline("p", {"seeds": [13, 21], "temperatures": [0.7, 1.0], "top_p": 0.9}))
    model = AutoModelForCausalLM.from_pretrained(policies / "first", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(policies / "first")
    found = rows(folder / "sample0")
    assert [row["id"] for row in found] == [row["id"] for row in PROMPTS]
    for row, given in zip(found, PROMPTS, strict=True):
        prompt = unpack_ids(row["prompt_ids"])
        assert list(prompt) == tokenizer(given["prompt"])["input_ids"]
        assert row["answer"] == given["answer"]
        drawn = [(each["temperature"], each["seed"]) for each in row["responses"]]
        assert drawn == [(0.7, 13), (0.7, 21), (1.0, 13), (1.0, 21)]
        for each in row["responses"]:
            ids = unpack_ids(each["ids"])
            spec = SamplingSpec(12, temperature=each["temperature"], top_p=0.9)
            sampled_logps(model, prompt, ids, spec)  # asserts that each token was in the nucleus
            assert each["text"] == tokenizer.decode(ids, skip_special_tokens=True)
            assert each["tokens"] == len(ids) and each["model"] == "first"
            assert each["ended"] == (ids[-1] in STOP) and (each["ended"] or len(ids) == 12)


def test_a_greedy_response_is_what_plain_generate_gives(pipeline: Pipeline, policies: Path) -> None:
    folder = build(pipeline("p", {"temperatures": [0]}))
    model = AutoModelForCausalLM.from_pretrained(policies / "first", dtype=torch.float32).eval()
    for row in rows(folder / "sample0"):
        prompt = torch.tensor([unpack_ids(row["prompt_ids"])])
        with torch.no_grad():
            whole: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                prompt,
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=sorted(STOP),
                pad_token_id=0,
            )
        assert unpack_ids(row["responses"][0]["ids"]) == tuple(whole[0, prompt.shape[1] :].tolist())


def test_shards_change_no_response(pipeline: Pipeline) -> None:
    keys = {"samples_per_seed": 3}
    small = build(pipeline("small", dict(keys), shard_rows=2))
    large = build(pipeline("large", dict(keys), shard_rows=5))
    assert rows(small / "sample0") == rows(large / "sample0")
    assert len(list((small / "sample0").iterdir())) == 4
    other = build(pipeline("other", dict(keys), seed=1))
    texts = [[r["text"] for r in row["responses"]] for row in rows(large / "sample0")]
    assert texts != [[r["text"] for r in row["responses"]] for row in rows(other / "sample0")]
    assert len({text for group in texts for text in group}) > 15  # 21 samples of a random model


def test_a_run_that_was_cut_short_goes_on_to_the_same_bytes(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """Of kills proper: test_runner."""
    path = pipeline("p", {"samples_per_seed": 2}, shard_rows=1)
    calm = made(build(path))
    short = tmp_path / "short"
    interrupted(path, f"output_dir={short}", shards=3)
    assert len(list((short / "sample0").glob("*.jsonl"))) == 4  # the last one without a record
    build(path, f"output_dir={short}")
    assert made(short) == calm


def test_a_second_stage_appends_another_models_responses(pipeline: Pipeline) -> None:
    first = {"seeds": [1, 2], "drop_identical": False}
    alone = rows(build(pipeline("alone", dict(first))) / "sample0")
    both = rows(build(pipeline("both", dict(first), {"of": "second", "name": "rival"})) / "sample1")
    for one, two in zip(alone, both, strict=True):
        assert two["responses"][:2] == one["responses"]
        assert [each["model"] for each in two["responses"]] == ["first", "first", "rival"]
        assert two["prompt_ids"] == one["prompt_ids"] and "ids" in two["responses"][2]


def test_ids_of_two_tokenizers_are_not_mixed(pipeline: Pipeline) -> None:
    """`foreign` puts a BOS in front: other prompt ids, so nobody's ids are kept."""
    for row in rows(build(pipeline("p", {}, {"of": "foreign"})) / "sample1"):
        assert "prompt_ids" not in row and len(row["responses"]) == 2
        assert not any("ids" in each for each in row["responses"])


def test_sopo_pairs_an_offline_answer_with_the_worst_sample(
    pipeline: Pipeline, policies: Path
) -> None:
    """The penalty is a token's price: the longest of four samples is the worst (the first, if two are)."""
    given = [{**row, "responses": [{"text": "In a pot.", "offline": True}]} for row in PROMPTS]
    later = [
        {
            "stage": "score",
            "signals": [{"name": "length_penalty"}],
            "tokenizer": str(policies / "first"),
        },
        {"stage": "pair", "rule": {"name": "sopo"}},
    ]
    keys = {"samples_per_seed": 4, "max_new_tokens": 60}
    folder = build(pipeline("p", keys, prompts=given, kind="groups", later=later))
    tokenizer = AutoTokenizer.from_pretrained(policies / "first")
    offline = -0.001 * (len(tokenizer("In a pot.")["input_ids"]) + 1)  # and its end token
    groups = {row["id"]: row["responses"] for row in rows(folder / "score")}
    pairs = rows(folder / "pair")
    assert len(pairs) > 3
    for pair in pairs:
        first, *samples = groups[pair["id"]]
        assert (pair["chosen"], first["offline"]) == ("In a pot.", True)
        assert pair["score_chosen"] == first["score"] == pytest.approx(offline)
        worst = max(samples, key=lambda each: each["tokens"])
        assert pair["rejected"] == worst["text"]
        assert pair["score_rejected"] == pytest.approx(-0.001 * worst["tokens"])


def test_what_cannot_be_asked_is_dropped_with_its_reason(
    pipeline: Pipeline, policies: Path
) -> None:
    """Context 128, 12 new tokens: a prompt may have 116 (max_prompt_tokens is off the table at 1000)."""
    tokenizer = AutoTokenizer.from_pretrained(policies / "first")
    fits = "a" * 116
    assert len(tokenizer(fits)["input_ids"]) == 116
    prompts = [
        {"id": "fits", "prompt": fits},
        {"id": "long", "prompt": fits + "a"},
        {"id": "empty", "prompt": ""},
        {"id": "odd", "prompt": [{"role": "assistant", "content": "I begin"}]},
        {"id": "chat", "prompt": [{"role": "user", "content": "hi"}]},
    ]
    template = policies / "strict.jinja"
    template.write_text(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        + tokenizer.chat_template
    )
    model = {"path": str(policies / "first"), "chat_template": str(template)}
    path = pipeline("p", {"model": model, "max_prompt_tokens": 1000}, prompts=prompts)
    folder = build(path)
    assert [row["id"] for row in rows(folder / "sample0")] == ["fits", "chat"]
    assert counts(folder, "sample0")["dropped"] == {
        "empty_prompt": 1, "prompt_too_long": 1, "template_refused": 1,
    }  # fmt: skip
    chat = rows(folder / "sample0")[1]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(unpack_ids(chat["prompt_ids"])) == expected


def test_prompts_whose_responses_are_all_the_same_are_dropped(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a temperature of 1e-4 three samples are three times the likeliest response."""
    cold = {"samples_per_seed": 3, "temperatures": [0.0001]}
    said = refused(capsys, pipeline("dropped", dict(cold)), code=1)
    assert "not one row is left of 7 (7 all_identical)" in said
    kept = rows(build(pipeline("kept", cold | {"drop_identical": False})) / "sample0")
    assert [len({each["text"] for each in row["responses"]}) for row in kept] == [1] * 7
    assert len(rows(build(pipeline("one", {"temperatures": [0.0001]})) / "sample0")) == 7


def test_responses_that_did_not_end_can_be_left_out(pipeline: Pipeline) -> None:
    every = rows(build(pipeline("all", {"samples_per_seed": 6, "max_new_tokens": 60})) / "sample0")
    keys = {"samples_per_seed": 6, "max_new_tokens": 60, "drop_unended": True}
    folder = build(pipeline("ended", keys))
    expected = {row["id"]: [each for each in row["responses"] if each["ended"]] for row in every}
    found = {row["id"]: row["responses"] for row in rows(folder / "sample0")}
    assert found == {id_: responses for id_, responses in expected.items() if responses}
    assert 0 < sum(map(len, found.values())) < 42
    dropped = counts(folder, "sample0")["dropped"]
    assert dropped.get("none_ended", 0) == sum(not responses for responses in expected.values())


def test_the_engine_starts_once_a_worker(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        engine, context = launch(*arguments, **keywords)
        started.append(engine)
        return engine, context

    launch = engines.start_engine
    monkeypatch.setattr(engines, "start_engine", counted)
    build(pipeline("p", {}, shard_rows=1))
    assert len(started) == 1 and started[0].model is None  # closed


def test_other_weights_are_refused_and_another_time_limit_is_not(
    pipeline: Pipeline, policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "moving").symlink_to(policies / "first")
    path = pipeline(
        "p", {"model": {"path": str(tmp_path / "moving")}, "engine": {"timeout_s": 60.0}}
    )
    build(path)
    build(path, "stages.sample0.engine.timeout_s=90.0")
    os.replace(_link(tmp_path / "new", policies / "second"), tmp_path / "moving")
    said = refused(capsys, path)
    assert "stage 'sample0' was made differently: depends.weights was" in said


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"seeds": [1, 1]}, "sample.seeds = [1, 1]: holds one twice"),
        (
            {"seeds": [1, 2], "temperatures": [0]},
            "0 is greedy, so all 2 responses of a prompt are equal",
        ),
        ({"engine": {"max_logp_gap": 0.1}}, "sample.engine.max_logp_gap: would be ignored"),
        ({"max_new_tokens": 128}, "must fit the context of"),
        ({"temperature": 1.0}, "temperatures"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    pipeline: Pipeline, keys: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, pipeline("p", keys))


@pytest.mark.slow  # starts vLLM on a cluster
def test_vllm_on_ray_samples_what_it_samples_here(pipeline: Pipeline, cluster: Cluster) -> None:
    vllm = {"name": "vllm", "enforce_eager": True, "options": {"max_num_seqs": 16}}
    path = pipeline("vllm", {"engine": vllm, "temperatures": [0, 1.0]}, shard_rows=4)
    here = made(build(path))
    there = path.with_name("there")
    ray = ("executor.name=ray", f"executor.address={cluster.address}")
    build(path, f"output_dir={there}", *ray)
    assert {n: d for n, d in made(there).items() if n.split("/")[0] != "logs"} == {
        n: d for n, d in here.items() if n.split("/")[0] != "logs"
    }


@pytest.mark.slow  # starts vLLM, which `make quickstart-prompts` samples with in CI
def test_vllm_answers_as_hf_does(pipeline: Pipeline, policies: Path) -> None:
    """Greedy, fp32: the hf engine's very ids. Sampled: every token in what top-p leaves of a plain forward."""
    vllm = {"name": "vllm", "enforce_eager": True, "options": {"max_num_seqs": 16}}
    path = pipeline("vllm", {"engine": vllm, "temperatures": [0, 1.0], "top_p": 0.9}, shard_rows=3)
    found = rows(build(path) / "sample0")
    greedy = rows(build(pipeline("hf", {"temperatures": [0]})) / "sample0")
    assert [row["responses"][:1] for row in found] == [row["responses"] for row in greedy]
    model = AutoModelForCausalLM.from_pretrained(policies / "first", dtype=torch.float32).eval()
    for row in found:
        prompt, ids = unpack_ids(row["prompt_ids"]), unpack_ids(row["responses"][1]["ids"])
        sampled_logps(model, prompt, ids, SamplingSpec(12, temperature=1.0, top_p=0.9))


def test_a_condition_is_asked_for_and_the_row_keeps_its_own_prompt(pipeline: Pipeline) -> None:
    """Greedy answers are those to prompts that a user wrote the reward into."""
    condition = {"template": "{input} <r>: {reward}\n", "target": 2.0}
    asked = [{**row, "prompt": f"{row['prompt']} <r>: 2.00\n"} for row in PROMPTS]
    ours = rows(build(pipeline("one", {"temperatures": [0], "condition": condition})) / "sample0")
    by_hand = rows(build(pipeline("two", {"temperatures": [0]}, prompts=asked)) / "sample0")
    texts = [[[r["text"] for r in row["responses"]] for row in found] for found in (ours, by_hand)]
    assert texts[0] == texts[1]
    assert [row["prompt"] for row in ours] == TEXTS
    # Ids after a prompt that the row does not hold would be scored as if they came after its own.
    assert not any("prompt_ids" in row or "ids" in row["responses"][0] for row in ours)
