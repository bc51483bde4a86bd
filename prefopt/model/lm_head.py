"""Log-probs of tokens from the hidden states that predict them, a chunk of tokens at a time.

With a frozen head (LoRA) the backward pass costs nothing: the derivative of a token's log-prob with respect
to its hidden state, W[y] - Σ_v p_v W[v], is formed while the chunk's logits exist. A head that trains
recomputes a chunk's logits in the backward pass, and its gradient adds up over the chunks in float32: in the
weights' dtype (or in the one bfloat16 copy that autocast keeps of them) each chunk would round the sum again.

Shape letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does to the LM head's output: scale, then softcap c·tanh(x/c)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read off a transformers config."""
        # Cohere and Falcon-H1 multiply; Granite, MiniCPM3 and Inkling divide. HyperCLOVA X multiplies by what
        # Granite divides by.
        scale = _first(config, "logit_scale", "lm_head_multiplier") or 1.0
        scaling = _first(config, "logits_scaling", "logits_mup_width_multiplier") or 1.0
        scale *= scaling if getattr(config, "model_type", None) == "hyperclovax" else 1 / scaling
        # Gemma's, Griffin's and xLSTM's
        caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
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


def head_logps(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    *,
    temperature: float,
    size: int,
) -> Tensor:
    """(N,) fp32 natural-log probabilities of ``targets`` under ``head`` at ``hidden`` (N, D).

    Args:
        size: tokens whose logits may be held at a time.
    """
    if type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters()):
        # Under ZeRO-3, reading head.weight here, in the wrapped module's forward, gathers it and keeps
        # it to the end of the forward; GatheredParameters around it frees it while it is in use.
        return _FrozenHeadLogps.apply(
            hidden, head.weight, head.bias, targets, transform, temperature, size
        )
    trainable = _TrainableHead(head, transform, temperature)
    if not trainable.is_linear and any(hasattr(p, "ds_id") for p in head.parameters()):
        # ZeRO-3 gathers what is inside this module when its own forward runs, and only then.
        parts = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([_checkpointed(trainable, h, y) for h, y in parts])
    return _RecomputedLogps.apply(hidden, targets, trainable, size, *trainable.parameters())


@dataclass(frozen=True)
class _TrainableHead:
    """A head with weights, adapters or anything else that trains."""

    head: nn.Module
    transform: LogitTransform
    temperature: float

    @property
    def is_linear(self) -> bool:
        return type(self.head) is nn.Linear

    def named(self) -> dict[str, nn.Parameter]:
        """What trains. Read anew each time: sharding swaps or empties parameters between passes."""
        if isinstance(self.head, nn.Linear) and self.is_linear:
            pair = {"weight": self.head.weight, "bias": self.head.bias}
            return {n: p for n, p in pair.items() if p is not None and p.requires_grad}
        return {n: p for n, p in self.head.named_parameters() if p.requires_grad}

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named().values())

    def copies(self, dtype: torch.dtype | None, *, leaves: bool) -> dict[str, Tensor]:
        """The parameters detached; a linear head's once in the dtype autocast would cast them to each time."""
        cast = dtype if self.is_linear else None
        return {
            name: parameter.detach().to(cast or parameter.dtype).requires_grad_(leaves)
            for name, parameter in self.named().items()
        }

    def logps(self, hidden: Tensor, targets: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        """(n,) of a chunk, with these parameters in place of the head's own."""
        if isinstance(self.head, nn.Linear) and self.is_linear:
            weight = parameters.get("weight", self.head.weight)
            raw = F.linear(hidden, weight, parameters.get("bias", self.head.bias))
        else:
            raw = functional_call(self.head, dict(parameters), (hidden,))
        return self.of_logits(raw, targets)

    def of_logits(self, raw: Tensor, targets: Tensor) -> Tensor:
        logits = self.transform(raw.float()) / self.temperature
        return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _checkpointed(trainable: _TrainableHead, hidden: Tensor, targets: Tensor) -> Tensor:
    def compute(h: Tensor, y: Tensor) -> Tensor:
        return trainable.of_logits(trainable.head(h), y)

    if torch.is_grad_enabled():
        return checkpoint(compute, hidden, targets, use_reentrant=False)
    return compute(hidden, targets)


class _RecomputedLogps(torch.autograd.Function):
    """A trainable head's log-probs (N,); the gradients of its parameters add up in fp32 over the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        trainable: _TrainableHead,
        size: int,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, targets)
        ctx.trainable, ctx.size = trainable, size
        kind = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # A linear head draws nothing; an adapter's dropout must drop the same again.
        ctx.random = None if trainable.is_linear else _RandomState.of(hidden.device)
        copies = trainable.copies(ctx.dtype, leaves=False)
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([trainable.logps(h, y, copies) for h, y in chunks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        trainable: _TrainableHead = ctx.trainable
        copies = trainable.copies(ctx.dtype, leaves=True)
        sums = [
            torch.zeros_like(copy, dtype=torch.promote_types(copy.dtype, torch.float32))
            for copy in copies.values()
        ]
        hidden_gradients = []
        random = contextlib.nullcontext() if ctx.random is None else ctx.random.again()
        kind = hidden.device.type
        autocast = torch.autocast(kind, ctx.dtype or torch.bfloat16, enabled=ctx.dtype is not None)
        pieces = (tensor.split(ctx.size) for tensor in (hidden, targets, grad_outputs[0]))
        with random, torch.enable_grad():
            for h, y, grad in zip(*pieces, strict=True):
                h = h.detach().requires_grad_(ctx.needs_input_grad[0])
                with autocast:
                    logps = trainable.logps(h, y, copies)
                wanted = [*copies.values(), *([h] if h.requires_grad else [])]
                found = torch.autograd.grad(logps, wanted, grad)
                for total, gradient in zip(sums, found, strict=False):
                    total.add_(gradient)
                hidden_gradients.append(found[-1])
        first = torch.cat(hidden_gradients) if ctx.needs_input_grad[0] else None
        named = zip(sums, trainable.parameters(), strict=True)
        return (first, None, None, None, *[total.to(p.dtype) for total, p in named])


@dataclass(frozen=True)
class _RandomState:
    """The random numbers that are drawn next, on the CPU and one device."""

    device: torch.device
    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> _RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """They are drawn again inside; afterwards it goes on as if they had not been."""
        devices = [] if self.cuda is None else [self.device]
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield


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
