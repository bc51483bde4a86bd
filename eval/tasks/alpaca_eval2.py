"""AlpacaEval 2: 805 instructions, win rate against gpt-4-1106-preview, with answers' length held equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

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
from eval.registry import task
from eval.sources import file_or_hub_rows, file_rows, keyed, require, text_key
from eval.tasks._alpaca_instructions import instruction_number
from eval.tasks._alpaca_judge import judge_messages, load_template, model_first, model_win
from eval.tasks._alpaca_rows import BASELINE, annotation_row, make_row
from eval.tasks._alpaca_summary import alpaca_summary
from eval.tasks._lc_winrate import HUB, Calibration, find_calibration
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError, DataError

HUB_FILE = "alpaca_eval_gpt4_baseline.json"
_QUESTION = "preference"


@dataclass(frozen=True)
class AlpacaOptions:
    """Options of the task as the user gave them; see `alpaca_eval2`."""

    data: str | None
    baseline_data: str | None
    calibration: str | None


@task(
    "alpaca_eval2",
    version="1",
    kind="judge",
    headline="length_controlled_winrate",
    source="Dubois et al. 2024, arXiv:2404.04475; tatsu-lab/alpaca_eval@cd543a1, weighted_alpaca_eval_gpt4_turbo",
    data=f"hub {HUB}, {HUB_FILE}",
)
def alpaca_eval2(
    *,
    data: str | None = None,
    baseline_data: str | None = None,
    calibration: str | None = None,
    template: str | None = None,
    temperature: NonNegativeFloat = 0.7,
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
    max_new_tokens: PositiveInt = 2048,
) -> AlpacaEval2:
    """Win rate in percent against gpt-4-1106-preview on 805 instructions, as it is and at equal length.

    A judge sees both answers once, in an order drawn by instruction, and names the better in one token; the
    probabilities of the two names are the preference. ``win_rate`` is its mean. ``length_controlled_winrate`` is
    what a logistic regression on length difference, instruction and model predicts at equal length; it needs the
    published calibration, which is for that baseline and its own judge prompt. Standard errors are over
    instructions, of predictions for the second. Equal answers are a draw unasked; an instruction without a
    preference (a null, a refusal, no log-probs, neither name among the likeliest tokens) is left out and counted.

    Decoding is each model's own on the published leaderboard; the default is that of its Zephyr-7B-beta.
    Llama-3-8B-SimPO's numbers were made with temperature 0.9 and 4096 tokens.

    Args:
        data: file of instructions (``instruction``, ``dataset``); default: ``baseline_data``, else the hub's.
        baseline_data: file of the baseline's answers (``instruction``, ``output``); default: ``data``, where its
            ``generator`` is gpt4_1106_preview, else the hub's.
        calibration: folder with the published df_gamed.csv (which holds the difficulties, too); default: the
            folder of the file or up to two above, an installed alpaca_eval, the hub.
        template: file in place of the judge prompt, with ``{instruction}``, ``{output_1}`` (called m) and
            ``{output_2}`` (called M); default: that of an installed alpaca_eval, else our own. Published numbers
            were made with alpaca_eval_clf.txt.
        temperature: of the answers; 0 is greedy.
        top_p: of the answers.
        max_new_tokens: longest answer.
    """
    return AlpacaEval2(
        AlpacaOptions(data, baseline_data, calibration),
        load_template("tasks.alpaca_eval2.template", template),
        Decoding(max_new_tokens, temperature, top_p),
    )


class AlpacaEval2:
    """See `alpaca_eval2`."""

    baseline: Literal["none", "required", "published"] = "published"
    max_asks = 1

    def __init__(self, options: AlpacaOptions, template: Template, preset: Decoding) -> None:
        self.options = options
        self.template = template
        self.preset = preset
        self.judge_sampling: Mapping[str, Any] = {
            "temperature": 1.0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 5,
        }
        self._files = [Path(each) for each in (options.data, options.baseline_data) if each]
        self._found: Calibration | None = None
        self._theirs: dict[str, Answer] = {}
        """The baseline's answers by key, as the judge saw them."""
        self._whose: str | None = None

    def examples(self) -> list[Example]:
        rows = keyed(
            self._instructions(), lambda data: data.get("instruction"), "instruction", "instruction"
        )
        found = [_example(row) for row in rows.values()]
        if all(instruction_number(example.key) is None for example in found):
            raise ConfigError(
                f"tasks.alpaca_eval2.data = {self.options.data!r}: holds none of AlpacaEval's 805 instructions, "
                "so there is no length-controlled win rate; use the task win_rate for prompts of your own"
            )
        self._calibration()  # a file that is missing is better known now than after judging
        return found

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def questions(
        self, example: Example, samples: Conversations, baseline: Conversations | None
    ) -> list[Question]:
        if baseline is None:
            raise ConfigError("alpaca_eval2: needs a baseline's answers to compare with")
        self._theirs[example.key] = baseline[0][0]
        ours, theirs = samples[0][0].text, baseline[0][0].text
        if ours == theirs:
            return []
        instruction = str(example.fields["instruction"])
        sides = (ours, theirs) if model_first(instruction) else (theirs, ours)
        return [Question(_QUESTION, judge_messages(self.template, instruction, *sides))]

    def ask_again(self, question: Question, judgment: Judgment) -> Question | None:
        return None

    def baseline_answers(self, examples: Sequence[Example]) -> dict[str, list[Conversation]]:
        self._whose = BASELINE
        rows = keyed(
            self._baseline_rows(), lambda data: data.get("instruction"), "answer", "instruction"
        )
        answers = {
            text_key(instruction): str(require(row, "output")) for instruction, row in rows.items()
        }
        missing = [example for example in examples if example.key not in answers]
        if missing:
            raise DataError(
                f"tasks.alpaca_eval2.baseline_data: no answer for {len(missing)} of {len(examples)} instructions, "
                f"e.g. {missing[0].fields['instruction'][:80]!r}"
            )
        return {example.key: [(Answer(answers[example.key]),)] for example in examples}

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        answer, theirs = samples[0][0], self._theirs[example.key]
        judgment = missing_judgment(judgments, _QUESTION)
        first = model_first(str(example.fields["instruction"]))
        win = 0.5 if answer.text == theirs.text else model_win(judgment.top_logprobs, first=first)
        problem = answer.problem or (f"baseline_{theirs.problem}" if theirs.problem else None)
        if win is None and problem is None:
            problem = _no_preference(judgment)
        return make_row(
            example.key,
            win,
            (theirs.text, answer.text),
            problem=problem,
            baseline=self._whose,
            dataset=example.fields.get("dataset"),
        )

    def summarise(self, rows: Sequence[Row]) -> Summary:
        return alpaca_summary(rows, self._calibration)

    def read(self, path: Path) -> dict[str, list[Row]]:
        """Annotations (``instruction``, ``output_1`` the baseline's, ``output_2``, ``preference`` in [1, 2]).

        Where there is no column ``preference``, it is made of the judge's log-probs (``raw_completion``).
        """
        self._files.insert(0, path)
        models: dict[str, list[RawRow]] = {}
        for raw in file_rows(path):
            models.setdefault(str(raw.data.get("generator_2") or ""), []).append(raw)
        return {
            model: [
                annotation_row(raw)
                for raw in keyed(
                    rows, lambda data: data.get("instruction"), "annotation", "instruction"
                ).values()
            ]
            for model, rows in models.items()
        }

    def _calibration(self) -> Calibration:
        if self._found is None:
            option = "tasks.alpaca_eval2.calibration"
            self._found = find_calibration(option, self.options.calibration, self._files)
        return self._found

    def _instructions(self) -> list[RawRow]:
        path = self.options.data or self.options.baseline_data
        return file_or_hub_rows("tasks.alpaca_eval2.data", path, repo=HUB, file=HUB_FILE)

    def _baseline_rows(self) -> list[RawRow]:
        path = self.options.baseline_data
        if path is None and self.options.data is not None:
            rows = self._instructions()
            if rows and all(row.data.get("generator") == BASELINE for row in rows):
                return rows
        option = "tasks.alpaca_eval2.baseline_data"
        return file_or_hub_rows(option, path, repo=HUB, file=HUB_FILE)


def _example(row: RawRow) -> Example:
    instruction = str(require(row, "instruction"))
    fields = {"instruction": instruction, "dataset": row.data.get("dataset")}
    return Example(text_key(instruction), ({"role": "user", "content": instruction},), fields)


def _no_preference(judgment: Judgment) -> str:
    if judgment.refused:
        return "judge_refused"
    return "no_verdict" if judgment.top_logprobs else "no_logprobs"
