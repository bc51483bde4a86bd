"""`make test-changed` finds the tests of a change: a made-up repository, and two changes of this one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.changed import ROOT, Repository, changed_files, choose
from tests.conftest import LONG

FILES = {
    "prefopt/__init__.py": "",
    "prefopt/table.py": 'TABLE = {"dpo": "prefopt.losses.dpo"}',
    "prefopt/losses/__init__.py": "",
    "prefopt/losses/dpo.py": "",
    "prefopt/trainer.py": "def train():\n    from prefopt.losses import dpo",
    "tests/helper.py": "from prefopt.losses.dpo import loss",
    "tests/unit/test_loss.py": "import prefopt.losses.dpo",
    "tests/unit/test_by_helper.py": "from tests.helper import cases",
    "tests/unit/test_trainer.py": "from prefopt.trainer import train",
    "tests/unit/test_table.py": "from prefopt.table import TABLE",
    "tests/unit/test_other.py": "import prefopt",
    "tests/fixed/conftest.py": "from prefopt.losses.dpo import loss",
    "tests/fixed/test_fixture.py": "",
    "tests/test_recipes.py": 'ROOT / "recipes"',
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture(scope="module")
def here() -> Repository:
    return Repository(ROOT)


def test_tests_are_found_by_imports_of_their_own_of_helpers_and_of_modules(root: Path) -> None:
    """Nearest first: themselves, through a helper or a conftest; then what imports or names a user of it."""
    choice = choose(Repository(root), ["prefopt/losses/dpo.py"], long=[])
    assert list(choice.run) == [
        "tests/fixed/test_fixture.py",
        "tests/unit/test_by_helper.py",
        "tests/unit/test_loss.py",
        "tests/unit/test_table.py",
        "tests/unit/test_trainer.py",
    ]
    assert choice.run["tests/unit/test_by_helper.py"] == "1 from prefopt.losses.dpo"
    assert choice.run["tests/unit/test_table.py"] == "2 from prefopt.losses.dpo"


def test_what_does_not_fit_or_takes_long_is_named(root: Path) -> None:
    choice = choose(
        Repository(root), ["prefopt/losses/dpo.py"], long=["tests/unit/test_loss"], cap=2
    )
    assert list(choice.run) == ["tests/fixed/test_fixture.py", "tests/unit/test_by_helper.py"]
    assert choice.too_long == ["tests/unit/test_loss.py"]
    assert choice.beyond_the_cap == ["tests/unit/test_table.py", "tests/unit/test_trainer.py"]


def test_changed_tests_run_even_if_long_and_files_belong_to_those_that_name_them(
    root: Path,
) -> None:
    changed = ["tests/unit/test_loss.py", "recipes/dpo/zephyr.yaml", "gone.py"]
    choice = choose(Repository(root), changed, long=["tests/unit"])
    assert choice.run == {"tests/test_recipes.py": "reads it", "tests/unit/test_loss.py": "changed"}


def test_no_other_test_takes_the_place_of_a_changed_one(root: Path) -> None:
    changed = ["tests/unit/test_trainer.py", "tests/unit/test_table.py", "prefopt/losses/dpo.py"]
    choice = choose(Repository(root), changed, long=[], cap=1)
    assert choice.run == dict.fromkeys(reversed(changed[:2]), "changed")


def test_changes_are_those_of_the_branch_and_of_the_working_tree(root: Path) -> None:
    def git(*words: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "start")
    git("checkout", "-q", "-b", "work")
    (root / "prefopt" / "trainer.py").write_text("")
    git("commit", "-q", "-a", "-m", "one")
    git("checkout", "-q", "main")
    (root / "prefopt" / "table.py").write_text("")
    git("commit", "-q", "-a", "-m", "elsewhere")
    git("checkout", "-q", "work")
    (root / "tests" / "helper.py").write_text("")
    (root / "new.py").write_text("")
    assert changed_files(root, "main") == ["new.py", "prefopt/trainer.py", "tests/helper.py"]
    with pytest.raises(SystemExit, match="test-changed: git merge-base nowhere HEAD"):
        changed_files(root, "nowhere")


@pytest.mark.parametrize(
    ("file", "test"),
    [
        ("prefopt/objectives/dpo.py", "tests/unit/test_objectives.py"),
        ("prefopt/data/formats.py", "tests/unit/test_data_formats.py"),
        ("recipes/simpo/gemma2-9b-it.yaml", "tests/recipes/test_presets.py"),
        ("accelerate_configs/zero3.yaml", "tests/recipes/test_presets.py"),
        ("README.md", "tests/recipes/test_readme.py"),
    ],
)
def test_changes_here_reach_their_tests(here: Repository, file: str, test: str) -> None:
    assert test in choose(here, [file], long=[]).run


def test_the_long_files_are_there() -> None:
    assert not [name for name in LONG if not (ROOT / "tests" / name).is_file()]
