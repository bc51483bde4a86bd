"""A schedule of one's own: what its names stand for, what its loops take, what it refuses, and one run whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipelines.schedule.base import Found, Task
from data_pipelines.schedule.commands import check_schedule, run_command
from data_pipelines.schedule.settings import load_schedule
from data_pipelines.schedule.walk import Walk
from prefopt.cli import main
from prefopt.errors import ConfigError
from recipes.quickstart.prepare import write_base, write_jsonl
from tests.eval.runs import write_chat_model
from tests.pipelines import schedules

ROOT = Path(__file__).resolve().parents[2]
CHAIN = ROOT / "recipes" / "schedule" / "quickstart" / "chain.yaml"
PIPELINE: dict[str, Any] = {
    "stages": [
        {"stage": "prompts", "sources": [{"path": "prompts.jsonl"}], "keep": ["answer"]},
        {"stage": "sample", "model": {"path": "${sft}"}},
        {"stage": "score", "signals": [{"name": "final_number"}]},
        {"stage": "pair"},
    ]
}
SCORED = {"stages": PIPELINE["stages"][:3]}
LORA = {"type": "lora", "r": 4, "target_modules": ["q_proj", "v_proj"]}


def recipe(path: str = "${pairs}", **changes: Any) -> dict[str, Any]:
    """DPO with LoRA on what ``path`` holds."""
    train = {"learning_rate": 1e-3, "global_batch_size": 4}
    data = {"train": [{"path": path}]}
    return {"peft": LORA, "data": data, "objective": {"name": "dpo"}, "train": train, **changes}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model"))


def write(folder: Path, *steps: dict[str, Any], **settings: Any) -> Path:
    """A schedule file; one problem of its steps must not hide behind another: each has a sound base."""
    path = folder / "schedule.yaml"
    raw = {"output_dir": str(folder / "out"), **settings, "steps": list(steps)}
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


# -- what names stand for, and which turns are taken -----------------------------------------------------------


class Scripted:
    """Steps that are taken at once; evaluations come to what is given, in order."""

    def __init__(self, *scores: float) -> None:
        self.scores: Iterator[float] = iter(scores)
        self.tasks: list[Task] = []

    def __call__(self, task: Task) -> Found:
        self.tasks.append(task)
        return Found(next(self.scores) if task.settings.is_scored(task) else None)

    def trained(self) -> dict[str, str]:
        """What each training step started from, by title: the last parts of the paths that differ."""
        return {
            task.title: task.raw["model"]["path"] if "adapter" not in task.raw["peft"]
            else task.raw["peft"]["adapter"]
            for task in self.tasks
            if task.settings.name == "train"
        }  # fmt: skip


def loop(folder: Path, **settings: Any) -> Path:
    """Five turns of training on and measuring, from the policy `base`."""
    train = {"name": "train", "recipe": recipe("x"), "trains": "${previous.train}"}
    check = {"name": "check", "eval": "${train}", "tasks": "gsm8k"}
    raw = {"name": "round", "rounds": 5, "start": {"train": "base"}, "steps": [train, check]}
    return write(folder, raw | settings)


@pytest.mark.parametrize(
    ("best", "scores", "taken", "kept"),
    [
        (None, (0.5, 0.4, 0.3, 0.2, 0.1), 5, "round-5"),  # no rule: every turn, and the last counts
        ({"by": "check"}, (0.1, 0.2, 0.3, 0.4, 0.5), 5, "round-5"),
        ({"by": "check"}, (0.1, 0.4, 0.3), 3, "round-2"),
        ({"by": "check"}, (0.1, 0.4, 0.4), 3, "round-2"),  # equal is no gain, and the first of them counts
        ({"by": "check", "patience": 2}, (0.1, 0.4, 0.3, 0.5, 0.6), 5, "round-5"),
        ({"by": "check", "patience": 2}, (0.3, 0.1, 0.2), 3, "round-1"),
        # higher, but by less than a gain: it ends, and the higher one counts
        ({"by": "check", "min_gain": 0.1}, (0.3, 0.35), 2, "round-2"),
    ],
)  # fmt: skip
def test_a_loop_ends_when_it_brings_nothing_more_and_keeps_the_best_turn(
    tmp_path: Path, best: Any, scores: tuple[float, ...], taken: int, kept: str
) -> None:
    doing = Scripted(*scores)
    walk = Walk(load_schedule(loop(tmp_path, **({"best": best} if best else {}))), doing).take()
    assert next(doing.scores, None) is None and len(doing.trained()) == taken
    assert Path(walk.names["train"]).relative_to(tmp_path / "out") == Path(kept) / "train" / "final"
    # each turn trains what the turn before made, not the best one
    finals = [str(tmp_path / "out" / f"round-{n}" / "train" / "final") for n in range(1, taken)]
    assert list(doing.trained().values()) == ["base", *finals]


def test_a_start_with_a_score_is_what_the_first_turn_must_exceed(tmp_path: Path) -> None:
    start = {"train": "base", "check.score": 0.5}
    doing = Scripted(0.4)
    walk = Walk(load_schedule(loop(tmp_path, start=start, best={"by": "check"})), doing).take()
    assert walk.names["train"] == "base" and walk.names["check.score"] == 0.5
    assert walk.ended == ["round 1 of 5 brought no gain; the rest is left out"]


def test_each_turn_has_its_own_values_steps_and_best(tmp_path: Path) -> None:
    first = {"name": "first", "recipe": recipe("a"), "when": "first", "also": ["made"]}
    later = {"name": "later", "recipe": recipe("b"), "when": "later", "also": ["made"]}
    on = recipe("${made}", run={"name": "${round} ${label}", "tags": "${best.train}"})
    on["train"]["learning_rate"] = "${rate}"
    train = {"name": "train", "recipe": on, "trains": "${best.train}"}
    check = {"name": "check", "eval": "${train}", "tasks": "gsm8k"}
    path = loop(
        tmp_path,
        each={"rate": [1e-3, 1e-4, 1e-5]},
        rounds=None,
        values={"label": "at ${rate}"},
        best={"by": "check", "patience": 9},
        steps=[first, later, train, check],
    )
    doing = Scripted(0.5, 0.4, 0.6)
    Walk(load_schedule(path), doing).take()
    assert [task.settings.name for task in doing.tasks] == [
        *("first", "train", "check", "later", "train", "check", "later", "train", "check")
    ]
    raws = [task.raw for task in doing.tasks if task.settings.name == "train"]
    assert [raw["train"]["learning_rate"] for raw in raws] == [1e-3, 1e-4, 1e-5]
    assert [raw["run"]["name"] for raw in raws] == ["1 at 0.001", "2 at 0.0001", "3 at 1e-05"]
    out = tmp_path / "out"
    made = [f"round-1/first/{'final'}", "round-2/later/final", "round-3/later/final"]
    assert [raw["data"]["train"][0]["path"] for raw in raws] == [str(out / each) for each in made]
    # the second turn was worse than the first, so the third trains the first's policy
    best = str(out / "round-1" / "train" / "final")
    assert list(doing.trained().values()) == ["base", best, best]


def test_an_adapter_is_trained_on_above_its_base(tmp_path: Path) -> None:
    """A full model gets the recipe's adapter, that adapter is trained on, and its base stays below it."""
    sft = {"name": "sft", "recipe": {**recipe("x"), "stage": "sft", "peft": None}, "trains": "base"}
    dpo = {"name": "dpo", "recipe": recipe("x"), "trains": "${sft}"}
    on = {"name": "on", "recipe": recipe("x"), "trains": "${dpo}"}
    doing = Scripted()
    Walk(load_schedule(write(tmp_path, sft, dpo, on)), doing).take()
    full = str(tmp_path / "out" / "sft" / "final")
    assert [task.raw["model"] for task in doing.tasks] == [
        {"path": each} for each in ("base", full, full)
    ]
    adapter = {"adapter": str(tmp_path / "out" / "dpo" / "final")}
    assert [task.raw["peft"] for task in doing.tasks] == [None, LORA, adapter]


# -- what is refused before the first step ---------------------------------------------------------------------


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_schedule(load_schedule(path, overrides))
    assert not (path.parent / "out").exists()
    return str(caught.value)


def steps(model: Path) -> tuple[dict[str, Any], ...]:
    """SFT, pairs of its answers, DPO on them."""
    sft = {**recipe(str(model / "config.json")), "stage": "sft"}
    del sft["objective"]
    return (
        {"name": "sft", "recipe": sft, "trains": str(model)},
        {"name": "pairs", "pipeline": PIPELINE},
        {"name": "dpo", "recipe": recipe(), "trains": "${sft}"},
    )


def test_a_sound_schedule_is_fine_and_shows_its_commands(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, *steps(model))
    script = [
        "steps.dpo.launch=accelerate launch --num_processes 2",
        f"steps.dpo.script={ROOT / 'recipes/dpo.py'}",
    ]
    assert main(["data", "schedule", str(path), "--dry-run", *script]) == 0
    out = tmp_path / "out"
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: fine",
        f"to do  sft: $ prefopt train {out}/sft.yaml",
        f"to do  pairs: $ prefopt data build {out}/pairs.yaml",
        f"to do  dpo: $ accelerate launch --num_processes 2 {ROOT}/recipes/dpo.py {out}/dpo.yaml",
    ]
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps.dpo.trains=${sff}", "trains: ${sff}: unknown placeholder; did you mean 'sft'?"),
        ("steps.pairs.pipeline.stages.1.model.path=${dpo}", "stages.1.model.path: ${dpo}: has no value yet"),
        ("steps.dpo.trains=${dpo}", "trains: ${dpo}: has no value yet: a step names the results of steps before"),
        ("steps.dpo.trains=${previous.dpo}", "${previous.dpo}: there is none in the first turn"),
        ("steps.dpo.recipe.objective.name=dop", "dpo: override: objective.name = 'dop': unknown; did you mean"),
        ("steps.dpo.recipe.objective={name: r_gold}", "holds pairs, and objective.name = 'r_gold' trains on one"),
        ("steps.dpo.recipe.data.train.0.path=nowhere.jsonl", "data.train.0.path = 'nowhere.jsonl': no such file"),
        ("steps.pairs.pipeline.stages.1.temperatur=1", "pairs: override: stages.1.temperatur: unknown key"),
        ("steps.dpo.launch=accelerate launch", "launch = 'accelerate launch', script = None: are given together"),
        ("steps.dpo.recipe=nowhere.yaml", "dpo: nowhere.yaml: no such file"),
        ("steps.dpo.recipe.model=x", "dpo: override: model = 'x': must be a section of keys"),
        ("steps.dpo.recipe.run=x", "dpo: override: run = 'x': must be a section of keys"),
        ("steps.dpo.recipe=[x]", "steps.2.recipe: is the path of a YAML file, or what would be in it"),
        ("steps.dpo.settings=[train.seed]", "override 'train.seed': must be section.key=value"),
        ("steps.dpo.trians=x", "steps.2.trians: unknown key; did you mean 'trains'?"),
        ("steps.dpo.eval=x", "steps.2: is one of pipeline, recipe, eval, or a loop with steps, and has"),
        ("steps.pairs.name=a.b", "steps.1.name = 'a.b': takes letters, digits, - and _"),
        ("steps.pairs.name=sft", "sft: a second step or value of that name"),
        ("values={a: '${b}', b: x}", "values: a: ${b}: unknown placeholder"),
        ("output_dri=x", "output_dri: unknown key; did you mean 'output_dir'?"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_the_first_step(
    tmp_path: Path, model: Path, override: str, said: str
) -> None:
    assert said in refused(write(tmp_path, *steps(model)), override)


def test_a_problem_has_file_key_and_line(tmp_path: Path, model: Path) -> None:
    """Of the step's own file where it has one, else of the schedule; all at once."""
    own = tmp_path / "dpo.yaml"
    own.write_text(
        yaml.safe_dump(recipe("${pears}"), sort_keys=False).replace("learning_rate", "lerning_rate")
    )
    sft, pairs, dpo = steps(model)
    found = refused(write(tmp_path, sft, pairs | {"sttings": []}, dpo | {"recipe": str(own)}))
    assert "steps.1.sttings: unknown key" in found
    path = write(tmp_path, sft, pairs, dpo | {"recipe": str(own), "trains": "${sfft}"})
    found = refused(path)

    def line(file: Path, text: str) -> str:
        lines = file.read_text().splitlines()
        return f"line {next(n for n, each in enumerate(lines, 1) if text in each)}: "

    assert (
        f"dpo: {own}: {line(own, 'pears')}data.train.0.path: ${{pears}}: unknown placeholder"
        in found
    )
    assert f"dpo: {own}: {line(own, 'lerning_rate')}train.lerning_rate: unknown key" in found
    assert (
        f"{line(path, 'sfft')}trains: ${{sfft}}: unknown placeholder; did you mean 'sft'?" in found
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": None}, "a loop has an end: set one of `rounds`"),
        ({"each": {"rate": [1]}}, "a loop has an end: set one of `rounds`"),
        ({"rounds": None, "each": {"a": [1], "b": [1, 2]}}, "are of different lengths (a: 1, b: 2)"),
        ({"best": {"by": "chek"}}, "best.by = 'chek': no step of the loop; did you mean 'check'?"),
        ({"best": {"by": "train"}}, "round: ends by the score of 'train', which has none"),
        ({"best": {"by": "check", "patience": 0}}, "steps.0.best.patience = 0: must be > 0"),
        ({"start": {}}, "say under `start` what train is there"),
        ({"start": {"train": "${dpo}"}}, "round: start: train: ${dpo}: unknown placeholder"),
    ],
)  # fmt: skip
def test_a_loop_that_cannot_work_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    assert said in refused(loop(tmp_path, **changes))


def test_rows_that_the_objective_cannot_read_are_known(tmp_path: Path, model: Path) -> None:
    sft, pairs, dpo = steps(model)
    groups = refused(write(tmp_path, sft, pairs | {"pipeline": SCORED}, dpo))
    assert (
        "/pairs/score': holds groups, and objective.name = 'dpo' trains on pairs or samples"
        in groups
    )
    samples = {"stages": [*SCORED["stages"], {"stage": "threshold", "above": 0.5}]}
    found = refused(write(tmp_path, sft, pairs | {"pipeline": samples}, dpo))
    assert (
        "objective.name = 'dpo', stage = 'preference': does not train on one response a row"
        in found
    )
    on_samples = dpo | {"recipe": recipe(objective={"name": "r_gold"})}
    check_schedule(load_schedule(write(tmp_path, sft, pairs | {"pipeline": samples}, on_samples)))


# -- what runs ---------------------------------------------------------------------------------------------------


def test_a_command_is_run_to_its_end() -> None:
    assert run_command(["sh", "-c", "exit 3"]) == 3
    assert run_command(["sh", "-c", "kill -9 $$"]) == -9


def cheap_chain(folder: Path) -> Path:
    """The shipped chain with 40 prompts, few steps, and a reward that an untrained policy gets some of."""
    write_base(folder / "runs/quickstart/base", seed=0)
    asked = [{"prompt": f"{n * 7919 % 10**8:08d}:"} for n in range(64)]
    digits = [{**each, "response": "".join(sorted(each["prompt"][:-1]))} for each in asked]
    sides = [{**each, "chosen": "01", "rejected": "1"} for each in asked]
    for name, data in (("sft", digits), ("pairs", sides[:24]), ("held_out_pairs", sides[:8])):
        write_jsonl(folder / "runs/quickstart/data" / f"{name}.jsonl", data)
    raw = yaml.safe_load(CHAIN.read_text())
    plugin = str(ROOT / "recipes/rest/digits_in_place.py")
    sft, pairs, simpo, before, rounds = raw["steps"]
    few = ["train.global_batch_size=8", "train.log_every=1"]
    sft["settings"] = few
    simpo["settings"] += few
    stages = pairs["pipeline"]["stages"]
    stages[2]["signals"], stages[3]["rule"] = [{"name": "digits_in_place"}], {"name": "best_worst"}
    pairs["pipeline"]["plugins"] = [plugin]
    online, right = rounds["steps"]
    online["settings"] += [
        *few,
        "signals=[{name: digits_in_place}]",
        "credit={name: best_worst}",
        f"plugins=[{plugin}]",
    ]
    rounds["rounds"] = 2
    rounds["best"]["patience"] = 2
    for each in (before, right):
        each["settings"] = [s.replace("sorted_digits", "digits_in_place") for s in each["settings"]]
        each["settings"][3] = f"tasks.signals.plugins=[{plugin}]"
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def test_the_shipped_chain_runs_whole_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SFT, pairs, SimPO, two rounds of online DPO: each trains what the step before made, and done is done."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    path, ran = cheap_chain(tmp_path), schedules.in_this_process(monkeypatch)
    assert main(["data", "schedule", str(CHAIN), "--check"]) == 0
    assert main(["data", "schedule", str(path)]) == 0
    names = [
        "sft.yaml",
        "pairs.yaml",
        "simpo.yaml",
        "simpo",
        "round-1/online.yaml",
        "round-1/online",
    ]
    names += ["round-2/online.yaml", "round-2/online"]
    kinds = ["train", "data build", "train", "eval", *["train", "eval"] * 2]
    for said, kind, name in zip(ran, kinds, names, strict=True):
        assert said.startswith(f"prefopt {kind} runs/quickstart-chain/{name}")
    out = tmp_path / "runs/quickstart-chain"
    finals = [
        f"runs/quickstart-chain/{each}/final"
        for each in ("sft", "simpo", "round-1/online", "round-2/online")
    ]
    runs = [
        json.loads((tmp_path / each).parent.joinpath("run.json").read_text())["recipe"]
        for each in finals
    ]
    assert [run["model"]["path"] for run in runs] == ["runs/quickstart/base", *finals[:1] * 3]
    assert [run["peft"]["adapter"] for run in runs[2:]] == finals[1:3]
    assert runs[1]["data"]["train"][0]["path"] == "runs/quickstart-chain/pairs/filter"
    assert [run["train"]["seed"] for run in runs[2:]] == [1, 2]
    record = json.loads((out / "schedule.json").read_text())
    scores = [each["score"] for each in record["steps"] if each["score"] is not None]
    assert len(scores) == 3 and record["names"]["right.score"] == max(scores)
    assert record["names"]["online"] == finals[1:][scores.index(max(scores))]
    # done is done, and a finished step that would now be another one is refused by name
    capsys.readouterr()
    assert main(["data", "schedule", str(path)]) == 0 and len(ran) == 8
    assert main(["data", "schedule", str(path), "--status"]) == 0
    assert "right" in capsys.readouterr().out
    assert (
        main(["data", "schedule", str(path), 'steps.simpo.settings=["data.train.0.path=${pairs}"]'])
        == 2
    )
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "simpo has begun with another simpo.yaml: train.global_batch_size was 8 and is now 16"
        in said
    )
    assert len(ran) == 8
    # what a step left is read back or named: torn, of another shape, edited
    damage = {
        "pairs/manifest/filter/done.json": "[]",
        "before/results.json": '{"tasks": ',
        "sft/metrics.jsonl": '{"step": 1}\n[1]\n{"step": 2}\n',
        "sft.yaml": "train: [",
    }
    for name, text in damage.items():
        whole = (out / name).read_bytes()
        (out / name).write_text(text)
        command = ["data", "schedule", str(path), *([] if name.endswith(".yaml") else ["--status"])]
        assert main(command) == (2 if name.endswith(".yaml") else 1)
        said = capsys.readouterr().err
        assert f"{Path('runs/quickstart-chain', name)}:" in said and "estore it" in said
        (out / name).write_bytes(whole)
    assert main(["data", "schedule", str(path)]) == 0 and len(ran) == 8
