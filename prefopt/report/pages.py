"""From a template and values to one HTML file: every value is escaped, whatever markup an answer holds."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from prefopt.storage.cache import write_whole

TEMPLATES = Path(__file__).with_name("templates")
"""``page.html.j2``, which a page extends; ``parts.html.j2``, what its body is made of; the style sheet."""

# What no HTML document may hold: control characters, and halves of surrogate pairs, which are not UTF-8.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def render(template: Path, **values: Any) -> str:
    """The page that a template makes of ``values``.

    Args:
        template: a ``.html.j2`` file of the caller's; it extends ``page.html.j2``.
        values: what the template names; a name that is not among them is an error of the template.
    """
    made = environment(template.parent).get_template(template.name).render(values)
    return _FORBIDDEN.sub("\ufffd", made) + "\n"


@functools.cache
def environment(folder: Path = TEMPLATES) -> Environment:
    """Jinja over the templates of a folder and of this room. Only markup that a template made is not escaped."""
    made = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["thousands"] = lambda count: f"{count:,}"
    return made


def write_text(path: Path, text: str) -> None:
    """Writes a page, or the JSON beside it, whole or not at all; half characters as ``\\udXXX``, as in JSON.

    Raises: DataError if it cannot be written.
    """
    data = text.encode(errors="backslashreplace")
    write_whole(path, data, "Make room, or name another folder with --output")
