"""YAML: what it would guess, execute or blow up is an error with its line; the rest is read as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.errors import ConfigError
from prefopt.recipe.yaml_file import Document, apply_overrides, read_yaml
from prefopt.recipe.yaml_values import dump_yaml, parse_yaml


def problems(text: str) -> str:
    """What is wrong with a text, whether it ends the reading or not."""
    try:
        return "\n".join(parse_yaml(text).problems)
    except ConfigError as error:
        return "\n".join(error.problems)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGED_LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("x: 1\na: !!python/object/apply:os.system [ls]", 2, "the tag !!python/object/apply:os.system is not"),
        ("a: !mine 3", 1, "the tag !mine is not read"),
        ("a:\n  b: !!int x", 2, "a.b = x: cannot be read as int"),
        ("a: !!float x", 1, "cannot be read as float"),
        ("a: !!bool maybe", 1, "cannot be read as bool"),
        ("a: !!timestamp 2024-13-45", 1, "the tag !!timestamp is not read"),
        ("a: !!binary '%%'", 1, "the tag !!binary is not read"),
        ("a: !!set {x, y}", 1, "the tag !!set is not read"),
        ("a: !!omap [x: 1]", 1, "the tag !!omap is not read"),
        ("? [a]\n: 1", 1, "a key must be a name"),
        ("? {a: 1}\n: 1", 1, "a key must be a name"),
        ("x: 1\n1: 2", 2, "1 = 1: a key is text; put it in quotes"),
        ("no: 2", 1, "a key is text"),
        ("a: 1\nb: 2\na: 3", 1, "a: given twice, on lines 1 and 3"),
        ("a: {b: 1, b: 2}", 1, "a.b: given twice"),
        ("x:\n  a: 010", 2, 'x.a = 010: a number with leading zeros is octal to YAML 1.1 and decimal to YAML 1.2; '
         'write 10, or "010"'),
        ("a: 08", 1, "leading zeros"),
        ("a: 007.5", 1, "leading zeros"),
        ("a: 1:20", 1, "a number to base 60"),
        ("a: 1:20:30.5", 1, "a number to base 60"),
        ("a: 0b101", 1, "a binary number"),
        ("a: 2024_01_01", 1, "underscores"),
        ("a: [yes]", 1, "a.0 = yes: YAML 1.1 reads this as true"),
        ("a: off", 1, "YAML 1.1 reads this as false"),
        ("a: " + "9" * 5000, 1, "Exceeds the limit"),
        ("a: 1" + "0" * 400, 1, "beyond what a float holds"),
        ("a: 0x" + "f" * 5000, 1, "beyond what a float holds"),
        ("a: 1e400", 1, "beyond what a float holds"),
        ('a: "\\ud83d"', 1, "half of a surrogate pair"),
        ('a: "x\\0"', 1, "a NUL character"),
        ('x: 1\na: "\\U00110000"', 2, "not valid YAML"),
        ('a: "\\UFFFFFFFF"', 1, "not valid YAML"),
        ("x: 1\na: \x07", 2, "the character U+0007"),
        ("x: 1\na: \ud83d", 2, "the character U+D83D"),
        ("a:\n\t- b", 2, "not valid YAML"),
        ("a: 1\n---\nb: 1", 2, "not valid YAML"),
        ("a: *nobody", 1, "not valid YAML"),
        ("a: &x [1, *x]", 1, "holds itself through an alias"),
        ("a: &x {b: *x}", 1, "holds itself through an alias"),
        ("a: &x {<<: *x}", 1, "holds itself through an alias"),
        ("a: {<<: 3}", 1, "must be a section"),
        ("a: " + "[" * 60 + "]" * 60, 1, "nested more than 50 deep"),
        ("a: " + "[" * 20000, 1, "nested more than 50 deep"),
        (LAUGHS, 1, "more than 100,000 values"),
        (MERGED_LAUGHS, 1, "more than 100,000 values"),
        ("a: " + "x" * (9 << 20), 0, "is it a data file?"),
    ],
)  # fmt: skip
def test_what_yaml_would_guess_execute_or_blow_up_is_an_error_with_its_line(
    text: str, line: int, said: str
) -> None:
    found = problems(text)
    assert said in found
    assert f"line {line}" in found or f"lines {line} " in found or line == 0


def test_a_date_is_the_text_it_is_written_as() -> None:
    assert parse_yaml("a: 2024-01-31\nb: 2001-12-14t21:59:43Z\nc: =").raw == {
        "a": "2024-01-31",
        "b": "2001-12-14t21:59:43Z",
        "c": "=",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7), ("-3", -3), ("0", 0), ("1_000_000", 1_000_000), ("0x1F", 31), ("1e-6", 1e-6), ("0.5", 0.5),
        (".5", 0.5),         ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("'010'", "010"), ('"no"', "no"),
        ("!!str 010", "010"), ("12:30 h", "12:30 h"), ("1.2.3", "1.2.3"), ("😀", "😀"), (".inf", float("inf")),
        ("[1, {a: b}]", [1, {"a": "b"}]), ("{b: &x {c: 1}, d: *x}", {"b": {"c": 1}, "d": {"c": 1}}),
        ("{a: &x {c: 1, e: 2}, d: {<<: *x, c: 3}}", {"a": {"c": 1, "e": 2}, "d": {"c": 3, "e": 2}}),
        ("{<<: [{a: 1}, {a: 2, b: 2}]}", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_everything_else_is_read_as_it_is_written(text: str, value: Any) -> None:
    found = parse_yaml(f"x: {text}")
    assert (found.raw, found.problems) == ({"x": value}, [])
    assert repr(found.raw["x"]) == repr(value)  # 1 is not True
    overridden = apply_overrides(Document({}), [f"x={text}"])
    assert (overridden.raw, overridden.problems) == ({"x": value}, ())


def test_what_is_dumped_is_read_again() -> None:
    values = {
        "text": ["1e-6", "08", "010", "1:20", "yes", "null", "2024-01-01", "1_0",
                 "", "=", "<<", "0x1", "a\nb", "é😀"],
        "numbers": [1, -2.5, 1e-6, 1e22, True, None],
        "twice": [(same := {"a": 1}), same],
    }  # fmt: skip
    found = parse_yaml(dump_yaml(values))
    assert (found.raw, found.problems) == (values, [])


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=010", "train.seed=1:20", "a={b: 1, b: 2}", "a=!!python/name:os.system x", "a=&x [*x]",
        "a=!!int x", "a=" + "9" * 5000, 'a="\\ud83d"', "a=" + "[" * 5000, "a.²=1", "data.train.²=1",
        "data.train." + "9" * 5000 + "=1", "a={1: 2}", "a=\udcff",
    ],
)  # fmt: skip
def test_an_override_is_read_by_the_same_reader(override: str) -> None:
    found = apply_overrides(Document({"data": {"train": [1]}}), [override])
    if override != "a.²=1":  # a name like any other
        assert found.problems[0].startswith("override ")
        assert "Traceback" not in found.problems[0] and len(found.problems[0]) < 500


def test_a_file_that_is_not_utf8_names_its_line_and_a_byte_order_mark_is_none_of_a_key(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ConfigError, match="line 2: cannot be read: not UTF-8"):
        read_yaml(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(path).raw == {"a": 1, "b": 2}
    with pytest.raises(ConfigError, match="Is a directory"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {seed: !!int x}\n", "line 1: train.seed = x: cannot be read as int"),
        (LAUGHS, "more than 100,000 values"),
        ("train: {seed: 010}\n", "line 1: train.seed = 010: a number with leading zeros"),
    ],
)
@pytest.mark.parametrize(
    "command", [["check"], ["data", "check"], ["eval", "M", "--tasks", "gsm8k", "--config"]]
)
def test_through_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], text: str, said: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert main([*command, str(path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("a" * 5000, "no file has a name that long"),
        ("x/" * 3000, "no file has a name that long"),
        ("~nobody-of-that-name/x", "this machine has no user of that name"),
        ("", "must be a path, and is empty"),
    ],
)
@pytest.mark.parametrize(
    "key", ["model.path", "data.train.0.path", "train.resume", "run.output_dir", "plugins.0"]
)
def test_a_path_that_no_file_system_can_look_up_is_a_config_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str, said: str, key: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {path: m}\ndata: {train: [{path: p.jsonl}]}\nobjective: {name: dpo}\n"
        "train: {learning_rate: 1e-6}\nrun: {output_dir: out}\nplugins: [x]\n"
    )
    assert main(["check", str(recipe), f"{key}='{path}'"]) == 2
    found = capsys.readouterr().err
    assert f"{key} = {path[:30]!r}"[:-1] in found
    assert said in found or key == "plugins.0"
    assert main(["eval", "score", "pair_accuracy", str(recipe), f"data='{path}'"]) in (1, 2)
