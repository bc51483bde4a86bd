"""Which token layout a model runs in, decided by trying it and said aloud, never silently.

A wrong attention mask, or an LM head with a step this project does not know, gives log-probs that look
plausible. So what is built here is compared with the model's own forward on a few tokens before it is used, with
the model's windows cut short, because what they hide begins thousands of tokens away.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from prefopt.errors import ModelError
from prefopt.model.balance import router_balance
from prefopt.model.collate import joined
from prefopt.model.fit import refuse_not_finite
from prefopt.model.logps import LogpModel, unwrap_causal_lm
from prefopt.model.precision import mixed_dtypes
from prefopt.model.scores import ScoreModel
from prefopt.model.short_windows import short_windows
from prefopt.types import Group, Response

logger = logging.getLogger(__name__)

_UNCHECKED = (
    " (not compared with the model's own forward: ZeRO-3 sharded the weights while loading)"
)

# Mean absolute difference of token log-probs, in nats. Rounding gives about 1e-6 in fp32 and 1e-2 in
# bfloat16; a response that sees its sibling, or a missing softcap, gives 0.1 to 10. Of scores: as a share of them.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}

# Standard deviation of what is added to an adapter's values for the probe: far above rounding, below what
# swamps the model it sits on.
_STIR = 0.02
_LARGEST_STIRRED = 2**24

# The same weights in another batch composition, stored and computed again: rounding, nothing else.
_LOG_RATIO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def log_ratio_tolerance(model: nn.Module, precision: str) -> float:
    """Largest mean |log-ratio| (nats a token) that rounding explains when policy equals reference."""
    if precision in ("bf16", "fp16"):
        return _LOG_RATIO_TOLERANCE[torch.bfloat16 if precision == "bf16" else torch.float16]
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return max(_LOG_RATIO_TOLERANCE.get(dtype, 0.1) for dtype in dtypes)


def build_logp_model(
    model: nn.Module, layout: str = "auto", router_aux_loss_coef: float | None = 0.0
) -> LogpModel:
    """The `LogpModel` of a loaded model in the layout asked for, checked against the model's own forward.

    Args:
        model: causal LM or PEFT model, not yet wrapped by DDP, DeepSpeed or FSDP.
        layout: ``packed``, ``padded``, or ``auto``: packed where it can be and is right, else padded.
        router_aux_loss_coef: of the experts' balancing loss in training; None as the configuration asks.

    Raises: ConfigError for a coefficient on a model without such a loss; ModelError if the layout asked for (or,
    with auto, both) disagrees with the model's own forward.
    """
    result = _checked(LogpModel, model, layout, _logps_differ)
    result.balance = router_balance(result.causal_lm, router_aux_loss_coef)
    return result


def build_score_model(
    model: nn.Module, layout: str = "auto", router_aux_loss_coef: float | None = 0.0
) -> ScoreModel:
    """As `build_logp_model`, of a sequence classifier with one output."""
    result = _checked(ScoreModel, model, layout, _scores_differ)
    result.balance = router_balance(unwrap_causal_lm(model), router_aux_loss_coef)
    return result


_Module = TypeVar("_Module", LogpModel, ScoreModel)


def _checked(
    kind: type[_Module],
    model: nn.Module,
    layout: str,
    differ: Callable[[nn.Module, bool], str | None],
) -> _Module:
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    for packed in {"auto": (True, False), "packed": (True,), "padded": (False,)}[layout]:
        reason = _why_not_packed(model) if packed else None
        if reason is None and not sharded:
            reason = _disagreement(model, packed, differ)
            if reason is not None:
                refuse_not_finite(model)
        if reason is None:
            name = "packed, prompts shared" if packed else "padded"
            logger.info("token layout: %s%s", name, _UNCHECKED if sharded else "")
            return kind(model, packed=packed)
        if layout != "auto" or not packed:
            name = "packed" if packed else "padded"
            raise ModelError(
                f"model.layout = {layout}: the {name} layout cannot be used here: {reason}"
            )
        logger.warning("token layout: padded, because the packed layout cannot be used: %s", reason)
    raise AssertionError("unreachable: the loop returns or raises")


def _why_not_packed(model: nn.Module) -> str | None:
    """A reason known from the architecture alone: no attention, or one that takes no custom mask."""
    causal_lm = unwrap_causal_lm(model)
    if not getattr(causal_lm, "_supports_attention_backend", False):
        return f"{type(causal_lm).__name__}'s attention takes no custom implementation"
    if getattr(causal_lm, "_is_stateful", False):
        return f"{type(causal_lm).__name__} carries a recurrent state from token to token"
    return None


def _disagreement(
    model: nn.Module, packed: bool, differ: Callable[[nn.Module, bool], str | None]
) -> str | None:
    """Why the model in this layout differs from its own forward on probe groups; None if they agree."""
    transformer = unwrap_causal_lm(model)
    attention = transformer.config._attn_implementation
    was_training = model.training
    try:
        model.eval()
        with torch.no_grad(), mixed_dtypes(model), _stirred(model):
            if not packed:
                return differ(model, packed)
            reason = _hidden_windows(transformer)
            with short_windows(transformer):
                return reason or differ(model, packed)
    except torch.OutOfMemoryError:
        raise
    except (ModelError, TypeError, LookupError, AttributeError, ValueError, RuntimeError) as error:
        # TypeError: a decoder that takes no extra keywords or position ids, or computes with its mask.
        # AttributeError, RuntimeError: another head.
        return f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)
        if attention:
            transformer.set_attn_implementation(attention)


@contextlib.contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """The model with random values in its adapter: a new one does nothing, and would show nothing."""
    before = {
        parameter: parameter.detach().clone()
        for parameter in model.parameters()
        # not a whole embedding beside the adapter, whose copy and whose noise would take their time
        if isinstance(model, PeftModel)
        and parameter.requires_grad
        and parameter.numel() <= _LARGEST_STIRRED
    }
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in before:
            noise = torch.randn(parameter.shape, generator=generator) * _STIR
            parameter.add_(noise.to(parameter.device, parameter.dtype))
        yield
    finally:
        for parameter, value in before.items():
            parameter.copy_(value)


def _hidden_windows(transformer: Any) -> str | None:
    """Why the windows that the configuration names cannot be checked; None if they can, or there are none."""
    ids = torch.cat(
        [joined([g.prompt_ids, g.responses[-1].ids]) for g in _probe_groups(transformer)]
    )
    row = ids[None].to(next(transformer.parameters()).device)
    whole = transformer(input_ids=row, use_cache=False).logits
    with short_windows(transformer) as windows:
        cut = transformer(input_ids=row, use_cache=False).logits if windows else whole
    kinds = getattr(transformer.config.get_text_config(decoder=True), "layer_types", None)
    unused = kinds is not None and set(kinds) == {"full_attention"}
    if not windows or unused or not torch.equal(whole, cut):
        return None
    named = ", ".join(f"{name} = {length}" for name, length in sorted(windows.items()))
    return (
        f"its configuration names {named}, and cutting that to a few tokens changes nothing in its own "
        "forward: where it acts is unknown, so longer rows cannot be checked. If nothing uses it, set it to null "
        "in config.json"
    )


def _looks_ahead(causal_lm: Any) -> bool:
    """Does a later token change an earlier one's logits?"""
    vocabulary = causal_lm.config.get_text_config(decoder=True).vocab_size
    row = torch.arange(8, device=next(causal_lm.parameters()).device)[None] % vocabulary
    other = row.clone()
    other[0, -1] = (row[0, -1] + 1) % vocabulary
    first, second = (
        causal_lm(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (row, other)
    )
    return bool((first - second).abs().max() > 1e-3 * first.abs().max())


def _logps_differ(model: nn.Module, packed: bool) -> str | None:
    causal_lm = unwrap_causal_lm(model)
    groups = _probe_groups(causal_lm)
    want = _own_logps(causal_lm, groups)
    if _looks_ahead(causal_lm):
        return (
            "it is not causal: a later token changes an earlier one's log-probs. An encoder reads in one "
            "direction only with is_decoder: true in its config.json"
        )
    logp_model = LogpModel(model, packed=packed)
    layout = logp_model.layout(groups).to(want.device)
    error = (logp_model(layout).flatten()[layout.slots] - want).abs().mean().item()
    limit = _TOLERANCE.get(next(causal_lm.parameters()).dtype, 0.1)
    if error <= limit:  # False for NaN
        return None
    step = (
        ""
        if packed
        else "; its head, or what it does with padding, has a step that is not known here"
    )
    return f"log-probs differ from the model's own forward by {error:.3g} nats a token (limit {limit:g}){step}"


def _scores_differ(model: nn.Module, packed: bool) -> str | None:
    """Padded is the model's own forward, with nothing to compare."""
    if not packed:
        return None
    classifier = unwrap_causal_lm(model)
    groups = _probe_groups(classifier)
    device = next(classifier.parameters()).device
    rows = [[*group.prompt_ids, *r.ids] for group in groups for r in group.responses]
    want = torch.stack(
        [classifier(input_ids=torch.tensor([row], device=device)).logits[0, 0] for row in rows]
    )
    score_model = ScoreModel(model, packed=True)
    got = score_model(score_model.layout(groups).to(device))
    error = ((got - want).abs().sum() / want.abs().sum().clamp(min=1e-12)).item()
    limit = _TOLERANCE.get(next(classifier.parameters()).dtype, 0.1)
    if error <= limit:  # False for NaN
        return None
    return f"scores differ from the model's own forward by a share of {error:.3g} (limit {limit:g})"


def _probe_groups(transformer: Any) -> list[Group]:
    vocabulary = transformer.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    return [Group(f"probe{i}", draw(6), (Response(draw(5)), Response(draw(9)))) for i in range(2)]


def _own_logps(causal_lm: Any, groups: list[Group]) -> Tensor:
    """(N,) log-probs from the model's own logits, one unpadded sequence at a time, rows in order."""
    device = next(causal_lm.parameters()).device
    parts = []
    for group in groups:
        for response in group.responses:
            ids = joined([group.prompt_ids, response.ids])[None].to(device)
            logits = causal_lm(input_ids=ids, use_cache=False).logits[
                0, len(group.prompt_ids) - 1 : -1
            ]
            targets = ids[0, len(group.prompt_ids) :, None]
            parts.append(logits.float().log_softmax(-1).gather(-1, targets)[:, 0])
    return torch.cat(parts)
