"""What every engine does: token ids in, sampled ids and their log-probs out, policies swapped by version.

One contract suite (``tests/engines/test_contract.py``) holds for all of them. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

StopReason = Literal["eos", "length"]


@dataclass(frozen=True)
class SamplingSpec:
    """How to sample; the same for every request of a call."""

    max_new_tokens: int
    temperature: float = 1.0
    """0 is greedy (seeds then change nothing)."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Any of these ends a response, and is its last token."""


@dataclass(frozen=True)
class Request:
    """One prompt, and a seed for each response wanted."""

    prompt_ids: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    ``ids`` ends with the stop token if ``stop_reason`` is ``eos``. ``logps`` are the log-probs of the
    distribution that was sampled from, nats, one a token: at the sampling temperature and, with top-p or
    top-k, renormalised over what those left. (At temperature 0: of the untempered distribution.)
    """

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    stop_reason: StopReason


@dataclass(frozen=True)
class PolicyFiles:
    """A version of the policy on disk: a PEFT adapter directory, or a whole model directory."""

    version: int
    """Optimizer step of the weights. Versions strictly increase, except after a resume."""
    path: Path
    """Never the path of another version: vLLM keys its prefix cache by it."""
    is_adapter: bool


class Engine(Protocol):
    """Generates with the policy version it was given last.

    Calls come from one thread at a time. Every call has a deadline: an engine that does not answer raises
    EngineError, which names what was waited for, and never hangs.
    """

    name: str

    @property
    def version(self) -> int | None:
        """Of the policy loaded last; None before the first `load_policy`."""
        ...

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[Completion]]:
        """For each request, in order, one completion a seed, in order.

        A (prompt, seed, spec, policy version) gives the same completion whatever else is in the call, as
        far as the engine's arithmetic does.
        Raises: EngineError; DataError for a prompt that leaves no room in the engine's context.
        """
        ...

    def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[list[float]]:
        """Log-probs, nats at temperature 1, of each response token of ``(prompt_ids, response_ids)``."""
        ...

    def load_policy(self, policy: PolicyFiles) -> None:
        """Later calls use this version. Raises: EngineError if it cannot be loaded."""
        ...

    def close(self) -> None:
        """Frees what the engine holds, processes included. May be called twice."""
        ...
