"""Text of others: it does not act on a terminal, and no credential of a setting is shown or kept."""

from __future__ import annotations

import io
import json
import logging
import re
import time
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from prefopt.engines.vllm.client import ServerClient
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.run_directory import changed_settings
from prefopt.recipe.schema import Recipe
from prefopt.report.bars import Bar
from prefopt.report.terminal import Terminal
from prefopt.shown import ShownFormatter, redacted, say, shown, visible, without_credentials
from prefopt.training.run_record import settings_that_count

ROOT = Path(__file__).resolve().parents[2]
ACTS = [
    "\x1b]0;title\x07", "\x1b[2J", "\x1b[31m", "\x9b31m", "\x90q\x9c", "\r", "\x08", "\x00", "\x7f", "\x0b",
    "\u202e", "\u2066", "\u200f", "\u061c", "\u2028", "\ufeff", "\ud83d", "\U000e0041",
]  # fmt: skip
STAYS = ["\t", "\n", "é", "中文", "👩‍👩‍👧", "क्षि", "ภาษา", "a\u200db", "[red]x[/red]", ":smile:"]


@pytest.mark.parametrize("text", ACTS, ids=ascii)
def test_what_acts_on_a_terminal_becomes_its_escape(text: str) -> None:
    found = visible(f"a{text}b")
    assert all(ord(c) >= 32 and not 0x7F <= ord(c) < 0xA0 for c in found) and "\\u" in found.lower()
    assert json.loads(f'"{found}"')[0] == "a" if "\\U" not in found else True
    assert visible(found) == found
    found.encode("utf-8")


@pytest.mark.parametrize("text", STAYS, ids=ascii)
def test_what_does_not_is_left_alone(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize("text", [*ACTS, *STAYS], ids=ascii)
def test_every_door_to_a_terminal_shows_the_same(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A printed line, a log line, an error; a console's text, table, title and heading."""
    wanted = visible(text)
    say(text)
    assert capsys.readouterr().out == f"{wanted}\n"
    record = logging.LogRecord("prefopt", 20, "", 0, "row %s", (text,), None)
    assert ShownFormatter("%(message)s").format(record) == f"row {wanted}"
    assert str(DataError(text)) == wanted
    assert wanted in str(ConfigError([text], source=text))
    if text in "\t\n\r\x08\x0b\x07":
        return  # rich lays these out, or leaves them out
    file = io.StringIO()
    console = Terminal(file=file, width=200, force_terminal=True, color_system="truecolor")
    table = Table(title=f"t{text}")
    table.add_column(f"c{text}")
    table.add_row(f"r{text}")
    table.add_row(Text(f"x{text}"))
    console.print(f"p{text}")
    console.print(Text(f"q{text}", "bold red"))
    console.print(table)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # rich's own colours
    plain = plain.replace("\r\n", "\n")
    assert visible(plain) == plain
    if "\x07" not in text:
        assert all(f"{letter}{wanted}" in plain for letter in "tcrxpq")


def test_a_bars_name_does_not_act_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Bar(range(2), desc="a\x1b[2Jb.jsonl"):
        pass
    said = capsys.readouterr().err
    assert "a\\u001b[2Jb.jsonl" in said and "\x1b[2J" not in said


def test_nothing_of_ours_writes_to_a_terminal_by_another_door() -> None:
    """`print`, rich's own console and `sys.stdout.write` are in the two modules that guard them."""
    doors = re.compile(r"(?<![\w.])print\(|(?<![\w.])Console\(|sys\.std(out|err)\.write\(")
    guards = {"prefopt/shown.py", "prefopt/report/terminal.py", "prefopt/report/bars.py"}
    found = set()
    for folder in ("prefopt", "data_pipelines", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            if doors.search(path.read_text(encoding="utf-8")):
                found.add(path.relative_to(ROOT).as_posix())
    # what the children of the sandbox and of math-verify write is a pipe's
    assert found - guards <= {"prefopt/signals/sandbox_child.py", "prefopt/signals/math_worker.py"}


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"http://user:{SECRET}@host:8000/v1", "http://***@host:8000/v1"),
        (f"https://{SECRET}@host", "https://***@host"),
        (f"http://user:{SECRET}@x@host/v1", "http://***@host/v1"),
        (f"http://user:{SECRET}/x@host/v1", "http://***@host/v1"),
        (f"http://user:{SECRET}?x@host/v1", "http://***@host/v1"),
        (f"http://user:{SECRET}#x@host/v1", "http://***@host/v1"),
        (f"HTTP://user:{SECRET}@[::1]:8000", "HTTP://***@[::1]:8000"),
        (f"http://host/v1?api_key={SECRET}", "http://host/v1?api_key=***"),
        (f"http://host/v1?a=1&access-token={SECRET}&b=2", "http://host/v1?a=1&access-token=***&b=2"),
        (f"https://host/f?X-Amz-Signature={SECRET}", "https://host/f?X-Amz-Signature=***"),
        (f"https://host/f?sv=1&sig={SECRET}#p", "https://host/f?sv=1&sig=***#p"),
        (f"https://host/f?KEY={SECRET}", "https://host/f?KEY=***"),
        (f"two: ftp://a:{SECRET}@b and http://c:{SECRET}@d", "two: ftp://***@b and http://***@d"),
        (f"'http://u:{SECRET}@h', \"http://u:{SECRET}@h\"", "'http://***@h', \"http://***@h\""),
        (f"Authorization: Bearer {SECRET}-{SECRET}", "Authorization: Bearer ***"),
        ("{'authorization': 'Basic dXNlcjpwYXNz'}", "{'authorization': 'Basic ***'}"),
        (f"bearer {SECRET}{SECRET}", "bearer ***"),
    ],
)  # fmt: skip
def test_credentials_are_hidden(text: str, hidden: str) -> None:
    assert redacted(text) == hidden
    assert redacted(hidden) == hidden
    assert SECRET not in str(DataError(f"data: {text}: no such file"))


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8000/v1", "http://host:8000/path/user@example", "hf://datasets/a/b@main/x.parquet",
        "https://host/search?q=monkey&page=2", "mail me@home", "Bearer of newspapers", "a?b=c", "x = 3 @ y",
        "Basic understanding", "Why? monkeys=animals",
    ],
)  # fmt: skip
def test_what_is_no_credential_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize(
    "text",
    ["?key" * 50_000 + "=", f"?{'key' * 70_000}=", "://" * 70_000 + "=", "bearer " * 30_000, "a:" * 99_999],
)  # fmt: skip
def test_text_that_is_made_to_take_long_does_not(text: str) -> None:
    began = time.perf_counter()
    shown(text)
    assert (
        time.perf_counter() - began < 20.0
    )  # minutes, where a pattern goes back over the whole text


def test_settings_are_hidden_at_every_depth() -> None:
    given = {
        "urls": [f"http://u:{SECRET}@h"], "options": {"api_key": SECRET, "n": 1, "hf-token": SECRET},
        "api_key_env": "JUDGE_KEY", "max_tokens": 3, "stop_token": "</s>", "deep": ({"password": SECRET},),
    }  # fmt: skip
    found = without_credentials(given)
    assert SECRET not in json.dumps(found)
    assert found["api_key_env"] == "JUDGE_KEY" and found["stop_token"] == "</s>"
    assert given["options"]["api_key"] == SECRET  # what runs still has it


def recipe(password: str) -> Recipe:
    url = f"http://user:{password}@node7:8000?token={password}"
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": [{"path": f"https://{password}@host/rows.jsonl"}]},
            "objective": {"name": "dpo"},
            "regime": {"name": "rollouts"},
            "engine": {"name": "vllm_server", "urls": [url]},
            "signals": [{"name": "regex", "pattern": "a"}],
            "train": {"learning_rate": 1e-4},
            "run": {"output_dir": "run"},
        }
    )


def test_no_record_of_a_run_has_a_credential_and_a_new_password_is_no_other_run() -> None:
    was = without_credentials(recipe(SECRET).model_dump(mode="json"))
    assert SECRET not in json.dumps(was)
    assert SECRET not in json.dumps(settings_that_count(recipe(SECRET)))
    assert list(changed_settings({"recipe": was}, recipe("another"))) == []


def test_a_server_is_asked_with_its_credentials_and_named_without() -> None:
    client = ServerClient(f"http://u:{SECRET}@127.0.0.1:9/v1?token={SECRET}", through_proxy=False)
    request = client._http.build_request("GET", "/v1/models")
    assert client.url == "http://***@127.0.0.1:9"
    assert str(request.url) == f"http://u:{SECRET}@127.0.0.1:9/v1/models?token={SECRET}"
    client.close()
