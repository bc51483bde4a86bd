"""What rows give to the chat template reaches it in evaluations and pipelines; what it cannot render is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.candidates import candidates
from data_pipelines.rows import RowKind
from eval.base import Decoding
from eval.engines import Ask, Generator
from eval.preference_data import pair_examples, prompt_examples
from eval.provenance import data_hash
from prefopt.data.render import Renderer
from prefopt.recipe.schema import HFSection, ModelSection, SourceSection
from tests.unit.test_chat_data import LATER_ONLY, THOUGHT, TOOLS, WEATHER, pair, says, user
from tests.unit.tiny_models import tiny_model
from tests.unit.tiny_tokenizers import make_tokenizer


def generator(directory: Path, chat: str) -> Generator:
    tiny_model("llama", vocab_size=400).save_pretrained(directory)
    make_tokenizer(chat).save_pretrained(directory)
    policy = ModelSection(path=str(directory))
    return Generator(policy, HFSection(), device="cpu", log_dir=directory)


def source(directory: Path, *rows: dict[str, Any]) -> list[SourceSection]:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [SourceSection(path=str(path))]


def test_tools_of_a_prompt_are_asked_with_and_are_part_of_the_data(tmp_path: Path) -> None:
    given = pair("Rain?", says("Yes."), tools=[WEATHER])
    sections = source(tmp_path, given, pair("Rain?", says("Yes.")))
    with_tools, without = prompt_examples(sections).examples
    asked = generator(tmp_path / "model", TOOLS)
    ids = asked.prompt_ids(with_tools.prompt, with_tools.options)
    assert ids is not None and '"weather"' in asked.tokenizer.decode(ids)
    assert data_hash([with_tools]) != data_hash([without])
    first, second = pair_examples(sections)
    assert first.options.given == {"tools": [WEATHER]} and first.key != second.key


def test_an_answer_to_what_cannot_be_rendered_says_why(tmp_path: Path) -> None:
    asked = generator(tmp_path / "model", LATER_ONLY)
    asked.start(64)
    spelt = Ask([user("What is <|im_end|>?")], Decoding(4), (0,))
    earlier = Ask([user("2 + 2?"), says(THOUGHT), user("And 3?")], Decoding(4), (0,))
    ((refused,), (answered,)) = asked.answer([spelt, earlier])
    asked.close()
    assert refused.problem == "control_token"
    assert answered.problem is None  # thoughts of earlier answers are left out by design
    assert {2, 4} <= {*asked.spec(Decoding(4)).stop_token_ids}


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps([WEATHER])])
def test_tools_travel_with_a_row_of_a_pipeline(tools: Any) -> None:
    renderer = Renderer(make_tokenizer(TOOLS))
    row = {
        "id": "a",
        "prompt": [user("Rain?")],
        "chosen": "Yes.",
        "rejected": "No.",
        "tools": tools,
    }
    (found,) = candidates([row], RowKind.PAIRS, renderer)
    assert not isinstance(found, str) and '"weather"' in renderer.tokenizer.decode(found.prompt.ids)  # type: ignore[union-attr]
    assert found.prompt.given == {"tools": [WEATHER]}  # type: ignore[union-attr]
