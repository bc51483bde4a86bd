"""Which tokens of a sequence a layer lets see each other, as the model itself asks transformers for it.

Windows and chunks stand in some architectures only in the mask they ask for, and never reach the attention
function. A packed row has branches, which no such mask knows; so what is kept here is the question, a function
of two positions of one sequence, and the kernel puts it to the positions of the unpacked sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class MaskRule:
    """A mask that a model asked for: may a token at one position look at one at another?

    Not a tensor and not a mapping, so that it passes through wrappers as it is.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def allows(self, positions: Tensor) -> Tensor:
        """Bool, broadcastable to (L, L): row looks at column, by their positions (L,) in the unpacked sequence."""
        zero = torch.zeros((), dtype=torch.long, device=positions.device)
        return self._function(zero, zero, positions[:, None], positions[None, :])


def ask_mask(*, mask_function: Callable[..., Any], **_: Any) -> MaskRule:
    """transformers' mask interface: the rule instead of a tensor over the row as it lies."""
    return MaskRule(mask_function)
