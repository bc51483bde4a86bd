"""What a newcomer writes to add one of each kind: new files, and a few lines in old ones.

`ADDITIONS` holds both; `EXERCISE` is what is then done with them, in an interpreter that imports the changed copy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Addition:
    """New files by path, and by path what is replaced in old ones: ``(old, new)``, where ``old`` stands once."""

    files: dict[str, str] = field(default_factory=dict)
    edits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def make(self, root: Path) -> None:
        for path, text in self.files.items():
            assert not (root / path).exists()
            (root / path).write_text(text.lstrip("\n"), encoding="utf-8")
        for path, pairs in self.edits.items():
            text = (root / path).read_text(encoding="utf-8")
            for old, new in pairs:
                assert text.count(old) == 1, f"{path}: {old!r} stands {text.count(old)} times"
                text = text.replace(old, new)
            (root / path).write_text(text, encoding="utf-8")

    @property
    def touched(self) -> set[str]:
        """As docs/where_is.md names them."""
        return {path.replace("newcomer", "NAME") for path in self.files} | set(self.edits)


def _line(path: str, table: str, home: str) -> dict[str, list[tuple[str, str]]]:
    """The line of a table that a new module needs."""
    opening = f"{table}: dict[str, str] = {{"
    return {path: [(opening, f'{opening}\n    "newcomer": "{home}.newcomer",')]}


REGISTRY = "prefopt/recipe/registry.py"

ADDITIONS = {
    "objective": Addition(
        {
            "prefopt/objectives/newcomer.py": """
from prefopt.recipe.registry import Need, objective
from prefopt.types import ObjectiveOutput


@objective("newcomer", needs={Need.PAIRS}, source="here")
def newcomer(lp, *, gamma: float = 1.0) -> ObjectiveOutput:
    chosen, rejected = lp.policy.sum(-1)[lp.pairs].unbind(-1)
    return ObjectiveOutput((gamma - (chosen - rejected)).relu())
"""
        },
        _line(REGISTRY, "OBJECTIVES", "prefopt.objectives"),
    ),
    "signal": Addition(
        {
            "prefopt/signals/newcomer.py": """
from prefopt.recipe.registry import signal
from prefopt.signals.base import per_response


@signal("newcomer", source="here")
def newcomer(*, word: str = "please"):
    return per_response(lambda prompt, text: float(word in text))
"""
        },
        _line(REGISTRY, "SIGNALS", "prefopt.signals"),
    ),
    "credit rule": Addition(
        {
            "prefopt/credit/newcomer.py": """
from prefopt.credit.base import GroupScores, Labels
from prefopt.recipe.registry import Need, credit


@credit("newcomer", gives={Need.PAIRS}, source="here")
def newcomer(scores: GroupScores, *, best: int = 0) -> Labels:
    return Labels(pairs=((best, 1 - best),))
"""
        },
        _line(REGISTRY, "CREDITS", "prefopt.credit"),
    ),
    "stage": Addition(
        {
            "data_pipelines/stages/newcomer.py": """
from data_pipelines.base import Place, RowByRow, StageSettings
from data_pipelines.registry import stage
from data_pipelines.rows import RowKind


@stage("newcomer", works="map", reads={RowKind.PROMPTS}, source="here")
class Newcomer(StageSettings):
    \"\"\"Asks louder.\"\"\"

    mark: str = "!"
    \"\"\"What a prompt ends with.\"\"\"

    def open(self, place: Place) -> RowByRow:
        return RowByRow(lambda row: [{**row, "prompt": row["prompt"] + self.mark}])
"""
        },
        _line("data_pipelines/registry.py", "STAGES", "data_pipelines.stages"),
    ),
    "benchmark": Addition(
        {
            "eval/tasks/newcomer.py": """
from eval.base import Row, Summary
from eval.registry import task
from eval.responses import response_of, response_rows
from eval.statistics import mean_metric, values_of


@task("newcomer", version="1", kind="generate", headline="shouts", source="here", data="an option")
def newcomer(*, mark: str = "!"):
    return Newcomer(mark)


class Newcomer:
    def __init__(self, mark):
        self.mark = mark

    def read(self, path):
        rows = [
            Row(str(i), {"shouts": float(response_of(raw).text.endswith(self.mark))})
            for i, raw in enumerate(response_rows(path, "prompt"))
        ]
        return {"": rows}

    def summarise(self, rows):
        return Summary({"shouts": mean_metric(values_of(rows, "shouts"), 100)}, {"n": len(rows)})
"""
        },
        _line("eval/registry.py", "TASKS", "eval.tasks"),
    ),
    "engine": Addition(
        {
            "prefopt/engines/newcomer.py": """
from prefopt.engines.base import Completion
from prefopt.engines.start import Started, engine


@engine("newcomer", source="here")
def start(section, task):
    return Started(Echo(section.times), None)


class Echo:
    name, version = "newcomer", 0

    def __init__(self, times):
        self.times = times

    def generate(self, requests, spec):
        ids = [tuple(request.prompt_ids) * self.times for request in requests]
        return [[Completion(i, (0.0,) * len(i), "eos") for _ in r.seeds] for i, r in zip(ids, requests)]

    def close(self):
        pass
"""
        },
        {
            **_line("prefopt/engines/start.py", "ENGINES", "prefopt.engines"),
            "prefopt/recipe/choices.py": [
                (
                    "Engine = Annotated[HFSection |",
                    """class NewcomerSection(EngineSection):
    \"\"\"Says a prompt again.\"\"\"

    name: Literal["newcomer"] = "newcomer"
    times: PositiveInt = 2
    \"\"\"How often.\"\"\"


Engine = Annotated[NewcomerSection | HFSection |""",
                )
            ],
        },
    ),
    "reference": Addition(
        edits={
            "prefopt/reference/live.py": [
                ('"ema", "synced"]', '"ema", "synced", "newcomer"]'),
                (
                    "    def after_step(self) -> None:\n",
                    "    def after_step(self) -> None:\n"
                    '        if self.kind == "newcomer":\n'
                    "            self._held[0] = self._snapshot()\n",
                ),
            ],
            "prefopt/recipe/choices.py": [
                (
                    "Reference = Annotated[\n",
                    """class NewcomerReference(ReferenceSection):
    \"\"\"The policy of the step before; for rollouts.\"\"\"

    follows_policy: ClassVar[bool] = True

    name: Literal["newcomer"] = "newcomer"


Reference = Annotated[
    NewcomerReference |
""",
                ),
            ],
        },
    ),
    "attention kernel": Addition(
        {
            "prefopt/model/attention/newcomer.py": """
from prefopt.model.attention import Kernel
from prefopt.model.attention.reference import PackedMasks, packed_attention

CALLS = []


def attend(*arguments, **keywords):
    CALLS.append(1)
    return packed_attention(*arguments, **keywords)


KERNEL = Kernel(attend, PackedMasks)
"""
        },
        _line("prefopt/model/attention/__init__.py", "KERNELS", "prefopt.model.attention"),
    ),
    "schedule step": Addition(
        edits={
            "data_pipelines/schedule/kinds.py": [
                (
                    "KINDS: dict[str, type[StepSettings]] = {",
                    """class NewcomerStep(StepSettings):
    \"\"\"Touches a file.\"\"\"

    touch: str

    def prepare(self, task: Task) -> None:
        pass

    def result(self, task: Task) -> str:
        return str(task.output)

    def is_done(self, task: Task) -> bool:
        return task.output.is_file()

    def command(self, task: Task) -> list[str]:
        return ["touch", str(task.output)]

    def found(self, task: Task) -> Found:
        return Found()


KINDS: dict[str, type[StepSettings]] = {
    "touch": NewcomerStep,""",
                )
            ]
        },
    ),
}

EXERCISE = """
import json, random, sys
from pathlib import Path
import torch
from prefopt.cli import main

found = {}
folder = Path.cwd() / "work"
folder.mkdir()

from prefopt.recipe.registry import bind_objective, get_credit
from prefopt.types import Candidates, Group, Prompt, Response, ResponseLogps

lp = ResponseLogps(
    policy=torch.tensor([[-1.0, -1.0], [-1.0, -2.0]]), mask=torch.ones(2, 2, dtype=torch.bool),
    pairs=torch.tensor([[0, 1]]),
)
found["objective"] = bind_objective({"name": "newcomer", "gamma": 3.0})(lp).losses.tolist()

recipe = folder / "recipe.yaml"
recipe.write_text(json.dumps({
    "model": {"path": "hub/model"}, "data": {"prompts": [{"path": "hub/prompts"}]},
    "objective": {"name": "dpo"}, "regime": {"name": "rollouts"}, "engine": {"name": "newcomer", "times": 3},
    "signals": [{"name": "newcomer", "word": "thanks"}], "credit": {"name": "newcomer", "best": 1},
    "reference": {"name": "newcomer"}, "train": {"learning_rate": 1e-6}, "run": {"output_dir": "run"},
}))
from prefopt.recipe.load import load_recipe
from prefopt.signals.combine import build_signals

loaded = load_recipe(recipe)
prompt = Prompt("p", (1, 2), "hello")
candidates = Candidates(prompt, ("no", "many thanks"), ((3,), (4,)), (False, False))
(scored,) = build_signals(loaded.signals).score([candidates])
found["signal"] = list(scored.rewards)

from prefopt.credit.base import GroupScores

scores = GroupScores((0.0, 1.0), ((3,), (4,)), random.Random(0))
found["credit rule"] = [list(pair) for pair in loaded.credit(scores).pairs]

rows = folder / "prompts.jsonl"
rows.write_text(json.dumps({"prompt": "more"}))
pipeline = folder / "pipeline.yaml"
pipeline.write_text(json.dumps({"output_dir": str(folder / "out"), "stages": [
    {"stage": "prompts", "sources": [{"path": str(rows)}]}, {"stage": "newcomer", "mark": "?!"}]}))
assert main(["data", "build", str(pipeline)]) == 0
(file,) = (folder / "out" / "newcomer").glob("*.jsonl")
found["stage"] = json.loads(file.read_text())["prompt"]

answers = folder / "answers.jsonl"
answers.write_text("\\n".join(json.dumps({"prompt": p, "response": p + "!"}) for p in "ab"))
from eval.registry import make_task

task = make_task("newcomer", {})
found["benchmark"] = task.summarise(task.read(answers)[""]).metrics["shouts"].value

from prefopt.engines.base import Request, SamplingSpec
from prefopt.engines.start import Task, start_engine

started = start_engine(loaded.engine, Task(loaded.model, 0, 9, "cpu", folder))
((answer,),) = started.engine.generate([Request((7, 8), (0,))], SamplingSpec(max_new_tokens=9))
found["engine"] = list(answer.ids)

from prefopt.model.layouts import build_logp_model
from prefopt.model.logps import LogpModel
from prefopt.model.collate import pack
from prefopt.reference.live import LiveReference
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
llama = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2))
groups = [Group("g", (1, 2, 3), (Response((4, 5)), Response((6,))))]
own = LogpModel(llama)
want = own(pack(groups))
reference = LiveReference(own, kind=loaded.reference.name, layout=pack, device=torch.device("cpu"))
with torch.no_grad():
    llama.lm_head.weight.mul_(2)
before = reference.logps([groups])[0]
reference.after_step()
found["reference"] = [torch.equal(before, want), torch.equal(reference.logps([groups])[0], own(pack(groups)))]

kernel = LogpModel(llama, kernel="newcomer")(pack(groups))
from prefopt.model.attention.newcomer import CALLS

found["attention kernel"] = [torch.equal(kernel, LogpModel(llama)(pack(groups))), len(CALLS)]

schedule = folder / "schedule.yaml"
steps = [{"name": "bell", "touch": "it"}]
schedule.write_text(json.dumps({"output_dir": str(folder / "schedule"), "steps": steps}))
assert main(["data", "schedule", str(schedule)]) == 0
found["schedule step"] = (folder / "schedule" / "bell").is_file()
print(json.dumps(found))
"""
