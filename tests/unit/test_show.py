"""`prefopt show`: every token of an example is on the page, with its role, and every reject is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefopt.cli import main
from prefopt.commands.show import HEAD_TOKENS, SEPARATOR, TAIL_TOKENS, token_text

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, two special ones: what is shown can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: index for index, piece in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    byte_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text('{"model_type": "llama"}')

    def turns(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": answer}]

    rows = [("yes\nok", "no"), ("same", "same"), ("fine", "x" * 900), ("b", "c")]
    lines = [json.dumps({"chosen": turns(c), "rejected": turns(r)}) for c, r in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{path: {directory}}}\n"
        f"data:\n  train: [{{path: {tmp_path}/pairs.jsonl, columns: {{prompt: null}}}}]\n"
        "  max_length_tokens: 512\n"
        "objective: {name: simpo}\ntrain: {learning_rate: 1e-6}\n"
        f"run: {{output_dir: {tmp_path}/run}}\n"
    )
    return ["show", str(tmp_path / "recipe.yaml"), "--no-color"]


def test_an_example_is_shown_token_by_token_with_roles_and_lengths(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*recipe, "-n", "1"]) == 0
    output = capsys.readouterr().out
    # <s> + "<user>\n" (7) + "Hi?" (3) + "<assistant>\n" (12); "yes\nok" (6) + </s>; "no" + </s>
    assert "prompt 23 · chosen 7 · rejected 3 · 33 tokens in all" in output
    assert "prompt (23 tokens, no loss)" in output
    assert "chosen (7 tokens, loss on every token)\ny│e│s│⏎\n│o│k│</s>\n" in output
    assert "rejected (3 tokens, loss on every token)\nn│o│</s>\n" in output
    assert "<s>│<│u│s│e│r│>│⏎\n│H│i│?│<│a│" in output
    assert (
        "BOS '<s>' 1 time(s) in the prompt; chosen ends with '</s>', rejected ends with '</s>'"
        in output
    )
    assert "\x1b[" not in output


def test_rejects_are_counted_by_reason_with_the_first_row(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(recipe) == 0
    output = capsys.readouterr().out
    assert output.count("tokens in all") == 2
    assert "2 rows to train on" in output
    assert "2 rejected\n" in output
    assert "1 identical, first: pairs.jsonl row 2" in output
    assert "1 too_long, first: pairs.jsonl row 3" in output


def test_n_larger_than_the_data_shows_all_and_zero_shows_the_summary(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*recipe, "-n", "99"]) == 0
    assert capsys.readouterr().out.count("tokens in all") == 2
    assert main([*recipe, "-n", "0"]) == 0
    assert capsys.readouterr().out.startswith("2 rows to train on")


def test_a_bad_recipe_is_refused_before_data_is_read(
    recipe: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*recipe, "reference={name: initial}"]) == 2
    assert "needs no reference" in capsys.readouterr().err


def test_long_parts_are_cut_in_the_middle_and_say_so() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a" * 500, add_special_tokens=False)["input_ids"]
    text = token_text(tokenizer, ids).plain
    assert f"… {500 - HEAD_TOKENS - TAIL_TOKENS} more tokens …" in text
    assert text.count("a") == HEAD_TOKENS + TAIL_TOKENS


def test_tokens_join_back_to_the_text_and_broken_characters_show_their_bytes() -> None:
    tokenizer = byte_tokenizer()
    text = "to be, or not"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_text(tokenizer, ids).plain.split(SEPARATOR) == list(text)
    # é is two bytes: neither is a character, so each shows its byte-level piece.
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert token_text(tokenizer, ids).plain == "Ã│©"


def test_prompts_for_rollouts_are_shown_with_what_signals_check_against(
    recipe: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`<s>Add 2.` and the data's own `4.</s>`; a prompt over the limit is refused, a column is missing."""
    rows = [
        {"prompt": "Add 2.", "chosen": "4.", "answer": "four", "note": "not read"},
        {"prompt": "x" * 600, "chosen": "b", "answer": "c"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"data.prompts=[{{path: {tmp_path}/prompts.jsonl, format: text}}]",
        "regime={name: rollouts, max_new_tokens: 16}",
        "objective={name: dpo}",
        "signals=[{name: exact_match, answer: answer}]",
    ]
    assert main([*recipe, *overrides]) == 0
    output = capsys.readouterr().out
    assert "── prompts.jsonl:1 ── prompt 6 · own response 3" in output
    assert "prompt (6 tokens, the policy goes on from here)\nA│d│d│ │2│.\n" in output
    assert "own response (3 tokens, from the data)\n4│.│</s>\n" in output
    assert "answer: four\n" in output and "not read" not in output
    assert (
        "1 prompts to sample from (6 tokens, longest 6), 1 with a response of their own" in output
    )
    assert "1 prompt_too_long, first: prompts.jsonl row 2" in output
    missing = "signals=[{name: exact_match, answer: solution}]"
    assert main([*recipe, *overrides, missing]) == 1
    assert "solution" in capsys.readouterr().err
