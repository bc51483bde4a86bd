"""The balancing loss of mixture-of-experts models: the router's, as transformers computes it, over our layouts.

    L = E Σ_i f_i P_i        (Switch Transformers, arXiv:2101.03961, eq. 4-6)

with f_i the share of the tokens' picks that go to expert i and P_i the router's mean probability of it, both over
all layers and all tokens of one forward: transformers' ``load_balancing_loss_func``, which is called here. A product
of two means is no sum over tokens, so the loss of a forward depends on which rows share it, in transformers as here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import ConfigError
from prefopt.model.collate import TokenLayout
from prefopt.model.logps import unwrap_causal_lm

logger = logging.getLogger(__name__)

_FUNCTION = "load_balancing_loss_func"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # JetMoe's has the second name


@dataclass(frozen=True)
class RouterBalance:
    """What a training step adds to its loss for the routers."""

    coefficient: float
    function: Callable[..., Any]
    num_experts: int
    top_k: int

    def __call__(self, router_logits: tuple[Tensor, ...], layout: TokenLayout) -> Tensor:
        """The balancing loss of one forward, not yet times the coefficient; fp32, 1 where all is even and k = 1."""
        return self.function(
            router_logits, self.num_experts, self.top_k, token_weights(layout)
        )


def token_weights(layout: TokenLayout) -> Tensor:
    """(B, L) how many rows of the plain layout each token stands for: padding 0, a shared prompt's once a response."""
    if layout.spans is None:
        assert layout.attention_mask is not None
        return layout.attention_mask
    weights = torch.ones_like(layout.input_ids)
    for span in layout.spans:
        weights[:, span.start : span.start + span.prompt] = len(span.branches)
    return weights


def router_balance(model: nn.Module, coefficient: float | None) -> RouterBalance | None:
    """The balancing loss that a run trains with; None for none.

    Args:
        model: a transformers model, or a PEFT model around one.
        coefficient: the recipe's ``model.router_aux_loss_coef``; None leaves it to the model's configuration, which
            asks for the loss with ``output_router_logits: true``.

    Raises: ConfigError for a coefficient on a model whose transformers class has no such loss.
    """
    owner = unwrap_causal_lm(model)
    config = owner.config.get_text_config(decoder=True)
    named = next((getattr(config, name) for name in _COEFFICIENTS if hasattr(config, name)), None)
    asked = bool(getattr(config, "output_router_logits", False))
    if coefficient is None and (named is None or not asked):
        if named:
            logger.info(
                "balancing loss of the experts: none (output_router_logits is false in the model's configuration; "
                "model.router_aux_loss_coef adds one)"
            )
        return None
    weight = named if coefficient is None else coefficient
    if not weight:
        return None
    sizes = _sizes(owner, config)
    if sizes is None:
        if coefficient is None:
            logger.warning("balancing loss of the experts: none: transformers' %s has none", type(owner).__name__)
            return None
        raise ConfigError(
            f"model.router_aux_loss_coef = {coefficient:g}: {type(owner).__name__} has no balancing loss in "
            "transformers: it is no mixture of experts, or balances by other means. Leave it out"
        )
    logger.info("balancing loss of the experts: %g times that of each forward", weight)
    return RouterBalance(float(weight), *sizes)


def _sizes(owner: Any, config: Any) -> tuple[Callable[..., Any], int, int] | None:
    """The architecture's own function, its number of experts and picks a token; None if it has no such loss."""
    function = getattr(_causal_module(owner), _FUNCTION, None)
    experts = _first(config, "num_local_experts", "num_experts", "moe_num_experts", "n_routed_experts")
    top_k = _first(config, "num_experts_per_tok", "moe_k", "moe_top_k")
    ffn = getattr(config, "ffn_config", None)  # DBRX
    experts = experts or getattr(ffn, "moe_num_experts", None)
    top_k = top_k or getattr(ffn, "moe_top_k", None)
    if function is None or not experts or not top_k:
        return None
    return function, int(experts), int(top_k)


def _causal_module(owner: Any) -> Any:
    """The module of transformers that the model's class is from, a sequence classifier's too."""
    return sys.modules[type(owner).__module__]


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)
