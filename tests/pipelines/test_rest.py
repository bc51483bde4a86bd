"""ReST's schedule: which steps are taken from which weights, when it ends, what it refuses, what a kill costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_pipelines.schedule.base import Found, Task
from data_pipelines.schedule.commands import check_schedule
from data_pipelines.schedule.rest import load_rest, validation_pipeline
from data_pipelines.schedule.rest_settings import RestSettings
from data_pipelines.schedule.walk import Walk
from prefopt.cli import main
from prefopt.errors import ConfigError
from prefopt.recipe.yaml_file import read_yaml
from recipes.quickstart.task import share_in_place
from tests.eval.runs import write_chat_model, write_jsonl
from tests.pipelines import schedules
from tests.pipelines.pipelines import rows
from tests.recipes.commands import run

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = str(Path(__file__).with_name("round_plugin.py"))
LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return schedules.in_this_process(monkeypatch)


def schedule(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Two grow steps of 8 prompts x 4 samples, two improve steps each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("prompts", 8), ("held_out", 6)):
        asked = [{"prompt": [{"role": "user", "content": f"say {name} {n}"}]} for n in range(count)]
        write_jsonl(folder / f"{name}.jsonl", asked)
    sample = {"stage": "sample", "model": {"path": "${policy}"}, "samples_per_seed": 4}
    sample |= {"temperatures": [1.0], "top_p": 1.0, "max_new_tokens": 6, "max_prompt_tokens": 60}
    grow = {
        "steps": 2,
        "shard_rows": 5,
        "plugins": [PLUGIN],
        "stages": [
            {"stage": "prompts", "sources": [{"path": str(folder / "prompts.jsonl")}]},
            {**sample, "drop_identical": False},
            {"stage": "score", "signals": [{"name": "letter_a"}]},
        ],
    }
    recipe = {
        "data": {"train": [{"path": "${data}"}], "cache_dir": str(folder / "cache")},
        "objective": {"name": "filtered_nll"},
        "train": {"global_batch_size": 4, "save_every": 1},
    }
    raw = {
        "output_dir": str(folder / "out"),
        "policy": str(model),
        "grow": grow,
        "improve": {"gamma": [0, 0.5], "learning_rates": [1e-2, 1e-3]},
        "recipe": recipe,
    }
    return raw | changes


def write(folder: Path, raw: dict[str, Any]) -> Path:
    path = folder / "rest.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def weights(folder: Path) -> dict[str, bytes]:
    """What every improve step ended with, and what it trained on."""
    files = [
        *folder.glob("grow-*/improve-*/train/final/*.safetensors"),
        *folder.rglob("data/**/*.jsonl"),
    ]
    return schedules.contents(folder, files)


def distance(one: Path, other: Path) -> float:
    """Largest difference of a weight of two models."""
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# -- what runs -----------------------------------------------------------------------------------------------


def test_steps_run_in_order_each_from_the_one_before(
    tmp_path: Path, model: Path, in_process: list[str]
) -> None:
    """Thresholds of a grow step before its first training; the second grow step asks what came last."""
    raw = schedule(tmp_path, model)
    raw["recipe"]["peft"] = LORA
    assert main(["data", "rest", str(write(tmp_path, raw))]) == 0
    out = tmp_path / "out"
    places = ("grow-1/improve-1", "grow-1/improve-2"), ("grow-2/improve-1", "grow-2/improve-2")
    assert in_process == [
        f"prefopt {command} {out / place}/{file}"
        for grow in places
        for command, file in (("data build", "data.yaml"), ("train", "recipe.yaml"))
        for place in grow
    ]
    before = [
        str(model),
        *(str(out / place / "train" / "final") for grow in places for place in grow),
    ]
    for start, place, rate in zip(before, [*places[0], *places[1]], [1e-2, 1e-3] * 2, strict=False):
        recipe = yaml.safe_load((out / place / "recipe.yaml").read_text())
        assert recipe["model"]["path"] == str(model)
        assert recipe["peft"] == (LORA if start == str(model) else {"adapter": start})
        assert recipe["train"]["learning_rate"] == rate
        run = json.loads((out / place / "train" / "run.json").read_text())
        kept = rows(out / place.split("/")[0] / "data" / place.split("/")[1])
        assert run["data"]["train_rows"] == len(kept) > 0
    # the same prompts, another policy, other seeds: other answers
    asked = [yaml.safe_load((out / grow[0] / "data.yaml").read_text()) for grow in places]
    assert [each["stages"][1]["model"]["path"] for each in asked] == [before[0], before[2]]
    assert [each["seed"] for each in asked] == [0, 1]
    sampled = [rows(out / f"grow-{n}" / "data" / "sample") for n in (1, 2)]
    assert [row["id"] for row in sampled[0]] == [row["id"] for row in sampled[1]]
    assert sampled[0] != sampled[1]
    # by hand: what is above γ·max + (1 - γ)·mean of its prompt
    for number, gamma in ((1, 0.0), (2, 0.5)):
        expected = []
        for row in rows(out / "grow-1" / "data" / "score"):
            scores = [each["score"] for each in row["responses"]]
            limit = gamma * max(scores) + (1 - gamma) * sum(scores) / len(scores)
            expected += [each["text"] for each in row["responses"] if each["score"] > limit + 1e-12]
        found = rows(out / "grow-1" / "data" / f"improve-{number}")
        assert [row["response"] for row in found] == expected
    result = json.loads((out / "schedule.json").read_text())
    assert result["names"]["train"] == before[-1] and len(result["steps"]) == 8
    assert result["steps"][0]["numbers"]["of"] == 32
    # done is done
    done, ran = weights(out), len(in_process)
    assert main(["data", "rest", str(tmp_path / "rest.yaml")]) == 0
    assert len(in_process) == ran and weights(out) == done


@pytest.mark.parametrize("start", ["previous", "base"])
def test_where_a_step_starts(
    tmp_path: Path, model: Path, in_process: list[str], start: str
) -> None:
    """A second step that barely moves (learning rate 1e-12) ends where it began: the first's end, or the base."""
    raw = schedule(tmp_path, model)
    raw["grow"]["steps"] = 1
    raw["improve"] = {"gamma": [0, 0.5], "learning_rates": [1e-2, 1e-12], "start": start}
    assert main(["data", "rest", str(write(tmp_path, raw))]) == 0
    first, second = (tmp_path / "out/grow-1" / f"improve-{n}/train/final" for n in (1, 2))
    assert distance(model, first) > 1e-3
    assert (distance(model, second) < 1e-6) == (start == "base")
    assert (distance(first, second) < 1e-6) == (start == "previous")


def test_validation_is_the_mean_score_of_held_out_answers(
    tmp_path: Path, model: Path, in_process: list[str]
) -> None:
    """Of every policy, the first included, by the signal of the grow step and with the same prompts and seeds."""
    raw = schedule(tmp_path, model)
    held_out = {"path": str(tmp_path / "held_out.jsonl")}
    raw |= {"validation": {"sources": [held_out], "samples_per_prompt": 3}}
    raw |= {"improve": {"gamma": [0.5], "learning_rates": [1e-2]}}
    raw["grow"]["steps"] = 1
    assert main(["data", "rest", str(write(tmp_path, raw))]) == 0
    result = json.loads((tmp_path / "out" / "schedule.json").read_text())
    means = []
    measured = [each for each in result["steps"] if each["step"] in ("validation-0", "validation")]
    places = ("grow-0/improve-0", "grow-1/improve-1")
    for step, place in zip(measured, places, strict=True):
        answers = rows(tmp_path / "out" / place / "validation" / "score")
        assert len(answers) == 6 and {len(row["responses"]) for row in answers} == {3}
        texts = [each["text"] for row in answers for each in row["responses"]]
        rewards = [text.count("a") - 0.01 * len(text) for text in texts]
        assert step["score"] == pytest.approx(sum(rewards) / 18)
        means.append(step["score"])
    assert result["names"]["validation.score"] == max(means)


def test_a_killed_schedule_ends_with_the_same_weights_and_decisions(
    tmp_path: Path, model: Path
) -> None:
    """SIGKILL to the whole at random moments."""
    outs = []
    for name in ("calm", "killed"):
        raw = schedule(tmp_path / name, model)
        raw["grow"]["steps"] = 1
        raw["recipe"]["peft"] = LORA
        held_out = {"path": str(tmp_path / name / "held_out.jsonl")}
        raw["validation"] = {"sources": [held_out], "patience": 2}
        path, out = write(tmp_path / name, raw), tmp_path / name / "out"
        if name == "calm":
            code, said = run(
                "data", "rest", str(path), log=path.with_suffix(".log"), entry=schedules.main
            )
            assert code == 0, said
        else:
            num_files = schedules.count_files(outs[0])
            schedules.run_and_kill(path, out, num_files, command="rest", seed=2, kills=2)
        outs.append(out)
    calm, killed = map(weights, outs)
    assert calm.keys() == killed.keys() and len(calm) > 8
    assert {name for name in calm if calm[name] != killed[name]} == set()
    records = [(out / "schedule.json").read_text().replace(str(out.parent), "") for out in outs]
    assert records[0] == records[1] and "validation.score" in records[0]


@pytest.mark.slow  # every step starts a Python
def test_processes_of_their_own_leave_the_same_bytes(tmp_path: Path, model: Path) -> None:
    """As users have them, and not as forks of a warm one."""
    outs = []
    for name, command in (("own", [sys.executable, "-m", "prefopt.cli"]), ("forks", None)):
        raw = schedule(tmp_path / name, model, improve={"gamma": [0.5], "learning_rates": [1e-3]})
        raw["grow"]["steps"] = 1
        path = write(tmp_path / name, raw)
        arguments = ["data", "rest", str(path)]
        if command is None:
            log = tmp_path / "log"
            assert run(*arguments, log=log, entry=schedules.main)[0] == 0, log.read_text()
        else:
            subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
        outs.append(weights(path.parent / "out"))
    assert outs[0] == outs[1] and len(outs[0]) > 4


# -- when it ends --------------------------------------------------------------------------------------------


class Scripted:
    """Steps that are taken at once, and rewards as they are given: first policy, then every step in order."""

    def __init__(self, *rewards: float) -> None:
        self.rewards: Iterator[float] = iter(rewards)
        self.trained: list[str] = []
        self.asked: list[str] = []

    def __call__(self, task: Task) -> Found:
        name, place = task.settings.name, ".".join(map(str, task.place.turns.values()))
        if name == "samples" and task.place.turns["improve"] == 1:
            self.asked.append(_place(task.raw["stages"][1]["model"]["path"]))
        if name == "train":
            self.trained.append(place)
        return Found(next(self.rewards) if name in ("validation-0", "validation") else None)


def _place(policy: str) -> str:
    """1.2 for the second improve step of the first grow step, 0 for the first policy."""
    parts = Path(policy).parts
    return f"{parts[-4][-1]}.{parts[-3][-1]}" if parts[-1] == "final" else "0"


@pytest.mark.parametrize(
    ("rewards", "patience", "trained", "asked", "best"),
    [
        # every step a gain
        ((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), 1, "1.1 1.2 1.3 2.1 2.2 2.3", "0 1.3", "2.3"),
        # 1.2 is no gain: 1.3 is left out, and the second grow step asks 1.1
        ((0.1, 0.4, 0.3, 0.5, 0.45), 1, "1.1 1.2 2.1 2.2", "0 1.1", "2.1"),
        # an equal reward is no gain either
        ((0.1, 0.4, 0.4, 0.5, 0.6, 0.7), 1, "1.1 1.2 2.1 2.2 2.3", "0 1.1", "2.3"),
        # a little patience gets past 1.2
        ((0.1, 0.4, 0.3, 0.6, 0.5, 0.4), 2, "1.1 1.2 1.3 2.1 2.2", "0 1.3", "1.3"),
        # nothing gained at all: no second grow step, and the first policy is the best
        ((0.4, 0.3), 1, "1.1", "0", "0"),
        ((0.4, 0.3, 0.2, 0.3), 3, "1.1 1.2 1.3", "0", "0"),
    ],
)
def test_it_goes_on_while_the_reward_rises_and_keeps_the_best(
    tmp_path: Path, model: Path, rewards: tuple[float, ...], patience: int, trained: str, asked: str, best: str
) -> None:  # fmt: skip
    raw = schedule(tmp_path, model)
    raw["improve"] = {"above": [0.1, 0.2, 0.3], "learning_rates": [1e-3]}
    raw["validation"] = {
        "sources": [{"path": str(tmp_path / "held_out.jsonl")}],
        "patience": patience,
    }
    doing = Scripted(*rewards)
    walk = Walk(load_rest(write(tmp_path, raw)), doing).take()
    assert (" ".join(doing.trained), " ".join(doing.asked)) == (trained, asked)
    assert _place(walk.names["train"]) == best and not walk.problems
    assert next(doing.rewards, None) is None  # every policy that was made was measured


def test_without_validation_the_last_policy_grows(tmp_path: Path, model: Path) -> None:
    doing = Scripted()
    walk = Walk(load_rest(write(tmp_path, schedule(tmp_path, model))), doing).take()
    assert doing.trained == ["1.1", "1.2", "2.1", "2.2"] and doing.asked == ["0", "1.2"]
    assert _place(walk.names["train"]) == "2.2" and "validation.score" not in walk.names


# -- what is refused -----------------------------------------------------------------------------------------


def refused(folder: Path, raw: dict[str, Any], *overrides: str) -> str:
    path = write(folder, raw)
    with pytest.raises(ConfigError) as caught:
        check_schedule(load_rest(path, overrides))
    assert not (folder / "out").exists()
    return str(caught.value)


def line(folder: Path, text: str) -> str:
    """``line N: `` of the line of the schedule that holds ``text``."""
    lines = (folder / "rest.yaml").read_text().splitlines()
    return f"line {next(n for n, each in enumerate(lines, 1) if text in each)}: "


@pytest.mark.parametrize(
    ("improve", "said"),
    [
        ({"above": [0.5, 0.5]}, "improve.above = [0.5, 0.5]: thresholds must rise"),
        ({"gamma": [0.5, 0.2]}, "improve.gamma = [0.5, 0.2]: thresholds must rise"),
        ({"above": [0.5, None]}, "only the first threshold can be null"),
        ({"percentile": [50, 100]}, "100 keeps nothing"),
        ({"percentile": [50, 101]}, "improve.percentile.1 = 101: must be <= 100"),
        ({"gamma": [1.0]}, "no reward is above the best one"),
        ({"above": [0.5], "gamma": [0.5]}, "from one of above, percentile, gamma, and has above and gamma"),
        ({}, "and has none"),
        ({"above": [0.5], "over": "all"}, "improve.over: would be ignored"),
        ({"above": [0.1, 0.2, 0.3]}, "improve.learning_rates = [0.01, 0.001]: 2 for 3 improve steps"),
        ({"above": [0.1], "start": "bas"}, "improve.start = 'bas'"),
        ({"aboev": [0.1]}, "improve.aboev: unknown key; did you mean 'above'?"),
    ],
)  # fmt: skip
def test_infeasible_thresholds_are_refused_with_their_line(
    tmp_path: Path, model: Path, improve: dict[str, Any], said: str
) -> None:
    raw = schedule(tmp_path, model)
    rates = [1e-2, 1e-3] if len(next(iter(improve.values()), [])) != 1 else [1e-2]
    raw["improve"] = {"learning_rates": rates, **improve}
    found = refused(tmp_path, raw)
    assert said in found and "line " in found


def test_what_pipeline_and_recipe_lack_is_said_at_once_with_lines(
    tmp_path: Path, model: Path
) -> None:
    raw = schedule(tmp_path, model)
    raw["grow"]["stages"][1] |= {"drop_identical": True, "temperaturs": [1.0]}
    raw["recipe"]["train"]["global_batch_siz"] = 4
    found = refused(tmp_path, raw)
    assert f"{line(tmp_path, 'temperaturs')}stages.1.temperaturs: unknown key" in found
    assert f"{line(tmp_path, 'global_batch_siz:')}train.global_batch_siz: unknown key" in found
    del raw["grow"]["stages"][1]["temperaturs"], raw["recipe"]["train"]["global_batch_siz"]
    raw["recipe"]["reference"] = {"name": "initial"}
    found = refused(tmp_path, raw)
    assert (
        "grow.stages.1.drop_identical = true: drops prompts whose samples are all the same" in found
    )
    assert f"{line(tmp_path, 'reference:')}reference: would be ignored" in found


def test_what_a_schedule_cannot_do_without(tmp_path: Path, model: Path) -> None:
    raw = schedule(tmp_path, model)
    same = refused(tmp_path, raw, f"grow.stages.sample.model.path={model}")
    assert "no `sample` stage asks ${policy}" in same
    assert "names no ${data}" in refused(tmp_path, raw, "recipe.data.train=[{path: x}]")
    ignored = refused(tmp_path, raw, "recipe.train.learning_rate=1e-3", "recipe.model={path: x}")
    assert (
        "recipe.train.learning_rate: would be ignored: the schedule sets it, from improve.lea"
        in ignored
    )
    assert "recipe.model.path: would be ignored" in ignored
    assert "grow.output_dir: would be ignored" in refused(tmp_path, raw, "grow.output_dir=x")
    assert "${polici}: unknown placeholder" in refused(
        tmp_path, raw, "recipe.run={name: '${polici}'}"
    )
    raw["grow"]["stages"].append({"stage": "pair"})
    assert "takes groups or samples, and the stage before gives pairs" in refused(tmp_path, raw)
    raw["grow"]["stages"] = raw["grow"]["stages"][:2]
    raw["validation"] = {"sources": [{"path": "x.jsonl"}]}
    assert "a `score` stage that writes `score`" in refused(tmp_path, raw)
    assert "are given together" in refused(tmp_path, raw, "launch=accelerate launch")


def test_the_inner_objective_trains_on_what_the_grow_step_gives(
    tmp_path: Path, model: Path
) -> None:
    raw = schedule(tmp_path, model)
    of_pairs = refused(tmp_path, raw, "recipe.objective={name: dpo}")
    assert (
        "override: objective.name = 'dpo', stage = 'preference': does not train on one response a row"
        in of_pairs
    )
    without = refused(tmp_path, raw, "recipe.objective={name: a_lol_ref_free}")
    assert "needs advantages, and" in without and "has none: it is made of groups" in without
    raw["grow"]["stages"].append({"stage": "advantage", "positive_only": True})
    for name in ("a_lol_ref_free", "r_gold", "filtered_nll"):
        raw["recipe"]["objective"] = {"name": name}
        check_schedule(load_rest(write(tmp_path, raw)))


def test_what_improve_keeps_no_second_threshold_drops(tmp_path: Path, model: Path) -> None:
    """Rewards may be negative (log-probs, reward models), and a percentile keeps the better half of those too."""
    raw = schedule(tmp_path, model, improve={"percentile": [50], "learning_rates": [1e-2]})
    for threshold in (0, -100):
        raw["recipe"]["objective"] = {"name": "filtered_nll", "threshold": threshold}
        found = refused(tmp_path, raw)
        assert (
            f"{line(tmp_path, 'threshold:')}recipe.objective.threshold = {threshold}: would"
            in found
        )
    raw["recipe"]["objective"] = {"name": "filtered_nll"}
    (trained, *_) = [
        each
        for each in check_schedule(load_rest(write(tmp_path, raw)))
        if each.settings.name == "train"
    ]
    rewards = torch.tensor([-1e6, -3.0, 0.5])
    assert bool((rewards >= trained.raw["objective"]["threshold"]).all())


def test_a_script_that_would_refuse_the_recipe_is_known(tmp_path: Path, model: Path) -> None:
    """And not after the first grow step, when it is launched."""
    raw = schedule(tmp_path, model, launch="accelerate launch", script=str(ROOT / "recipes/dpo.py"))
    said = refused(tmp_path, raw)
    assert (
        f"{line(tmp_path, 'script:')}script = '{ROOT / 'recipes/dpo.py'}': trains something else"
        in said
    )
    assert "no such file" in refused(tmp_path, raw, "script=recipes/rset.py")


def test_a_threshold_that_keeps_nothing_stops_before_any_training(
    tmp_path: Path, model: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of two thresholds; a letter a is worth 1, and six tokens have few of them."""
    raw = schedule(tmp_path, model)
    raw["improve"] = {"above": [None, 50], "learning_rates": [1e-3]}
    assert main(["data", "rest", str(write(tmp_path, raw))]) == 1
    scores = [
        each["score"]
        for row in rows(tmp_path / "out/grow-1/data/score")
        for each in row["responses"]
    ]
    said = " ".join(capsys.readouterr().err.split())
    assert f"above = 50 keeps none of 32 samples: their rewards go up to {max(scores):g}" in said
    assert "grow 1, improve 2" in said and not any("train" in each for each in in_process)


def test_a_schedule_that_changed_is_refused(
    tmp_path: Path, model: Path, in_process: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = schedule(tmp_path, model, improve={"gamma": [0.5], "learning_rates": [1e-3]})
    raw["grow"]["steps"] = 1
    path = str(write(tmp_path, raw))
    assert main(["data", "rest", path]) == 0
    ran = len(in_process)
    assert main(["data", "rest", path, "improve.learning_rates=[0.002]"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    begun = "grow 1, improve 1 has begun with another recipe.yaml"
    assert f"{begun}: train.learning_rate was 0.001 and is now 0.002" in said
    assert len(in_process) == ran
    # more of the same is no change
    shutil.copytree(tmp_path / "out/grow-1", tmp_path / "before")
    assert main(["data", "rest", str(tmp_path / "rest.yaml"), "grow.steps=2"]) == 0
    assert len(in_process) == 2 * ran
    assert weights(tmp_path / "before") == weights(tmp_path / "out/grow-1")


# -- what validation asks, and presets -----------------------------------------------------------------------


def test_validation_asks_held_out_prompts_as_grow_asks_its_own(tmp_path: Path, model: Path) -> None:
    """Data rows' own answers stay out, and so does whatever else the grow step does to groups."""
    raw = schedule(tmp_path, model)
    own = {"stage": "rated", "sources": [{"path": "d.jsonl"}], "keep": ["answer"],
           "responses": [{"text": "answer", "offline": True}]}  # fmt: skip
    sampling = {**raw["grow"]["stages"][1], "drop_unended": True}
    signal = {"name": "implicit_reward", "path": "${policy}", "reference": "${first}"}
    scoring = {"stage": "score", "signals": [signal]}
    raw["grow"]["stages"] = [own, sampling, scoring, {"stage": "filter", "max_unended_frac": 0.5}]
    raw["validation"] = {"sources": [{"path": "h.jsonl"}], "max_prompts": 5, "temperature": 0}
    document = read_yaml(write(tmp_path, raw))
    section = RestSettings.model_validate(document.raw).validation
    assert section is not None
    prompts, sample, score = validation_pipeline(document, section, "P").raw["stages"]
    kept = {"keep": ["answer"], "max_prompts": 5}
    assert prompts == {"stage": "prompts", "sources": [{"path": "h.jsonl"}], **kept}
    assert sample["model"] == {"path": "P"} and sample["temperatures"] == [0]
    assert (sample["samples_per_seed"], sample["seeds"]) == (1, [0])
    assert sample["drop_unended"] is False  # an answer that does not end is an answer
    reference = {"name": "implicit_reward", "path": "P", "reference": "${first}"}
    assert score == {"stage": "score", "signals": [reference]}


def test_the_quickstarts_graded_reward_by_hand() -> None:
    """Right is 00133578. One digit left out moves those behind it; one too many is a place too many."""
    assert share_in_place("83051703:", "00133578") == 1
    assert (
        share_in_place("83051703:", "013578") == 1 / 8
    )  # 0 is in place, then 1, 3, 5 and 7 are early
    assert share_in_place("83051703:", "001335788") == 8 / 9
    assert share_in_place("83051703:", "0013357") == 7 / 8
    assert share_in_place("83051703:", "") == 0


@pytest.mark.parametrize("name", ["quickstart", "translation", "verifiable", "rest_em"])
def test_shipped_schedules_are_sound(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    tasks = check_schedule(
        load_rest(ROOT / "recipes" / "rest" / f"{name}.yaml", [f"policy={model}"])
    )
    if name == "rest_em":
        assert {each.raw["model"]["path"] for each in tasks if each.settings.name == "train"} == {
            str(model)
        }
        samples = [each for each in tasks if each.settings.name == "samples"]
        assert [each.raw["stages"][-1]["max_per_prompt"] for each in samples] == [10] * 3
        assert samples[0].raw["stages"][0]["stage"] == "prompts"  # no D in the mix
