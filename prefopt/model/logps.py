"""Token log-probs of responses, without ever holding full logits.

`LogpModel` runs the decoder over a `TokenLayout`, then the LM head over response positions only, a chunk
of tokens at a time (`prefopt.model.lm_head`).

Shape letters: N response tokens, D hidden size, V vocabulary, R responses, T longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefopt.errors import ModelError
from prefopt.model.attention import load_kernel, packed_keywords
from prefopt.model.balance import RouterBalance
from prefopt.model.collate import TokenLayout, pack, pad
from prefopt.model.lm_head import LogitTransform, head_logps
from prefopt.types import Group

# Logits of one chunk, in elements: small enough for a CPU's caches, large enough to keep a GPU busy.
_CHUNK_ELEMENTS_CPU = 2**21
_CHUNK_ELEMENTS_GPU = 2**27


def unwrap_causal_lm(model: nn.Module) -> Any:
    """The transformers model inside any PEFT wrapper (LoRA layers are injected, so they still run)."""
    get_base = getattr(model, "get_base_model", None)
    return get_base() if get_base is not None else model


def decoder_of(causal_lm: Any) -> Any:
    """The part of a transformers causal LM whose last hidden states its head reads.

    Raises: ModelError if there is none that can be told.
    """
    found = causal_lm.get_decoder()
    if found is not causal_lm and found is not causal_lm.get_output_embeddings():
        return found
    # `get_decoder` misses a body by another name than the class's own prefix (the text models of Llama 4 and
    # Mllama), and takes an output layer called "decoder" for one.
    bodies = [child for child in causal_lm.children() if isinstance(child, PreTrainedModel)]
    if len(bodies) != 1:
        raise ModelError(
            f"{type(causal_lm).__name__}: cannot tell which part gives the hidden states its head reads "
            f"(get_decoder names none, and {len(bodies)} of its parts are models)"
        )
    return bodies[0]


class LogpModel(nn.Module):
    """A causal LM whose forward maps a `TokenLayout` to (R, T) fp32 log-probs.

    It is the module that DDP, DeepSpeed and FSDP wrap: decoder and head both run inside its forward, where
    sharded weights are gathered.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        packed: take packed layouts (True) or padded ones (False).
        temperature: divides the logits, as a sampler would; 1 scores the model itself.
        kernel: of packed attention, by its name in `prefopt.model.attention`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        packed: bool = True,
        temperature: float = 1.0,
        kernel: str = "reference",
    ) -> None:
        super().__init__()
        self.model = model
        self.packed = packed
        self.balance: RouterBalance | None = None
        """Set where the routers' balancing loss is trained with; see `forward`."""
        causal_lm = self.causal_lm
        if packed:
            self._kernel, implementation = load_kernel(kernel)
            causal_lm.set_attn_implementation(implementation)
        text_config = causal_lm.config.get_text_config(decoder=True)
        self.transform = LogitTransform.of(text_config)
        self.temperature = temperature

    @property
    def causal_lm(self) -> Any:
        """The transformers model whose decoder and head run; see `unwrap_causal_lm`."""
        return unwrap_causal_lm(self.model)

    def forward(self, layout: TokenLayout) -> Tensor | tuple[Tensor, Tensor]:
        """(R, T) fp32 natural-log probabilities of the response tokens with loss, zero elsewhere.

        In training with `balance`, beside them that loss of this forward: an output, because wrappers that shard
        weights gather them for what a forward returns.
        """
        output = self._decoded(layout)
        states = output.last_hidden_state.flatten(0, 1)[layout.predict]
        logps = self._head(states, layout.targets)
        result = logps.new_zeros(layout.num_rows * layout.width)
        result = result.index_put((layout.slots,), logps).view(layout.num_rows, layout.width)
        if self.balance is None or not self.training:
            return result
        return result, self.balance(output.router_logits, layout)

    def layout(self, groups: Sequence[Group]) -> TokenLayout:
        """The layout this model takes."""
        return pack(groups) if self.packed else pad(groups)

    def states(self, layout: TokenLayout) -> Tensor:
        """(N, D) hidden states that predict the N response tokens, in the order of ``layout.targets``."""
        return self._decoded(layout).last_hidden_state.flatten(0, 1)[layout.predict]

    def logits(self, states: Tensor) -> Tensor:
        """(n, V) fp32 logits over the temperature; for `chunk_size` states at a time, or memory runs out."""
        head = self.causal_lm.get_output_embeddings()
        return self.transform(head(states).float()) / self.temperature

    def chunk_size(self, device: torch.device) -> int:
        """States whose logits may be held at a time."""
        head = self.causal_lm.get_output_embeddings()
        vocabulary = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
        budget = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS_GPU
        return max(64, budget // vocabulary)

    def _decoded(self, layout: TokenLayout) -> Any:
        if layout.packed != self.packed:
            names = {True: "packed", False: "padded"}
            raise ModelError(
                f"got a {names[layout.packed]} layout; the model was set up for {names[self.packed]} ones"
            )
        extra: dict[str, Any] = {"attention_mask": layout.attention_mask}
        if layout.packed:
            extra = packed_keywords(self._kernel, layout)
        if self.balance is not None and self.training:
            extra["output_router_logits"] = True
        return decoder_of(self.causal_lm)(
            input_ids=layout.input_ids, position_ids=layout.position_ids, use_cache=False, **extra
        )

    def _head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = self.causal_lm.get_output_embeddings()
        size = self.chunk_size(hidden.device)
        return head_logps(
            head, hidden, targets, self.transform, temperature=self.temperature, size=size
        )
