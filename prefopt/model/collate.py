"""Token layouts: how the groups of a micro-batch lie in memory for one forward pass.

``packed`` writes each prompt once and its responses after it as branches, groups end to end in one row:
no padding, no prompt computed twice. ``padded`` is the plain layout, one row a response; it is the parity
reference and the fallback. Both describe the same N response tokens, so nothing downstream can tell
which one ran. Tokens of a response that carry no loss (`Response.loss_mask`) are inputs like any other, and
nothing predicts them.

Shape letters: B rows of the layout, L its width, N response tokens with loss, R responses, T longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefopt.types import Group, Response, ResponseBatch, TokenIds


@dataclass(frozen=True)
class GroupSpan:
    """Where a group lies in the packed row: a prompt of ``prompt`` tokens, then its branches."""

    start: int
    prompt: int
    branches: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.prompt + sum(self.branches)


@dataclass(frozen=True)
class TokenLayout:
    """One forward pass: inputs, and which hidden state predicts which response token that carries loss.

    The last token of a response is predicted but never an input: nothing follows it.
    """

    input_ids: Tensor
    """(B, L) int64."""
    position_ids: Tensor
    """(B, L) int64; a branch continues from the end of its prompt."""
    predict: Tensor
    """(N,) int64 indices into the flattened (B·L) hidden states."""
    targets: Tensor
    """(N,) int64 token ids."""
    slots: Tensor
    """(N,) int64 indices into the flattened (R·T) result."""
    num_rows: int
    """R."""
    width: int
    """T."""
    spans: tuple[GroupSpan, ...] | None = None
    """Packed only: the groups, in order."""
    attention_mask: Tensor | None = None
    """Padded only: (B, L) int64, 1 on real tokens."""

    @property
    def packed(self) -> bool:
        return self.spans is not None

    @property
    def num_input_tokens(self) -> int:
        """Tokens computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout with every tensor on ``device``."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def response_mask(batch: ResponseBatch) -> Tensor:
    """(R, T) bool, True on response tokens that carry loss."""
    responses = [response for group in batch.groups for response in group.responses]
    mask = torch.zeros(len(responses), _width(responses), dtype=torch.bool)
    mask.view(-1)[_slots(responses)] = True
    return mask


def make_batch(groups: Sequence[Group]) -> ResponseBatch:
    """A batch of groups with their labels and samplers' log-probs."""
    groups = tuple(groups)
    responses = [response for group in groups for response in group.responses]
    sizes = torch.tensor([len(group.responses) for group in groups])
    samples = torch.tensor([counts for group in groups for counts in group.samples])
    return ResponseBatch(
        groups=groups,
        pairs=pair_index(groups),
        rewards=_column([response.score for response in responses], missing=float("nan")),
        advantages=_column([response.advantage for response in responses], missing=0.0),
        behavior_logps=_behavior_logps(responses) if any(r.is_sampled for r in responses) else None,
        samples=samples if bool(samples.any()) else None,
        group=torch.arange(len(groups)).repeat_interleave(sizes),
    )


def _column(values: Sequence[float | None], *, missing: float) -> Tensor | None:
    """(R,) fp32, None if no row has a value."""
    if all(value is None for value in values):
        return None
    return torch.tensor([missing if value is None else value for value in values])


def _behavior_logps(responses: Sequence[Response]) -> Tensor:
    """(R, T) fp32 log-probs of the sampler, zero on rows and tokens without."""
    result = torch.zeros(len(responses), _width(responses))
    for row, response in enumerate(responses):
        if response.logps is not None:
            result[row, : len(response.logps)] = torch.tensor(response.logps)
    return result


def pack(groups: Sequence[Group]) -> TokenLayout:
    """Prefix-shared layout of ``groups``: (1, L) with L = Σ prompt + Σ (response - 1)."""
    inputs, positions, predict, targets, spans = [], [], [], [], []
    start = 0
    for group in groups:
        prompt, branches = len(group.prompt_ids), tuple(len(r.ids) - 1 for r in group.responses)
        spans.append(GroupSpan(start, prompt, branches))
        inputs.append(group.prompt_ids)
        positions.append(np.arange(prompt))
        last, start = start + prompt - 1, start + prompt
        for response, branch in zip(group.responses, branches, strict=True):
            inputs.append(response.ids[:-1])
            positions.append(np.arange(prompt, prompt + branch))
            # The last prompt token predicts the first token of every branch.
            predictors = np.concatenate([[last], np.arange(start, start + branch)])
            predict.append(predictors[response.loss_places])
            targets.append(np.take(response.ids, response.loss_places))
            start += branch
    row = joined(inputs)[None], joined(positions)[None]
    return _layout(groups, *row, predict, targets, spans=tuple(spans))


def pad(groups: Sequence[Group], *, pad_id: int = 0) -> TokenLayout:
    """Plain layout of ``groups``: one right-padded row a response, each with its own copy of the prompt."""
    rows = [(group.prompt_ids, response) for group in groups for response in group.responses]
    width = max(len(prompt) + len(response.ids) for prompt, response in rows) - 1
    inputs = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    predict, targets = [], []
    for index, (prompt, response) in enumerate(rows):
        stop = len(prompt) + len(response.ids) - 1
        inputs[index, :stop] = joined([prompt, response.ids[:-1]])
        mask[index, :stop] = 1
        predict.append(index * width + len(prompt) - 1 + response.loss_places)
        targets.append(np.take(response.ids, response.loss_places))
    positions = torch.arange(width).repeat(len(rows), 1)
    return _layout(groups, inputs, positions, predict, targets, attention_mask=mask)


def _layout(
    groups: Sequence[Group],
    inputs: Tensor,
    positions: Tensor,
    predict: Sequence[TokenIds],
    targets: Sequence[TokenIds],
    *,
    spans: tuple[GroupSpan, ...] | None = None,
    attention_mask: Tensor | None = None,
) -> TokenLayout:
    responses = [response for group in groups for response in group.responses]
    return TokenLayout(
        input_ids=inputs,
        position_ids=positions,
        predict=joined(predict),
        targets=joined(targets),
        slots=_slots(responses),
        num_rows=len(responses),
        width=_width(responses),
        spans=spans,
        attention_mask=attention_mask,
    )


def _width(responses: Sequence[Response]) -> int:
    """T."""
    return max(len(response.ids) for response in responses)


def _slots(responses: Sequence[Response]) -> Tensor:
    """(N,) int64 indices into the flattened (R, T) of the tokens that carry loss."""
    width = _width(responses)
    return joined([row * width + each.loss_places for row, each in enumerate(responses)])


def joined(parts: Sequence[TokenIds]) -> Tensor:
    """Integers one after the other, as the (n,) int64 that torch indexes with."""
    return torch.from_numpy(np.concatenate(parts, dtype=np.int64))


def pair_index(groups: tuple[Group, ...]) -> Tensor:
    """(P, 2) row indices of every pair of ``groups``, rows counted group by group."""
    rows: list[tuple[int, int]] = []
    start = 0
    for group in groups:
        rows += [(start + chosen, start + rejected) for chosen, rejected in group.pairs]
        start += len(group.responses)
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 2)
