"""What a vLLM server answers, read strictly: a response under other ids or log-probs would be trained on unseen.

Every function raises ValueError with what is wrong; who asked names the server. No torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefopt.engines.base import Completion, SamplingSpec
from prefopt.storage.json_text import parse_json

_FINISHED: dict[str, Literal["eos", "length"]] = {"stop": "eos", "length": "length"}
_ROUNDED_ONE = 1e-3
"""The log-prob of a certain token, as half-precision arithmetic may round it."""


@dataclass(frozen=True)
class ModelCard:
    """A full model that a server serves, of ``/v1/models``."""

    id: str
    root: str
    max_model_len: int | None


def read_object(content: bytes, content_type: str | None) -> dict[str, Any]:
    """The JSON object of a body."""
    try:
        found = parse_json(content.decode("utf-8"), twice=True)
    except ValueError as error:  # UnicodeDecodeError is one
        start = repr(content[:80].decode("utf-8", "replace"))
        raise ValueError(
            f"no JSON ({error}) but {content_type or 'no content type'}, {start}"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"JSON that is no object: {_shown(found)}")
    return found


def read_model(answer: Mapping[str, Any]) -> ModelCard:
    """The full model in ``/v1/models``: the first that is nobody's adapter."""
    cards = answer.get("data")
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise ValueError(f"data is {_shown(cards)} and no list of models")
    full = [card for card in cards if not card.get("parent")]
    if not full:
        raise ValueError("it lists no model")
    name, root, longest = (full[0].get(key) for key in ("id", "root", "max_model_len"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"the model's id is {_shown(name)}")
    if longest is not None and (type(longest) is not int or longest < 2):
        raise ValueError(f"max_model_len is {_shown(longest)}")
    return ModelCard(name, root if isinstance(root, str) and root else name, longest)


def read_completion(
    answer: Mapping[str, Any],
    model: str,
    prompt_ids: Sequence[int],
    spec: SamplingSpec,
    vocab_size: int | None,
) -> Completion:
    """The one response in an answer to a request for ``spec``, which it must follow."""
    choice = _choice(answer, model, prompt_ids)
    given, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if given is None or logprobs is None:
        raise ValueError("it returns no token ids or no log-probs")
    ids = tuple(map(_token_id, _list(given, "token_ids")))
    if not isinstance(logprobs, dict):
        raise ValueError(f"logprobs is {_shown(logprobs)}")
    logps = tuple(map(_logprob, _list(logprobs.get("token_logprobs"), "token_logprobs")))
    if len(ids) != len(logps):
        raise ValueError(f"{len(ids)} token ids and {len(logps)} log-probs")
    if vocab_size is not None and max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"token {max(ids)} is none of the model's, whose vocabulary has {vocab_size}"
        )
    _check_names(ids, logprobs.get("tokens"))
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or reason not in _FINISHED:
        raise ValueError(f"finish_reason is {_shown(reason)}, and neither stop nor length")
    _check_length(ids, spec, reason)
    return Completion(ids, logps, _FINISHED[reason])


def read_logprobs(
    answer: Mapping[str, Any], model: str, prompt: Sequence[int], response: Sequence[int]
) -> list[float]:
    """Log-probs of the tokens of ``response``, which was asked for as the end of a prompt."""
    choice = _choice(answer, model, [*prompt, *response])
    rows = _list(choice.get("prompt_logprobs"), "prompt_logprobs")
    if len(rows) != len(prompt) + len(response):
        raise ValueError(
            f"{len(rows)} prompt_logprobs for a prompt of {len(prompt) + len(response)} tokens"
        )
    found = []
    for row, token in zip(rows[len(prompt) :], response, strict=True):
        entry = row.get(str(token)) if isinstance(row, dict) else None
        if not isinstance(entry, dict):
            raise ValueError(f"no log-prob of token {token} in {_shown(row)}")
        found.append(_logprob(entry.get("logprob")))
    return found


def _choice(answer: Mapping[str, Any], model: str, prompt_ids: Sequence[int]) -> dict[str, Any]:
    """The only choice. What it says of model and prompt, if it does, must be what was asked."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ValueError(f"choices is {_shown(choices)}, and one was asked for")
    choice, answered_by = choices[0], answer.get("model")
    if choice.get("index") not in (None, 0):
        raise ValueError(f"the only choice has index {_shown(choice['index'])}")
    if answered_by is not None and answered_by != model:
        raise ValueError(f"model {_shown(answered_by)} answered, and {model!r} was asked")
    echoed = choice.get("prompt_token_ids")
    if echoed is not None and echoed != list(prompt_ids):
        raise ValueError("prompt_token_ids are not those of the prompt that was sent")
    return choice


def _check_names(ids: Sequence[int], tokens: Any) -> None:
    """Log-probs name the tokens they are of, as was asked for; an answer without names says nothing."""
    if tokens is not None and tokens != [f"token_id:{token}" for token in ids]:
        raise ValueError(
            f"log-probs are of {_shown(tokens)}, and token_ids are {_shown(list(ids))}"
        )


def _check_length(ids: Sequence[int], spec: SamplingSpec, reason: str) -> None:
    most = spec.max_new_tokens
    if not 1 <= len(ids) <= most:
        raise ValueError(f"{len(ids)} tokens, and 1 to {most} were asked for")
    if reason == "length" and len(ids) < most:
        raise ValueError(f"it ended for its length after {len(ids)} of {most} tokens")
    stops = set(spec.stop_token_ids)
    if stops & set(ids[:-1]):
        raise ValueError("a stop token stands within the response, which did not end there")
    if reason == "stop" and stops and ids[-1] not in stops:
        raise ValueError(f"it stopped at token {ids[-1]}, which is none of stop_token_ids")


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_shown(value)}")
    return value


def _token_id(value: Any) -> int:
    if type(value) is int and 0 <= value < 2**31:
        return value
    raise ValueError(f"{_shown(value)} is no token id")


def _logprob(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and math.isfinite(value) and value <= _ROUNDED_ONE:
        return float(value)
    raise ValueError(f"{_shown(value)} is no log-prob")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:59]}…"
