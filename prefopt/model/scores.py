"""Scores of responses by a reward model: a language model's body with a head of one output.

A response is read where transformers' sequence classifiers read it, at its last token that is not the pad token,
so a model trained here scores the same when anything else loads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prefopt.model.attention import load_kernel, packed_keywords
from prefopt.model.balance import RouterBalance
from prefopt.model.collate import TokenLayout, pack, pad
from prefopt.model.logps import unwrap_causal_lm
from prefopt.types import Group, TokenIds


class ScoreModel(nn.Module):
    """A sequence classifier whose forward maps a layout of its own `layout` to (R,) fp32 scores.

    Like `LogpModel` it is what DDP, DeepSpeed and FSDP wrap. Padded, the classifier's own forward runs.

    Args:
        model: a transformers sequence classifier with one output, or a PEFT model around one.
        packed: take each prompt once, its responses as branches (True), or padded rows (False).
        kernel: of packed attention, by its name in `prefopt.model.attention`.
    """

    def __init__(self, model: nn.Module, *, packed: bool = True, kernel: str = "reference") -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.balance: RouterBalance | None = None
        """As `LogpModel.balance`."""
        classifier = unwrap_causal_lm(model)
        self.pad_id: int | None = classifier.config.get_text_config().pad_token_id
        if packed:
            self._kernel, implementation = load_kernel(kernel)
            classifier.set_attn_implementation(implementation)

    def forward(self, layout: TokenLayout) -> Tensor | tuple[Tensor, Tensor]:
        """(R,) fp32 scores of the responses, in the units of the loss: a difference of 1 is odds of e.

        In training with `balance`, beside them that loss of this forward, as `LogpModel.forward`.
        """
        classifier = unwrap_causal_lm(self.model)
        balanced = self.balance is not None and self.training
        more: dict[str, Any] = {"output_router_logits": True} if balanced else {}
        body = getattr(classifier, classifier.base_model_prefix)
        if layout.packed:
            output = body(
                input_ids=layout.input_ids,
                position_ids=layout.position_ids,
                use_cache=False,
                **packed_keywords(self._kernel, layout),
                **more,
            )
            ends = output.last_hidden_state.flatten(0, 1)[layout.predict]
            scores = classifier.score(ends)[:, 0].float()
        else:
            with _outputs(body) as seen:
                output = classifier(
                    input_ids=layout.input_ids, attention_mask=layout.attention_mask, **more
                )
            scores, output = output.logits[:, 0].float(), seen[-1]
        if self.balance is None or not balanced:
            return scores
        return scores, self.balance(output.router_logits, layout)

    def layout(self, groups: Sequence[Group]) -> TokenLayout:
        """Whole responses, and in ``predict`` (R,) where each is read."""
        # The last token of a response is no input of a layout, so each gets one more.
        longer = [
            replace(
                group,
                responses=tuple(replace(r, ids=np.append(r.ids, 0)) for r in group.responses),
            )
            for group in groups
        ]
        whole = pack(longer) if self.packed else pad(longer, pad_id=self.pad_id or 0)
        ends, start = [], 0
        for group in groups:
            for response in group.responses:
                ends.append(start + _num_read(response.ids, self.pad_id))
                start += len(response.ids) + 1
        rows = torch.arange(len(ends))
        return replace(
            whole, predict=whole.predict[ends], targets=torch.zeros_like(rows), slots=rows, width=1
        )


@contextlib.contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Any]]:
    """What the module returns inside, where what it is a part of keeps that for itself."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def _num_read(ids: TokenIds, pad_id: int | None) -> int:
    """Tokens of a response up to the last that is not the pad token; 0 leaves the end of the prompt."""
    read = np.flatnonzero(np.asarray(ids) != pad_id)
    return int(read[-1]) + 1 if len(read) else 0
