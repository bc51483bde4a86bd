"""What the README shows is what runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from prefopt.recipe import Recipe
from prefopt.recipe.registry import OBJECTIVES
from prefopt.training.metrics import read_metrics
from prefopt.wiring import train
from tests.distributed.launch import write_model, write_pairs, write_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, opening: str) -> str:
    """The README's code block in ``language`` that starts with ``opening``."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [text for text in blocks if text.startswith(opening)]
    return found


def test_your_own_objective_trains_in_ten_lines(tmp_path: Path) -> None:
    code = block("python", "# my_margin.py")
    assert len([line for line in code.splitlines()[1:] if line.strip()]) <= 10
    (tmp_path / "my_margin.py").write_text(code, encoding="utf-8")
    added = yaml.safe_load(block("yaml", "# added to the recipe"))
    model, pairs = write_model(tmp_path / "model"), write_pairs(tmp_path / "pairs.jsonl", 16)
    path = write_recipe(tmp_path / "recipe.yaml", model, pairs, train={"learning_rate": 1e-2})
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | added), encoding="utf-8")
    losses = [row["loss/total"] for row in read_metrics(train(path) / "metrics.jsonl")]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_recipe_of_the_readme_is_a_recipe() -> None:
    recipe = Recipe.model_validate(
        yaml.safe_load(block("yaml", "model:").replace("1e-5", "1.0e-5"))
    )
    assert recipe.objective is not None
    assert recipe.objective.given == {"name": "simpo", "beta": 2.0, "gamma": 1.0}


def test_every_objective_is_in_the_table() -> None:
    table = README[README.index("| objective |") : README.index("¹ By a person")]
    listed = set(re.findall(r"`([a-z_]+)`", table)) - {"label_smoothing"}
    assert listed == set(OBJECTIVES)  # the built-in ones, whatever other tests have registered


@pytest.mark.parametrize("path", re.findall(r"\]\(((?:docs/)?[A-Za-z_.]+\.md)\)", README))
def test_links_lead_somewhere(path: str) -> None:
    assert (Path(__file__).resolve().parents[2] / path).is_file()


def test_every_fault_that_the_docs_name_has_its_test() -> None:
    """docs/what_goes_wrong.md: each cell names files and functions that are there."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "what_goes_wrong.md").read_text().splitlines()
        if line.startswith("| ") and "| test |" not in line
    ]
    assert len(rows) > 90
    for row in rows:
        named = re.findall(r"`(tests/[\w./]+)?(?:::(\w+))?`", row[-1])
        assert len(row) == 3 and named, row
        file = ""
        for path, function in named:
            file = path or file
            assert (ROOT / file).exists(), row
            if function:
                assert f"def {function}(" in (ROOT / file).read_text(), row


def test_as_many_models_run_as_the_table_of_architectures_says() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text()
    counts = {
        title: len(
            re.findall(r"`[\w.-]+`", page.partition(f"\n## {title}\n")[2].partition("\n#")[0])
        )
        for title in ("Packed", "Padded", "Refused", "Not tried")
    }
    found = re.search(
        r"(\d+) of transformers' (\d+) text models .*?: (\d+) run packed, (\d+) padded, and say so;\s+"
        r"(\d+) are refused .*?why (\d+) were not tried",
        README,
        re.DOTALL,
    )
    assert found is not None
    tried = counts["Packed"] + counts["Padded"] + counts["Refused"]
    said = [int(each) for each in found.groups()]
    assert said == [tried, tried + counts["Not tried"], *counts.values()]
