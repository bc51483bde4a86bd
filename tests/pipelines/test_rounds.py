"""Rounds of sampling and training: what each round is made of, and that a kill changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipelines.schedule.base import Task
from data_pipelines.schedule.commands import check_schedule
from data_pipelines.schedule.rounds import load_rounds
from prefopt.cli import main
from prefopt.errors import ConfigError
from tests.eval.runs import write_chat_model
from tests.pipelines import schedules
from tests.pipelines.pipelines import counts, rows
from tests.recipes.commands import run

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(Path(__file__).with_name("round_plugin.py"))
PAIRS: dict[str, Any] = {
    "output_dir": "set by the round",
    "shard_rows": 5,
    "plugins": [PLUGIN],
    "stages": [
        {"stage": "questions", "round": "${round}"},
        {
            "stage": "sample",
            "model": {"path": "${policy}"},
            "samples_per_seed": 4,
            "temperatures": [1.0],
            "top_p": 1.0,
            "max_new_tokens": 6,
            "max_prompt_tokens": 60,
        },
        {"stage": "score", "signals": [{"name": "letter_a"}]},
        {"stage": "pair"},
    ],
}
RECIPE: dict[str, Any] = {
    "model": {"path": "set by the round"},
    "peft": {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]},
    "data": {"train": [{"path": "${data}"}]},
    "objective": {"name": "dpo"},
    "train": {"learning_rate": 1e-3, "global_batch_size": 4, "save_every": 1},
    "run": {"output_dir": "set by the round"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


def write_rounds(folder: Path, model: Path, **settings: Any) -> Path:
    """A rounds file with its pipeline and recipe; output in ``folder/out``."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {**RECIPE, "data": {**RECIPE["data"], "cache_dir": str(folder / "cache")}}
    files = {"pairs": PAIRS, "dpo": recipe}
    for name, raw in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    raw = {
        "output_dir": str(folder / "out"),
        "num_rounds": 2,
        "policy": str(model),
        "pipelines": [str(folder / "pairs.yaml")],
        "recipe": str(folder / "dpo.yaml"),
        **settings,
    }
    path = folder / "rounds.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def weights(folder: Path) -> dict[str, bytes]:
    """The adapter each round ended with, and the data it was trained on."""
    files = [
        *folder.glob("round-*/train/final/adapter_model.safetensors"),
        *folder.glob("round-*/data/**/*.jsonl"),
    ]
    return schedules.contents(folder, files)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """Two rounds, undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    path = write_rounds(folder, model)
    log, code = folder / "log", 0
    assert run("data", "round", str(path), log=log, entry=schedules.main)[0] == code, (
        log.read_text()
    )
    return folder / "out"


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return schedules.in_this_process(monkeypatch)


# -- what runs -----------------------------------------------------------------------------------------------


def test_each_round_samples_from_the_newest_policy_and_trains_it_on(
    calm: Path, model: Path
) -> None:
    first, second = calm / "round-1", calm / "round-2"
    recipes = [yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (first, second)]
    assert recipes[0]["model"]["path"] == str(model) and recipes[0]["peft"] == RECIPE["peft"]
    # a policy that is an adapter is trained on, its base below it; and it is what the second round asks
    assert recipes[1]["model"]["path"] == str(model)
    assert recipes[1]["peft"] == {"adapter": str(first / "train" / "final")}
    asked = [
        json.loads((folder / "data" / "pairs" / "manifest" / "sample" / "stage.json").read_text())
        for folder in (first, second)
    ]
    assert [each["settings"]["model"]["path"] for each in asked] == [
        str(model),
        str(first / "train" / "final"),
    ]
    assert {row["id"].split("-")[0] for row in rows(second / "data" / "pairs" / "pair")} == {"2"}
    # a second round that had started from scratch would end with an adapter near the first one's size
    for folder in (first, second):
        run = json.loads((folder / "train" / "run.json").read_text())
        assert run["data"]["train_rows"] == counts(folder / "data" / "pairs", "pair")["rows_out"]


def test_the_second_rounds_pairs_are_answers_of_the_trained_policy(
    calm: Path, model: Path, tmp_path: Path
) -> None:
    """The same prompts asked of the first policy give other answers."""
    pipeline = yaml.safe_load((calm / "round-2" / "pairs.yaml").read_text())
    pipeline["stages"][1]["model"]["path"] = str(model)
    pipeline["output_dir"] = str(tmp_path / "out")
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(pipeline))
    assert main(["data", "build", str(tmp_path / "pairs.yaml")]) == 0
    ours, other = (
        [[each["text"] for each in row["responses"]] for row in rows(folder / "sample")]
        for folder in (calm / "round-2" / "data" / "pairs", tmp_path / "out")
    )
    assert len(ours) == len(other) and ours != other


def test_finished_rounds_run_nothing_again(
    calm: Path, capsys: pytest.CaptureFixture[str], in_process: list[str]
) -> None:
    before = weights(calm)
    times = {path: path.stat().st_mtime_ns for path in calm.rglob("*.safetensors")}
    assert main(["data", "round", str(calm.parent / "rounds.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "rounds" in shown and "rewards/accuracy" in shown and "round-2/train/final" in shown
    assert weights(calm) == before and in_process == []
    assert {path: path.stat().st_mtime_ns for path in calm.rglob("*.safetensors")} == times


def test_killed_rounds_end_with_the_same_weights(tmp_path: Path, calm: Path, model: Path) -> None:
    """SIGKILL to the whole at random moments; no step of a dead one lives on."""
    path = write_rounds(tmp_path, model)
    num_files, out = schedules.count_files(calm), tmp_path / "out"
    schedules.run_and_kill(path, out, num_files, command="round", seed=1, kills=3)
    assert weights(out) == weights(calm)


def test_a_step_that_fails_says_which_and_what_is_done_stays(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str], in_process: list[str]
) -> None:
    path = write_rounds(tmp_path, model)
    recipe = yaml.safe_load((tmp_path / "dpo.yaml").read_text())
    (tmp_path / "dpo.yaml").write_text(
        yaml.safe_dump({**recipe, "peft": {"type": "lora", "target_modules": ["no_proj"]}})
    )
    assert main(["data", "round", str(path)]) == 1
    said = capfd.readouterr().err
    assert "no_proj" in said and "round 1: prefopt train" in said and "exit code" in said
    assert (tmp_path / "out" / "round-1" / "data" / "pairs" / "manifest.json").exists()


# -- what is refused -----------------------------------------------------------------------------------------


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_schedule(load_rounds(path, overrides))
    return str(caught.value)


def test_a_recipe_changed_between_rounds_is_refused(
    tmp_path: Path, calm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(calm.parent, folder)
    recipe = yaml.safe_load((folder / "dpo.yaml").read_text())
    recipe["train"]["learning_rate"] = 2e-3
    (folder / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        main(["data", "round", str(calm.parent / "rounds.yaml"), f"recipe={folder / 'dpo.yaml'}"])
        == 2
    )
    said = capsys.readouterr().err
    assert (
        "round 1 has begun with another recipe.yaml: train.learning_rate was 0.001 and is now 0.002"
        in said
    )


def test_what_cannot_work_is_known_before_the_first_round(tmp_path: Path, model: Path) -> None:
    path = write_rounds(tmp_path, model)

    def changed(name: str, raw: dict[str, Any]) -> str:
        old = (tmp_path / name).read_text()
        (tmp_path / name).write_text(yaml.safe_dump(raw))
        said = problems(path)
        (tmp_path / name).write_text(old)
        return said

    assert "data: names no ${data}" in changed(
        "dpo.yaml", {**RECIPE, "data": {"train": [{"path": "x"}]}}
    )
    groups = changed("pairs.yaml", {**PAIRS, "stages": PAIRS["stages"][:-1]})
    assert "/pairs/score': holds groups, and objective.name = 'dpo' trains on pairs" in groups
    wrong = [{"stage": "questions", "round": "${rond}"}, *PAIRS["stages"][1:]]
    assert "${rond}: unknown placeholder; did you mean 'round'?" in changed(
        "pairs.yaml", {**PAIRS, "stages": wrong}
    )
    assert "objective.name = 'dop': unknown" in changed(
        "dpo.yaml", {**RECIPE, "objective": {"name": "dop"}}
    )
    assert "are given together" in problems(path, "launch=accelerate launch")
    assert "num_round: unknown key; did you mean 'num_rounds'?" in problems(path, "num_round=3")
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_ended_is_no_policy(tmp_path: Path, model: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "a run that has not ended" in problems(write_rounds(tmp_path, tmp_path / "run"))


def tasks(path: Path, name: str, *overrides: str) -> list[Task]:
    """A step of every round, filled in."""
    found = check_schedule(load_rounds(path, overrides))
    return [each for each in found if each.settings.name == name]


def test_rounds_may_train_the_first_policy_anew(tmp_path: Path, model: Path) -> None:
    path = write_rounds(tmp_path, model, trains="first")
    trained = tasks(path, "train")
    assert [each.raw["model"]["path"] for each in trained] == [str(model)] * 2
    assert [each.raw["peft"] for each in trained] == [RECIPE["peft"]] * 2
    asked = [each.raw["stages"][1]["model"]["path"] for each in tasks(path, "pairs")]
    assert asked == [str(model), trained[0].settings.result(trained[0])]


@pytest.mark.parametrize("name", ["quickstart", "sera"])
def test_shipped_rounds_are_sound(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / "iterative_dpo" / name / "rounds.yaml"
    trained = tasks(path, "train", f"policy={model}")
    assert len(trained) == 3
    if name == "sera":
        offline, *others = tasks(path, "offline", f"policy={model}")
        assert offline.title == "round 1" and not others
        select, bootstrap = (
            tasks(path, each, f"policy={model}")[-1].raw for each in ("select", "bootstrap")
        )
        score = next(stage for stage in select["stages"] if stage["stage"] == "score")
        policies = [f"runs/sera/round-{n}/train/final" for n in (2, 1)]
        assert [each["path"] for each in score["signals"]] == policies
        # One reference: what pairs are ranked by is what DPO trains.
        assert {each["reference"] for each in score["signals"]} == {str(model)}
        assert [each.raw["reference"] for each in trained] == [
            {"name": "model", "path": str(model)}
        ] * 3
        mixed = bootstrap["stages"][-1]["sources"][0]["path"]
        assert mixed == "runs/sera/round-3/data/select/order"
        assert trained[2].raw["data"]["train"][0]["path"] == "runs/sera/round-3/data/bootstrap/mix"
