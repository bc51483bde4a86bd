"""Attention over the packed layout: a response sees its prompt and itself, and nothing else.

Plain SDPA, on any device, and what every other kernel must agree with. Groups are attended to one by one:
the score matrix is Σ Lg² and not (Σ Lg)², which on CPU took 4-6 times less than one masked call over
the whole row (bench/attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefopt.errors import ModelError
from prefopt.model.attention import Kernel
from prefopt.model.attention.masks import MaskRule
from prefopt.model.collate import GroupSpan, TokenLayout

# Additions to the scores that this implementation does not know; ignoring one would be a silent error.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


class PackedMasks:
    """Additive (Lg, Lg) masks of every group of a layout, built once a forward and shared by all layers.

    Not a tensor and not a mapping, so that it passes through wrappers (DDP, DeepSpeed, checkpointing)
    as it is.
    """

    def __init__(self, layout: TokenLayout) -> None:
        if layout.spans is None:
            raise ValueError("a padded layout has no group spans")
        self.spans = layout.spans
        shapes: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for index, span in enumerate(self.spans):
            shapes.setdefault((span.prompt, span.branches), []).append(index)
        self.alike = list(shapes.values())
        """Groups of the same lengths, which are attended to in one call and share a mask."""
        self._cache: dict[tuple[Any, torch.dtype, torch.device], list[Tensor]] = {}

    def get(self, within: MaskRule | int | None, like: Tensor) -> list[Tensor]:
        """One additive mask for each of `alike`: 0 where a query may look, -inf elsewhere.

        Args:
            within: as `visible`.
            like: tensor whose dtype and device the masks take.
        """
        key = (within, like.dtype, like.device)
        if key not in self._cache:
            self._cache[key] = [_additive(self.spans[i], within, like) for i, *_ in self.alike]
        return self._cache[key]


def visible(
    span: GroupSpan, within: MaskRule | int | None = None, device: torch.device | None = None
) -> Tensor:
    """(Lg, Lg) bool: may the row's token look at the column's token?

    True where the column is not later, lies in the prompt or in the row's own branch, and is in reach by the
    positions of the unpacked sequence.

    Args:
        within: what the model asked its mask to be; or a sliding window, which reaches fewer than that many
            positions back (transformers' convention); or None for full attention.
    """
    length = span.stop - span.start
    index = torch.arange(length, device=device)
    branch = torch.full_like(index, -1)
    position = index.clone()
    start = span.prompt
    for number, size in enumerate(span.branches):
        branch[start : start + size] = number
        position[start : start + size] = span.prompt + torch.arange(size, device=device)
        start += size
    seen = index[:, None] >= index[None, :]
    seen &= (branch[None, :] == -1) | (branch[:, None] == branch[None, :])
    if isinstance(within, MaskRule):
        return seen & within.allows(position)
    if within is not None:
        seen &= position[:, None] - position[None, :] < within
    return seen


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRule | Tensor | None,
    *,
    packed_masks: PackedMasks | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output (1, L, heads, head_dim) of the packed row, group by group.

    Args:
        query: (1, heads, L, head_dim); ``key`` and ``value`` (1, kv_heads, L, head_dim).
        attention_mask: what the model asked for; None where it asks for no mask, and ``sliding_window`` counts.
        packed_masks: the layout's masks, handed down from `LogpModel` as a forward keyword.
        softcap: ``c`` of c·tanh(score/c) (Gemma 2); scores are then materialised.

    Raises: ModelError for a call that is not a packed self-attention (a cache, cross-attention, sinks, a mask
        of the model's own making): the architecture cannot take this layout.
    """
    extras = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    within = sliding_window
    if isinstance(attention_mask, MaskRule):
        within = attention_mask
    elif attention_mask is not None:
        extras.append("attention_mask")
    if packed_masks is None or extras or key.shape[2] != packed_masks.spans[-1].stop:
        raise ModelError(
            f"{type(module).__name__} cannot take the packed layout"
            f"{f' (it adds {extras} to the scores)' if extras else ''}; set model.layout = padded"
        )
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    masks = packed_masks.get(within, query)
    # Not slices: the backward of each would write a gradient as long as the whole row.
    sizes = [span.stop - span.start for span in packed_masks.spans]
    queries, keys, values = (tensor.split(sizes, 2) for tensor in (query, key, value))
    outputs = list(queries)
    for members, mask in zip(packed_masks.alike, masks, strict=True):
        q, k, v = (torch.cat([t[i] for i in members]) for t in (queries, keys, values))
        if softcap is None:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling)
        else:
            found = _softcapped(q, k, v, mask, dropout, scaling, softcap)
        for index, output in zip(members, found.split(1), strict=True):
            outputs[index] = output
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _softcapped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float | None, cap: float
) -> Tensor:
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = torch.tanh(q @ k.transpose(-1, -2) * scale / cap) * cap + mask
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ v


def _additive(span: GroupSpan, within: MaskRule | int | None, like: Tensor) -> Tensor:
    seen = visible(span, within, like.device)
    # Every row sees at least itself, so no row of -inf can turn a softmax into NaN.
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
        ~seen, -torch.inf
    )


KERNEL = Kernel(packed_attention, PackedMasks)
