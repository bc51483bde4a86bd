"""A judge's answers to a task's questions, each stored once, with what they cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.base import Answer, Conversation, Example, JudgedTask, Judgment, Question
from eval.settings import JudgeSection
from eval.store import Store
from prefopt.recipe.thinking import DEFAULT_TAGS, Tags
from prefopt.report.bars import Bar
from prefopt.signals.chat_client import ChatClient, Endpoint
from prefopt.signals.chat_replies import Reply, ReplyCache
from prefopt.signals.thinking import answer_of
from prefopt.storage.cache import cache_root

_CHUNKS_IN_FLIGHT = 4
"""Questions asked (and then stored) at a time, as a multiple of the endpoint's concurrency."""


@dataclass(frozen=True)
class Asked:
    """One question about one example."""

    key: str
    question: Question

    @property
    def id(self) -> str:
        return f"{self.key}\t{self.question.id}"


def open_judge(section: JudgeSection, published: Mapping[str, Any]) -> ChatClient:
    """A client that asks as the benchmark published, except where the user said otherwise.

    Raises: SignalError for a key or URL that cannot work.
    """
    endpoint = Endpoint(
        section.base_url,
        section.model,
        section.api_key_env,
        section.timeout_s,
        section.deadline_s,
        section.concurrency,
    )
    cache = ReplyCache(cache_root(section.cache_dir) / "chat")
    return ChatClient(endpoint, judge_sampling(section, published), cache)


def judge_sampling(section: JudgeSection, published: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of each request beside model and messages; one that is null is left out."""
    own = {"temperature": section.temperature, "max_tokens": section.max_tokens}
    own = {name: value for name, value in own.items() if value is not None}
    merged = {**published, **own, **section.sampling}
    return {name: value for name, value in merged.items() if value is not None}


def judge_all(
    task: JudgedTask,
    asked: Sequence[Asked],
    client: ChatClient,
    store: Store,
    *,
    label: str,
    thinking: Tags = DEFAULT_TAGS,
) -> None:
    """Fills ``store`` with the judge's reply to every question that it has none for yet.

    An answer without a verdict is asked for again, as the benchmark defines; the last one counts.
    ``thinking``: the marks of the judge's thinking; whole replies are stored, what is outside them is read.
    Raises: SignalError for an endpoint that is down, refuses the key, or is too slow: what was answered is
        stored, and the same command goes on.
    """
    waiting = [each for each in asked if each.id not in store]
    size = _CHUNKS_IN_FLIGHT * client.endpoint.concurrency
    done = len(asked) - len(waiting)
    with Bar(total=len(asked), initial=done, desc=label, unit="question") as bar:
        for start in range(0, len(waiting), size):
            chunk = waiting[start : start + size]
            store.add(_ask_chunk(task, chunk, client, thinking))
            bar.update(len(chunk))


def judgments(
    store: Store, key: str, questions: Sequence[Question], thinking: Tags = DEFAULT_TAGS
) -> dict[str, Judgment]:
    """The judge's answers about one example by question id, without what it thought."""
    return {
        question.id: _judgment(store[f"{key}\t{question.id}"], thinking) for question in questions
    }


def usage(store: Store, section: JudgeSection) -> dict[str, float]:
    """Questions, tokens and cost of everything in the store, answers from the cache included."""
    records = list(store.values())
    prompt = sum(record["prompt_tokens"] for record in records)
    completion = sum(record["completion_tokens"] for record in records)
    usd = prompt * section.usd_per_million_prompt_tokens / 1e6
    usd += completion * section.usd_per_million_completion_tokens / 1e6
    return {
        "judge_questions": len(records),
        "judge_requests": sum(record["asks"] for record in records),
        "judge_refused": sum(record["refused"] is not None for record in records),
        "judge_prompt_tokens": prompt,
        "judge_completion_tokens": completion,
        "usd": usd,
    }


def placeholder_questions(
    task: JudgedTask, examples: Sequence[Example], num_samples: int
) -> list[Question]:
    """The questions of a run whose answers are not there yet: how many, for a dry run."""
    found: list[Question] = []
    for example in examples:
        samples = _placeholders(example, "policy", num_samples)
        baseline = None if task.baseline == "none" else _placeholders(example, "baseline", 1)
        found += task.questions(example, samples, baseline)
    return found


def _placeholders(example: Example, who: str, num_samples: int) -> list[Conversation]:
    answer = Answer(f"(the {who}'s answer)", 1)
    return [tuple(answer for _ in range(example.num_turns)) for _ in range(num_samples)]


def _ask_chunk(
    task: JudgedTask, chunk: Sequence[Asked], client: ChatClient, thinking: Tags
) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    waiting = {each.id: each.question for each in chunk}
    for _ in range(task.max_asks):
        if not waiting:
            break
        replies = client.complete_all([list(question.messages) for question in waiting.values()])
        again: dict[str, Question] = {}
        for (id_, question), reply in zip(waiting.items(), replies, strict=True):
            records[id_] = record = _record(id_, question, reply, records.get(id_))
            answer = _judgment(record, thinking)
            follow_up = None if record["refused"] else task.ask_again(question, answer)
            if follow_up is not None:
                again[id_] = follow_up
        waiting = again
    return list(records.values())


def _record(
    id_: str, question: Question, reply: Reply | Exception, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A judgment as JSON; tokens and asks add up over askings."""
    found = reply if isinstance(reply, Reply) else Reply("", None, 0, 0)
    earlier = before or {"asks": 0, "prompt_tokens": 0, "completion_tokens": 0}
    messages = json.dumps([dict(message) for message in question.messages], ensure_ascii=True)
    return {
        "id": id_,
        "text": found.text,
        "finish_reason": found.finish_reason,
        "top_logprobs": dict(found.top_logprobs),
        "prompt_tokens": earlier["prompt_tokens"] + found.prompt_tokens,
        "completion_tokens": earlier["completion_tokens"] + found.completion_tokens,
        "asks": earlier["asks"] + 1,
        "refused": None if isinstance(reply, Reply) else str(reply),
        "messages_sha256": hashlib.sha256(messages.encode()).hexdigest(),
    }


def _judgment(record: Mapping[str, Any], thinking: Tags) -> Judgment:
    return Judgment(
        answer_of(record["text"], thinking) or "",
        record["finish_reason"],
        record["top_logprobs"],
        record["prompt_tokens"],
        record["completion_tokens"],
        record["refused"],
    )
