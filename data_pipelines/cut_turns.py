"""A response cut in two: its beginning joins the prompt, the rest is what a pair compares.

For plain text the prompt simply grows. A chat template has no way to say "the assistant has begun": a prompt that
ends with an assistant's message closes that turn and opens another, and the policy would be trained after a
context it never meets. So a dialogue is rendered to text, with the response, and cut there: the row is a plain
text one whose ids are those of the dialogue, which is tried for every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_pipelines.base import Dropped
from prefopt.data.options import PLAIN, RenderOptions
from prefopt.errors import DataError
from prefopt.recipe.schema import ModelSection
from prefopt.recipe.yaml_file import Document, KeyPath

if TYPE_CHECKING:
    from prefopt.data.render import Renderer


@dataclass(frozen=True)
class Cut:
    """A plain-text prompt that ends with the shared beginning, and what follows it."""

    prompt: str
    response: str


def cut_turn(
    prompt: str | Sequence[Any],
    response: str,
    shared: str,
    renderer: Renderer | None,
    row_id: str,
    options: RenderOptions = PLAIN,
) -> Cut | Dropped:
    """The prompt with ``shared``, and the rest of ``response``.

    Args:
        prompt: plain text, or chat messages.
        response: begins with ``shared``.
        shared: "" leaves plain text as it is, and turns a dialogue into text all the same: rows of one set have
            one shape.
        renderer: of the tokenizer that will be trained; needed for chat messages.
        row_id: for messages.
        options: what the row is rendered with beside its messages.

    Returns: the cut; Dropped where the chat template does not write the response right after what opens the
        assistant's turn, or where the text would be tokenised otherwise than the dialogue.
    Raises: DataError for chat messages without a renderer; ModelError for a tokenizer without a chat template.
    """
    if isinstance(prompt, str):
        return Cut(prompt + shared, response[len(shared) :])
    if renderer is None:
        raise DataError(
            f"row {row_id}: its prompt is a dialogue, and only a chat template can say how an answer that has "
            "begun reads. Set the stage's tokenizer (tree.tokenizer, step_advantage.tokenizer) to the directory "
            "of the model that will be trained"
        )
    turns = [*prompt, {"role": "assistant", "content": response}]
    texts = _rendered(renderer, prompt, turns, options)
    if isinstance(texts, Dropped):
        return texts
    opened, whole = texts
    if not whole.startswith(opened + response):
        return Dropped("template_changes_text", "the template strips or rewrites what it is given")
    end = whole[len(opened) + len(response) :]
    # Templates write a line break after a turn's end; the renderer cuts it off, where there is an end before it.
    cut = Cut(opened + shared, response[len(shared) :] + (end.rstrip() or end))
    return _same_ids(renderer, prompt, turns[-1], cut, options)


def turn_renderer(tokenizer: str | None, chat_template: str | None) -> Renderer | None:
    """What renders dialogues, where a stage names a tokenizer. Raises: ModelError if it cannot be loaded."""
    if tokenizer is None:
        return None
    from prefopt.data.render import Renderer
    from prefopt.model.load import load_tokenizer

    # named twice: a folder with a tokenizer alone is no model
    section = ModelSection(path=tokenizer, tokenizer=tokenizer, chat_template=chat_template)
    return Renderer(load_tokenizer(section))


def renderer_basis(tokenizer: str | None, chat_template: str | None) -> Mapping[str, Any]:
    """What rendered rows depend on beside the settings; nothing without a tokenizer."""
    renderer = turn_renderer(tokenizer, chat_template)
    if renderer is None:
        return {}
    from prefopt.data.render import RENDERER_VERSION
    from prefopt.data.tokenise import tokenizer_hash

    return {"tokenizer": tokenizer_hash(renderer.tokenizer), "renderer": RENDERER_VERSION}


def template_problems(
    label: str, tokenizer: str | None, chat_template: str | None, document: Document, path: KeyPath
) -> list[str]:
    """A chat template without the tokenizer that it goes with."""
    if chat_template is None or tokenizer is not None:
        return []
    where = document.origin((*path, "chat_template"))
    return [f"{where}{label}.chat_template: would be ignored without {label}.tokenizer; set it"]


def _rendered(
    renderer: Renderer, prompt: Sequence[Any], turns: Sequence[Any], options: RenderOptions
) -> tuple[str, str] | Dropped:
    """The dialogue up to where the policy answers, and with its answer."""
    from prefopt.data.rows import Refused

    opened = renderer.template.text(prompt, options, generate=True)
    whole = renderer.template.text(turns, options)
    for found in (opened, whole):
        if isinstance(found, Refused):
            return Dropped(str(found.reason), found.detail)
    return str(opened), str(whole)


def _same_ids(
    renderer: Renderer, prompt: Sequence[Any], turn: Any, cut: Cut, options: RenderOptions
) -> Cut | Dropped:
    """The cut, if it renders to the ids of the dialogue, with its prompt as a prefix of them."""
    from prefopt.data.options import AS_RENDERED
    from prefopt.data.render import Request
    from prefopt.data.rows import Refused

    requests = [
        Request(list(prompt), (turn,), options=options),
        Request(cut.prompt, (cut.response,), options=AS_RENDERED),
    ]
    ids = []
    for found in renderer.render_batch(requests):
        if isinstance(found, Refused):
            return Dropped(str(found.reason), found.detail)
        ids.append(found.prompt_ids + found.responses[0])
    return cut if ids[0] == ids[1] else Dropped("renders_differently")
