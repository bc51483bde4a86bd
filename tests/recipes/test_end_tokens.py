"""The token that ends a turn in training ends generation wherever what was trained is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.cli import main
from prefopt.commands.export import export_checkpoint
from prefopt.model.end_tokens import add_end_tokens, end_token_ids, own_end_ids
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import CHATML, make_tokenizer

END, EOS = 4, 2
"""<|im_end|>, which ends a turn of ChatML, and </s>, which is all that the base model knows of."""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """SFT of a base model on ChatML, to the point where it says what it was taught."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    tokenizer = make_tokenizer("chatml")
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"]) == [END, EOS]
    tiny_model("llama", vocab_size=400).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"Say {n}", "chosen": "rice and water"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sft.yaml").write_text(
        f"stage: sft\nmodel: {{path: {tmp_path}/base}}\n"
        f"data: {{train: [{{path: {tmp_path}/rows.jsonl, format: chat, columns: {{rejected: null}}}}]}}\n"
        "train: {learning_rate: 2e-2, global_batch_size: 8, max_steps: 30, save_every: 15, precision: fp32}\n"
        f"run: {{output_dir: {tmp_path}/run}}\n"
    )
    return ["train", str(tmp_path / "sft.yaml")]


def ends(directory: Path) -> Any:
    return json.loads((directory / "generation_config.json").read_text())["eos_token_id"]


def said(directory: Path) -> str:
    """What `generate` says, with nothing but what lies in ``directory``."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    asked = [{"role": "user", "content": "Say 3"}]
    given = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=40, do_sample=False, pad_token_id=0)
    return tokenizer.decode(ids[0, given["input_ids"].shape[1] :])


def test_what_sft_taught_a_base_model_stops_in_generate(recipe: list[str], tmp_path: Path) -> None:
    assert main(recipe) == 0
    run = tmp_path / "run"
    assert ends(run / "final") == [EOS, END]
    assert said(run / "final") == "rice and water<|im_end|>"
    export_checkpoint(run, run / "checkpoints" / "step-15", tmp_path / "exported")
    assert ends(tmp_path / "exported") == [EOS, END]


def test_an_adapter_takes_its_end_along_into_the_merged_model(
    recipe: list[str], tmp_path: Path
) -> None:
    assert main([*recipe, "peft={type: lora, r: 4}", "train.max_steps=1"]) == 0
    assert ends(tmp_path / "run" / "final") == [EOS, END]
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0
    assert ends(tmp_path / "merged") == [EOS, END]


def test_text_that_a_template_has_rendered_ends_as_its_rows_do(
    recipe: list[str], tmp_path: Path
) -> None:
    """Without a chat template, the data alone says what a turn ends with."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    rows = [{"prompt": "<|im_start|>user\nHi\n", "chosen": f"rice {n}<|im_end|>"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["data.train.0.format=text", "data.train.0.control_tokens=[all]"]
    assert main([*recipe, *source, "train.max_steps=1"]) == 0
    assert ends(tmp_path / "run" / "final") == [EOS, END]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["end_token_ids"] == [END]


def test_a_chat_ends_with_its_turns_end_its_tool_calls_end_and_the_tokenizers() -> None:
    """As gpt-oss and Llama 3.1 end a turn that calls a tool with a token of its own."""
    chat = CHATML.replace("<|im_end|>", "{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}")
    chat = chat.replace(
        "{{ m['content'] }}", "{{ m['content'] }}{{ m.tool_calls | tojson if m.tool_calls }}"
    )
    tokenizer = make_tokenizer(chat)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|call|>"]})
    names = tokenizer.convert_ids_to_tokens([*end_token_ids(tokenizer)])
    assert sorted(names) == ["</s>", "<|call|>", "<|im_end|>"]


def test_what_a_models_makers_say_stays_and_defaults_of_its_class_say_nothing() -> None:
    model: Any = tiny_model("llama", vocab_size=400)
    assert own_end_ids(model) == ()  # 2 is LlamaConfig's default
    model.generation_config._from_model_config = False
    model.generation_config.eos_token_id = [7, 2]
    assert own_end_ids(model) == (7, 2)
    add_end_tokens(model, [2, 4])
    assert model.generation_config.eos_token_id == [7, 2, 4]
