"""Scoring as a stage: the same numbers as the signals themselves, whatever they cannot score counted."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prefopt.cli import main
from prefopt.errors import SignalError
from prefopt.recipe.load import import_plugin
from prefopt.recipe.registry import get_signal
from prefopt.signals.base import Signal
from tests.pipelines.pipelines import build, counts, refused, rows, write_pipeline
from tests.signals.cases import candidates
from tests.signals.chat_server import Answer, chat_server
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import TokenizerFactory, make_tokenizer

PRESETS = Path(__file__).resolve().parents[2] / "data_pipelines" / "presets"
GIVEN = str(Path(__file__).with_name("given.py"))
Pipeline = Callable[..., Path]
NUMBER = [{"name": "final_number"}]


def group(id_: str, *texts: str, **columns: Any) -> dict[str, Any]:
    responses = [{"text": text} for text in texts]
    return {"id": id_, "prompt": "How many?", "responses": responses, **columns}


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    """``pipeline(rows, {keys of a stage}, …, kind=…)``; a stage is `score` unless it says."""

    def write(
        given: list[dict[str, Any]], *stages: dict[str, Any], kind: str = "groups", **settings: Any
    ) -> Path:
        data = tmp_path / "given.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in given))
        first = {"stage": "given", "path": str(data), "kind": kind}
        later = [{"stage": "score", "id": f"score{i}", **keys} for i, keys in enumerate(stages)]
        return write_pipeline(tmp_path / "p.yaml", [first, *later], **settings, plugins=[GIVEN])

    return write


def test_gsm8k_solutions_are_right_as_often_as_published(
    pipeline: Pipeline, shared_data: Path
) -> None:
    """openai/grade-school-math's own labels: 286 and 742 of 1,319 right."""
    file = shared_data / "gsm8k" / "example_model_solutions.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    models = ("6b_finetuning", "175b_verification")
    given = [
        {
            "id": f"q{number}",
            "prompt": each["question"],
            "answer": each["ground_truth"],
            "responses": [{"text": each[m]["solution"], "model": m} for m in models],
        }
        for number, each in enumerate(problems)
    ]
    folder = build(pipeline(given, {"signals": NUMBER}))
    found = rows(folder / "score0")
    expected = json.loads((shared_data / "gsm8k" / "expected.json").read_text())
    for number, model in enumerate(models):
        right = [row["responses"][number]["score"] for row in found]
        assert sum(right) == expected[model]["n_correct"]
        assert right == [float(each[model]["is_correct"]) for each in problems]


def test_the_score_is_the_weighted_sum_and_the_parts_are_kept(pipeline: Pipeline) -> None:
    """By hand: 2 · right - 0.5 · cut; the second response is right and cut, the third wrong and cut."""
    row = group("q", "it is 4", "4", "5", answer="4")
    row["responses"][1]["ended"] = row["responses"][2]["ended"] = False
    signals = [
        {"name": "final_number", "weight": 2.0},
        {"name": "truncation_penalty", "weight": 0.5},
    ]
    (found,) = rows(build(pipeline([row], {"signals": signals})) / "score0")
    assert [each["score"] for each in found["responses"]] == [2.0, 1.5, -0.5]
    assert [each["scores"] for each in found["responses"]] == [
        {"final_number": 1.0, "truncation_penalty": 0.0},
        {"final_number": 1.0, "truncation_penalty": -1.0},
        {"final_number": 0.0, "truncation_penalty": -1.0},
    ]
    assert found["answer"] == "4" and found["responses"][1]["ended"] is False
    again = build(pipeline([row], {"signals": signals, "keep_parts": False}), "--from", "score0")
    assert all("scores" not in each for each in rows(again / "score0")[0]["responses"])


def test_a_pairwise_judge_ranks_a_group_as_its_round_robin(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    """The longer answer wins: lengths 1, 3, 2 give 0, 1 and 1/2 of the games; best against worst follows."""

    def longer(body: dict[str, Any]) -> Answer:
        text = body["messages"][0]["content"]
        first = text.split("<answer_a>\n")[1].split("\n</answer_a>")[0]
        second = text.split("<answer_b>\n")[1].split("\n</answer_b>")[0]
        return Answer("[[A]]" if len(first) > len(second) else "[[B]]")

    with chat_server(longer) as server:
        judge = {
            "name": "judge",
            "base_url": server.base_url,
            "model": "m",
            "cache_dir": str(tmp_path),
        }
        path = pipeline([group("q", "a", "bbb", "cc")], {"signals": [judge]}, {"stage": "pair"})
        folder = build(path)
        assert len(server.requests) == 6
    (scored,), (pair,) = rows(folder / "score0"), rows(folder / "score1")
    assert [each["score"] for each in scored["responses"]] == [0.0, 1.0, 0.5]
    assert (pair["chosen"], pair["rejected"]) == ("bbb", "a")
    # the server is gone: where it was is not what was made, so nothing is asked again
    build(path, "stages.score0.signals.0.base_url=http://127.0.0.1:9/v1")


@pytest.fixture
def models(tmp_path: Path, tiny_tokenizer: TokenizerFactory) -> list[str]:
    """Three policies of one family: a reference, and two rounds of training."""
    tokenizer = tiny_tokenizer()
    for seed in range(3):
        tiny_model("llama", len(tokenizer), seed=seed).save_pretrained(tmp_path / f"model{seed}")
        tokenizer.save_pretrained(tmp_path / f"model{seed}")
    return [str(tmp_path / f"model{seed}") for seed in range(3)]


def log_prob(seed: int, prompt: str, text: str) -> float:
    """Of the text and one EOS, by a plain forward."""
    tokenizer: Any = make_tokenizer()
    head = tokenizer(prompt)["input_ids"]
    tail = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    model: Any = tiny_model("llama", len(tokenizer), seed=seed)
    with torch.no_grad():
        logps = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(tail)[:, None]).sum().item()


def test_seras_margin_of_two_rounds_orders_offline_pairs(
    pipeline: Pipeline, models: list[str]
) -> None:
    """m = γ·m_now + (1-γ)·m_before (arXiv:2410.09362) from plain forwards; the pairs' own scores stay."""
    texts = [("Sure!", "No."), ("In a pot.", "I think so"), ("water", "rice")]
    pairs = [
        {"id": f"p{i}", "prompt": "How?", "chosen": a, "rejected": b, "score_chosen": 9.0, "score_rejected": 1.0}
        for i, (a, b) in enumerate(texts)
    ]  # fmt: skip
    reward = {"name": "implicit_reward", "reference": models[0]}
    now = {"signals": [{**reward, "path": models[2]}], "into": "now", "tokenizer": models[0]}
    before = {"signals": [{**reward, "path": models[1]}], "into": "before", "tokenizer": models[0]}
    order = {"stage": "order", "by": {"gap.now": 0.7, "gap.before": 0.3}, "normalise": "none"}
    folder = build(pipeline(pairs, now, before, order, kind="pairs"))

    def margin(seed: int, chosen: str, rejected: str) -> float:
        ratios = [log_prob(seed, "How?", t) - log_prob(0, "How?", t) for t in (chosen, rejected)]
        return ratios[0] - ratios[1]

    expected = {f"p{i}": 0.7 * margin(2, *t) + 0.3 * margin(1, *t) for i, t in enumerate(texts)}
    found = rows(folder / "score2")
    for row in found:
        gaps = [row["info_chosen"][key] - row["info_rejected"][key] for key in ("now", "before")]
        assert 0.7 * gaps[0] + 0.3 * gaps[1] == pytest.approx(expected[row["id"]], abs=1e-4)
        assert (row["score_chosen"], row["score_rejected"]) == (9.0, 1.0)
        assert set(row["info_chosen"]["scores"]) == {
            "now/implicit_reward",
            "before/implicit_reward",
        }
    assert [row["id"] for row in found] == sorted(expected, key=expected.get, reverse=True)  # type: ignore[arg-type]


def test_ids_that_sampling_left_are_scored_as_they_are(
    pipeline: Pipeline, tiny_tokenizer: TokenizerFactory
) -> None:
    """Ten tokens at 0.1 each, though the text alone has three: -1.0."""
    from prefopt.storage.packed import pack_ids

    row = group("q", "abc")
    row |= {"prompt_ids": pack_ids([5])}
    row["responses"][0]["ids"] = pack_ids([7] * 10)
    penalty = [{"name": "length_penalty", "per_token": 0.1}]
    (found,) = rows(build(pipeline([row], {"signals": penalty})) / "score0")
    direct = (
        get_signal("length_penalty").fn(per_token=0.1).score([candidates("abc", ids=[(7,) * 10])])
    )
    assert found["responses"][0]["score"] == direct[0][0] == pytest.approx(-1.0)


def test_scores_that_are_there_are_not_overwritten_unasked(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    row = group("q", "4", "5", answer="4")
    row["responses"][1]["score"] = 7.0
    said = refused(capsys, pipeline([row], {"signals": NUMBER}), code=1)
    assert "row q: has a 'score' already. Set overwrite: true" in said
    both = build(pipeline([row], {"signals": NUMBER, "into": "verified"}), "--from", "score0")
    (found,) = rows(both / "score0")
    assert [each.get("score") for each in found["responses"]] == [None, 7.0]
    assert [each["verified"] for each in found["responses"]] == [1.0, 0.0]
    again = pipeline([row], {"signals": NUMBER, "overwrite": True})
    (found,) = rows(build(again, "--from", "score0") / "score0")
    assert [each["score"] for each in found["responses"]] == [1.0, 0.0]


def test_a_row_that_a_signal_cannot_score_is_dropped_with_what_it_said(pipeline: Pipeline) -> None:
    """A gold answer without a number has no right response."""
    given = [group("good", "4", answer="4"), group("bad", "4", answer="none")]
    folder = build(pipeline(given, {"signals": NUMBER}))
    assert [row["id"] for row in rows(folder / "score0")] == ["good"]
    assert counts(folder, "score0")["dropped"] == {"signal_failed": 1}
    listed = (folder / "manifest" / "score0" / "00000.dropped.jsonl").read_text()
    assert "final_number: not finite" in json.loads(listed)["detail"]


def test_too_many_failures_stop_the_pipeline_and_lose_nothing(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 good rows, then 10 bad ones in shards of 10: 10 of 30 is more than a fifth; the good shards are kept."""
    given = [group(f"q{i}", "4", answer="4" if i < 20 else "none") for i in range(30)]
    path = pipeline(given, {"signals": NUMBER}, shard_rows=10)
    said = refused(capsys, path, code=1)
    assert "signals failed on 10 of 30 rows, more than max_failed_frac = 0.2" in said
    folder = path.parent / "p-out" / "score0"
    assert len(rows(folder)) == 20
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    build(path, "stages.score0.max_failed_frac=0.5")  # goes on: the bound decides no row
    assert (
        before.items() <= {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}.items()
    )
    assert counts(folder.parent, "score0")["dropped"] == {"signal_failed": 10}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"signals": [{"name": "final_nmber"}]}, "stages.1.signals.0.name = 'final_nmber': unknown; did you mean"),
        ({"signals": [{"name": "final_number", "anwser": "a"}]}, "anwser"),
        ({"signals": []}, "stages.1.signals"),
        ({"signals": [{"name": "final_number", "answer": "gold"}]}, "reads the column 'gold'"),
        ({"signals": NUMBER, "into": "text"}, "score.into = 'text': must be a name"),
        ({"signals": NUMBER, "chat_template": "x.jinja"}, "score.chat_template: would be ignored"),
        ({"signals": [{"name": "length_penalty"}]}, "score.tokenizer is missing: length_penalty reads token ids"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(
    pipeline: Pipeline, keys: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"id": "p", "prompt": "How?", "chosen": "a", "rejected": "b", "answer": "4"}
    assert said in refused(capsys, pipeline([pair], keys, kind="pairs"))


def test_other_weights_of_a_model_that_scores_are_refused(
    pipeline: Pipeline, models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "moving"
    link.symlink_to(models[1])
    pair = {"id": "p", "prompt": "How?", "chosen": "a", "rejected": "b"}
    reward = {"name": "implicit_reward", "path": str(link), "reference": models[0]}
    path = pipeline([pair], {"signals": [reward], "tokenizer": models[0]}, kind="pairs")
    build(path)
    link.unlink()
    link.symlink_to(models[2])
    assert "depends.signals.0.path was" in refused(capsys, path)


def test_armorm_is_its_gated_sum_of_outputs(tmp_path: Path) -> None:
    """Against its authors' formula written out, one unpadded row at a time: the gate reads the hidden state where
    the last assistant header begins, the 5 outputs that of the last token."""
    tokenizer, model, gating, regression, mixing = write_armorm(tmp_path)
    header = "<|im_end|>\n<|im_start|>assistant\n"
    signal = armorm(tmp_path, header=header)
    earlier = [("user", "Is it?"), ("assistant", "Is what?"), ("user", "Is it raining?")]
    dialogue = tuple({"role": role, "content": content} for role, content in earlier)
    texts = ("yes", "a longer answer, so that one of the two is padded")
    (scores,) = signal.score([candidates(*texts, prompt=dialogue)])
    for text, score in zip(texts, scores, strict=True):
        turns = [*dialogue, {"role": "assistant", "content": text}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        before = tokenizer(whole[: whole.rindex(header)], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids[len(before)]) == "<|im_end|>"
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
            gate = hidden[len(before)]
            for layer in gating[:-1]:
                gate = torch.relu(layer(gate))
            gate = torch.softmax(gating[-1](gate) / 10, dim=0) * 1.7
            expected = (gate * ((regression @ hidden[-1]) @ mixing)).sum().item()
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-5)
    model.save_pretrained(tmp_path)  # a Llama without the head
    with pytest.raises(SignalError, match="no ArmoRM checkpoint"):
        armorm(tmp_path, header=header)


def test_armorm_says_that_a_template_has_no_such_header(tmp_path: Path) -> None:
    """Its default is Llama 3's, and this tokenizer's template has another."""
    write_armorm(tmp_path)
    with pytest.raises(SignalError, match="there is no place to read the gate at"):
        armorm(tmp_path).score([candidates("yes", prompt=({"role": "user", "content": "Is it?"},))])


def write_armorm(directory: Path) -> tuple[Any, ...]:
    """A checkpoint as ArmoRM's, with 5 outputs: tokenizer, model, gating layers, regression, mixing matrix."""
    tokenizer: Any = make_tokenizer("chatml")
    tokenizer.save_pretrained(directory)
    model: Any = tiny_model("llama", len(tokenizer))
    model.config.save_pretrained(directory)
    torch.manual_seed(1)
    gating = [torch.nn.Linear(size, out) for size, out in ((32, 8), (8, 8), (8, 8), (8, 5))]
    regression, mixing = torch.randn(5, 32), torch.randn(5, 5)
    tensors = {"regression_layer.weight": regression, "reward_transform_matrix": mixing}
    tensors["gating.logit_scale"] = torch.tensor([1.7])
    for number, layer in enumerate(gating):
        tensors |= {f"gating.layers.{number}.{k}": v for k, v in layer.state_dict().items()}
    tensors |= {f"model.{name}": tensor for name, tensor in model.model.state_dict().items()}
    save_file(tensors, directory / "model.safetensors")
    return tokenizer, model, gating, regression, mixing


def armorm(directory: Path, **keys: Any) -> Signal:
    import_plugin(PRESETS / "armorm.py")
    return get_signal("armorm").fn(path=str(directory), dtype="float32", device="cpu", **keys)


def test_tasks_side_by_side_are_scored_by_their_own_signals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Case by hand: two tasks with columns of their own, a third that goes by its source, and one for nobody."""
    answers = {
        "math": [{"prompt": "6 * 7", "answer": "42", "completions": ["it is 42", "it is 41"]}],
        "code": [
            {
                "prompt": "area",
                "tests": "assert area(2, 3) == 6",
                "completions": ["def area(w, h):\n    return w * h", "area = 6"],
            }
        ],
        "talk": [{"prompt": "Hi!", "completions": ["hello", "no"]}],
        "poems": [{"prompt": "A poem!", "completions": ["roses", "hello"]}],
    }
    sources = []
    for name, lines in answers.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        sources.append({"path": str(path), "name": name, "format": "text"})
    rated = {
        "stage": "rated",
        "sources": sources,
        "responses": {"column": "completions", "text": None},
        "keep": ["answer", "tests"],
    }
    score = {
        "stage": "score",
        "signals": [
            {"name": "math", "only_where": "answer"},
            {"name": "python_tests", "only_where": "tests"},
            {"name": "regex", "pattern": "hello", "only_where": {"source": "talk"}},
        ],
    }
    pair = {"stage": "pair"}
    folder = build(write_pipeline(tmp_path / "p.yaml", [rated, score, pair]))
    found = rows(folder / "score")
    assert [(row["source"], row["answer"], row["tests"] is None) for row in found] == [
        ("math", "42", True),
        ("code", None, False),
        ("talk", None, True),
    ]
    names = ("math", "python_tests", "regex")
    for row, name in zip(found, names, strict=True):
        assert [each["scores"] for each in row["responses"]] == [{name: 1.0}, {name: 0.0}]
        assert [each["score"] for each in row["responses"]] == [1.0, 0.0]
    assert counts(folder, "score")["dropped"] == {"no_signal": 1}
    assert "its source is 'poems'; math is for rows with 'answer'" in caplog.text
    assert [row["source"] for row in rows(folder / "pair")] == ["math", "code", "talk"]


def test_a_part_of_a_signal_that_is_not_for_the_row_any_more_goes(pipeline: Pipeline) -> None:
    rows_ = [group("a", "4", "5", answer="4"), group("b", "4", "5", answer="4", easy=True)]
    both = [{"name": "final_number"}, {"name": "regex", "pattern": "4"}]
    now = [{"name": "final_number", "only_where": {"easy": True}}, both[1]]
    path = pipeline(rows_, {"signals": both}, {"signals": now, "overwrite": True})
    text = path.read_text().replace("kind: groups", "kind: groups\n  keep: [answer, easy]")
    path.write_text(text)
    first, second = rows(build(path) / "score1")
    assert set(first["responses"][0]["scores"]) == {"regex"}
    assert set(second["responses"][0]["scores"]) == {"regex", "final_number"}
    assert [first["responses"][0]["score"], second["responses"][0]["score"]] == [1.0, 2.0]


def test_a_column_that_signals_are_told_apart_by_must_be_kept(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    signals = [{"name": "final_number", "only_where": {"task": "math"}}]
    assert main(["data", "build", str(pipeline([], {"signals": signals}))]) != 0
    assert "reads the column 'task'" in capsys.readouterr().err
