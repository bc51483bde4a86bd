"""Token log-probs of responses, without ever holding full logits.

`LogpModel` runs the decoder over a `TokenLayout`, then the LM head over response positions only, a chunk
of tokens at a time. With a frozen head (LoRA) the backward pass costs nothing: the derivative of a token's
log-prob with respect to its hidden state, W[y] - Σ_v p_v W[v], is formed while the chunk's logits exist.

Shape letters: N response tokens, D hidden size, V vocabulary, R responses, T longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefopt.errors import ModelError
from prefopt.model.attention import load_kernel, packed_keywords
from prefopt.model.balance import RouterBalance
from prefopt.model.collate import TokenLayout, pack, pad
from prefopt.types import Group

# Logits of one chunk, in elements: small enough for a CPU's caches, large enough to keep a GPU busy.
_CHUNK_ELEMENTS_CPU = 2**21
_CHUNK_ELEMENTS_GPU = 2**27


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to the LM head's output: scale, then softcap c·tanh(x/c)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read off a transformers config."""
        # Cohere multiplies by logit_scale; Granite and MiniCPM3 divide by logits_scaling, HyperCLOVA X
        # multiplies by it.
        scale = _first(config, "logit_scale", "lm_head_multiplier") or 1.0
        scaling = _first(config, "logits_scaling", "logits_mup_width_multiplier") or 1.0
        scale *= scaling if getattr(config, "model_type", None) == "hyperclovax" else 1 / scaling
        caps = (
            "final_logit_softcapping",
            "logits_soft_cap",
            "output_logit_soft_cap",
        )  # Gemma's, Griffin's, xLSTM's
        return cls(scale, _first(config, *caps))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def _first(config: Any, *names: str) -> Any:
    """The first of these settings that the configuration has and that is not None."""
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)


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
        if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
            # Under ZeRO-3, reading head.weight here, in the wrapped module's forward, gathers it and keeps
            # it to the end of the forward; GatheredParameters around it frees it while it is in use.
            return _FrozenHeadLogps.apply(
                hidden, head.weight, head.bias, targets, self.transform, self.temperature, size
            )
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([self._trainable_chunk(head, h, y) for h, y in parts])

    def _trainable_chunk(self, head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        """A chunk whose logits are recomputed in the backward pass: weights, adapters, anything trains."""

        def compute(h: Tensor, y: Tensor) -> Tensor:
            logits = self.transform(head(h).float()) / self.temperature
            return logits.gather(-1, y[:, None])[:, 0] - logits.logsumexp(-1)

        if torch.is_grad_enabled():
            return checkpoint(compute, hidden, targets, use_reentrant=False)
        return compute(hidden, targets)


class _FrozenHeadLogps(torch.autograd.Function):
    """log softmax(transform(h Wᵀ + b) / temperature)[y], (N,) fp32, for a head that does not train."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        temperature: float,
        size: int,
    ) -> Tensor:
        logps, derivatives = [], []
        for h, y in zip(hidden.split(size), targets.split(size), strict=True):
            logits = transform(F.linear(h, weight, bias).float())
            slope = _slope(logits, transform, temperature)
            logits.div_(temperature) if temperature != 1.0 else None
            norm = logits.logsumexp(-1, keepdim=True)
            logps.append(logits.gather(-1, y[:, None])[:, 0] - norm[:, 0])
            if ctx.needs_input_grad[0]:
                # d logp / d logits = onehot(y) - softmax; the buffer of the logits is reused for it.
                grad = logits.sub_(norm).exp_().neg_()
                grad[torch.arange(len(y), device=y.device), y] += 1.0
                derivatives.append((grad.mul_(slope).to(weight.dtype) @ weight).to(hidden.dtype))
        if derivatives:
            ctx.save_for_backward(torch.cat(derivatives))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        return (grad_outputs[0][:, None].to(derivative.dtype) * derivative, *[None] * 6)


def _slope(logits: Tensor, transform: LogitTransform, temperature: float) -> Tensor | float:
    """d transform(x) / dx at the transformed ``logits``, over the temperature: 1 for most architectures."""
    slope = transform.scale / temperature
    if transform.softcap is None:
        return slope
    return (1 - (logits / transform.softcap) ** 2) * slope  # tanh' = 1 - tanh²
