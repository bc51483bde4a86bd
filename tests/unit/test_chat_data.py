"""What chat rows hold beside plain messages: it reaches the template, is honoured, or is refused by name.

Each case goes through `prefopt show`, the command a user looks at rows with, or through the loader that it calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefopt.cli import main
from prefopt.data import Renderer, load_data, load_prompts
from prefopt.data.options import AS_RENDERED, RenderOptions
from prefopt.data.render import Request
from prefopt.data.rows import Refused, Reject
from prefopt.errors import ConfigError, DataError, ModelError
from prefopt.model.load import load_tokenizer
from prefopt.recipe.schema import ColumnMap, DataSection, ModelSection, SourceSection
from prefopt.types import Group
from tests.unit.tiny_tokenizers import CHATML, make_tokenizer

TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for d in documents or [] %}<doc>{{ d['text'] }}</doc>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think></think>"
    "{% endif %}{% endif %}"
)
"""Tools, documents and a keyword; arguments as an object. What the keyword adds stands in the prompt alone."""
JOINING = TOOLS.replace(
    "{{ c.function.arguments | tojson }}", "{{ 'a' + c.function.arguments }}"
).replace("{{ m['content'] }}", "{{ m['content'] if m['content'] is not none else '' }}")
"""Joins arguments to a text: JSON text alone will do."""
ON_NULL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is none %}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""DeepSeek-V2.5-like: a message calls tools where its content is null."""
FORGETFUL = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
"""Drops every thought."""
LATER_ONLY = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1] }}",
)
"""Qwen3-like: drops the thoughts of earlier turns."""
PARTS = CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p.text }}{% endfor %}")
"""Of a model that also sees: contents are lists of parts."""

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
Rows = Sequence[dict[str, Any]]


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calls(name: str, arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}], **more}


def pair(prompt: Any, chosen: Any, rejected: Any = "Nothing.", **more: Any) -> dict[str, Any]:
    sides = {"chosen": [chosen], "rejected": [says(rejected)]}
    return {"prompt": [user(prompt)] if isinstance(prompt, str) else prompt, **sides, **more}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Rows, suffix: str = ".jsonl") -> Path:
        path = tmp_path / f"rows{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def texts(tmp_path: Path, write: Callable[..., Path]) -> Callable[..., list[str]]:
    """Prompt + chosen of each row that is kept, as the policy reads it."""

    def texts(rows: Rows, chat: str = TOOLS, suffix: str = ".jsonl", **source: Any) -> list[str]:
        tokenizer = make_tokenizer(chat)
        section = SourceSection(path=str(write(rows, suffix)), **source)
        data = DataSection(train=(section,), cache_dir=str(tmp_path / "cache"))
        train = load_data(data, tokenizer).train
        assert train is not None
        groups: list[Group] = list(train)
        return [tokenizer.decode([*g.prompt_ids, *g.responses[0].ids]) for g in groups]

    return texts


@pytest.fixture
def show(
    tmp_path: Path, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What `prefopt show` prints of rows, errors included."""

    def show(rows: Rows, chat: str = TOOLS, *overrides: str) -> str:
        make_tokenizer(chat).save_pretrained(tmp_path / "model")
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            f"model: {{path: {tmp_path}/model}}\ndata:\n  train: [{{path: {write(rows)}}}]\n"
            f"  cache_dir: {tmp_path}/cache\nobjective: {{name: dpo}}\n"
            f"train: {{learning_rate: 1e-6}}\nrun: {{output_dir: {tmp_path}/run}}\n"
        )
        main(["show", str(recipe), "--no-color", *overrides])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return (said.out + said.err).replace("│", "")

    return show


# -- what the template is given ------------------------------------------------------------------------------


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]])
def test_a_column_of_tools_reaches_the_template(
    tools: Any, texts: Callable[..., list[str]]
) -> None:
    (text,) = texts([pair("Rain?", calls("weather", {"city": "Oslo"}), tools=tools)])
    start = f"<|im_start|>system\n{json.dumps(WEATHER)}\n<|im_end|>\n<|im_start|>user\nRain?"
    assert text.startswith(start)
    assert text.endswith('<call>weather {"city": "Oslo"}</call><|im_end|>')


def test_tools_are_shown_and_those_of_a_template_without_them_are_counted(
    show: Callable[..., str],
) -> None:
    rows = [pair("Rain?", says("Yes."), tools=[WEATHER]), pair("Sun?", says("No."), tools=None)]
    assert "0 rejected" in show(rows)
    said = show(rows, CHATML)
    assert "1 not_rendered, first: rows.jsonl row 1 (the chat template takes no tools)" in said
    assert "0 rejected" in show(rows, CHATML, "data.train.0.columns.tools=null")


@pytest.mark.parametrize("tools", ["{not json", "3", [3], {"name": "weather"}])
def test_tools_of_another_kind_are_an_error_with_file_and_row(
    tools: Any, texts: Callable[..., list[str]]
) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'tools'.*columns\.tools: null"):
        texts([pair("Rain?", says("Yes."), tools=tools)])


def test_documents_and_keywords_of_a_row_reach_the_template(
    texts: Callable[..., list[str]],
) -> None:
    given = {
        "documents": [{"text": "It rains."}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    with pytest.raises(DataError, match="prompt_not_prefix 1"):
        texts([pair("Rain?", says("Yes."), **given)])  # so the keyword was seen
    given.pop("chat_template_kwargs")
    (text,) = texts([pair("Rain?", says("Yes."), **given)])
    assert text.startswith("<doc>It rains.</doc>")


def test_a_keyword_that_the_template_does_not_read_is_named(show: Callable[..., str]) -> None:
    said = show([pair("Rain?", says("Yes."), chat_template_kwargs={"thinking": True})])
    assert "the chat template takes no thinking" in said


def test_prompts_of_rollouts_have_their_tools(tmp_path: Path, write: Callable[..., Path]) -> None:
    tokenizer = make_tokenizer(TOOLS)
    section = SourceSection(path=str(write([{"prompt": [user("Rain?")], "tools": [WEATHER]}])))
    found = load_prompts((section,), DataSection(), Renderer(tokenizer), max_new_tokens=8)
    (prompt,) = found.prompts
    assert '"weather"' in tokenizer.decode(list(prompt.ids))
    assert prompt.given == {"tools": [WEATHER]}


def test_keywords_of_a_recipe_stay_with_the_saved_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(TOOLS).save_pretrained(tmp_path / "model")

    def load(**keywords: Any) -> Any:
        where = str(tmp_path / "model")
        section = ModelSection(path=where, tokenizer=where, chat_template_kwargs=keywords)
        return load_tokenizer(section)

    def prompt(tokenizer: Any, **keywords: Any) -> str:
        ids = Renderer(tokenizer).prompt_ids([user("Hi")], RenderOptions(keywords=keywords))
        return tokenizer.decode(ids)

    assert not prompt(load()).endswith("<think></think>")
    tokenizer = load(enable_thinking=False)
    assert prompt(tokenizer).endswith("<think></think>")
    assert not prompt(tokenizer, enable_thinking=True).endswith("<think></think>")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(ModelSection(path="x", tokenizer=str(tmp_path / "saved")))
    assert prompt(again).endswith("<think></think>")
    with pytest.raises(
        ConfigError, match=r"enable_thinkin = False.*did you mean 'enable_thinking'"
    ):
        load(enable_thinkin=False)


# -- tool calls ----------------------------------------------------------------------------------------------


def test_nulls_that_a_format_fills_in_go_at_every_depth(texts: Callable[..., list[str]]) -> None:
    rows = [
        pair("Rain?", calls("weather", {"city": "Oslo"}), tools=[WEATHER]),
        pair("2 + 3?", calls("add", {"a": 2, "b": {"c": 3}}), tools=[{"name": "add"}]),
    ]
    for suffix in (".jsonl", ".parquet"):
        first, second = texts(rows, suffix=suffix)
        assert '<call>weather {"city": "Oslo"}</call>' in first
        assert '<call>add {"a": 2, "b": {"c": 3}}</call>' in second
        assert "null" not in first + second
    (kept,) = texts([pair("Rain?", calls("weather", {"city": None}))])
    assert '{"city": null}' in kept  # JSON's own null is what the row says


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_message_that_calls_tools_needs_no_content(
    content: dict[str, Any], texts: Callable[..., list[str]]
) -> None:
    for chat in (TOOLS, ON_NULL):
        (text,) = texts([pair("Rain?", calls("weather", {"city": "Oslo"}, **content))], chat)
        assert "weather" in text and '{"city": "Oslo"}' in text and "None" not in text


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_arguments_reach_a_template_in_the_form_that_it_takes(
    arguments: Any, texts: Callable[..., list[str]]
) -> None:
    for chat in (TOOLS, JOINING):
        (text,) = texts([pair("Rain?", calls("weather", arguments))], chat)
        assert '{"city": "Oslo"}</call>' in text


def test_contents_are_parts_for_a_template_that_takes_them_so(
    texts: Callable[..., list[str]],
) -> None:
    (text,) = texts([pair("Rain?", says("Yes."))], PARTS)
    assert text == "<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"


# -- what is said and not rendered ---------------------------------------------------------------------------

THOUGHT = "<think>\nTwo and two.\n</think>\n4"


@pytest.mark.parametrize(
    "response",
    [
        says(THOUGHT),
        says("4", reasoning_content="Two and two."),
        calls("add", {"a": 2}, content="4"),
    ],
    ids=["a thought", "reasoning_content", "a tool call"],
)
def test_a_response_that_is_not_rendered_whole_is_a_counted_reject(
    response: dict[str, Any], show: Callable[..., str]
) -> None:
    rows = [pair("2 + 2?", response), pair("3 + 3?", says("6"))]
    assert "1 not_rendered, first: rows.jsonl row 1 (of the response: " in show(rows, FORGETFUL)
    assert "0 rejected" in show(rows, FORGETFUL, "data.train.0.template_omits=anything")


def test_what_the_prompt_says_must_be_rendered_too(show: Callable[..., str]) -> None:
    rows = [
        pair([user("2 + 2?"), says(THOUGHT), user("And 3?")], says("6")),
        pair([{"role": "system", "content": "Be short."}, user("Hi")], says("Yo")),
        pair("3 + 3?", says("6")),
    ]
    assert "1 not_rendered" in show(rows, LATER_ONLY)
    assert "of a turn of the assistant: '<think> Two and two. </think> 4'" in show(rows, LATER_ONLY)
    assert "0 rejected" in show(rows, LATER_ONLY, "data.train.0.template_omits=history")
    deaf = CHATML.replace("messages %}", "messages if m['role'] != 'system' %}")
    said = show(rows, deaf, "data.train.0.template_omits=history")
    assert "of a turn of the system: 'Be short.'" in said


@pytest.mark.parametrize("chat", ["llama3", "alternating", "zephyr"])
def test_white_space_that_a_template_trims_is_not_missing(
    chat: str, texts: Callable[..., list[str]]
) -> None:
    assert len(texts([pair(" \n Hi\n\n you \n", says("  Yes.\n  print(1)\n\n"))], chat)) == 1


def test_what_a_template_escapes_is_said_all_the_same(texts: Callable[..., list[str]]) -> None:
    escaping = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}")
    assert len(texts([pair('Say "a\nb" & <c> é', says('"a\nb"\té'))], escaping)) == 1


# -- control tokens in texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "</s>", "<s>", "<pad>", "<unk>"])
@pytest.mark.parametrize("format", ["chat", "text"])
def test_a_control_token_in_a_text_is_a_counted_reject(
    token: str, format: str, show: Callable[..., str]
) -> None:
    rows = [
        {"prompt": f"Explain {token} now", "chosen": "It is a token.", "rejected": "No."},
        {"prompt": "Explain it\n", "chosen": f"A turn {token} ends.", "rejected": "No."},
        {"prompt": "Say\n", "chosen": "Yes.", "rejected": f"No {token} way."},
        {"prompt": "Hello\n", "chosen": "Yes.", "rejected": "No."},
    ]
    said = show(rows, CHATML, f"data.train.0.format={format}")
    assert f"3 control_token, first: rows.jsonl row 1 ({token!r} in a text)" in said


def test_all_that_a_row_gives_is_looked_at() -> None:
    renderer = Renderer(make_tokenizer(TOOLS))
    spelt = "a</s>b"
    requests = [
        Request([user("Hi")], (calls("weather", {spelt: 1}, content=""),)),
        Request([user("Hi")], (says("Yes."),), options=RenderOptions(tools=[{"name": spelt}])),
        Request([{"role": spelt, "content": "Hi"}], (says("Yes."),)),
    ]
    for found in renderer.render_batch(requests):
        assert isinstance(found, Refused) and found.reason == Reject.CONTROL_TOKEN


def test_control_tokens_that_are_meant_stand() -> None:
    renderer = Renderer(make_tokenizer("chatml"))
    meant = RenderOptions(control_tokens=("<unk>",))
    ids, _ = renderer.render([user("a <unk> b")], says("Yes."), meant)
    assert renderer.tokenizer.unk_token_id in ids
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids, response = renderer.render(rendered, "Yes.<|im_end|>", AS_RENDERED)
    assert (ids, response) == renderer.render([user("Hi")], says("Yes."))
    with pytest.raises(DataError, match=r"goes on after its end token '<\|im_end\|>'"):
        renderer.render(rendered, "Yes.<|im_end|>\nNo.<|im_end|>", AS_RENDERED)


def test_a_name_that_is_no_control_token_is_an_error(texts: Callable[..., list[str]]) -> None:
    with pytest.raises(ConfigError, match=r"control_tokens: '<\|imend\|>'.*mean '<\|im_end\|>'"):
        texts([pair("Hi", says("Yes."))], CHATML, control_tokens=("<|imend|>",))


@pytest.mark.parametrize("end", ["</s>", "<|im_start|>"])
def test_an_end_of_another_kind_at_the_end_of_a_content_is_refused(end: str) -> None:
    """Where the turn's own end stands there already, it is folded into one; no other is."""
    renderer = Renderer(make_tokenizer("chatml"))
    with pytest.raises(DataError, match="control_token"):
        renderer.render([user("Hi")], says(f"Yes.{end}"))


def test_tokens_that_open_and_close_turns_are_control_tokens_though_not_special() -> None:
    """As DeepSeek's <｜User｜>, which is not marked special; neither is <think>, and that one is said."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.add_tokens(["[user]", "[assistant]", "[end]", "<think>", "</think>"])
    renderer = Renderer(tokenizer)
    for token in ("[user]", "[assistant]", "[end]"):
        with pytest.raises(DataError, match="control_token"):
            renderer.render([user("Hi")], says(f"Yes {token} no."))
    prompt, response = renderer.render([user("Hi")], says("<think>so</think>Yes."))
    assert (
        tokenizer.decode([*prompt, *response])
        == "[user]Hi[end][assistant]<think>so</think>Yes.[end]"
    )


def test_half_a_surrogate_pair_is_refused_and_not_a_traceback() -> None:
    renderer = Renderer(make_tokenizer("chatml"))
    for request in (
        Request([user("a \ud83d b")], (says("Yes."),)),
        Request("a \ud83d\n", ("Yes.",), options=AS_RENDERED),
        Request([user("Hi")], (says("Yes.", reasoning_content="\udc00"),)),
    ):
        (found,) = renderer.render_batch([request])
        assert isinstance(found, Refused) and found.reason == Reject.BROKEN_TEXT


# -- what a template may raise -------------------------------------------------------------------------------


def test_whatever_a_template_raises_on_a_row_refuses_the_row() -> None:
    joining = CHATML.replace("{{ m['content'] }}", "{{ m['content'] + m['extra'] }}")
    renderer = Renderer(make_tokenizer(joining))
    found = renderer.render_batch([Request([user("Hi", extra=3)], (says("a", extra="b"),))])[0]
    assert isinstance(found, Refused) and found.reason == Reject.TEMPLATE_REFUSED
    with pytest.raises(ModelError, match="chat template is broken: line 1"):
        Renderer(make_tokenizer("{% for m in %}")).prompt_ids([user("Hi")])


# -- loss of single turns ------------------------------------------------------------------------------------

DIALOGUE = [user("Hi"), says("Hello."), user("1 + 1?"), says("2"), user("Bye"), says("So long.")]


def flagged(**flags: Any) -> list[dict[str, Any]]:
    """`DIALOGUE` with flags by turn: ``weight_1=0``."""
    turns = [dict(turn) for turn in DIALOGUE]
    for name, value in flags.items():
        key, _, place = name.partition("_")
        turns[int(place)][key] = value
    return turns


def with_loss(directory: Path, turns: list[dict[str, Any]], which: Any) -> list[str]:
    """The runs of tokens that carry loss, of one dialogue beside another without flags."""
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (turns, DIALOGUE)))
    tokenizer = make_tokenizer("chatml")
    section = SourceSection(path=str(path), columns=ColumnMap(turns=which))
    data = DataSection(train=(section,), cache_dir=str(directory / "cache"))
    train = load_data(data, tokenizer, stage="sft").train
    assert train is not None and len(train) == 2
    (response,) = train.group(0).responses
    counts = np.isin(np.arange(len(response.ids)), response.loss_places)
    cuts = np.flatnonzero(np.diff(counts)) + 1
    parts = zip(np.split(response.ids, cuts), np.split(counts, cuts), strict=True)
    (plain,) = train.group(1).responses  # the row beside it is as it would be alone
    assert tokenizer.decode(plain.ids[plain.loss_places]).endswith("So long.<|im_end|>")
    return [tokenizer.decode(ids).removesuffix("<|im_end|>") for ids, run in parts if run[0]]


@pytest.mark.parametrize(
    ("flags", "turns", "expected"),
    [
        ({"weight_1": 0}, "all", ["2", "So long."]),
        ({"train_1": False, "train_5": False}, "all", ["2"]),
        ({"weight_5": 0}, "all", ["Hello.", "2"]),
        ({"weight_3": 1}, "last", ["2", "So long."]),
        ({"train_1": True, "weight_5": 0, "train_2": False}, "last", ["Hello."]),
        ({"weight_0": 0, "weight_1": 1.0}, "all", ["Hello.", "2", "So long."]),
    ],
)
def test_a_turn_says_itself_whether_it_carries_loss(
    tmp_path: Path, flags: dict[str, Any], turns: str, expected: list[str]
) -> None:
    assert with_loss(tmp_path, flagged(**flags), turns) == expected


def test_flags_that_cannot_be_honoured_are_named(tmp_path: Path) -> None:
    for flags, problem in (
        ({"weight_1": 0.5}, "weight = 0.5"),
        ({"weight_0": 1}, "message of the user has"),
        ({"weight_1": 1, "train_1": False}, "flags must agree"),
    ):
        with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{problem}"):
            with_loss(tmp_path, flagged(**flags), "all")
    with pytest.raises(DataError, match=r"no row is left .*no_loss 1"):
        path = tmp_path / "none.jsonl"
        path.write_text(json.dumps({"messages": flagged(weight_5=0)}) + "\n")
        data = DataSection(train=(SourceSection(path=str(path)),), cache_dir=str(tmp_path / "c"))
        load_data(data, make_tokenizer("chatml"), stage="sft")


def test_flags_of_a_pair_may_only_say_what_its_loss_is(texts: Callable[..., list[str]]) -> None:
    assert len(texts([pair("Hi", says("Yes.", weight=1))], CHATML)) == 1
    with pytest.raises(DataError, match="the loss here is of the last turns alone"):
        texts([pair("Hi", says("Yes.", weight=0))], CHATML)


# -- what no policy of text can be shown ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (pair("Hi", says("Yes."), images=["a.png"]), "'images'"),
        (pair("Hi", says("Yes."), audio={"path": "a.wav"}), "'audio'"),
        (pair([user("Hi", images=["a.png"])], says("Yes.")), "'images'"),
        (pair([user([{"type": "image_url", "image_url": {}}])], says("Yes.")), "'image_url'"),  # type: ignore[arg-type]
        (pair([user([{"type": "input_audio", "text": "a"}])], says("Yes.")), "'input_audio'"),  # type: ignore[arg-type]
    ],
)
def test_images_and_sound_are_refused_by_name(
    row: dict[str, Any], named: str, texts: Callable[..., list[str]]
) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{named}.*only text is supported"):
        texts([row], CHATML)


def test_empty_columns_of_images_and_those_that_say_nothing_are_let_be(
    texts: Callable[..., list[str]],
) -> None:
    assert len(texts([pair("Hi", says("Yes."), images=[], video=None)], CHATML)) == 1
    rows = [pair("Hi", says("Yes."), image="logo.png")]
    assert len(texts(rows, CHATML, columns=ColumnMap(ignored=("image",)))) == 1


def test_columns_that_are_nobodys_business_are_listed_once(
    texts: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [pair("Hi", says("Yes."), source="web", meta={"a": 1}, tools=None) for _ in range(3)]
    texts(rows, CHATML)
    said = [record.message for record in caplog.records if "nothing reads" in record.message]
    assert len(said) == 1 and said[0].endswith("columns that nothing reads: source, meta")
