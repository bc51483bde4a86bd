"""What a YAML text says: plain values, the line of each, and a sentence for all that YAML would guess or execute.

PyYAML parses; the values are made here, node by node, so that each error knows its line and an alias cannot grow
without bound. YAML 1.1 (PyYAML) and 1.2 (most editors, and JSON) read some scalars differently: those are refused
and not guessed. A date is read as the text it is written as.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from prefopt.errors import ConfigError

KeyPath = tuple[str | int, ...]

_MOST_VALUES = 100_000
"""Of a file with its aliases written out. Every reader after this one walks all of them."""
_MOST_CHARACTERS = 8 << 20
_MOST_DEEP = 50
_SHOWN = 60
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_MERGE = f"{_TAG}merge"
_BOOLEANS = re.compile(r"(?i:yes|no|on|off)")
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+([.eE].*)?")
_UNDERSCORES = re.compile(r"[-+0-9]*_.*")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(_[0-9]{3})+(\.[0-9]*)?")
_UNPRINTABLE = re.compile("[\x00\ud800-\udfff]")


@dataclass
class Values:
    """The values of a text, and where they stand."""

    raw: Any = None
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Key path -> ``line 12``."""
    problems: list[str] = field(default_factory=list)
    """A sentence each, with the line; the value is what YAML 1.1 makes of it, or the text."""


def parse_yaml(text: str) -> Values:
    """The values of a YAML text.

    Raises: ConfigError with a line for what is no YAML, or is made to fill memory.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(
            f"{len(text):,} characters long, and settings fit into {_MOST_CHARACTERS:,}: is it a data file?"
        )
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"line {line}: not valid YAML: the character U+{int(error.character):04X} must not stand in it"
        ) from error
    try:
        node = loader.get_single_node()
        builder = _Builder(loader)
        if node is not None:
            builder.values.raw = builder.build(node, (), ())
        return builder.values
    except yaml.YAMLError as error:
        raise ConfigError(f"{_at(error)}not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"line {loader.line + 1}: {_deep(_MOST_DEEP)}") from error
    # a character escape beyond Unicode, as chr() has it
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"line {loader.line + 1}: not valid YAML: {one_line(error)}") from error
    finally:
        loader.dispose()


def dump_yaml(values: Any) -> str:
    """YAML from which `parse_yaml` reads ``values`` again."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def is_text(text: str) -> bool:
    """Whether a name can be written at all: no NUL, no half of a surrogate pair."""
    return _UNPRINTABLE.search(text) is None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """SafeLoader whose floats follow YAML 1.2: PyYAML reads ``1e-6`` as a string. Dates stay text."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number, and has no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        del data
        return True


_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
# PyYAML takes the first resolver that matches, and its integer resolver comes before this one: plain integers
# stay integers.
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+0123456789."))
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in found if tag not in (f"{_TAG}timestamp", f"{_TAG}value")
    ]
    for first, found in _Loader.yaml_implicit_resolvers.items()
}


class _Builder:
    """Makes values of nodes; each use of an alias anew, and counted."""

    def __init__(self, loader: _Loader) -> None:
        self.values = Values()
        self._loader = loader
        self._left = _MOST_VALUES

    def build(self, node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> Any:
        """The value of ``node`` at ``path``. Args: ``above``: the nodes it stands in."""
        line = f"line {node.start_mark.line + 1}"
        self._left -= 1
        if self._left < 0:
            raise ConfigError(
                f"{line}: with its aliases written out the file holds more than {_MOST_VALUES:,} values"
            )
        if id(node) in above:
            raise ConfigError(f"{line}: {_shown(path)}holds itself through an alias")
        if len(above) > _MOST_DEEP:
            raise ConfigError(f"{line}: {_deep(_MOST_DEEP)}")
        if node.tag not in _PLAIN_TAGS:
            self._problem(
                node, path, f"the tag {node.tag.replace(_TAG, '!!')} is not read: settings are texts, numbers, "
                "true, false, null, lists and sections; leave the tag out",
            )  # fmt: skip
        within = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, within)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, (*path, n), within) for n, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _item(self, node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> Any:
        self.values.origins[path] = f"line {node.start_mark.line + 1}"
        return self.build(node, path, above)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[int, ...]) -> Any:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged = {**self._merged(value_node, path, above), **merged}
                continue
            key, line = self._key(key_node, path), key_node.start_mark.line + 1
            if key in lines:
                name = ".".join(map(str, (*path, key)))
                self.values.problems.append(
                    f"{name}: given twice, on lines {lines[key]} and {line}; keep one"
                )
            lines[key] = line
            own[key] = self._item(value_node, (*path, key), above)
            self.values.origins[(*path, key)] = f"line {line}"
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> dict[str, Any]:
        """What ``<<`` brings: of several sections an earlier one wins."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, Any] = {}
        for each in nodes:
            if not isinstance(each, yaml.MappingNode):
                self._problem(each, (*path, "<<"), "must be a section, or a list of sections")
                continue
            found = {**self.build(each, path, above), **found}
        return found

    def _key(self, node: yaml.Node, path: KeyPath) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a name, and not a list or a section", node.start_mark
            )
        if node.tag != f"{_TAG}str":
            self._problem(node, (*path, node.value), 'a key is text; put it in quotes: "…"')
        self._check_text(node, (*path, node.value))
        return node.value

    def _scalar(self, node: Any, path: KeyPath) -> Any:
        if node.style is None and (said := _ambiguous(node)) is not None:
            self._problem(node, path, said)
        self._check_text(node, path)
        try:
            value = self._loader.construct_object(node)
        # int(), float() and PyYAML's table of booleans, of a scalar with a tag that it does not fit
        except (ValueError, OverflowError, KeyError, AttributeError, yaml.YAMLError) as error:
            value = node.value
            if node.tag in _PLAIN_TAGS:
                self._problem(
                    node, path, f"cannot be read as {node.tag.removeprefix(_TAG)}: {_cause(error)}"
                )
            return value
        if isinstance(value, float) and math.isinf(value) and ".inf" not in node.value.lower():
            self._problem(node, path, "is beyond what a float holds")
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and abs(value) > sys.float_info.max
        ):
            self._problem(node, path, "is beyond what a float holds")
            return node.value  # Python itself cannot print it
        return value if isinstance(value, str | int | float | type(None)) else node.value

    def _check_text(self, node: Any, path: KeyPath) -> None:
        found = _UNPRINTABLE.search(node.value)
        if found is None:
            return
        name = "a NUL character" if found.group() == "\0" else "half of a surrogate pair"
        self._problem(node, path, f"holds {name}; write the character itself")
        node.value = _UNPRINTABLE.sub("?", node.value)

    def _problem(self, node: yaml.Node, path: KeyPath, said: str) -> None:
        name = _UNPRINTABLE.sub("?", ".".join(map(str, path)))
        value = _short(node.value) if isinstance(node, yaml.ScalarNode) else ""
        shown = " = ".join(part for part in (name, value) if part)
        self.values.problems.append(f"line {node.start_mark.line + 1}: {shown}: {said}")


def _ambiguous(node: Any) -> str | None:
    """What is to be written instead of a scalar that YAML 1.1 and 1.2 read differently."""
    text, tag = str(node.value), node.tag
    if tag == f"{_TAG}bool" and _BOOLEANS.fullmatch(text):
        value = "true" if text.lower() in ("yes", "on") else "false"
        return f'YAML 1.1 reads this as {value} and YAML 1.2 as text; write {value}, or "{text}"'
    if tag not in (f"{_TAG}int", f"{_TAG}float"):
        return None
    if text.lower().lstrip("+-").startswith("0b"):
        return (
            f'YAML 1.1 reads this as a binary number; write it in decimal, or "{text}" for the text'
        )
    if _SEXAGESIMAL.fullmatch(text):
        return f'YAML 1.1 reads this as a number to base 60; write the number, or "{text}" for the text'
    if _LEADING_ZERO.fullmatch(text):
        plain = text.lstrip("+-0_") or "0"
        return (
            f"a number with leading zeros is octal to YAML 1.1 and decimal to YAML 1.2; write {plain}, or "
            f'"{text}" for the text'
        )
    if _UNDERSCORES.fullmatch(text) and not _THOUSANDS.fullmatch(text):
        return f'YAML 1.1 leaves the underscores out; write the number without them, or "{text}" for the text'
    return None


def _short(text: str) -> str:
    text = _UNPRINTABLE.sub("?", " ".join(text.split()))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _cause(error: Exception) -> str:
    return _short(one_line(error)) if isinstance(error, ValueError) else "no such value"


def _shown(path: Iterable[str | int]) -> str:
    name = ".".join(map(str, path))
    return f"{name} " if name else "it "


def _deep(most: int) -> str:
    return f"sections and lists are nested more than {most} deep"


def _at(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f"line {mark.line + 1}: " if mark is not None else ""
