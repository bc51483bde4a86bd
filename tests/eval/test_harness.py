"""lm-evaluation-harness on the project's models: its choices against log-probs computed here. No downloads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.harness import harness_problems, harness_results
from eval.models import Models
from eval.provenance import task_folder
from prefopt.errors import ConfigError
from prefopt.recipe.schema import EngineSection, HFSection, ModelSection, VllmSection
from tests.eval.runs import read_jsonl, write_chat_model, write_jsonl

pytest.importorskip("lm_eval")

QUESTIONS = [
    {
        "question": f"What is {n} and {n + 1}?",
        # of one length, or the shortest would always be the likeliest
        "choices": [chr(97 + (5 * n + 9 * k) % 26) + chr(97 + (7 * n + k) % 26) for k in range(3)],
        "label": n % 3,
    }
    for n in range(9)
]

_CHOICE = """\
task: own_choice
dataset_path: json
dataset_kwargs: {{cache_dir: {cache}, data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 3.0}}
"""
_WORDS = """\
task: own_words
dataset_path: json
dataset_kwargs: {{cache_dir: {cache}, data_files: {{test: {words}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_GROUP = """\
group: own_group
task: [own_choice, own_words]
"""
_MEAN = """\
group: own_mean
task: [own_choice]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 7}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an adapter on it, and tasks of our own."""
    folder = tmp_path_factory.mktemp("harness")
    model = write_chat_model(folder / "model")
    _write_adapter(model, folder / "adapter")
    data = write_jsonl(folder / "choice.jsonl", QUESTIONS)
    words = write_jsonl(folder / "words.jsonl", _half_right(model))
    (folder / "tasks").mkdir()
    names = {"choice": _CHOICE, "words": _WORDS}
    for name, text in names.items():
        text = text.format(cache=folder / "cache", data=data, words=words)
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    lost = _CHOICE.format(cache=folder / "cache", data=folder / "absent.jsonl")
    (folder / "tasks" / "lost.yaml").write_text(lost.replace("own_", "lost_"))
    (folder / "tasks" / "group.yaml").write_text(_GROUP)
    (folder / "tasks" / "mean.yaml").write_text(_MEAN)
    return folder


def _load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def _write_adapter(model: Path, folder: Path) -> None:
    """A LoRA that changes the model: its B is drawn, not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted: Any = get_peft_model(
        _load(model)[0],
        LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "o_proj"]),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    adapted.save_pretrained(folder)


def _half_right(path: Path) -> list[dict[str, str]]:
    """Questions whose answer is what the model says greedily, and as many that are not."""
    model, tokenizer = _load(path)
    rows = []
    for number, row in enumerate(QUESTIONS[:4]):
        ids = tokenizer(row["question"], return_tensors="pt").input_ids
        said = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        answer = tokenizer.decode(said, skip_special_tokens=True)
        rows.append({"question": row["question"], "answer": answer if number % 2 else "nothing"})
    return rows


def _models(path: Path, engine: EngineSection | None = None, **settings: Any) -> Models:
    section = ModelSection(path=str(path), dtype="float32", **settings)
    return Models(section, None, engine or HFSection(), None, 0, "cpu", 4096)


def _run(place: Path, output: Path, *names: str, model: str = "model", **options: Any) -> Any:
    return harness_results(
        names,
        _models(place / model),
        options={"include_path": str(place / "tasks"), **options},
        limit=None,
        output=output / "lm_eval",
    )


def _rows(output: Path, name: str) -> list[dict[str, Any]]:
    return read_jsonl(output / task_folder(f"lm_eval:{name}") / "examples.jsonl")


def _picks(model: Any, tokenizer: Any, render: Any) -> list[int]:
    """The likeliest choice of each question: Σ log p of its tokens after the question, one forward each."""
    picks = []
    for row in QUESTIONS:
        start = tokenizer(render(row["question"]), add_special_tokens=False).input_ids
        sums = []
        for choice in row["choices"]:
            text = f"{render(row['question'])} {choice}"
            ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            with torch.inference_mode():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1)
            taken = logps.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(float(taken[len(start) - 1 :].sum()))
        picks.append(max(range(3), key=sums.__getitem__))
    return picks


def test_choices_are_the_likeliest_by_log_prob(place: Path, tmp_path: Path) -> None:
    entry = _run(place, tmp_path, "own_choice")["own_choice"]
    picks = _picks(*_load(place / "model"), lambda question: f"Q: {question}\nA:")
    right = [float(pick == row["label"]) for pick, row in zip(picks, QUESTIONS, strict=True)]
    rows = _rows(tmp_path, "own_choice")
    assert [row["answer"] for row in rows] == [
        row["choices"][pick] for row, pick in zip(QUESTIONS, picks, strict=True)
    ]
    assert [row["values"]["acc"] for row in rows] == right
    accuracy = sum(right) / 9
    assert entry["metrics"]["acc"]["value"] == pytest.approx(100 * accuracy)
    stderr = (accuracy * (1 - accuracy) / 8) ** 0.5  # ddof 1
    assert entry["metrics"]["acc"]["stderr"] == pytest.approx(100 * stderr)
    assert (entry["version"], entry["headline"], entry["direction"]) == ("3.0", "acc", "higher")
    assert entry["counts"] == {"n": 9}
    assert len({row["key"] for row in rows}) == 9


def test_adapter_is_applied_on_its_base(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model, tokenizer = _load(place / "model")
    adapted = PeftModel.from_pretrained(model, place / "adapter").eval()
    picks = _picks(adapted, tokenizer, lambda question: f"Q: {question}\nA:")
    _run(place, tmp_path, "own_choice", model="adapter")
    answers = [row["answer"] for row in _rows(tmp_path, "own_choice")]
    assert answers == [row["choices"][p] for row, p in zip(QUESTIONS, picks, strict=True)]
    base = _picks(*_load(place / "model"), lambda question: f"Q: {question}\nA:")
    assert picks != base  # or the test would not see a missing adapter


def test_answers_are_greedy_and_asked_through_the_own_template_on_demand(
    place: Path, tmp_path: Path
) -> None:
    plain = _run(place, tmp_path / "plain", "own_words")["own_words"]
    assert plain["metrics"]["exact_match"]["value"] == 50
    assert plain["chat_template_hash"] is None
    assert "without the model's chat template" in plain["notes"][0]
    chat = _run(place, tmp_path / "chat", "own_words", apply_chat_template=True)["own_words"]
    tokenizer = _load(place / "model")[1]
    turn = [{"role": "user", "content": QUESTIONS[0]["question"]}]
    expected = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert _rows(tmp_path / "chat", "own_words")[0]["prompt"] == expected
    assert chat["decoding_hash"] != plain["decoding_hash"]
    assert chat["data_hash"] == plain["data_hash"]


def test_group_without_numbers_stands_for_its_tasks(place: Path, tmp_path: Path) -> None:
    entries = _run(place, tmp_path, "own_group")
    assert set(entries) == {"own_choice", "own_words"}
    assert len(_rows(tmp_path, "own_words")) == 4


def test_group_with_numbers_has_its_tasks_as_groups(place: Path, tmp_path: Path) -> None:
    entry = _run(place, tmp_path, "own_mean")["own_mean"]
    assert entry["version"] == "7" and entry["headline"] == "acc"
    assert entry["groups"]["own_choice"]["acc"] == entry["metrics"]["acc"]["value"]
    rows = _rows(tmp_path, "own_mean")
    mean = sum(row["values"]["acc"] for row in rows) / len(rows)
    assert 100 * mean == pytest.approx(entry["metrics"]["acc"]["value"])
    assert rows[0]["key"].startswith("own_choice/")


def test_second_run_takes_its_answers_from_the_first(place: Path, tmp_path: Path) -> None:
    """Weights that are replaced in between change nothing: no answer is computed twice."""
    model = write_chat_model(tmp_path / "model")
    arguments: Any = {"options": {"include_path": str(place / "tasks")}, "limit": None}
    output = tmp_path / "out" / "lm_eval"
    first = harness_results(["own_choice"], _models(model), output=output, **arguments)
    rows = _rows(tmp_path / "out", "own_choice")
    write_chat_model(tmp_path / "model", seed=7)
    again = harness_results(["own_choice"], _models(model), output=output, **arguments)
    assert json.dumps(again) == json.dumps(first) and _rows(tmp_path / "out", "own_choice") == rows
    fresh = tmp_path / "fresh" / "lm_eval"
    harness_results(["own_choice"], _models(model), output=fresh, **arguments)
    assert _rows(tmp_path / "fresh", "own_choice") != rows


def test_limit_counts_what_was_left_out_and_another_engine_is_said(
    place: Path, tmp_path: Path
) -> None:
    entry = harness_results(
        ["own_choice"],
        _models(place / "model", VllmSection()),
        options={"include_path": str(place / "tasks"), "num_fewshot": 0},
        limit=4,
        output=tmp_path / "lm_eval",
    )["own_choice"]
    assert entry["counts"] == {"n": 4, "n_total": 9}
    assert "run by transformers, not by vllm" in entry["notes"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own_choise", {}, r"lm_eval:own_choise: no such .* did you mean lm_eval:own_choice"),
        ("own_choice", {"num_fewshots": 3}, r"tasks\.lm_eval\.num_fewshots: unknown key"),
        ("own_choice", {"batch_size": 0}, r"tasks\.lm_eval\.batch_size"),
        ("own_choice", {"include_path": "nowhere"}, "include_path = 'nowhere': no such directory"),
    ],
)
def test_unknown_names_and_options_are_refused_before_a_model_loads(
    place: Path, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    given = {"include_path": str(place / "tasks"), **options}
    with pytest.raises(ConfigError, match=message):
        harness_results(
            [name], _models(Path("no/such/model")), options=given, limit=None, output=tmp_path / "o"
        )


def test_model_without_template_is_refused_where_one_is_asked_for(
    place: Path, tmp_path: Path
) -> None:
    write_chat_model(tmp_path / "plain", chat=None)
    with pytest.raises(ConfigError, match=r"apply_chat_template = true: .* has no chat template"):
        harness_results(
            ["own_words"],
            _models(tmp_path / "plain"),
            options={"include_path": str(place / "tasks"), "apply_chat_template": True},
            limit=None,
            output=tmp_path / "o",
        )


def test_task_whose_data_is_not_there_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lm_eval:lost_choice: .* cannot run it: FileNotFound"):
        _run(place, tmp_path, "lost_choice")


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    (problem,) = harness_problems(["mmlu"], {})
    assert (
        problem.startswith("--tasks lm_eval:mmlu: needs")
        and 'pip install "prefopt[eval]"' in problem
    )
