"""What `prefopt check` finds in the files that are there, before anything loads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli import main
from prefopt.commands.look import look
from prefopt.errors import ConfigError
from prefopt.recipe.checks import check, examine
from tests.distributed.launch import write_model, write_pairs, write_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("look") / "model")


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(recipe: Path, *overrides: str) -> list[str]:
    return look(examine(recipe, overrides)[0])[0]


def test_a_sound_recipe_has_no_problem_and_needs_no_torch(model: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", model, write_pairs(tmp_path / "pairs.jsonl", 3))
    assert found(recipe) == []
    targets = "peft={type: lora, r: 4, target_modules: [q_proj, mlp.up_proj]}"
    program = (
        "import sys\nfrom prefopt.cli import main\n"
        f"main(['check', {str(recipe)!r}, {targets!r}])\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "sections", "said"),
    [
        ({"question": "q", "good": "a", "bad": "b"}, {}, "no column 'chosen'; it has "),
        ({"prompt": "q", "chosen": "a"}, {}, "no column 'rejected'"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, {}, "data.train.0: "),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"data": {"train": [{"path": "PAIRS", "columns": {"id": "uid"}}]}},
            "no column 'uid'",
        ),
        (
            {"prompt": "q", "response": "a"},
            {"objective": {"name": "filtered_nll", "beta": None, "threshold": 0.5}},
            "no column 'reward'",
        ),
        (
            {"prompt": CHAT, "answer": "1"},
            {
                "regime": {"name": "rollouts"},
                "signals": [{"name": "final_number", "answer": "answr"}],
            },
            "no column 'answr'; it has answer",
        ),
    ],
    ids=["all", "one side", "kind", "id", "samples", "signals"],
)
def test_the_first_rows_have_what_the_recipe_names(
    row: dict[str, Any], sections: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", row)
    text = json.dumps(sections).replace("PAIRS", str(pairs))
    changed = json.loads(text)
    overrides = [f"{key}={json.dumps(changed.pop(key))}" for key in ("signals",) if key in changed]
    recipe = write_recipe(tmp_path / "r.yaml", model, pairs, **changed)
    (problem,) = found(recipe, *overrides)
    assert said in problem and problem.startswith("data.train.0: pairs.jsonl:1: ")


def test_chat_data_without_a_template_is_refused(model: Path, tmp_path: Path) -> None:
    answer = [{"role": "assistant", "content": "a"}]
    other = [{"role": "assistant", "content": "b"}]
    row = {"prompt": CHAT, "chosen": answer, "rejected": other}
    recipe = write_recipe(tmp_path / "r.yaml", model, write_rows(tmp_path / "p.jsonl", row))
    (problem,) = found(recipe)
    assert problem.startswith("model.chat_template: data.train.0 holds chat messages")
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    assert found(recipe, f"model.chat_template={template}") == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_modules", "[q_prj, v_proj]", "is called 'q_prj'; did you mean 'q_proj'?"),
        ("target_modules", "q_proj", "Write a list: [q_proj]"),
        ("target_modules", "'q_proj,v_proj'", "Write a list: [q_proj, v_proj]"),
        ("target_modules", "'.*(foo|bar)'", "is called '.*(foo|bar)'"),
        ("target_modules", "'.*(q_proj|v_proj)'", None),
        ("target_modules", "[self_attn.q_proj]", None),
        ("modules_to_save", "[score]", "peft.modules_to_save: no module of the model is called"),
    ],
)
def test_an_adapter_is_put_on_modules_that_are_there(
    key: str, value: str, said: str | None, model: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", model, write_pairs(tmp_path / "pairs.jsonl", 3))
    problems = found(recipe, f"peft={{type: lora, r: 4, {key}: {value}}}")
    assert [said in problem for problem in problems] == ([True] if said else []), problems


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("runs/sft/final", None),
        ("models/llma", "did you mean models/llama?"),
        ("models/final", "looks like a local directory"),
        ("step/step-12", "looks like a local directory"),
        ("meta-llama/Llama-3.1-8B", None),
        ("models/another", None),
    ],
)
@pytest.mark.parametrize("key", ["model.path", "model.tokenizer", "peft.adapter"])
def test_a_path_that_looks_local_is_not_taken_for_a_hub_id(
    key: str, path: str, said: str | None, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "r.yaml", model, write_pairs(tmp_path / "pairs.jsonl", 3))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").mkdir(parents=True)
    overrides = ["peft=null"] if key.startswith("model") else ["peft={}"]
    if path == "runs/sft/final":
        said = "no such directory" if key.startswith("model") else "is not a directory"
    if said is None:
        check(recipe, [*overrides, f"{key}={path}"])
        return
    with pytest.raises(ConfigError) as caught:
        check(recipe, [*overrides, f"{key}={path}"])
    (problem,) = [each for each in caught.value.problems if key in each]
    assert said in problem


def test_the_command_says_what_it_found(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "a"})
    recipe = write_recipe(tmp_path / "r.yaml", model, pairs)
    assert main(["check", str(recipe)]) == 2
    assert "data.train.0: pairs.jsonl:1: no column 'rejected'" in capsys.readouterr().err
