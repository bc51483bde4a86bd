"""Whether a model, its reference and the rows go together: else it is a crash, or a number like any other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prefopt.data.groups import GroupSource
from prefopt.errors import ConfigError, ModelError
from prefopt.model.load import load_tokenizer, num_embeddings
from prefopt.model.logps import unwrap_causal_lm
from prefopt.recipe.schema import ModelSection

logger = logging.getLogger(__name__)

# Embeddings of positions have as many rows as there are positions, and OPT's and XGLM's two more.
_OFFSETS = (0, 1, 2)


def check_positions(model: nn.Module, sources: Sequence[GroupSource | None]) -> None:
    """Looks at the longest row beside the positions that ``model`` knows.

    Raises: ConfigError for one that is longer where positions are learnt, so that there are none for it. Where
    they are computed (RoPE, ALiBi) it is said: the model is defined there and was not trained there.
    """
    transformer = unwrap_causal_lm(model)
    config = transformer.config.get_text_config(decoder=True)
    known = getattr(config, "max_position_embeddings", None)
    longest = max((_longest(source) for source in sources if source is not None), default=0)
    if not isinstance(known, int) or longest <= known:
        return
    said = f"the longest row has {longest} tokens, and the model has {known} positions"
    if _are_learnt(transformer, known):
        raise ConfigError(
            f"data.max_length_tokens: {said} (max_position_embeddings), each with weights of its own. Set it to "
            f"{known} or less: longer rows are then rejected and counted"
        )
    logger.warning(
        "%s (max_position_embeddings): beyond them it was not trained. If that is not meant, set "
        "data.max_length_tokens = %d", said, known,
    )  # fmt: skip


def _longest(source: GroupSource) -> int:
    rows = zip(source.prompt_lengths, source.response_lengths, strict=True)
    return max((int(prompt) + int(max(responses)) for prompt, responses in rows), default=0)


def _are_learnt(transformer: Any, known: int) -> bool:
    tokens = transformer.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and module.num_embeddings - known in _OFFSETS
        for module in transformer.modules()
    )


def check_reference_tokens(policy: ModelSection, place: ModelSection, reference: Any) -> None:
    """Returns if ``reference``, the model of ``place``, reads the policy's token ids as the policy does.

    Raises: ModelError for ids without an embedding row there, or that its own tokenizer gives to other tokens.
    """
    tokenizer = load_tokenizer(policy)
    said = f"reference.path = {place.path!r}:"
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= num_embeddings(reference):
        raise ModelError(
            f"{said} has {num_embeddings(reference)} embedding rows, and the policy's tokenizer gives {token!r} "
            f"the id {largest}: it cannot read what the policy is trained on. Take a reference with the policy's "
            "tokenizer"
        )
    plain = {"tokenizer": None, "chat_template": None, "chat_template_kwargs": {}}
    try:
        own = load_tokenizer(place.model_copy(update=plain)).get_vocab()
    except ModelError:
        return  # weights alone: nothing says what its ids mean
    for token, id_ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if own.get(token, id_) != id_:
            raise ModelError(
                f"{said} has another tokenizer: {token!r} has id {id_} for the policy and {own[token]} there. The "
                "reference would score other texts than the policy is trained on. Take one with the policy's "
                "tokenizer"
            )


def refuse_not_finite(model: nn.Module) -> None:
    """Raises ModelError if a weight is NaN or infinite, with its name."""
    broken = [
        name
        for name, each in model.named_parameters()
        if each.is_floating_point() and not torch.isfinite(each).all()
    ]
    if broken:
        raise ModelError(
            f"{len(broken)} tensors of the model hold NaN or infinite values, e.g. {broken[:3]}: the run that "
            "saved them had diverged, or the file is damaged. Take other weights"
        )
