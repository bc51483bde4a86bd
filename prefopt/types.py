"""The nouns every layer shares: prompts and candidates, token groups, response log-probs, objective outputs.

No torch at run time.

Shape letters: R responses, P pairs, T response tokens (padded width), N response tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Message = dict[str, Any]
"""One turn of a chat: role, content and what else a template reads."""

TokenIds = np.ndarray | Sequence[int]
"""(n,) int32, read only, wherever it is a field below: any sequence of ints that is given becomes that."""


@dataclass(frozen=True, eq=False)
class _WithTokenIds:
    """Equality and hash by value, which numpy's arrays lack, for a frozen dataclass with fields of `TokenIds`."""

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[Any, ...]:
        values = (getattr(self, each.name) for each in fields(self) if each.compare)
        return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in values)

    def _keep(self, name: str, dtype: type = np.int32) -> None:
        # A view, so that only ours is read only.
        values = np.asarray(getattr(self, name), dtype).view()
        values.flags.writeable = False
        object.__setattr__(self, name, values)


@dataclass(frozen=True, eq=False)
class Response(_WithTokenIds):
    """One response as token ids, terminal EOS included, with an optional scalar score.

    A response that a policy sampled also says which one (``version``), with what log-probs, and, under a
    policy-gradient credit, its advantage.
    """

    ids: TokenIds
    score: float | None = None
    version: int | None = None
    """Optimizer step of the weights that sampled it; None for a response of a data set."""
    logps: tuple[float, ...] | None = None
    """The sampler's log-prob of each token, nats, at the sampling temperature."""
    advantage: float | None = None
    """In the units of the score; of a credit rule on rollouts, or a column of a data set's sample rows."""
    loss_mask: np.ndarray | Sequence[bool] | None = None
    """(n,) bool, True on tokens that carry loss; the others are context between them. None: all do, and a mask
    that says the same becomes that. Only SFT rows of a data set have one."""

    def __post_init__(self) -> None:
        self._keep("ids")
        if self.loss_mask is None:
            return
        self._keep("loss_mask", bool)
        if len(self.loss_mask) != len(self.ids) or not np.any(self.loss_mask) or self.is_sampled:
            raise ValueError(
                f"a loss mask of {len(self.loss_mask)} for {len(self.ids)} tokens: it has one value a token, some "
                "of them True, and none is of a response that a policy sampled"
            )
        if np.all(self.loss_mask):
            object.__setattr__(self, "loss_mask", None)

    @property
    def loss_places(self) -> np.ndarray:
        """Indices into ``ids`` of the tokens that carry loss, in order."""
        if self.loss_mask is None:
            return np.arange(len(self.ids))
        return np.flatnonzero(self.loss_mask)

    @property
    def is_sampled(self) -> bool:
        return self.version is not None


@dataclass(frozen=True, eq=False)
class Group(_WithTokenIds):
    """The responses to one prompt.

    ``pairs`` lists ``(chosen, rejected)`` indices into ``responses``: nothing anywhere infers a pair
    from the order of rows. A preference pair is a group of two with ``pairs=((0, 1),)``, a weighted sample a
    group of one with none.
    """

    id: str
    prompt_ids: TokenIds
    responses: tuple[Response, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    source_row: tuple[Hashable, int] | None = field(default=None, compare=False, repr=False)
    """Where it was read: what names a source's content, and its row there; None for fresh samples. Finds what is
    kept by row."""

    def __post_init__(self) -> None:
        self._keep("prompt_ids")
        if self.pairs and any(response.loss_mask is not None for response in self.responses):
            raise ValueError(f"{self.id}: the responses of a pair carry loss on every token")

    @property
    def samples(self) -> tuple[bool, ...]:
        """Which responses stand by themselves in a loss: those that a policy sampled and, where nothing is
        paired, those of a data set (weighted samples)."""
        return tuple(response.is_sampled or not self.pairs for response in self.responses)

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix-shared layout: the prompt once, then every response."""
        return len(self.prompt_ids) + sum(len(response.ids) for response in self.responses)


@dataclass(frozen=True)
class ResponseBatch:
    """Groups of one micro-batch, with everything a loss may need, one row a response.

    Deliberately not a mapping: under DeepSpeed, mapping batches have every float tensor cast to the
    engine dtype, which turns a stored reference log-prob of -612.9 into -612.0 in bfloat16.
    """

    groups: tuple[Group, ...]
    pairs: Tensor
    """(P, 2) int64 row indices, chosen then rejected."""
    rewards: Tensor | None = None
    """(R,) fp32, NaN where a response has no score."""
    advantages: Tensor | None = None
    """(R,) fp32."""
    behavior_logps: Tensor | None = None
    """(R, T) fp32, log-probs of the policy that sampled, zero on other rows; None: no row is a sample."""
    samples: Tensor | None = None
    """(R,) bool, True on rows that `Group.samples` counts; None: no row is."""
    group: Tensor | None = None
    """(R,) int64, index of the group of each row."""

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(group.id for group in self.groups)


@dataclass(frozen=True)
class ResponseLogps:
    """Token log-probs of R responses: what an objective sees, and all it sees.

    ``policy``, ``reference`` and ``behavior`` are (R, T) fp32 natural logs, zero outside ``mask``;
    ``behavior`` is the sampler's own, and zero on rows that come from a data set.
    """

    policy: Tensor
    mask: Tensor
    """(R, T) bool, True on response tokens that carry loss (terminal EOS included)."""
    pairs: Tensor
    """(P, 2) int64 row indices, chosen then rejected."""
    reference: Tensor | None = None
    behavior: Tensor | None = None
    rewards: Tensor | None = None
    """(R,) fp32, NaN where a response has no score."""
    advantages: Tensor | None = None
    """(R,) fp32, zero on rows that are not samples."""
    samples: Tensor | None = None
    """(R,) bool, True on rows that stand by themselves and count: what a policy sampled, or a data set's weighted
    samples; None: no row is a sample."""
    group: Tensor | None = None
    """(R,) int64, which rows answer the same prompt: rows of one group have one number."""

    @property
    def lengths(self) -> Tensor:
        """(R,) fp32 token counts, from the mask and never from values."""
        return self.mask.sum(-1).float()

    @property
    def log_ratio(self) -> Tensor:
        """(R, T) policy minus reference; raises if the objective did not declare ``Need.REFERENCE``."""
        if self.reference is None:
            raise ValueError(
                "no reference log-probs: declare needs={Need.REFERENCE} on the objective"
            )
        return self.policy - self.reference


@dataclass(frozen=True)
class ResponseScores:
    """A reward model's scores of R responses: what the objective of a reward model sees, and all it sees."""

    scores: Tensor
    """(R,) fp32."""
    pairs: Tensor
    """(P, 2) int64 row indices, chosen then rejected."""
    rewards: Tensor | None = None
    """(R,) fp32, what the data set says of the responses; NaN where it says nothing."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """Unreduced losses: the trainer, and only the trainer, divides and sums.

    ``losses`` (P,) is divided by the number of pairs of the global batch. ``token_losses`` (P,), where
    present, is each pair's sum over its chosen tokens (nats) and is divided by the number of chosen
    tokens of the global batch, so that a token-mean NLL term does not depend on how the batch is split.
    """

    losses: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-pair (P,) detached values, named ``area/name``; a row of metrics holds their mean over its pairs."""
    token_losses: Tensor | None = None
    sample_losses: Tensor | None = None
    """(R,) one loss a response, zero where ``samples`` is False; divided by the number of samples of the
    global batch."""
    sample_token_losses: Tensor | None = None
    """(R,) each response's sum over its tokens, zero where ``samples`` is False; divided by the number of tokens
    of the samples of the global batch."""
    sample_metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-response (R,) detached values, a row of metrics holds their mean over its samples."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the data has it: its row's other columns are what verifiers check against."""

    id: str
    ids: tuple[int, ...]
    """Rendered token ids: what the policy continues."""
    content: str | tuple[Message, ...]
    """Plain text, or chat messages."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of the row, e.g. ``answer``."""
    offline_ids: tuple[int, ...] | None = None
    """The data set's own response (its chosen side), terminal EOS included, where the row has one."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What its chat template is given beside the messages: ``tools``, ``documents``, keywords."""
    opened: str = ""
    """The mark that its rendering ends with (``<think>``), where it has one: a response goes on within it."""
    source: str | None = None
    """What the data source that it is from is called."""

    @property
    def text(self) -> str:
        """The prompt's text; of a dialogue, its turns one after the other."""
        if isinstance(self.content, str):
            return self.content
        return "\n\n".join(str(message.get("content", "")) for message in self.content)


@dataclass(frozen=True)
class Candidates:
    """The responses to one prompt, as text without special tokens and as ids."""

    prompt: Prompt
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    truncated: tuple[bool, ...]
    """True where generation hit its length limit: no end token."""
    opened: tuple[str, ...] = ()
    """For each response, the mark (``<think>``) that the rendered prompt before it ended with, "" for none; empty
    where none ended with any."""
