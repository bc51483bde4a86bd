"""Rows as signals see them: ids that were sampled, ids that are made, and ids that nobody has."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipelines.base import Dropped
from data_pipelines.candidates import READS_IDS, candidates
from data_pipelines.rows import Row, RowKind
from prefopt.data.render import Renderer
from prefopt.errors import DataError, SignalError
from prefopt.recipe.registry import get_signal
from prefopt.storage.packed import pack_ids
from prefopt.types import Candidates
from tests.unit.tiny_tokenizers import TokenizerFactory

PAIR: Row = {
    "id": "p", "prompt": "How to cook rice?", "chosen": "In a pot.", "rejected": "No.", "answer": "pot",
    "score_chosen": 1.0, "info_rejected": {"ended": False},
}  # fmt: skip


def only(row: Row, kind: RowKind, renderer: Renderer | None = None) -> Candidates:
    (found,) = candidates([row], kind, renderer)
    assert isinstance(found, Candidates)
    return found


def test_a_pairs_sides_are_rendered_as_training_renders_them(
    tiny_tokenizer: TokenizerFactory,
) -> None:
    """Prompt, then text and one EOS; the rejected side was cut by the length limit, so it has none."""
    tokenizer = tiny_tokenizer(add_bos=True)
    found = only(PAIR, RowKind.PAIRS, Renderer(tokenizer))

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert found.prompt.ids == (tokenizer.bos_token_id, *ids("How to cook rice?"))
    assert found.ids == ((*ids("In a pot."), tokenizer.eos_token_id), ids("No."))
    assert found.truncated == (False, True)
    assert found.texts == ("In a pot.", "No.")
    assert found.prompt.fields == {"answer": "pot"}


def test_a_dialogue_goes_through_the_chat_template(tiny_tokenizer: TokenizerFactory) -> None:
    tokenizer = tiny_tokenizer("chatml")
    row = {**PAIR, "prompt": [{"role": "user", "content": "hi"}]}
    found = only(row, RowKind.PAIRS, Renderer(tokenizer))
    whole = tokenizer.decode([*found.prompt.ids, *found.ids[0]])
    assert whole == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nIn a pot.<|im_end|>"


def test_ids_that_were_sampled_stay_and_only_missing_ones_are_made(
    tiny_tokenizer: TokenizerFactory,
) -> None:
    """(9, 8, 7) is no rendering of "No.": a policy may spell a text in other tokens."""
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer)
    prompt, made = renderer.render("How?", "In a pot.")
    responses: list[dict[str, Any]] = [
        {"text": "No.", "ids": pack_ids([9, 8, 7])},
        {"text": "In a pot."},
    ]
    row = {"id": "g", "prompt": "How?", "prompt_ids": pack_ids(prompt), "responses": responses}
    found = only(row, RowKind.GROUPS, renderer)
    assert found.ids == ((9, 8, 7), made) and found.prompt.ids == prompt
    other = {**row, "prompt_ids": pack_ids([5])}
    with pytest.raises(DataError, match="row g: was sampled after other prompt ids"):
        candidates([other], RowKind.GROUPS, renderer)


def test_a_prompt_that_the_template_refuses_is_dropped_alone(
    tiny_tokenizer: TokenizerFactory,
) -> None:
    renderer = Renderer(tiny_tokenizer("alternating"))
    refused = {**PAIR, "id": "r", "prompt": [{"role": "system", "content": "be brief"}]}
    fine = {**PAIR, "prompt": [{"role": "user", "content": "hi"}]}
    first, second = candidates([refused, fine], RowKind.PAIRS, renderer)
    assert isinstance(first, Dropped) and first.reason == "template_refused"
    assert isinstance(second, Candidates)


@pytest.mark.parametrize(
    "name",
    [
        "length_penalty", "repetition_penalty", "truncation_penalty", "truncation_value", "final_number",
        "exact_match", "multiple_choice", "constraints",
    ],
)  # fmt: skip
def test_who_reads_ids_that_are_not_there_is_told_so(name: str) -> None:
    """An empty tuple in their place would score as a response without length and repetition."""
    group = only(PAIR, RowKind.PAIRS)
    signal = get_signal(name).fn()
    try:
        signal.score([group])
        told = False
    except SignalError as error:
        assert "row p has text alone" in str(error) and "score.tokenizer" in str(error)
        told = True
    except DataError:  # the row has no column for it: ids were not what it missed
        told = False
    finally:
        signal.close()
    assert told == (name in READS_IDS)
