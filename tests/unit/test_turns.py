"""`columns.turns: all`: every turn of the assistant carries loss, and what lies between is context.

Which tokens those are is asked of the chat template's own `{% generation %}` marks, which our renderer does not
read, and of `turns: last` on dialogues that were cut; the loss, of a plain torch loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from prefopt.commands.show import show
from prefopt.data import DataBundle, load_data
from prefopt.data.groups import GroupList
from prefopt.data.samples import SampleNeeds
from prefopt.errors import ConfigError
from prefopt.model.collate import make_batch, response_mask
from prefopt.model.logps import LogpModel
from prefopt.recipe.checks import check
from prefopt.recipe.schema import ColumnMap, DataSection, Recipe, SourceSection
from prefopt.training.metrics import read_metrics
from prefopt.types import Group, Response
from prefopt.wiring import train
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import CHATML, make_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that says itself which tokens are the assistant's."""
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>')[-1] if not loop.last else m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3-like: thoughts of earlier turns are dropped."""

Turns = list[dict[str, str]]


def dialogue(*contents: str) -> Turns:
    """User and assistant by turns; a first content that begins with ``!`` is the system's."""
    turns: Turns = []
    for content in contents:
        if content.startswith("!"):
            turns.append({"role": "system", "content": content[1:]})
            continue
        asked = bool(turns) and turns[-1]["role"] == "user"
        turns.append({"role": "assistant" if asked else "user", "content": content})
    return turns


DIALOGUES = [
    dialogue("Hi", "Hello, what can I do?", "Count to three.", "one two three", "On!", "four"),
    dialogue("What is rice?", "A grain that you cook in water."),
    dialogue("!Be short.", "And now?", "No.", "Why?", "I am not sure about this."),
    *(dialogue("go " * i, "so " * (7 - i), f"and {i}?", "well " * i) for i in range(1, 6)),
]
ONE_TURN = [turns[:2] for turns in (DIALOGUES[0], DIALOGUES[1], *DIALOGUES[3:])]


def write(path: Path, dialogues: list[Turns]) -> Path:
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in dialogues))
    return path


def load(directory: Path, dialogues: list[Turns], tokenizer: Any, turns: Any = "all") -> DataBundle:
    path = write(directory / f"{turns}-{len(dialogues)}.jsonl", dialogues)
    columns = ColumnMap(rejected=None, turns=turns)
    section = SourceSection(path=str(path), columns=columns)
    data = DataSection(train=(section,), cache_dir=str(directory / "cache"))
    return load_data(data, tokenizer, stage="sft")


def groups_of(bundle: DataBundle) -> list[Group]:
    assert bundle.train is not None
    return list(bundle.train)


def whole(group: Group) -> tuple[list[int], list[bool]]:
    """Ids of prompt and response, and which of them carry loss."""
    prompt, (response,) = len(group.prompt_ids), group.responses
    mask = np.zeros(prompt + len(response.ids), bool)
    mask[prompt + response.loss_places] = True
    return [*group.prompt_ids, *response.ids], mask.tolist()


def marked(turns: Turns) -> tuple[list[int], list[bool]]:
    """The template's ids of a dialogue up to its last end token, and its own mask of the assistant's."""
    found: Any = make_tokenizer(MARKED).apply_chat_template(
        turns, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = found["assistant_masks"]
    length = len(mask) - mask[::-1].index(1)
    return found["input_ids"][:length], [value == 1 for value in mask[:length]]


# --- which tokens ---------------------------------------------------------------------------------------


def test_ids_are_the_templates_and_the_mask_is_its_own(tmp_path: Path) -> None:
    bundle = load(tmp_path, DIALOGUES, make_tokenizer(CHATML))
    groups = groups_of(bundle)
    assert [whole(group) for group in groups] == [marked(turns) for turns in DIALOGUES]
    assert bundle.train is not None
    counted = [sum(mask) for _, mask in map(marked, DIALOGUES)]
    assert bundle.train.num_loss_tokens[:, 0].tolist() == counted
    assert [int(n[0]) for n in GroupList(groups).num_loss_tokens] == counted
    masks = [
        mask[len(group.prompt_ids) :]
        for group, (_, mask) in zip(groups, map(marked, DIALOGUES), strict=True)
    ]
    for row, mask in zip(response_mask(make_batch(groups)).tolist(), masks, strict=True):
        assert row == mask + [False] * (len(row) - len(mask))


@pytest.mark.parametrize("chat", ["chatml", "llama3", "zephyr", "alternating"])
def test_a_turn_has_the_tokens_that_it_has_as_a_last_turn(chat: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat, add_bos=chat != "chatml")
    dialogues = [turns for turns in DIALOGUES if chat != "alternating" or len(turns) % 2 == 0]
    for place, group in enumerate(groups_of(load(tmp_path, dialogues, tokenizer))):
        turns = dialogues[place]
        ids, mask = whole(group)
        wanted = np.zeros(len(ids), bool)
        ends = [i + 1 for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        cuts = [turns[:end] for end in ends]
        for cut in groups_of(load(tmp_path, cuts, tokenizer, "last")):
            end = cut.num_tokens
            assert ids[:end] == [*cut.prompt_ids, *cut.responses[0].ids]
            wanted[len(cut.prompt_ids) : end] = True
        assert mask == wanted.tolist()
        assert len(group.prompt_ids) == mask.index(True)


def test_dialogues_of_one_turn_are_those_of_turns_last(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("llama3", add_bos=True)
    found, last = (
        groups_of(load(tmp_path, ONE_TURN, tokenizer, turns)) for turns in ("all", "last")
    )
    wanted = [(list(group.prompt_ids), group.responses) for group in last]
    assert [(list(group.prompt_ids), group.responses) for group in found] == wanted


@pytest.mark.parametrize("template", [FORGETFUL, "plain"], ids=["drops thoughts", "ends no turn"])
def test_a_row_whose_template_renders_earlier_turns_otherwise_is_a_counted_reject(
    template: str, tmp_path: Path
) -> None:
    bad = dialogue("Hi", "<think>who?</think>Hello", "Bye", "<think>oh</think>Farewell")
    bundle = load(tmp_path, [bad, *ONE_TURN], make_tokenizer(template))
    assert bundle.reject_counts == {"turn_not_prefix": 1}
    assert len(groups_of(bundle)) == len(ONE_TURN)
    (line,) = bundle.sources[0][1].rejects()
    assert line["row"] == 1 and "the dialogue up to a turn has" in line["detail"]


def test_an_opening_turn_of_the_assistant_is_context_and_an_empty_one_refuses_its_row(
    tmp_path: Path,
) -> None:
    opening = [{"role": "assistant", "content": "Welcome!"}, *DIALOGUES[0]]
    empty = dialogue("Hi", "  ", "Bye", "Farewell")
    bundle = load(tmp_path, [opening, empty], make_tokenizer(CHATML))
    (group,) = groups_of(bundle)
    ids, mask = marked(opening)
    greeting = mask.index(False, mask.index(True))
    assert whole(group) == (ids, [False] * greeting + mask[greeting:])
    assert bundle.reject_counts == {"empty_chosen": 1}


def test_a_mask_says_something_of_every_token_and_some_carry_loss() -> None:
    assert Response((3, 4), loss_mask=[True, True]) == Response((3, 4))
    one = Response((3, 4, 5), loss_mask=[True, False, True])
    other = Response((3, 4, 5), loss_mask=[False, True, True])
    assert one != other and hash(one) != hash(other)
    groups = [[Group("g", (1,), (response,))] for response in (one, other, Response((3, 4, 5)))]
    assert len({GroupList(each).fingerprint for each in groups}) == 3
    for ids, mask, version in (
        ((3, 4), [True], None),
        ((3,), [False], None),
        ((3, 4), [False, True], 2),
    ):
        with pytest.raises(ValueError, match="loss mask"):
            Response(ids, version=version, loss_mask=mask)
    with pytest.raises(ValueError, match="pair"):
        Group("g", (1,), (one, other), ((0, 1),))


# --- what is trained --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_log_probs_are_those_of_the_plain_forward_where_the_mask_counts(
    packed: bool, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(CHATML)
    groups = groups_of(load(tmp_path, DIALOGUES, tokenizer))
    model = tiny_model("llama", vocab_size=len(tokenizer)).eval()
    with torch.no_grad():
        wanted = []
        for ids, mask in map(whole, groups):
            scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            own = scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            start = mask.index(True) - 1
            wanted.append((own * torch.tensor(mask[1:]))[start:])
        logps = LogpModel(model, packed=packed)
        layout = logps.layout(groups)
        found = logps(layout)
    assert layout.targets.numel() == sum(sum(mask) for _, mask in map(whole, groups))
    assert_close(found, nn.utils.rnn.pad_sequence(wanted, batch_first=True), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(CHATML)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(base: Path, tmp_path: Path) -> MakeRecipe:
    """``make_recipe(name, dialogues, …, **train)``: SFT of full weights, all rows a step."""

    def make(
        name: str = "run",
        dialogues: list[Turns] = DIALOGUES,
        *,
        layout: str = "packed",
        held_out: list[Turns] | None = None,
        turns: str = "all",
        **settings: Any,
    ) -> Recipe:
        columns = {"rejected": None, "turns": turns}
        path = write(tmp_path / f"{name}.jsonl", dialogues)
        data: dict[str, Any] = {"train": [{"path": str(path), "columns": columns}]}
        if held_out is not None:
            other = write(tmp_path / f"{name}-held-out.jsonl", held_out)
            data["eval"] = [{"path": str(other), "columns": columns}]
        fixed = {"learning_rate": 1e-3, "lr_scheduler": "constant", "warmup_frac": 0.0}
        sizes = {"global_batch_size": len(dialogues), "micro_batch_size": 3, "max_steps": 2}
        return Recipe.model_validate(
            {
                "stage": "sft",
                "model": {"path": str(base), "layout": layout},
                "data": {**data, "cache_dir": str(tmp_path / "cache")},
                "train": {**fixed, **sizes, "max_grad_norm": None, **settings},
                "run": {"output_dir": str(tmp_path / name)},
            }
        )

    return make


def logged(run_dir: Path, name: str = "loss/total") -> list[float]:
    return [row[name] for row in read_metrics(run_dir / "metrics.jsonl") if name in row]


def loss_by_hand(model: nn.Module, dialogues: list[Turns]) -> torch.Tensor:
    """Cross-entropy on exactly the tokens that the template marks, over their number; a row at a time."""
    total, count = torch.zeros(()), 0
    for ids, mask in map(marked, dialogues):
        logits, counts = model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(mask[1:])
        targets = torch.tensor(ids[1:])[counts]
        total = total + F.cross_entropy(logits[counts], targets, reduction="sum")
        count += sum(mask)
    return total / count


def test_loss_and_gradient_are_those_of_the_assistants_tokens(
    make_recipe: MakeRecipe, base: Path
) -> None:
    """Two AdamW steps; the second's loss and gradient are of weights that the first has moved."""
    run_dir = train(make_recipe(held_out=DIALOGUES[3:5]))
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    held_out = [loss_by_hand(model, DIALOGUES[3:5]).item()]
    losses, norms = [], []
    for _ in range(2):
        loss = loss_by_hand(model, DIALOGUES)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), torch.inf).item())
        optimizer.step()
        losses.append(loss.item())
    held_out.append(loss_by_hand(model, DIALOGUES[3:5]).item())
    assert logged(run_dir) == pytest.approx(losses, rel=1e-5)
    assert logged(run_dir, "train/grad_norm") == pytest.approx(norms, rel=1e-5)
    assert logged(run_dir, "eval/loss/total") == pytest.approx(held_out, rel=1e-5)
    counted = [sum(mask) for _, mask in map(marked, DIALOGUES)]
    assert logged(run_dir, "tokens/sample") == pytest.approx([np.mean(counted)] * 2)
    seen = sum(len(ids) for ids, _ in map(marked, DIALOGUES))
    assert logged(run_dir, "tokens/seen") == [seen, 2 * seen]
    saved = dict(AutoModelForCausalLM.from_pretrained(run_dir / "final").named_parameters())
    for name, weight in model.named_parameters():
        # AdamW moves by its rate whatever a gradient's size: where that is rounding, by a part of it.
        assert_close(saved[name], weight, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_every_split_and_layout_of_a_batch_takes_the_same_steps(make_recipe: MakeRecipe) -> None:
    """Eight dialogues in steps of five: the last step holds three, of other numbers of turns."""
    splits: list[dict[str, Any]] = [
        {"micro_batch_size": 5},
        {"micro_batch_size": 2},
        {"micro_batch_size": 1, "layout": "padded"},
        {"micro_batch_size": 3, "layout": "padded"},
        {"micro_batch_size": None, "micro_batch_tokens": 100},
    ]
    found = []
    for index, split in enumerate(splits):
        settings = {"held_out": DIALOGUES[:3], "global_batch_size": 5, **split}
        run_dir = train(make_recipe(f"run-{index}", **settings))
        names = ("loss/total", "train/grad_norm", "eval/loss/total", "tokens/seen")
        found.append([logged(run_dir, name) for name in names])
    for other in found[1:]:
        assert_close(other, found[0], rtol=2e-5, atol=0)


def test_dialogues_of_one_turn_train_to_the_bits_of_turns_last(make_recipe: MakeRecipe) -> None:
    runs = [train(make_recipe(turns, ONE_TURN, turns=turns)) for turns in ("all", "last")]
    files = [run_dir / "final" / "model.safetensors" for run_dir in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    for name in ("loss/total", "train/grad_norm"):
        assert logged(runs[0], name) == logged(runs[1], name)


# --- what it looks like, and where it is refused ------------------------------------------------------------


def test_show_prints_turns_with_loss_and_the_context_between(
    make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    show(make_recipe(), 1, color=False)
    output = capsys.readouterr().out
    tokenizer = make_tokenizer(CHATML)
    answer, between = (len(tokenizer(text)["input_ids"]) for text in (
        "four<|im_end|>", "\n<|im_start|>user\nOn!<|im_end|>\n<|im_start|>assistant\n"
    ))  # fmt: skip
    assert output.count("response (") == 3 and output.count("context (") == 2
    assert f"context ({between} tokens, no loss)\n" in output
    assert f"response ({answer} tokens, loss on every token)\n" in output
    assert output.count("response ends with '<|im_end|>'") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": "preference", "objective": {"name": "simpo"}}, "is for rows that stage = 'sft'"),
        ({"stage": "preference", "objective": {"name": "wbc"}}, "is for rows that stage = 'sft'"),
        ({"stage": "reward_model"}, "is for rows that stage = 'sft'"),
        ({"format": "text"}, "plain text has no turns"),
    ],
)
def test_the_check_refuses_turns_where_the_last_alone_is_read(
    make_recipe: MakeRecipe, changes: dict[str, Any], message: str
) -> None:
    raw = make_recipe().model_dump(exclude_unset=True)
    (source,) = raw["data"]["train"]
    source["columns"] = {"turns": "all"}
    if "format" in changes:
        source["format"] = changes.pop("format")
    with pytest.raises(ConfigError, match=rf"data\.train\.0\.columns\.turns = 'all': {message}"):
        check(Recipe.model_validate({**raw, **changes}))


def test_sources_of_prompts_have_no_turns_with_loss(make_recipe: MakeRecipe) -> None:
    raw = make_recipe().model_dump(exclude_unset=True)
    raw["eval"] = {"generation": {"prompts": raw["data"]["train"]}}
    with pytest.raises(ConfigError, match=r"eval\.generation\.prompts\.0\.columns\.turns = 'all'"):
        check(Recipe.model_validate(raw))


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ({"prompt": "a\n", "chosen": "b"}, {"stage": "sft"}),
        ({"messages": DIALOGUES[0], "rejected": DIALOGUES[0]}, {}),
        ({"prompt": "a\n", "response": "b", "reward": 1.0}, {"samples": SampleNeeds(reward=True)}),
    ],
    ids=["plain text", "pairs", "samples"],
)
def test_the_data_refuse_it_too_once_a_row_says_what_they_are(
    row: dict[str, Any], how: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    section = SourceSection(path=str(tmp_path / "rows.jsonl"), columns=ColumnMap(turns="all"))
    data = DataSection(train=(section,), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"columns\.turns = all"):
        load_data(data, make_tokenizer(CHATML), **how)
