"""The balancing loss of mixture-of-experts models: the router's, as transformers computes it, over our layouts.

    L = E Σ_i f_i P_i        (Switch Transformers, arXiv:2101.03961, eq. 4-6)

with f_i the share of the tokens' picks that go to expert i and P_i the router's mean probability of it, both over
all layers and all tokens of one forward: transformers' ``load_balancing_loss_func``, which is called here. A
product of two means is no sum over tokens, so the loss of a forward depends on which rows share it, in
transformers as here.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefopt.errors import ConfigError
from prefopt.model.collate import TokenLayout

logger = logging.getLogger(__name__)

_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # JetMoe's has the second name


@dataclass(frozen=True)
class RouterBalance:
    """What a training step adds to its loss for the routers."""

    coefficient: float
    function: Callable[..., Any]
    num_experts: int
    top_k: int

    def __call__(self, router_logits: tuple[Tensor, ...], layout: TokenLayout) -> Tensor:
        """The balancing loss of one forward, not yet times the coefficient; fp32, 1 where all is even and k = "
        "1."""
        return self.function(router_logits, self.num_experts, self.top_k, token_weights(layout))


def token_weights(layout: TokenLayout) -> Tensor:
    """(B, L) how many rows of the plain layout each token stands for: padding 0, a shared prompt's once a "
    "response."""
    if layout.spans is None:
        assert layout.attention_mask is not None
        return layout.attention_mask
    weights = torch.ones_like(layout.input_ids)
    for span in layout.spans:
        weights[:, span.start : span.start + span.prompt] = len(span.branches)
    return weights


def router_balance(owner: Any, coefficient: float | None) -> RouterBalance | None:
    """The balancing loss that a run trains with; None for none.

    Args:
        owner: a transformers model, unwrapped.
        coefficient: the recipe's ``model.router_aux_loss_coef``; None leaves it to the model's configuration,
        which
            asks for the loss with ``output_router_logits: true``.

    Raises: ConfigError for a coefficient on a model whose transformers class has no such loss.
    """
    config = owner.config.get_text_config(decoder=True)
    named = _first([owner, config], *_COEFFICIENTS)
    asked = bool(getattr(config, "output_router_logits", False))
    weight = coefficient if coefficient is not None else (named if asked else None)
    if not weight:
        if named and coefficient is None:
            logger.info("balancing loss of the experts: none; model.router_aux_loss_coef adds it")
        return None
    function = _function(owner)
    num_experts = _first([owner, config], "num_experts", "num_local_experts", "n_routed_experts")
    top_k = _first([owner, config], "num_experts_per_tok")
    if function is None or not num_experts or not top_k:
        reason = f"{type(owner).__name__} has no balancing loss in transformers"
        if coefficient is None:
            logger.warning("balancing loss of the experts: none: %s", reason)
            return None
        raise ConfigError(
            f"model.router_aux_loss_coef = {coefficient:g}: {reason}: it is no mixture of experts, or balances by "
            "other means. Leave it out"
        )
    logger.info("balancing loss of the experts: %g times that of each forward", weight)
    return RouterBalance(float(weight), function, int(num_experts), int(top_k))


def _function(owner: Any) -> Callable[..., Any] | None:
    """transformers' function for this architecture; None if it has none, or one that takes something else "
    "(Doge)."""
    function = getattr(sys.modules[type(owner).__module__], "load_balancing_loss_func", None)
    if function is None:
        return None
    return function if [*inspect.signature(function).parameters] == _PARAMETERS else None


def _first(owners: Sequence[Any], *names: str) -> Any:
    """The first of these settings that is there and not empty."""
    found = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in found if value), None)
