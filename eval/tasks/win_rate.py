"""Win rate against another model on prompts of your own, as a judge sees it in both orders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    Message,
    Metric,
    Question,
    Row,
    Summary,
    Template,
    missing_judgment,
)
from eval.registry import task
from eval.sources import benchmark_rows, keyed, require, text_key
from eval.statistics import mean_metric, problem_counts, values_of
from prefopt.data.readers import RawRow
from prefopt.errors import ConfigError, DataError
from prefopt.signals.judge import PAIRWISE_TEMPLATE, REMINDERS, conversation, fill, read_template
from prefopt.signals.verdicts import OrderStats, Verdict, joint_outcome, order_stats, parse_verdict
from prefopt.types import Prompt

_ORDERS = ("model_first", "baseline_first")
_NAME = "pairwise, three verdicts"
_PLACEHOLDERS = ("{prompt}", "{response_a}", "{response_b}")
_PROMPTS = ("prompt", "instruction", "messages")
_JUDGE_MAX_TOKENS = 1024


@task(
    "win_rate",
    version="1",
    kind="judge",
    headline="win_rate",
    source="both orders, disagreement is a tie: Zheng et al. 2023, arXiv:2306.05685",
    data="an option",
)
def win_rate(
    *,
    data: str | None = None,
    format: Literal["chat", "text"] = "chat",
    template: str | None = None,
    max_asks: PositiveInt = 3,
    temperature: NonNegativeFloat = 0.0,
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
    max_new_tokens: PositiveInt = 1024,
) -> WinRate:
    """Win rate in percent against ``--baseline`` on prompts of your own; a tie is half a win.

    A judge compares the two answers twice, in both orders. A win in both is a win; orders that disagree are a tie.
    Equal answers tie unasked; an answer that is not there is compared as an empty one, and counted. An answer of
    the judge without a verdict is asked for again; a prompt that has none in the end is left out and counted.

    ``consistency`` is the share of prompts with one verdict in both orders, ``position_bias`` the share of
    verdicts for the answer shown first minus that for the second (0 is unbiased). ``win_rate_longer`` and
    ``win_rate_shorter`` are over prompts to which the model's answer has more or fewer characters than the
    baseline's: where they differ much, the judge may go by length.

    Args:
        data: file of prompts: ``prompt``, ``instruction`` or ``messages`` (a text, or messages that end with the
            user); a column ``key`` identifies them (default: their text). Needed.
        format: ``chat``: a prompt is a user turn for the model's chat template. ``text``: it is continued as it
            stands, for a model without one.
        template: path of a text file in place of our judge prompt; holds ``{prompt}``, ``{response_a}`` and
            ``{response_b}``, and asks for [[A]], [[B]] or [[C]].
        max_asks: times an answer without a verdict is asked for.
        temperature: of the answers; 0 is greedy.
        top_p: of the answers.
        max_new_tokens: longest answer.
    """
    preset = Decoding(max_new_tokens, temperature, top_p)
    return WinRate(data, _template(template), max_asks, preset, is_chat=format == "chat")


class WinRate:
    """See `win_rate`."""

    baseline: Literal["none", "required", "published"] = "required"

    def __init__(
        self,
        data: str | None,
        template: Template,
        max_asks: int,
        preset: Decoding,
        *,
        is_chat: bool = True,
    ) -> None:
        self.data = data
        self.is_chat = is_chat
        self.template = template
        self.max_asks = max_asks
        self.preset = preset
        self.judge_sampling: Mapping[str, Any] = {
            "temperature": 0.0,
            "max_tokens": _JUDGE_MAX_TOKENS,
        }
        self._theirs: dict[str, Answer] = {}
        """The baseline's answers by key, as the judge saw them."""

    def examples(self) -> list[Example]:
        rows = benchmark_rows("tasks.win_rate.data", self.data, hub=None)
        prompts = [_prompt(row) if self.is_chat else _text(row) for row in rows]
        found = keyed(rows, _key, "prompt")
        return [Example(key, prompt) for key, prompt in zip(found, prompts, strict=True)]

    def decoding(self, example: Example) -> Decoding:
        return self.preset

    def questions(
        self, example: Example, samples: Conversations, baseline: Conversations | None
    ) -> list[Question]:
        if baseline is None:
            raise _no_baseline()
        self._theirs[example.key] = baseline[0][0]
        ours, theirs = samples[0][0].text, baseline[0][0].text
        if ours == theirs:
            return []
        sides = ((ours, theirs), (theirs, ours))
        return [
            Question(name, self._messages(example, *both))
            for name, both in zip(_ORDERS, sides, strict=True)
        ]

    def ask_again(self, question: Question, judgment: Judgment) -> Question | None:
        if _verdict(judgment) is not None:
            return None
        # An assistant turn without text is refused by some endpoints.
        said = {"role": "assistant", "content": judgment.text or "…"}
        reminder = {"role": "user", "content": REMINDERS["pairwise"]}
        return Question(question.id, (*question.messages, said, reminder))

    def baseline_answers(self, examples: Sequence[Example]) -> dict[str, list[Conversation]]:
        raise _no_baseline()

    def row(self, example: Example, samples: Conversations, judgments: Judgments) -> Row:
        answer, theirs = samples[0][0], self._theirs[example.key]
        lengths = {"length": len(answer.text), "baseline_length": len(theirs.text)}
        problem = answer.problem or (f"baseline_{theirs.problem}" if theirs.problem else None)
        if answer.text == theirs.text:
            return Row(example.key, {"win_rate": 0.5}, {**lengths, "equal": True}, problem)
        both = [missing_judgment(judgments, name) for name in _ORDERS]
        first, swapped = map(_verdict, both)
        outcome = joint_outcome(first, swapped)
        if outcome is None and problem is None:
            problem = next(why for each in both if (why := _missing(each)))
        details = {**lengths, "verdicts": [first, swapped]}
        return Row(example.key, {"win_rate": outcome}, details, problem)

    def summarise(self, rows: Sequence[Row]) -> Summary:
        points = values_of(rows, "win_rate")
        if not points:
            raise DataError(
                f"win_rate: the judge gave no verdict on any of the {len(rows)} prompts. A custom template must "
                "ask for [[A]], [[B]] or [[C]]; a judge that thinks first needs more judge.max_tokens"
            )
        stats = order_stats(row.details["verdicts"] for row in rows if "verdicts" in row.details)
        metrics = {"win_rate": mean_metric(points, 100), **_order_metrics(stats)}
        metrics |= _length_metrics(rows)
        counts = {
            "n": len(rows),
            "n_wins": points.count(1.0),
            "n_ties": points.count(0.5),
            "n_losses": points.count(0.0),
            "n_equal": sum(bool(row.details.get("equal")) for row in rows),
            "n_verdicts_missing": stats.num_missing,
            **problem_counts(rows),
        }
        return Summary(metrics, counts)

    def _messages(self, example: Example, first: str, second: str) -> tuple[Message, ...]:
        content = example.prompt if isinstance(example.prompt, str) else _dicts(example.prompt)
        values = {
            "prompt": conversation(Prompt(example.key, (), content)),
            "response_a": first,
            "response_b": second,
        }
        return ({"role": "user", "content": fill(self.template.texts["prompt"], values)},)


def _verdict(judgment: Judgment) -> Verdict | None:
    """What the judge decided; nothing where its reply was cut, which may name a verdict on the way to another."""
    return None if judgment.finish_reason == "length" else parse_verdict(judgment.text)


def _missing(judgment: Judgment) -> str | None:
    """Why it has no verdict; None where it has one."""
    if judgment.refused:
        return "judge_refused"
    if _verdict(judgment) is not None:
        return None
    return "judge_cut" if judgment.finish_reason == "length" else "no_verdict"


def _order_metrics(stats: OrderStats) -> dict[str, Metric]:
    return {
        "consistency": Metric(100 * stats.consistency_rate),
        "position_bias": Metric(100 * stats.position_bias),
    }


def _length_metrics(rows: Sequence[Row]) -> dict[str, Metric]:
    """Mean lengths in characters, and win rates by which answer is longer; NaN where there is none."""
    lengths = [(row.details["length"], row.details["baseline_length"]) for row in rows]
    pairs = list(zip(rows, lengths, strict=True))
    longer = values_of((row for row, (ours, theirs) in pairs if ours > theirs), "win_rate")
    shorter = values_of((row for row, (ours, theirs) in pairs if ours < theirs), "win_rate")
    none = Metric(float("nan"))
    return {
        "win_rate_longer": mean_metric(longer, 100) if longer else none,
        "win_rate_shorter": mean_metric(shorter, 100) if shorter else none,
        "longer_share": mean_metric([float(ours > theirs) for ours, theirs in lengths], 100),
        "avg_length": mean_metric([ours for ours, _ in lengths]),
        "baseline_avg_length": mean_metric([theirs for _, theirs in lengths]),
    }


def _prompt(row: RawRow) -> tuple[Message, ...]:
    """Chat messages that end with the user. Raises: DataError naming file and line."""
    value = require(row, *_PROMPTS)
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list) or not value or not all(map(_is_message, value)):
        raise DataError(
            f'{row.where}: a prompt must be a text, or messages [{{"role": …, "content": text}}, …]'
        )
    if value[-1]["role"] != "user":
        raise DataError(
            f"{row.where}: the messages end with the role {value[-1]['role']!r}: they must end with what the user "
            "says, which both models then answer"
        )
    return tuple({"role": each["role"], "content": each["content"]} for each in value)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )


def _key(data: Mapping[str, Any]) -> str:
    """The row's own key, else one made of its prompt."""
    if data.get("key") not in (None, ""):
        return str(data["key"])
    prompt = next(data[name] for name in _PROMPTS if data.get(name) is not None)
    return text_key(prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True))


def _text(row: RawRow) -> str:
    """A prompt as it stands. Raises: DataError naming file and line."""
    value = require(row, *_PROMPTS[:2])
    if not isinstance(value, str):
        raise DataError(f"{row.where}: format = text: a prompt must be a text. Set format: chat")
    return value


def _dicts(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(message) for message in messages)


def _template(path: str | None) -> Template:
    option = "tasks.win_rate.template"
    text = read_template(path, PAIRWISE_TEMPLATE, _PLACEHOLDERS, option, ConfigError)
    origin = "prefopt" if path is None else Path(path).name
    return Template(_NAME, origin, {"prompt": text})


def _no_baseline() -> ConfigError:
    return ConfigError("win_rate: compares two models' answers: give --baseline OTHER")
