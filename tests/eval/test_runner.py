"""Evaluations run whole: real generation, a real judge over HTTP, real kills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.base import Answer as ModelAnswer
from eval.engines import answer_from, answer_record
from eval.registry import make_task
from prefopt.cli import main
from tests.eval.runs import problems, read_jsonl, write_chat_model, write_jsonl
from tests.recipes.commands import measured
from tests.signals.chat_server import Answer, chat_server

TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))


def gsm8k(tmp_path: Path, count: int = 9) -> list[str]:
    """Arguments of a small GSM8K."""
    data = write_jsonl(tmp_path / "problems.jsonl", problems(count))
    return ["--tasks", "gsm8k", f"tasks.gsm8k.data={data}", f"tasks.gsm8k.max_new_tokens={TOKENS}"]


def refused(*arguments: object, capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    assert main(["eval", *map(str, arguments)]) == code
    return capsys.readouterr().err


def test_answers_are_those_of_a_greedy_teacher_forced_forward(tmp_path: Path, model: Path) -> None:
    assert main(["eval", str(model), *gsm8k(tmp_path), "--output", str(tmp_path / "out")]) == 0
    records = read_jsonl(tmp_path / "out" / "gsm8k" / "generations.jsonl")[1:]
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy: Any = AutoModelForCausalLM.from_pretrained(model)
    prompts = [row["prompt"] for row in read_jsonl(tmp_path / "out" / "gsm8k" / "examples.jsonl")]
    for prompt, record in zip(prompts, records, strict=True):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = list(answer_from(record["samples"][0][0]).ids or ())
        with torch.no_grad():
            logits = policy(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer
        assert record["samples"][0][0]["ended"] or len(answer) == TOKENS
    assert len(records) == 9


def test_results_say_what_they_are_made_of(tmp_path: Path, model: Path) -> None:
    main(["eval", str(model), *gsm8k(tmp_path), "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    entry = results["tasks"]["gsm8k"]
    assert results["model"]["path"] == str(model) and len(results["model"]["hash"]) == 64
    assert results["engine"]["name"] == "hf"
    assert entry["version"] == "2" and entry["counts"]["n"] == 9
    assert entry["decoding"] == [
        {"max_new_tokens": TOKENS, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "num_samples": 1, "examples": 9}
    ]  # fmt: skip
    assert {len(entry[name]) for name in ("data_hash", "decoding_hash", "chat_template_hash")} == {
        64
    }
    rows = read_jsonl(tmp_path / "out" / "gsm8k" / "examples.jsonl")
    assert entry["metrics"]["accuracy"]["value"] == pytest.approx(
        100 * sum(row["values"]["accuracy"] for row in rows) / 9
    )


def test_more_examples_are_added_to_those_that_are_there(tmp_path: Path, model: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [str(model), *gsm8k(tmp_path)]
    main(["eval", *arguments, "--output", str(whole)])
    main(["eval", *arguments, "--output", str(parts), "--limit", "4"])
    first = (parts / "gsm8k" / "generations.jsonl").read_bytes()
    (parts / "results.json").unlink()  # another limit is another result: it takes another file
    main(["eval", *arguments, "--output", str(parts)])
    assert (parts / "gsm8k" / "generations.jsonl").read_bytes().startswith(first)
    assert (parts / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_a_limited_result_is_not_overwritten_by_a_whole_one(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(model), *gsm8k(tmp_path), "--output", str(tmp_path / "out")]
    main(["eval", *arguments, "--limit", "4"])
    assert "limit was 4 and is now null" in refused(*arguments, capsys=capsys)


def test_another_model_is_refused_in_the_same_output(
    tmp_path: Path, model: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*gsm8k(tmp_path), "--output", str(tmp_path / "out")]
    main(["eval", str(model), *arguments])
    said = refused(other, *arguments, capsys=capsys)
    assert "results.json: model was" in said and "another --output" in said.replace("\n", " ")


def test_other_data_is_refused_where_answers_are_stored(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["eval", str(model), *gsm8k(tmp_path), "--output", str(tmp_path / "out")])
    assert "data was" in refused(
        model, *gsm8k(tmp_path, count=10), "--output", tmp_path / "out", capsys=capsys
    )


def test_unknown_names_are_told_the_nearest_all_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(
        "x", "--tasks", "gsm9k,ifevl", "--output", tmp_path, "tasks.math.x=1", capsys=capsys
    )
    assert "did you mean 'gsm8k'" in said and "did you mean 'ifeval'" in said
    assert "tasks.math: would be ignored" in said
    said = refused("x", "--tasks", "gsm8k", "judge.bas_url=x", "egine.name=hf", capsys=capsys)
    assert "did you mean 'base_url'" in said and "did you mean 'engine'" in said


def test_a_model_without_chat_template_is_refused_before_it_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_chat_model(tmp_path / "bare", chat=None)
    (bare / "model.safetensors").write_bytes(b"not weights: must not be read as such")
    said = refused(bare, *gsm8k(tmp_path), "--output", tmp_path / "out", capsys=capsys, code=1)
    assert "has no chat template" in said and "model.chat_template=FILE" in said


def test_a_prompt_without_room_is_counted_and_wrong(tmp_path: Path, model: Path) -> None:
    rows = [*problems(2), {"question": "long " * 400, "answer": "#### 1"}]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    arguments = ["--tasks", "gsm8k", f"tasks.gsm8k.data={data}", "--output", str(tmp_path / "out")]
    assert main(["eval", str(model), *arguments]) == 0
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["gsm8k"]
    assert entry["counts"]["n"] == 3
    assert entry["counts"]["num_prompt_too_long"] == entry["answers"]["num_prompt_too_long"] == 1


def judged(tmp_path: Path, other: Path, url: str, count: int = 6) -> list[str]:
    """Arguments of a small pairwise comparison under a judge."""
    rows = [{"prompt": f"Say something about {n}.", "key": f"k{n}"} for n in range(count)]
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    return [
        *("--tasks", "win_rate", f"tasks.win_rate.data={data}", "--baseline", str(other)),
        *(f"decoding.max_new_tokens={TOKENS}", f"judge.base_url={url}", "judge.model=j"),
    ]


def verdict(body: dict[str, Any]) -> Answer:
    """A judge that is a function of what it reads."""
    text = body["messages"][0]["content"]
    return Answer(f"Well. [[{'ABC'[sum(map(ord, text)) % 3]}]]")


def test_a_judge_is_asked_in_both_orders_and_once(tmp_path: Path, model: Path, other: Path) -> None:
    with chat_server(verdict) as server:
        arguments = [str(model), *judged(tmp_path, other, server.base_url), "--output"]
        assert main(["eval", *arguments, str(tmp_path / "a")]) == 0
        asked = len(server.requests)
        assert main(["eval", *arguments, str(tmp_path / "a")]) == 0
        assert len(server.requests) == asked == 12  # six prompts, two orders; nothing twice
    entry = json.loads((tmp_path / "a" / "results.json").read_text())["tasks"]["win_rate"]
    assert entry["usage"]["judge_questions"] == 12
    assert entry["usage"]["judge_prompt_tokens"] == 120
    assert entry["judge"]["model"] == "j" and entry["template"]["origin"] == "prefopt"


def test_an_endpoint_that_is_down_keeps_the_answers_and_goes_on_later(
    tmp_path: Path, model: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server(verdict) as server:
        arguments = [str(model), *judged(tmp_path, other, server.base_url)]
        arguments += ["--output", str(tmp_path / "out")]
    assert "did not answer a request within deadline_s" in refused(
        *arguments, "judge.deadline_s=1.0", capsys=capsys, code=1
    )
    stored = (tmp_path / "out" / "win_rate" / "generations.jsonl").read_bytes()
    with chat_server(verdict) as again:
        moved = [
            f"judge.base_url={again.base_url}" if "base_url" in each else each for each in arguments
        ]
        assert main(["eval", *moved]) == 0
    assert (tmp_path / "out" / "win_rate" / "generations.jsonl").read_bytes() == stored


def test_a_judge_that_limits_its_rate_is_waited_for(
    tmp_path: Path, model: Path, other: Path
) -> None:
    seen: list[int] = []

    def answer(body: dict[str, Any]) -> Answer:
        seen.append(1)
        return Answer(status=429, headers={"Retry-After": "0"}) if len(seen) <= 2 else verdict(body)

    with chat_server(answer) as server:
        arguments = [str(model), *judged(tmp_path, other, server.base_url, count=2)]
        arguments += ["--output", str(tmp_path / "out")]
        assert main(["eval", *arguments]) == 0
    usage = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["win_rate"][
        "usage"
    ]
    assert usage["judge_questions"] == 4 and usage["judge_refused"] == 0


def test_a_judge_that_refuses_is_counted(tmp_path: Path, model: Path, other: Path) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        about_zero = "about 0" in body["messages"][0]["content"]
        return Answer(status=400, raw=b"filtered") if about_zero else verdict(body)

    with chat_server(answer) as server:
        arguments = [str(model), *judged(tmp_path, other, server.base_url)]
        assert main(["eval", *arguments, "--output", str(tmp_path / "out")]) == 0
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["win_rate"]
    assert entry["usage"]["judge_refused"] == 2
    assert entry["counts"]["n"] == 6
    assert entry["counts"]["num_judge_refused"] == 1


def test_a_dry_run_says_how_much_it_would_ask_and_asks_nothing(
    tmp_path: Path, model: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server(verdict) as server:
        arguments = [str(model), *judged(tmp_path, other, server.base_url), "--dry-run", "--json"]
        assert main(["eval", *arguments]) == 0
        assert not server.requests
    (line,) = json.loads(capsys.readouterr().out)
    assert (line["examples"], line["responses"], line["judge_questions"]) == (6, 6, 12)


def test_what_a_judged_task_lacks_is_said_before_anything_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    said = refused(
        "nowhere", "--tasks", "win_rate", f"tasks.win_rate.data={data}", "--output", tmp_path, capsys=capsys
    )  # fmt: skip
    assert "judge.base_url is missing" in said and "--baseline is missing" in said


def test_a_baseline_file_is_matched_by_key_not_by_position(
    tmp_path: Path, model: Path, other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"key": f"k{n}", "answer": f"file answer {n}"} for n in reversed(range(6))]
    answers = write_jsonl(tmp_path / "answers.jsonl", rows)
    with chat_server(verdict) as server:
        arguments = [str(model), *judged(tmp_path, other, server.base_url)]
        arguments += [f"baseline_answers={answers}", "--output", str(tmp_path / "out")]
        assert main(["eval", *arguments]) == 0
        asked = [body["messages"][0]["content"] for body in server.requests]
    for text in asked:
        (number,) = {n for n in range(6) if f"about {n}." in text}
        assert f"file answer {number}" in text
    write_jsonl(answers, rows[1:])
    arguments[-1] = str(tmp_path / "out2")
    assert "no answer for 1 of 6 examples" in refused(*arguments, capsys=capsys, code=1)


def test_the_command_line_is_light() -> None:
    script = "import eval.cli, sys; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    loaded = {name.split(".")[0] for name in output.split()}
    heavy = {"torch", "transformers", "sklearn", "datasets", "vllm", "lm_eval", "openai", "scipy"}
    assert not loaded & heavy


def test_ten_thousand_stored_responses_take_less_than_a_gibibyte(
    tmp_path: Path, model: Path
) -> None:
    """800 tokens and 2,000 characters each; the time grows with their number, and no faster."""
    data = write_jsonl(tmp_path / "problems.jsonl", problems(10_000))
    arguments = ["eval", str(model), "--tasks", "gsm8k", f"tasks.gsm8k.data={data}"]
    arguments += ["--output", str(tmp_path / "out")]
    assert main([*arguments, "--limit", "1", f"tasks.gsm8k.max_new_tokens={TOKENS}"]) == 0
    store = tmp_path / "out" / "gsm8k" / "generations.jsonl"
    header = store.read_text().splitlines()[0]
    keys = [example.key for example in make_task("gsm8k", {"data": str(data)}).examples()]
    answer = answer_record(ModelAnswer("word " * 400 + "#### 3", 800, True, tuple(range(800))))
    lines = [json.dumps({"id": key, "samples": [[answer]]}) for key in keys]
    seconds = {}
    for count in (2_500, 10_000):
        for stale in (tmp_path / "out").glob("**/*.json*"):
            stale.unlink()
        store.write_text("\n".join([header, *lines[:count]]) + "\n")
        limited = [*arguments, "--limit", str(count), f"tasks.gsm8k.max_new_tokens={TOKENS}"]
        code, seconds[count], mib = measured(*limited)
        assert code == 0 and mib < 1024
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["gsm8k"]["counts"]["n"] == 10_000
    # Quadratic work would be 16 times as much.
    assert seconds[10_000] < 8 * seconds[2_500]
