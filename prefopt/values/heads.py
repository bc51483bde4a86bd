"""Value heads: from the frozen hidden states of a prompt to one number in (0, max_value).

Shape letters: B prompts, T prompt tokens (padded width), D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from prefopt.errors import ConfigError

NUM_HEADS = 8
DROPOUT = 0.1


class AttentionValueHead(nn.Module):
    """V(x) = max_value · σ( w · MHA(q, h, h) + b ), with one learned query over the prompt's hidden states.

    Dropout acts on the states and on what attention gives, in training alone. Padding is masked. The official
    code masks none: its value of a prompt depends on how long the other prompts of its batch are; and it leaves
    the head in training mode, so that dropout acts on the values it reports, too.

    Args:
        hidden_size: D; a multiple of the 8 attention heads.
        max_value: upper end of the reward's range, > 0; its lower end is 0.

    Raises: ConfigError for another hidden size.
    Source: methods C1 (b); ``ValueHeadAttention`` of abaheti95/LoL-RL, utils/rl_utils.py (arXiv:2305.14718).
    """

    def __init__(self, hidden_size: int, max_value: float) -> None:
        super().__init__()
        if hidden_size % NUM_HEADS:
            raise ConfigError(
                f"value.head = 'attention': has {NUM_HEADS} attention heads, and the model's hidden size "
                f"{hidden_size} is no multiple of that; set head: mean"
            )
        self.max_value = max_value
        self.dropout = nn.Dropout(DROPOUT)
        self.attention = nn.MultiheadAttention(hidden_size, NUM_HEADS, batch_first=True)
        self.query = nn.Parameter(torch.randn(hidden_size))
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B,) fp32 values.

        Args:
            states: (B, T, D) fp32; what stands outside ``mask`` is not read.
            mask: (B, T) bool, True on prompt tokens; at least one a row.
        """
        kept = self.dropout(_without_padding(states, mask))
        query = self.query.expand(len(states), 1, -1)  # (B, 1, D)
        # with its weights asked for, attention is plain matrix products: the same gradients every time on CUDA
        found, _ = self.attention(query, kept, kept, key_padding_mask=~mask, need_weights=True)
        logits = self.summary(self.dropout(found.squeeze(1))).squeeze(-1)
        return self.max_value * torch.sigmoid(logits)


class MeanValueHead(nn.Module):
    """V(x) = max_value · σ( w · mean_t(h_t) + b ): the mean of the prompt's states, padding left out.

    The official code divides by the padded width and counts the padding.

    Args:
        hidden_size: D.
        max_value: upper end of the reward's range, > 0; its lower end is 0.

    Source: methods C1 (b); ``ValueHead`` of abaheti95/LoL-RL, utils/rl_utils.py.
    """

    def __init__(self, hidden_size: int, max_value: float) -> None:
        super().__init__()
        self.max_value = max_value
        self.dropout = nn.Dropout(DROPOUT)
        self.summary = nn.Linear(hidden_size, 1)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B,) fp32 values; arguments as of `AttentionValueHead.forward`."""
        kept = self.dropout(_without_padding(states, mask))
        lengths = mask.sum(1, keepdim=True)  # at least 1: a prompt has tokens
        return self.max_value * torch.sigmoid(self.summary(kept.sum(1) / lengths).squeeze(-1))


HEADS: dict[str, type[AttentionValueHead] | type[MeanValueHead]] = {
    "attention": AttentionValueHead,
    "mean": MeanValueHead,
}


def make_head(kind: str, hidden_size: int, max_value: float, *, seed: int) -> nn.Module:
    """A fresh head, the same for the same seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HEADS[kind](hidden_size, max_value)


def _without_padding(states: Tensor, mask: Tensor) -> Tensor:
    """Zeros outside the mask: a weight of 0 does not silence a NaN."""
    return torch.where(mask.unsqueeze(-1), states, states.new_zeros(()))
