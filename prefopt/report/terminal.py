"""rich's console for text that others wrote, in part: it must not act on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from prefopt.shown import redacted, shown, visible


class Terminal(Console):
    """rich's console, but ``[red]`` in a text is text, and whatever is printed is `shown`.

    For markup of our own: `rich.text.Text.from_markup`, with nothing of others in it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich's, which lets the escape character through."""
        if isinstance(
            renderable, str | Text
        ):  # before it is measured and folded: nothing of it is cut off
            renderable = _shown(renderable)
        for segment in super().render(renderable, options):
            if segment.control is None:
                yield Segment(visible(segment.text), segment.style)
            else:
                yield segment

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's: a cell or a title that is given as a string."""
        return super().render_str(shown(text), **options)


def _shown(text: str | Text) -> str | Text:
    """The text as it may be shown, each part in its style."""
    if isinstance(text, str):
        return shown(text)
    if redacted(text.plain) != text.plain:
        return Text(shown(text.plain), text.style, justify=text.justify, overflow=text.overflow)
    cuts = [place for place, char in enumerate(text.plain) if visible(char) != char]
    if not cuts:
        return text
    found = text.blank_copy()
    for part in text.divide(sorted({*cuts, *(cut + 1 for cut in cuts)} - {0})):
        escape = visible(part.plain)
        found.append_text(part if escape == part.plain else Text(escape, part.style))
    return found
