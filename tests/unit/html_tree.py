"""A page as its elements: what tests look at in place of its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr"}


@dataclass
class Element:
    """A tag with its attributes, and the text below it."""

    tag: str
    attributes: dict[str, str | None]
    parents: tuple[str, ...]
    text: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()

    @property
    def words(self) -> str:
        return "".join(self.text)

    def number(self, name: str) -> float:
        """An attribute's number, of ``12.5%`` too."""
        return float((self.attributes[name] or "").removesuffix("%"))


class Tree(HTMLParser):
    """Every element of a page; an unbalanced tag is an AssertionError."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, [each.tag for each in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = Element(tag, dict(attrs), tuple(each.tag for each in self._open))
        self.elements.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for each in self._open:
            each.text.append(data)

    def all(self, tag: str, class_: str | None = None) -> list[Element]:
        return [
            e for e in self.elements if e.tag == tag and (class_ is None or class_ in e.classes)
        ]

    def figure(self, caption: str) -> list[Element]:
        """What is inside the chart of that caption."""
        starts = [i for i, e in enumerate(self.elements) if e.tag == "figure"]
        ends = [*starts[1:], len(self.elements)]
        captions = [e.words for e in self.all("figcaption")]
        start, end = list(zip(starts, ends, strict=True))[captions.index(caption)]
        return [e for e in self.elements[start:end] if "figure" in e.parents]


def assert_asks_for_nothing_and_runs_nothing(tree: Tree) -> None:
    """No element that fetches or runs, no such attribute, and a policy that forbids what a style could fetch."""
    fetching = {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "image",
        "use",
    }
    assert {e.tag for e in tree.elements}.isdisjoint(fetching)
    for element in tree.elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "style", "action")
            assert name != "href" or (value or "").startswith("#")
    (policy,) = [e for e in tree.all("meta") if e.attributes.get("http-equiv")]
    assert policy.attributes["http-equiv"] == "Content-Security-Policy"
    rules = {rule.strip() for rule in (policy.attributes["content"] or "").split(";")}
    assert rules == {"default-src 'none'", "style-src 'unsafe-inline'"}
