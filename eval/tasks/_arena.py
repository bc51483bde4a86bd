"""Arena-Hard, both editions: a judge compares a model's answers with a baseline's, in both orders, five labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.base import (
    Answer,
    Conversation,
    Conversations,
    Decoding,
    Example,
    Judgment,
    Judgments,
    Question,
    Row,
    Summary,
    Template,
    missing_judgment,
)
from eval.sources import benchmark_rows, file_or_hub_rows, file_rows, keyed
from eval.style import StyleMethod
from eval.tasks._arena_files import (
    LabelRules,
    StoredAnswer,
    Tally,
    count_labels,
    question_key,
    stored_answers,
    tallies,
)
from eval.tasks._arena_score import Scoring, Styles, arena_summary
from eval.tasks._arena_template import judge_messages
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError, DataError
from prefopt.recipe.local_paths import data_suffix

HUB = "lmarena-ai/arena-hard-auto"
_GAMES = ("game_1", "game_2")


@dataclass(frozen=True)
class Edition:
    """What differs between the editions."""

    task: str
    """Name of the task, for errors."""
    folder: str
    """Its folder in the hub's data set."""
    num_questions: int
    categories: tuple[str, ...]
    """Reported apart; the first is the headline's."""
    baselines: Mapping[str, str]
    """Baseline model by category."""
    rules: LabelRules
    follow_up: str | None
    """What a judge is told whose answer has no label at all; None: it is not asked again."""
    judge_max_tokens: int
    percentiles: tuple[float, float]
    style: StyleMethod
    encoding: str
    """Of tiktoken: what the published token counts were made with."""


@dataclass(frozen=True)
class ArenaOptions:
    """Options of the task as the user gave them; see `arena_hard`."""

    data: str | None
    baseline_data: str | None
    max_new_tokens: int
    style_control: bool
    style_length: Literal["tokens", "characters"]
    answers: str | None
    style_battles: str | None


class ArenaTask:
    """One edition with its options bound; see `arena_hard` and `arena_hard_v2`."""

    baseline: Literal["none", "required", "published"] = "published"

    def __init__(self, edition: Edition, options: ArenaOptions, template: Template) -> None:
        if options.style_battles and not options.style_control:
            raise ConfigError(
                f"tasks.{edition.task}.style_battles: would be ignored: set style_control, which fits them"
            )
        self.edition = edition
        self.options = options
        self.template = template
        self.judge_sampling: Mapping[str, Any] = {
            "temperature": 0.0,
            "max_tokens": edition.judge_max_tokens,
        }
        self.max_asks = 1 if edition.follow_up is None else 2
        self.preset = Decoding(options.max_new_tokens)
        self.styles = Styles(edition.encoding, options.style_length, self._option("style_length"))
        self._baseline_styles: dict[str, list[int]] = {}

    def examples(self) -> list[Example]:
        if self.options.style_control:
            self.styles.length("")  # no tokenizer: better known now than after generating
        return [self._example(row) for row in self._questions().values()]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def questions(
        self, example: Example, samples: Conversations, baseline: Conversations | None
    ) -> list[Question]:
        """Assistant A is the baseline in game 1, the model in game 2. A missing answer is judged as an empty one.

        Raises: ConfigError without a baseline.
        """
        if baseline is None:
            raise ConfigError(f"{self.edition.task}: needs a baseline's answers to compare with")
        ours, theirs = samples[0][0].text, baseline[0][0].text
        category, question = example.fields["category"], example.fields["question"]
        if self.options.style_control:
            self._baseline_styles[example.key] = self.styles.of(StoredAnswer(theirs))
        return [
            Question(name, judge_messages(self.template, category, question, *sides))
            for name, sides in zip(_GAMES, ((theirs, ours), (ours, theirs)), strict=True)
        ]

    def ask_again(self, question: Question, judgment: Judgment) -> Question | None:
        """As published: only where there is no label at all, not where there are several."""
        if self.edition.follow_up is None or self.edition.rules.labels(judgment.text):
            return None
        # An assistant turn without text is refused by some endpoints.
        said = {"role": "assistant", "content": judgment.text or "…"}
        more = {"role": "user", "content": self.edition.follow_up}
        return Question(question.id, (*question.messages, said, more))

    def baseline_answers(self, examples: Sequence[Example]) -> dict[str, list[Conversation]]:
        wanted = {
            example.key: self._baseline_of(example.fields["category"]) for example in examples
        }
        stored: dict[str, dict[str, StoredAnswer]] = {}
        for model in sorted(set(wanted.values())):
            stored[model] = self._baseline_file(model)
        missing = [
            key
            for key, model in wanted.items()
            if key not in stored[model] or stored[model][key].text is None
        ]
        if missing:
            raise DataError(
                f"{self._option('baseline_data')}: {wanted[missing[0]]} has no answer to {len(missing)} of "
                f"{len(wanted)} questions, e.g. {missing[0]!r}"
            )
        return {key: [(Answer(stored[model][key].text or ""),)] for key, model in wanted.items()}

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        both = [missing_judgment(judgments, name) for name in _GAMES]
        labels = [self.edition.rules.verdict(each.text) for each in both]
        tally = count_labels(labels, self.edition.rules, category=example.fields["category"])
        answer = samples[0][0]
        problem = answer.problem or ("judge_refused" if any(j.refused for j in both) else None)
        style = None
        if self.options.style_control:
            ours = self.styles.of(StoredAnswer(answer.text))
            style = {"model": ours, "baseline": self._baseline_styles[example.key]}
        return self._row(example.key, tally, style=style, problem=problem)

    def summarise(self, rows: Sequence[Row]) -> Summary:
        edition = self.edition
        total = len(self._questions()) if self.options.data else edition.num_questions
        scoring = Scoring(
            edition.categories, edition.percentiles, total, edition.style, self._option("answers")
        )
        others = self._other_models(rows) if self.options.style_control else None
        return arena_summary(rows, scoring, others)

    def read(self, path: Path) -> dict[str, list[Row]]:
        """Judgments with their games, or battles; several models in one file are told apart by name."""
        styles = self._stored_styles() if self.options.style_control else {}
        expected = self._questions() if self.options.data else None
        found = tallies(
            file_rows(path), self.edition.rules, self._baseline_of(self.edition.categories[0])
        )
        return {
            model: self._model_rows(path, model, questions, styles, expected)
            for model, questions in found.items()
        }

    def _model_rows(
        self,
        path: Path,
        model: str,
        questions: Mapping[str, Tally],
        styles: Mapping[str, Mapping[str, list[int]]],
        expected: Mapping[str, RawRow] | None,
    ) -> list[Row]:
        unknown = [key for key in questions if expected is not None and key not in expected]
        if unknown:
            raise DataError(
                f"{path}: {len(unknown)} of {len(questions)} questions are not in {self._option('data')}, e.g. "
                f"{unknown[0]!r}"
            )
        rows = []
        for key, tally in questions.items():
            theirs = styles.get(self._baseline_of(tally.category), {}).get(key)
            ours = styles.get(model, {}).get(key)
            style = {"model": ours, "baseline": theirs} if ours and theirs else None
            rows.append(self._row(key, tally, style=style, model=model))
        absent = [key for key in expected or () if key not in questions]
        return rows + [Row(key, {"score": None}, problem="missing") for key in absent]

    def _row(
        self,
        key: str,
        tally: Tally,
        *,
        style: Mapping[str, list[int]] | None,
        problem: str | None = None,
        model: str = "",
    ) -> Row:
        labels = [label for label in tally.games or () if label not in self.edition.rules.outcomes]
        details = {
            "wins": tally.wins,
            "losses": tally.losses,
            "ties": tally.ties,
            "games": None if tally.games is None else list(tally.games),
            "unparsed": len(labels),
            "disagreements": tally.disagreements,
            "category": self._category(tally.category),
            "model": model or None,
            "style": style,
        }
        score = (tally.wins + tally.ties / 2) / tally.battles if tally.battles else None
        kept = {name: value for name, value in details.items() if value not in (None, 0)}
        counts = {name: details[name] for name in ("wins", "losses", "ties")}
        return Row(
            key, {"score": score}, {**counts, **kept}, problem or ("no_verdict" if labels else None)
        )

    def _questions(self) -> dict[str, RawRow]:
        file = f"data/{self.edition.folder}/question.jsonl"
        rows = file_or_hub_rows(self._option("data"), self.options.data, repo=HUB, file=file)
        return keyed(
            rows,
            lambda data: data.get("question_id", data.get("uid")),
            "question",
            "question_id",
            "uid",
        )

    def _example(self, row: RawRow) -> Example:
        text = row.data.get("prompt")
        turns = row.data.get("turns")
        if text is None and isinstance(turns, list) and len(turns) == 1:
            text = turns[0].get("content") if isinstance(turns[0], Mapping) else turns[0]
        if not isinstance(text, str) or not text:
            raise DataError(f"{row.where}: the question must be one turn, in 'turns' or 'prompt'")
        prompt = ({"role": "user", "content": text},)
        fields = {"category": self._category(row.data.get("category")), "question": text}
        return Example(question_key(row), prompt, fields)

    def _category(self, named: str | None) -> str:
        """An edition with one category has one, whatever its questions say."""
        first, *others = self.edition.categories
        return str(named) if named and others else first

    def _baseline_of(self, category: str | None) -> str:
        known = self.edition.baselines
        return known.get(category or "", known[self.edition.categories[0]])

    def _baseline_file(self, model: str) -> dict[str, StoredAnswer]:
        """Raises: DataError if the file holds other models' answers only, naming them."""
        found = self._baseline_rows(model)
        if model not in found:
            raise DataError(
                f"{self._option('baseline_data')} = {self.options.baseline_data!r}: holds answers of "
                f"{', '.join(sorted(found)) or 'nobody'}, not of the baseline {model}. Another baseline is given "
                "with --baseline OTHER or baseline_answers=FILE"
            )
        return found[model]

    def _baseline_rows(self, model: str) -> dict[str, dict[str, StoredAnswer]]:
        file = f"data/{self.edition.folder}/model_answer/{model}.jsonl"
        option, path = self._option("baseline_data"), self.options.baseline_data
        return stored_answers(file_or_hub_rows(option, path, repo=HUB, file=file))

    def _stored_styles(self) -> dict[str, dict[str, list[int]]]:
        """Styles by model and question: of ``answers``, and of the baselines."""
        option = self._option("answers")
        if self.options.answers is None:
            raise ConfigError(
                f"{option} is missing: style control needs the answers that were judged (files or a folder in the "
                "shape of model_answer/*.jsonl)"
            )
        found = stored_answers(benchmark_rows(option, self.options.answers, hub=None))
        for model in sorted(set(self.edition.baselines.values()) - set(found)):
            if self.options.baseline_data is not None:
                found |= {model: self._baseline_file(model)}
        return {
            model: {key: self.styles.of(each) for key, each in answers.items()}
            for model, answers in found.items()
        }

    def _other_models(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Rows of the models of ``style_battles``, without the one that ``rows`` are of."""
        if self.options.style_battles is None:
            return []
        path = Path(self.options.style_battles).expanduser()
        files = sorted(f for f in path.iterdir() if data_suffix(f)) if path.is_dir() else [path]
        mine = {row.details.get("model") for row in rows}
        found: dict[str, list[Row]] = {}
        for file in files:
            for model, theirs in self.read(file).items():
                if model in found:
                    raise DataError(
                        f"{self._option('style_battles')}: {model!r} is in two files, {file.name} and another"
                    )
                found[model] = theirs
        return [found[model] for model in sorted(found) if model not in mine]

    def _option(self, name: str) -> str:
        return f"tasks.{self.edition.task}.{name}"
