"""One task of an evaluation, phase by phase: answers, the baseline's answers, judgments, rows, summary."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.base import (
    Conversation,
    Decoding,
    Example,
    JudgedTask,
    Row,
    Summary,
    Template,
    close_task,
)
from eval.engines import Generator
from eval.generate import Samples, generate, overridden
from eval.judging import Asked, judge_all, judge_sampling, judgments, open_judge, usage
from eval.models import Models, run_condition
from eval.provenance import (
    data_hash,
    describe_decodings,
    describe_engine,
    describe_template,
    task_folder,
    without_files,
    without_none,
)
from eval.registry import TaskSpec
from eval.responses import Answered, answers_from_file
from eval.results import metrics_json
from eval.rows import count_answers, row_from, score_batches, score_rows, write_examples
from eval.settings import EvalSettings
from eval.store import Store
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags, pairs_of

logger = logging.getLogger("prefopt.eval")

_SPARE_TURN_TOKENS = 1024
"""Room for what the user says in later turns, where an engine must know its longest sequence at start."""


@dataclass(frozen=True)
class Planned:
    """A task of this evaluation, its examples loaded."""

    name: str
    spec: TaskSpec
    task: Any
    examples: list[Example]
    """The first ``limit`` of them."""
    data: str
    """Hash of all of them."""


class TaskRun:
    """Runs tasks for one model; its engines start when a task first needs them.

    Args:
        settings: the evaluation.
        models: its models.
        output: its directory; every task has a folder in it.
        model_hash: of the policy's weights.
        baseline: as `eval.provenance.describe_model`, None without one.
    """

    def __init__(
        self,
        settings: EvalSettings,
        models: Models,
        output: Path,
        model_hash: str,
        baseline: Mapping[str, Any] | None,
    ) -> None:
        self.settings = settings
        self.models = models
        self.output = output
        self.model_hash = model_hash
        self.baseline = baseline
        self._generators: dict[str, Generator] = {}

    def task(self, planned: Planned) -> dict[str, Any]:
        """The task's entry of ``results.json``; its rows are in ``<task>/examples.jsonl``."""
        name, spec, examples = planned.name, planned.spec, planned.examples
        task: Any = planned.task
        folder = self.output / task_folder(name)
        base = {
            "task": name,
            "version": spec.version,
            "model": self.model_hash,
            "data": planned.data,
            "options": without_files(self.settings.tasks.get(name, {})),
        }
        try:
            if spec.kind == "model":
                entry, rows = self._score_models(task, examples, folder, base)
                samples = None
            else:
                entry, rows, samples = self._generated(spec, task, examples, folder, base)
        finally:
            if spec.kind != "model":
                close_task(task)
        summary: Summary = task.summarise(rows)
        write_examples(folder / "examples.jsonl", examples, rows, samples)
        return {
            "version": spec.version,
            "kind": spec.kind,
            "headline": spec.headline,
            "direction": spec.direction,
            **metrics_json(summary),
            "data_hash": data_hash(examples),
            "options": self.settings.tasks.get(name, {}),
            **entry,
        }

    def close(self) -> None:
        """Frees engines."""
        for generator in self._generators.values():
            generator.close()
        self._generators.clear()

    def _generated(
        self, spec: TaskSpec, task: Any, examples: list[Example], folder: Path, base: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Row], Samples]:
        name, decoding = spec.name, self._decoding(task)
        decodings = [decoding(example) for example in examples]
        generator = self._generator("policy")
        how = self._how(generator, decodings)
        with Store(folder / "generations.jsonl", {**base, **how}) as store:
            self._fill(generator, examples, decoding, store, name)
        samples = Samples(store, [example.key for example in examples])
        answers, how["thinking"] = self._answers(spec, samples)
        entry: dict[str, Any] = {
            "decoding": describe_decodings(decodings)["presets"],
            "decoding_hash": how["decoding"],
            "chat_template_hash": how["chat_template"],
            "template": _template(task),
            "answers": count_answers(samples.values()),
            "thinking": how["thinking"],
            "usage": {},
        }
        judged: dict[str, dict[str, Any]] = {}
        if isinstance(task, JudgedTask):
            judged, extra = self._judged(
                name, task, examples, answers, decoding, folder, base | how
            )
            entry["usage"] |= extra.pop("usage")
            entry |= extra
        depends = {name: entry.get(name) for name in ("template", "baseline", "judge")}
        with Store(folder / "rows.jsonl", {**base, **how, **depends}) as store:
            rows = score_rows(task, examples, answers, judged, store)
        return entry, rows, samples

    def _answers(
        self, spec: TaskSpec, samples: Samples
    ) -> tuple[Mapping[str, list[Conversation]], list[list[str]] | None]:
        """What the task is given of each response, and the marks of thinking that are looked for, as JSON."""
        tags = None if spec.whole_responses else self.settings.thinking
        return Answered(samples, tags), [[each.begin, each.end] for each in pairs_of(tags)] or None

    def _judged(
        self,
        name: str,
        task: JudgedTask,
        examples: list[Example],
        samples: Mapping[str, list[Conversation]],
        decoding: Callable[[Example], Decoding],
        folder: Path,
        base: dict[str, Any],
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """The judge's answers by example, and what the result says of baseline, judge and template."""
        section = self.models.judge
        assert section is not None, "the plan checks it"
        found, whose = self._baseline(name, task, examples, decoding, folder, base)
        baseline = found and Answered(found, self.settings.thinking)
        questions = {
            example.key: task.questions(
                example, samples[example.key], baseline[example.key] if baseline else None
            )
            for example in examples
        }
        asked = [Asked(key, question) for key, each in questions.items() for question in each]
        sampling = judge_sampling(section, task.judge_sampling)
        own = _own_marks(section.thinking)
        basis = {
            **base,
            "baseline": whose,
            "judge": section.model,
            "judge_sampling": sampling,
            "template": task.template.sha256,
            **own,
        }
        # Nothing of the model's may hold memory while a local judge runs beside it.
        client = open_judge(section, task.judge_sampling)
        with Store(folder / "judgments.jsonl", basis) as store:
            tags = section.thinking
            judge_all(task, asked, client, store, label=f"{name}: judge", thinking=tags)
            found = {key: judgments(store, key, each, tags) for key, each in questions.items()}
            used = usage(store, section)
        extra = {
            "template": describe_template(task.template),
            "baseline": whose,
            "judge": {"model": section.model, "sampling": sampling, **own},
            "usage": used,
        }
        return found, extra

    def _baseline(
        self,
        name: str,
        task: JudgedTask,
        examples: list[Example],
        decoding: Callable[[Example], Decoding],
        folder: Path,
        base: dict[str, Any],
    ) -> tuple[Mapping[str, list[Conversation]] | None, str | None]:
        """The other side's answers by example, and whose they are."""
        if task.baseline == "none":
            return None, None
        if self.settings.baseline_answers:
            path = Path(self.settings.baseline_answers)
            return answers_from_file(path, examples), f"file {path.name}"
        if self.models.baseline is None:
            return task.baseline_answers(examples), "published"
        assert self.baseline is not None
        generator = self._generator("baseline")
        how = {"model": self.baseline["hash"], "chat_template": generator.chat_template_sha256}
        with Store(folder / "baseline.jsonl", {**base, **how}) as store:
            self._fill(generator, examples, decoding, store, f"{name}: baseline")
        found = Samples(store, [example.key for example in examples])
        return found, f"model {self.baseline['hash']}"

    def _fill(
        self,
        generator: Generator,
        examples: list[Example],
        decoding: Callable[[Example], Decoding],
        store: Store,
        label: str,
    ) -> None:
        missing = [example for example in examples if example.key not in store]
        if not missing:
            return
        for other in self._generators.values():  # one model in memory at a time
            if other is not generator:
                other.close()
        generator.start(max(_longest(generator, each, decoding(each)) for each in examples))
        seed = self.settings.seed
        generate(
            generator, examples, decoding, store, task=label.split(":")[0], seed=seed, label=label
        )

    def _score_models(
        self, task: Any, examples: list[Example], folder: Path, base: dict[str, Any]
    ) -> tuple[dict[str, Any], list[Row]]:
        baseline = self.baseline if task.uses_baseline else None
        basis = {
            **base,
            "baseline": baseline["hash"] if baseline else None,
            "seed": self.settings.seed,
            "judge": self.models.judge.model if self.models.judge else None,
        }
        if (condition := run_condition(self.models.policy.path)) is not None:
            basis["condition"] = condition.model_dump()
        with Store(folder / "rows.jsonl", basis) as store:
            missing = [example for example in examples if example.key not in store]
            if missing:
                opened = task.open(self.models)
                try:
                    score_batches(task, examples, opened, store)
                finally:
                    task.close(opened)
            rows = [row_from(store[example.key]) for example in examples]
        entry = {
            "decoding": None,
            "decoding_hash": None,
            "chat_template_hash": self._generator("policy").chat_template_sha256,
            "template": None,
            "baseline": basis["baseline"],
            "usage": {},
        }
        return entry, rows

    def _generator(self, who: str) -> Generator:
        if who not in self._generators:
            policy = self.models.policy if who == "policy" else self.models.baseline
            assert policy is not None
            self._generators[who] = Generator(
                policy, self.models.engine, device=self.models.device, log_dir=self.output / "logs"
            )
        return self._generators[who]

    def _decoding(self, task: Any) -> Callable[[Example], Decoding]:
        changes = without_none(self.settings.decoding.model_dump())
        return lambda example: overridden(task.decoding(example), changes)

    def _how(self, generator: Generator, decodings: Sequence[Decoding]) -> dict[str, Any]:
        """What generations depend on beside model and data."""
        return {
            "decoding": describe_decodings(decodings)["hash"],
            "chat_template": generator.chat_template_sha256,
            "engine": describe_engine(self.models.engine, self.models.policy),
            "seed": self.settings.seed,
        }


def _template(task: Any) -> dict[str, str] | None:
    """The judge template of a task in which the model itself is the judge."""
    found = getattr(task, "template", None)
    return describe_template(found) if isinstance(found, Template) else None


def _longest(generator: Generator, example: Example, decoding: Decoding) -> int:
    """Tokens that an example's whole conversation may take."""
    prompt = generator.prompt_tokens(example.prompt, example.options) or 0
    further = len(example.further_turns) * (_SPARE_TURN_TOKENS + decoding.max_new_tokens)
    return prompt + decoding.max_new_tokens + further


def _own_marks(tags: Tags) -> dict[str, Any]:
    """What a result says of the judge's thinking: nothing where the usual marks are looked for."""
    if tags == DEFAULT_TAGS:
        return {}
    return {"judge_thinking": [[each.begin, each.end] for each in pairs_of(tags)]}
