"""The `value` stage and advantages against its head: from dev answers to sample rows, killed and refused."""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefopt.cli import main
from prefopt.values.saved import ValueModel, read_head
from tests.pipelines.pipelines import (
    build,
    counts,
    interrupted,
    made,
    refused,
    rows,
    write_pipeline,
)
from tests.recipes.commands import prefopt
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import TokenizerFactory

GIVEN = str(Path(__file__).with_name("given.py"))
SIGNAL = str(Path(__file__).with_name("rice_signal.py"))
Stage = dict[str, Any]

HARD, EASY = "What is the best way to cook rice?", "Can you help me with my code?"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: TokenizerFactory) -> Path:
    """`first` and `second`, two models of one tokenizer."""
    directory = tmp_path_factory.mktemp("policies")
    tokenizer = tiny_tokenizer("chatml")
    for seed, name in enumerate(("first", "second")):
        model = tiny_model("llama", len(tokenizer), seed=seed, max_position_embeddings=2048)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


def dev_rows(count: int = 120) -> list[dict[str, Any]]:
    """Groups of one scored answer: hard prompts earn 0.2, easy ones 0.8."""
    found = []
    for number in range(count):
        prompt, score = ((HARD, 0.2), (EASY, 0.8))[number % 2]
        response = {"text": f"answer {number}", "score": score}
        found.append({"id": f"d{number}", "prompt": f"{number}. {prompt}", "responses": [response]})
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, policies: Path) -> Path:
    """A head of `first` that knows hard from easy."""
    return trained(tmp_path_factory.mktemp("dev"), policies) / "value" / "head"


def given(directory: Path, name: str, found: list[dict[str, Any]], kind: str = "groups") -> Stage:
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return {"stage": "given", "path": str(path), "kind": kind}


def value_stage(policies: Path, **keys: Any) -> Stage:
    defaults = {"learning_rate": 1e-3, "epochs": 4, "model": {"path": str(policies / "first")}}
    return {"stage": "value", **defaults, **keys}


def dev_pipeline(
    directory: Path, policies: Path, found: list[Any] | None = None, **keys: Any
) -> Path:
    stages = [given(directory, "dev", found or dev_rows()), value_stage(policies, **keys)]
    return write_pipeline(directory / "dev.yaml", stages, plugins=[GIVEN])


def trained(directory: Path, policies: Path, **keys: Any) -> Path:
    return build(dev_pipeline(directory, policies, **keys))


def weigh(directory: Path, found: list[dict[str, Any]], kind: str = "groups", **keys: Any) -> Path:
    """A pipeline of `advantage` over given rows."""
    stages = [given(directory, "rows", found, kind), {"stage": "advantage", **keys}]
    return write_pipeline(directory / "weigh.yaml", stages, plugins=[GIVEN], shard_rows=4)


def done(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / "manifest" / stage / "done.json").read_text())


# --- the head ------------------------------------------------------------------------------------


def test_the_stage_leaves_a_head_that_beats_a_constant_and_rows_with_their_value(
    head: Path,
) -> None:
    folder = head.parent.parent
    record = read_head(head)
    assert record.trained_on["prompts"] == 108 and record.trained_on["held_out"] == 12
    assert record.validation["mse"] < 0.5 * record.validation["constant_mse"]
    found = rows(folder / "value")
    easy = [row["value"] for row in found if EASY in row["prompt"]]
    hard = [row["value"] for row in found if HARD in row["prompt"]]
    assert np.mean(easy) > np.mean(hard) + 0.2
    report = done(folder, "value")["report"]["head"]
    assert report["content"] == record.content and report["validation_r2"] > 0.5
    predictions = [
        json.loads(line) for line in (head / "predictions.jsonl").read_text().splitlines()
    ]
    held_out = [row for row in predictions if row["held_out"]]
    mse = np.mean([(row["reward"] - row["value"]) ** 2 for row in held_out])
    assert len(held_out) == 12 and mse == pytest.approx(report["validation_mse"], rel=1e-6)


def test_a_saved_head_predicts_what_it_was_measured_with(head: Path) -> None:
    """In any company: alone, or in one batch with the others."""
    found = rows(head.parent)[:7]
    model = ValueModel(head, device="cpu")
    together = model.values([row["prompt"] for row in found])
    alone = [model.values([row["prompt"]])[0] for row in found]
    assert together == pytest.approx([row["value"] for row in found], abs=1e-5)
    assert alone == pytest.approx(together, abs=1e-5)


def test_sampled_scored_dev_prompts_train_a_head(tmp_path: Path, policies: Path) -> None:
    """The whole way: prompts, one greedy answer each, a signal, the head. Some answers are cut, all are scored."""
    prompts = [
        {"id": f"p{n}", "prompt": f"{n}. {(HARD, EASY)[n % 2]}", "answer": ""} for n in range(30)
    ]
    model = {"path": str(policies / "first")}
    sample = {"stage": "sample", "model": model, "temperatures": [0], "max_new_tokens": 4}
    score = {"stage": "score", "signals": [{"name": "rice"}]}
    stages = [
        given(tmp_path, "prompts", prompts, "prompts"),
        {**sample, "max_prompt_tokens": 100},
        score,
        value_stage(policies, epochs=1, validation_frac=0.4, head="mean"),
    ]
    path = write_pipeline(tmp_path / "p.yaml", stages, plugins=[GIVEN, SIGNAL])
    folder = build(path)
    found = rows(folder / "value")
    assert len(found) == 30 and all(0 < row["value"] < 1 for row in found)
    record = read_head(folder / "value" / "head")
    assert record.settings.head == "mean" and record.trained_on["responses"] == 18
    groups = rows(folder / "score")
    assert all(
        len(row["responses"]) == 1 and row["responses"][0]["temperature"] == 0 for row in groups
    )
    scores = [row["responses"][0]["score"] for row in groups]
    assert record.trained_on["reward_mean"] == pytest.approx(np.mean(scores))


def test_rows_that_cannot_be_learned_from_are_dropped_with_their_reason(
    tmp_path: Path, policies: Path
) -> None:
    found = dev_rows()
    found += [{"id": "none", "prompt": "x", "responses": [{"text": "a"}]}]
    found += [{"id": "long", "prompt": "word " * 60, "responses": [{"text": "a", "score": 1.0}]}]
    folder = build(dev_pipeline(tmp_path, policies, found, epochs=1, max_prompt_tokens=60))
    assert counts(folder, "value")["dropped"] == {"prompt_too_long": 1, "unscored": 1}
    lines = (folder / "manifest" / "value" / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["none", "long"]


def test_answers_to_one_prompt_stand_on_one_side(tmp_path: Path, policies: Path) -> None:
    """Three rows of every prompt: a head that has seen one of them has seen the others."""
    found = [{**row, "id": f"{row['id']}/{n}"} for row in dev_rows(100) for n in range(3)]
    folder = build(dev_pipeline(tmp_path, policies, found, epochs=1))
    lines = (folder / "value" / "head" / "predictions.jsonl").read_text().splitlines()
    sides: dict[str, set[bool]] = {}
    for row in map(json.loads, lines):
        sides.setdefault(row["id"].split("/")[0], set()).add(row["held_out"])
    assert len(sides) == 100 and all(len(side) == 1 for side in sides.values())
    assert read_head(folder / "value" / "head").trained_on == {
        **read_head(folder / "value" / "head").trained_on,
        "prompts": 90,
        "responses": 270,
        "held_out": 10,
    }


def test_killed_while_it_trains_it_makes_the_same_bytes(tmp_path: Path, policies: Path) -> None:
    path = dev_pipeline(tmp_path, policies, epochs=8)
    calm = made(build(path))
    killed = tmp_path / "killed"
    states = killed / ".scratch" / "value" / "states"
    arguments = ("data", "build", str(path), f"output_dir={killed}")
    with prefopt(*arguments, log=tmp_path / "log") as command:
        command.wait_until(states.exists, "the prompts' states on disk")
        command.send(signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
    assert (
        not (killed / "value" / "head").exists() and not (killed / "value" / "00000.jsonl").exists()
    )
    build(path, f"output_dir={killed}")
    assert {name: data for name, data in made(killed).items() if "/.tmp-" not in name} == calm
    assert "value/head/head.safetensors" in calm


# --- advantages ----------------------------------------------------------------------------------


def mixed() -> list[dict[str, Any]]:
    """Ten groups of a good and a bad answer."""
    return [
        {
            "id": f"g{n}",
            "prompt": f"{200 + n}. {(HARD, EASY)[n % 2]}",
            "responses": [{"text": "good", "score": 0.9}, {"text": "bad", "score": 0.3}],
        }
        for n in range(10)
    ]


def test_an_advantage_is_the_reward_less_the_heads_value(tmp_path: Path, head: Path) -> None:
    folder = build(weigh(tmp_path, mixed(), head=str(head)))
    found = rows(folder / "advantage")
    values = ValueModel(head, device="cpu").values([row["prompt"] for row in mixed()])
    assert [row["id"] for row in found[:3]] == ["g0#0", "g0#1", "g1#0"]
    for number, row in enumerate(found):
        assert set(row) == {"id", "prompt", "response", "reward", "value", "advantage"}
        assert row["value"] == pytest.approx(values[number // 2], abs=1e-5)
        assert row["advantage"] == pytest.approx(row["reward"] - row["value"], abs=1e-12)
    report = done(folder, "advantage")["report"]
    advantages = [row["advantage"] for row in found]
    assert report["advantages"]["responses"] == 20
    assert report["advantages"]["negative_frac"] == np.mean(np.array(advantages) < 0)
    assert report["advantages"]["quantiles_of_kept"]["p25"] == np.quantile(advantages, 0.25)
    assert report["head"]["validation_mse"] == read_head(head).validation["mse"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stages"][-1]["report"] == report


def test_negative_advantages_that_are_left_out_are_listed_and_still_counted(
    tmp_path: Path, head: Path
) -> None:
    every = build(weigh(tmp_path, mixed(), head=str(head)))
    kept = build(
        weigh(tmp_path, mixed(), head=str(head), positive_only=True),
        f"output_dir={tmp_path / 'kept'}",
    ) and (tmp_path / "kept")
    wanted = [row for row in rows(every / "advantage") if row["advantage"] > 0]
    assert 0 < len(wanted) < 20 and rows(kept / "advantage") == wanted
    one, other = done(every, "advantage")["report"], done(kept, "advantage")["report"]
    assert one["advantages"]["negative_frac"] == other["advantages"]["negative_frac"]
    lines = [
        json.loads(line)
        for file in sorted((kept / "manifest" / "advantage").glob("*.dropped.jsonl"))
        for line in file.read_text().splitlines()
    ]
    assert {line["reason"] for line in lines} == {"negative_advantage"}
    ids = {line["id"] for line in lines} | {row["id"] for row in wanted}
    assert ids == {row["id"] for row in rows(every / "advantage")}


def test_samples_and_pairs_are_weighed_as_groups_are(tmp_path: Path, head: Path) -> None:
    prompt = f"1. {EASY}"
    samples = [{"id": "s", "prompt": prompt, "response": "good", "reward": 0.9}]
    (sample,) = rows(build(weigh(tmp_path, samples, "samples", head=str(head))) / "advantage")
    pair = {"chosen": "good", "score_chosen": 0.9, "rejected": "bad", "score_rejected": 0.3}
    other = tmp_path / "pairs"
    other.mkdir()
    path = weigh(other, [{"id": "s", "prompt": prompt, **pair}], "pairs", head=str(head))
    chosen, rejected = rows(build(path) / "advantage")
    assert {**sample, "id": "s#0"} == chosen
    assert chosen["advantage"] - rejected["advantage"] == pytest.approx(0.6)


def test_advantages_cut_short_are_those_of_a_calm_run(tmp_path: Path, head: Path) -> None:
    path = weigh(tmp_path, mixed(), head=str(head))
    calm = made(build(path))
    short = tmp_path / "short"
    interrupted(path, f"output_dir={short}", shards=1)
    assert not (short / "manifest.json").exists()
    build(path, f"output_dir={short}")
    assert made(short) == calm


def test_weighed_rows_train_as_they_stand(tmp_path: Path, head: Path, policies: Path) -> None:
    """Two steps of A-LoL on the stage's folder; its metrics are those of the rows' advantages."""
    from prefopt.training.metrics import read_metrics
    from prefopt.wiring import train

    folder = build(weigh(tmp_path, mixed(), head=str(head))) / "advantage"
    recipe = {
        "model": {"path": str(policies / "first")},
        "data": {
            "train": [{"path": str(folder), "format": "text"}],
            "cache_dir": str(tmp_path / "cache"),
        },
        "objective": {"name": "a_lol"},
        "train": {"learning_rate": 1e-4, "global_batch_size": 20, "max_steps": 2},
        "run": {"output_dir": str(tmp_path / "run")},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    train(str(path))
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    weights = [max(row["advantage"], 0.0) for row in rows(folder)]
    assert first["weights/mean"] == pytest.approx(np.mean(weights), rel=1e-4)


# --- refused -------------------------------------------------------------------------------------


def test_a_head_of_another_model_is_refused_with_both_hashes_before_anything_loads(
    tmp_path: Path, head: Path, policies: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("prefopt.values.features.load_policy", loaded)
    other = {"path": str(policies / "second")}
    path = weigh(tmp_path, mixed(), head=str(head), model=other)
    said = refused(capsys, path, code=1)
    from prefopt.model.source import resolve_source

    hashes = [resolve_source(str(policies / name)).content[:12] for name in ("first", "second")]
    assert "belongs to another model" in said and all(each in said for each in hashes)
    assert main(["data", "check", str(path)]) == 1


def test_a_reference_whose_files_changed_is_another_model(
    tmp_path: Path, policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(policies / "first", moved / "first")
    folder = trained(tmp_path, moved, epochs=1)
    path = weigh(tmp_path, mixed(), head=str(folder / "value" / "head"))
    tiny_model("llama", 400, seed=5, max_position_embeddings=2048).save_pretrained(moved / "first")
    assert "belongs to another model" in refused(capsys, path, code=1)


def test_another_chat_template_is_another_model(
    tmp_path: Path, head: Path, policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    model = {"path": str(policies / "first"), "chat_template": str(template)}
    said = refused(capsys, weigh(tmp_path, mixed(), head=str(head), model=model), code=1)
    assert "tokenizer, chat template or renderer" in said


def test_the_same_weights_in_another_dtype_are_another_model(
    tmp_path: Path, head: Path, policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"path": str(policies / "first"), "dtype": "bfloat16"}
    said = refused(capsys, weigh(tmp_path, mixed(), head=str(head), model=model), code=1)
    assert "weights as loaded (dtype, quantisation)" in said


def test_a_copy_of_the_reference_is_the_reference(
    tmp_path: Path, head: Path, policies: Path
) -> None:
    shutil.copytree(policies / "first", tmp_path / "copy")
    model = {"path": str(tmp_path / "copy")}
    assert rows(build(weigh(tmp_path, mixed(), head=str(head), model=model)) / "advantage")


def test_a_run_is_read_as_the_policy_that_it_ended_with(tmp_path: Path, policies: Path) -> None:
    """The head finds it again by itself, and under the run's name."""
    run = tmp_path / "run"
    shutil.copytree(policies / "first", run / "final")
    (run / "run.json").write_text('{"recipe": {"model": {"path": "base"}}}')
    folder = build(dev_pipeline(tmp_path, policies, epochs=1, model={"path": str(run)}))
    head = folder / "value" / "head"
    found = rows(build(weigh(tmp_path, mixed(), head=str(head))) / "advantage")
    other = build(
        weigh(tmp_path, mixed(), head=str(head), model={"path": str(run)}),
        f"output_dir={tmp_path / 'again'}",
    )
    assert other.exists() and found == rows(tmp_path / "again" / "advantage")


@pytest.mark.parametrize(
    ("score", "says"),
    [
        (1.5, "the farthest is 1.5, row d7; they go from 0.2 to 1.5. Set max_value to the most"),
        (
            -0.5,
            "the farthest is -0.5, row d7; they go from -0.5 to 0.8. Set normalize_rewards: sigmoid",
        ),
    ],
)
def test_rewards_that_the_head_cannot_reach_are_refused(
    tmp_path: Path, policies: Path, head: Path, capsys: pytest.CaptureFixture[str], score: float, says: str,
) -> None:  # fmt: skip
    """In training, and where the head is used."""
    found = dev_rows()
    found[7]["responses"][0]["score"] = score
    said = refused(capsys, dev_pipeline(tmp_path, policies, found), code=1)
    assert "1 of 120 rewards lie outside [0, max_value = 1]" in said and says in said
    said = refused(capsys, weigh(tmp_path, found, head=str(head)), code=1)
    assert "rewards lie outside [0, max_value = 1]" in said and "row d7" in said


def test_logits_are_squashed_in_training_and_in_use(tmp_path: Path, policies: Path) -> None:
    """σ(-2) = 0.1192, σ(3) = 0.9526."""
    found = dev_rows(100)
    for row in found:
        row["responses"][0]["score"] = 3.0 if EASY in row["prompt"] else -2.0
    folder = build(dev_pipeline(tmp_path, policies, found, normalize_rewards="sigmoid", epochs=1))
    head = folder / "value" / "head"
    data = read_head(head).trained_on
    assert (data["reward_min"], data["reward_max"]) == pytest.approx((0.1192, 0.9526), abs=1e-4)
    weighed = rows(build(weigh(tmp_path, found[:2], head=str(head))) / "advantage")
    assert [row["reward"] for row in weighed] == pytest.approx([0.1192, 0.9526], abs=1e-4)


def test_a_small_dev_set_and_one_without_scores_are_refused(
    tmp_path: Path, policies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, dev_pipeline(tmp_path, policies, dev_rows(30)), code=1)
    assert "a dev set of 30 different prompts" in said and "Give 100 prompts or more" in said
    found = [{**row, "responses": [{"text": "a"}]} for row in dev_rows(30)]
    other = tmp_path / "other"
    other.mkdir()
    said = refused(capsys, dev_pipeline(other, policies, found), code=1)
    assert "no row has a scored response" in said and "Put a `score` stage before it" in said


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"head": "h", "value": "v"}, "would be ignored with"),
        ({"head": "h", "rule": {"name": "group_mean"}}, "would be ignored with"),
        ({"device": "cpu"}, "advantage.device: would be ignored without advantage.head"),
        ({"model": {"path": "m"}}, "advantage.model: would be ignored without advantage.head"),
        ({"head": "h", "model": {"path": "m", "layout": "padded"}}, "only training reads it"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Stage, says: str
) -> None:
    assert says in refused(capsys, weigh(tmp_path, mixed(), **stage))


def test_a_rule_cannot_weigh_samples_and_a_folder_without_a_head_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = [{"id": "s", "prompt": "p", "response": "r", "reward": 0.9}]
    said = refused(capsys, weigh(tmp_path, samples, "samples"))
    assert "samples have one each; set advantage.head" in said
    said = refused(capsys, weigh(tmp_path, mixed(), head=str(tmp_path)), code=1)
    assert "holds no value head" in said and "OUTPUT_DIR/value/head" in said


def test_a_damaged_head_is_refused(
    tmp_path: Path, head: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "head"
    shutil.copytree(head, copy)
    weights = copy / "head.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(bytes(data))
    assert "its hash differs" in refused(capsys, weigh(tmp_path, mixed(), head=str(copy)), code=1)
    weights.write_bytes(bytes(data[:200]))
    assert "cannot be loaded" in refused(capsys, weigh(tmp_path, mixed(), head=str(copy)), code=1)


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ('"r": NaN', "column 'r' = nan: a score must be a finite number"),
        ('"r": "good"', "column 'r' = 'good': a score must be a finite number"),
        ('"R": 0.5', "no column 'r'"),
    ],
)
def test_a_reward_that_is_none_is_named_with_file_and_line(
    tmp_path: Path, policies: Path, capsys: pytest.CaptureFixture[str], reward: str, says: str
) -> None:
    file = tmp_path / "dev.jsonl"
    lines = [f'{{"prompt": "p{n}", "answer": "a", "r": 0.5}}' for n in range(4)]
    lines[2] = f'{{"prompt": "p2", "answer": "a", {reward}}}'
    file.write_text("\n".join(lines) + "\n")
    responses = [{"text": "answer", "score": "r"}]
    rated = {"stage": "rated", "sources": [{"path": str(file)}], "responses": responses}
    path = write_pipeline(tmp_path / "p.yaml", [rated, value_stage(policies)])
    said = refused(capsys, path, code=1)
    assert says in said and "dev.jsonl:3" in said


# --- shown ---------------------------------------------------------------------------------------


def test_show_prints_what_a_head_is_and_how_far_off(
    head: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["show", str(head), "-n", "3", "--no-color"]) == 0
    said = capsys.readouterr().out
    record = read_head(head)
    assert "attention, V(x) = 1 · σ(…)" in said and record.reference.weights[:12] in said
    assert "108 responses to 108 prompts, 12 prompts held out" in said
    assert f"MSE {record.validation['mse']:.4g}" in said
    assert said.count("kept") == 2  # the title, and the epoch
    assert (
        sum("reward" in line and "value" in line and "…" in line for line in said.splitlines()) >= 3
    )


def test_show_of_a_directory_without_a_head_says_what_there_is_to_show(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(tmp_path)]) == 2
    assert "holds no value head" in capsys.readouterr().err


# --- real rewards --------------------------------------------------------------------------------


def test_real_rewards_end_to_end(tmp_path: Path, policies: Path, shared_data: Path) -> None:
    """The dev sample trains a head, helpful pairs are weighed against it: numbers as the data has them."""
    folder = shared_data / "hh_rlhf"
    response = {"text": "chosen", "score": "reward_chosen"}
    dev = {
        "stage": "rated",
        "sources": [{"path": str(folder / "lol_sampled_dev_with_rewards.jsonl.gz")}],
        "responses": [response],
    }
    stages = [
        dev,
        value_stage(policies, normalize_rewards="sigmoid", epochs=2, max_prompt_tokens=600),
    ]
    trained = build(write_pipeline(tmp_path / "dev.yaml", stages))
    head = trained / "value" / "head"
    report = done(trained, "value")["report"]["head"]
    tally = counts(trained, "value")
    assert tally["rows_in"] == 280 == tally["rows_out"] + tally["dropped"]["prompt_too_long"]
    assert report["validation_num_prompts"] == round(0.1 * tally["rows_out"])
    assert (
        report["validation_mse"] < 1.1 * report["validation_constant_mse"]
    )  # random states know little
    columns = {"score_chosen": "reward_chosen", "score_rejected": "reward_rejected"}
    source = {"path": str(folder / "lol_helpful_base_with_rewards.jsonl.gz"), "columns": columns}
    rated = {"stage": "rated", "sources": [{**source, "max_rows": 60}]}
    path = write_pipeline(tmp_path / "adv.yaml", [rated, {"stage": "advantage", "head": str(head)}])
    weighed = build(path)
    found = rows(weighed / "advantage")
    tally = counts(weighed, "advantage")
    assert len(found) == 2 * (60 - tally["dropped"]["prompt_too_long"]) > 80
    raw = [json.loads(line) for line in _first_lines(source["path"], 60)]
    for row in found:
        line, side = row["id"].split(":")[1].split("#")
        logit = raw[int(line) - 1][("reward_chosen", "reward_rejected")[int(side)]]
        assert row["reward"] == pytest.approx(1 / (1 + math.exp(-logit)))
    share = done(weighed, "advantage")["report"]["advantages"]["negative_frac"]
    assert 0.5 < share < 1  # the dev answers, of a tuned policy, have better rewards than the data


def _first_lines(path: Any, count: int) -> list[str]:
    import gzip
    from itertools import islice

    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(islice(file, count))
