"""The renderer against `apply_chat_template` and TRL, and what peers get wrong: BOS, EOS, the boundary."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from prefopt.data.options import AS_RENDERED
from prefopt.data.render import Rendered, Renderer, Request
from prefopt.data.rows import Refused, Reject
from prefopt.data.template import ChatTemplate
from prefopt.errors import ModelError
from tests.unit.tiny_tokenizers import make_tokenizer

PROMPT = [
    {"role": "user", "content": "Hi there"},
    {"role": "assistant", "content": "Hello! How can I help?"},
    {"role": "user", "content": "Write code:\n\n  print(1)\n"},
]
CHOSEN = {"role": "assistant", "content": "Sure!\n\nprint(1) 🎉"}
REJECTED = {"role": "assistant", "content": "No."}


def template_ids(tokenizer: PreTrainedTokenizerFast, turns: list[Any], **kwargs: Any) -> list[int]:
    return tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True, **kwargs)[
        "input_ids"
    ]


def render(tokenizer: PreTrainedTokenizerFast, prompt: Any, *responses: Any) -> Rendered | Refused:
    return Renderer(tokenizer).render_batch([Request(prompt, responses)])[0]


def rendered(tokenizer: PreTrainedTokenizerFast, prompt: Any, *responses: Any) -> Rendered:
    result = render(tokenizer, prompt, *responses)
    assert isinstance(result, Rendered), result
    return result


def refused(tokenizer: PreTrainedTokenizerFast, prompt: Any, *responses: Any) -> Refused:
    result = render(tokenizer, prompt, *responses)
    assert isinstance(result, Refused), result
    return result


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (
            TURNS,
            r"writes '<\|im_start\|>assistant\\n' before an answer, and not where it is asked to open",
        ),
        (
            TURNS + "<|im_start|>assistant\n",
            "after an answer that nothing follows: it opens another one",
        ),
        (TURNS.replace("\n", "\\n"), r"a backslash and an n \(\\n\) where it means a line break"),
        # as old tools wrote it: without special tokens
        (
            "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}### assistant:\n",
            "after an answer that nothing follows",
        ),
    ],
)
def test_a_template_that_writes_what_no_policy_should_learn_is_refused(
    chat: str, said: str
) -> None:
    """Else the opening would carry loss: at the start of every response, or after the end of each."""
    with pytest.raises(ModelError, match=said):
        render(make_tokenizer(chat), PROMPT, CHOSEN)


# An end of the whole text after the last turn's own (Phi 3), an empty thought before the last answer (Qwen 3).
@pytest.mark.parametrize(
    "chat",
    [
        TURNS
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
        "{% endif %}{% endfor %}{% if messages[-1].role == 'assistant' %}{{ eos_token }}{% endif %}",
    ],
    ids=["phi3", "qwen3", "inst"],
)
def test_templates_that_only_look_so_are_taken(chat: str) -> None:
    assert ChatTemplate(make_tokenizer(chat)).fault is None


@pytest.mark.parametrize("chat", ["chatml", "llama3", "alternating"])
def test_ids_are_those_of_apply_chat_template(chat: str) -> None:
    """Up to the line break ChatML writes after the end of a turn, which no policy generates."""
    tokenizer = make_tokenizer(chat)
    result = rendered(tokenizer, PROMPT, CHOSEN, REJECTED)
    assert list(result.prompt_ids) == template_ids(tokenizer, PROMPT, add_generation_prompt=True)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for response, ids in zip((CHOSEN, REJECTED), result.responses, strict=True):
        after = newline if chat == "chatml" else []
        whole = template_ids(tokenizer, [*PROMPT, response])
        assert [*result.prompt_ids, *ids, *after] == whole


def trl_ids(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> dict[str, list[int]]:
    """Prompt, chosen and rejected ids as TRL's DPOTrainer prepares them."""
    trainer = DPOTrainer.__new__(
        DPOTrainer
    )  # its dataset preparation needs a tokenizer, not a model
    trainer._tokenizer = tokenizer
    trainer._is_vision_dataset = False
    args = DPOConfig(output_dir="unused", use_cpu=True, bf16=False, max_length=None)
    dataset = Dataset.from_list([row])
    return trainer._prepare_dataset(dataset, tokenizer, args, "train")[0]


def test_chat_ids_are_trls_where_the_template_ends_with_the_end_token() -> None:
    tokenizer = make_tokenizer("llama3", add_bos=True)
    theirs = trl_ids(tokenizer, {"prompt": PROMPT, "chosen": [CHOSEN], "rejected": [REJECTED]})
    ours = rendered(tokenizer, PROMPT, CHOSEN, REJECTED)
    assert list(ours.prompt_ids) == theirs["prompt_ids"]
    assert [list(ids) for ids in ours.responses] == [theirs["chosen_ids"], theirs["rejected_ids"]]


@pytest.mark.parametrize("add_bos", [False, True])
def test_text_ids_are_trls(add_bos: bool) -> None:
    tokenizer = make_tokenizer(add_bos=add_bos)
    row = {"prompt": "Question: 1 + 2\n", "chosen": "It is 3.", "rejected": "It is 4."}
    theirs = trl_ids(tokenizer, row)
    ours = rendered(tokenizer, row["prompt"], row["chosen"], row["rejected"])
    assert list(ours.prompt_ids) == theirs["prompt_ids"]
    assert [list(ids) for ids in ours.responses] == [theirs["chosen_ids"], theirs["rejected_ids"]]


CHATS = ["chatml", "llama3", "zephyr", "alternating", "plain"]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_bos", [False, True])
def test_there_is_never_more_than_one_bos_and_one_where_the_tokenizer_adds_it(
    chat: str, add_bos: bool
) -> None:
    """Llama 3's template writes a BOS that its tokenizer adds again; Zephyr's writes none."""
    tokenizer = make_tokenizer(chat, add_bos=add_bos)
    result = rendered(tokenizer, PROMPT, CHOSEN)
    ids = [*result.prompt_ids, *result.responses[0]]
    in_template = chat in ("llama3", "alternating")
    assert ids.count(tokenizer.bos_token_id) == int(add_bos or in_template)
    assert (ids[0] == tokenizer.bos_token_id) == (add_bos or in_template)


def test_a_bos_written_in_the_text_is_not_doubled() -> None:
    tokenizer = make_tokenizer(add_bos=True)
    assert Renderer(tokenizer).prompt_ids("<s>Hi") == Renderer(tokenizer).prompt_ids("Hi")


@pytest.mark.parametrize("chat", CHATS)
def test_a_response_ends_with_exactly_one_end_token(chat: str) -> None:
    tokenizer = make_tokenizer(chat, add_bos=True)
    response = rendered(tokenizer, PROMPT, CHOSEN).responses[0]
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    expected = "<|im_end|>" if chat in ("chatml", "llama3") else "</s>"
    assert response[-1] == tokenizer.convert_tokens_to_ids(expected)
    assert sum(token in ends for token in response) == 1


def test_an_end_token_that_the_data_already_holds_is_not_doubled() -> None:
    """TRL #4481."""
    tokenizer = make_tokenizer("chatml")
    clean = rendered(tokenizer, PROMPT, CHOSEN)
    dirty = {**CHOSEN, "content": CHOSEN["content"] + "<|im_end|>"}
    assert rendered(tokenizer, PROMPT, dirty) == clean
    assert rendered(tokenizer, "a\n", "b</s>") == rendered(tokenizer, "a\n", "b")
    assert rendered(tokenizer, "a\n", "b</s>\n") == rendered(tokenizer, "a\n", "b")


def test_an_unknown_character_at_the_end_does_not_pass_for_an_end_token() -> None:
    tokenizer = make_tokenizer()
    _, response = Renderer(tokenizer).render("a\n", "b<unk>", AS_RENDERED)
    unknown, end = response[-2:]
    assert (unknown, end) == (tokenizer.unk_token_id, tokenizer.eos_token_id)


def test_a_pad_token_that_is_the_eos_still_ends_a_turn() -> None:
    tokenizer = make_tokenizer("zephyr", pad_token="</s>")
    assert rendered(tokenizer, PROMPT, CHOSEN).responses[0].count(tokenizer.eos_token_id) == 1


def test_a_thinking_template_whose_prompt_is_no_prefix_is_refused_with_both_texts() -> None:
    result = refused(make_tokenizer("thinking"), PROMPT, CHOSEN)
    assert result.reason == Reject.PROMPT_NOT_PREFIX
    assert "<think>" in str(result.detail)
    assert "Sure!" in str(result.detail)


def test_a_response_that_merges_into_the_last_prompt_token_is_refused() -> None:
    """Here "th" is one token, so the ids of "t" + "he" do not begin with those of "t"."""
    tokenizer = make_tokenizer()
    assert len(tokenizer("th")["input_ids"]) == 1
    assert refused(tokenizer, "t", "he").reason == Reject.PROMPT_NOT_PREFIX


def test_one_unfit_row_does_not_stop_a_batch_and_order_is_kept() -> None:
    tokenizer = make_tokenizer("alternating")
    bad = [PROMPT[0], PROMPT[0]]
    requests = [Request(PROMPT, (CHOSEN,)), Request(bad, (CHOSEN,)), Request(PROMPT[:1], (CHOSEN,))]
    results = Renderer(tokenizer).render_batch(requests)
    assert results[0] == rendered(tokenizer, PROMPT, CHOSEN)
    assert isinstance(results[1], Refused)
    assert results[1].reason == Reject.TEMPLATE_REFUSED
    assert "must alternate" in str(results[1].detail)
    assert results[2] == rendered(tokenizer, PROMPT[:1], CHOSEN)


def test_prompt_ids_of_rollouts_are_those_of_training() -> None:
    renderer = Renderer(make_tokenizer("llama3", add_bos=True))
    prompt, response = renderer.render(PROMPT, CHOSEN)
    assert renderer.prompt_ids(PROMPT) == prompt
    assert renderer.tokenizer.decode(response) == "Sure!\n\nprint(1) 🎉<|im_end|>"


def test_chat_rows_without_a_chat_template_say_which_setting_is_missing() -> None:
    with pytest.raises(ModelError, match=r"set model\.chat_template"):
        render(make_tokenizer(), PROMPT, CHOSEN)


def test_a_tokenizer_that_cannot_end_a_response_is_refused() -> None:
    with pytest.raises(ModelError, match="no eos_token"):
        render(make_tokenizer(eos_token=None), "a\n", "b")
