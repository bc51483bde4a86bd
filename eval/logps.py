"""Frozen policies that score token ids: MODEL, and the reference its log-ratio is taken against."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from eval.models import Models, run_condition
from prefopt.data.render import Renderer
from prefopt.errors import ConfigError, ModelError
from prefopt.model.frozen import token_logps
from prefopt.model.layouts import build_logp_model
from prefopt.model.load import check_vocabulary, load_policy, load_tokenizer
from prefopt.model.logps import LogpModel
from prefopt.model.source import resolve_source
from prefopt.recipe.schema import ConditionSection, ModelSection
from prefopt.types import Group

logger = logging.getLogger("prefopt.eval")


@dataclass(frozen=True)
class Policies:
    """Loaded by `load_policies`; frozen, in eval mode."""

    policy: LogpModel
    reference: LogpModel | None
    """A second model; None where the reference is the policy's own base, or there is none."""
    has_reference: bool
    tokenizer: Any
    renderer: Renderer
    context: int | None
    """Longest prompt + response of either, in tokens; None without a limit."""
    device: torch.device
    batch_tokens: int
    condition: ConditionSection | None = None
    """How MODEL's run wrote rewards into its prompts: what MODEL answers is scored after such a prompt."""

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[LogpModel]:
        """The reference: a second model, or the policy with its adapter off (no second copy of the base)."""
        if not self.has_reference:
            raise ValueError("these policies were loaded without a reference")
        if self.reference is not None:
            yield self.reference
            return
        adapted: Any = self.policy.model
        with adapted.disable_adapter():
            yield self.policy

    def token_logps(
        self, groups: Sequence[Group], *, of_reference: bool = False
    ) -> list[list[np.ndarray]]:
        """As `prefopt.model.frozen.token_logps`, of the policy or of its reference."""
        holder = self.as_reference() if of_reference else contextlib.nullcontext(self.policy)
        with holder as model:
            return token_logps(model, groups, self.batch_tokens)


def has_reference(models: Models) -> bool:
    """Is there a baseline, or a base under MODEL's adapter?"""
    return models.baseline is not None or is_adapter(models.policy)


def is_adapter(section: ModelSection) -> bool:
    """Is it a PEFT adapter on a base?"""
    return bool(resolve_source(section.path, section.revision).adapters)


def load_policies(models: Models, *, task: str, reference: bool) -> Policies:
    """MODEL and, where asked for, its reference: the baseline, else the base under MODEL's adapter.

    Raises: ConfigError where a reference is asked for and there is none; ModelError if weights cannot be
        loaded, or the baseline has another tokenizer.
    """
    if reference and not has_reference(models):
        raise ConfigError(
            f"--baseline is missing: {task} compares log-probs with a reference's, and {models.policy.path!r} "
            "is a full model, which has none of its own. Give the model it was trained from: --baseline OTHER"
        )
    device = torch.device(models.device)
    tokenizer = load_tokenizer(models.policy)
    policy = _load(models.policy, tokenizer, device)
    second = None
    if reference and models.baseline is not None:
        _check_same_tokenizer(tokenizer, models.policy, models.baseline)
        second = _load(models.baseline, tokenizer, device)
    contexts = [_context(model) for model in (policy, second) if model is not None]
    return Policies(
        policy,
        second,
        reference,
        tokenizer,
        Renderer(tokenizer),
        min((length for length in contexts if length is not None), default=None),
        device,
        models.batch_tokens,
        run_condition(models.policy.path),
    )


def _load(section: ModelSection, tokenizer: Any, device: torch.device) -> LogpModel:
    loaded = load_policy(section, None, seed=0, trainable=False)
    check_vocabulary(loaded.model, tokenizer)
    model: Any = loaded.model
    if section.quantization is None:  # bitsandbytes has placed it, and refuses to be moved
        model = model.to(device)
    logger.info("scores: %s", loaded.description)
    return build_logp_model(model, section.layout).eval()


def _context(model: LogpModel) -> int | None:
    config = model.causal_lm.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def _check_same_tokenizer(tokenizer: Any, policy: ModelSection, baseline: ModelSection) -> None:
    """The baseline scores MODEL's ids. Raises: ModelError if they mean something else to it."""
    try:
        other = load_tokenizer(baseline)
    except ModelError as error:
        logger.warning("the baseline's tokenizer is taken to be MODEL's: %s", error)
        return
    ids = tokenizer.get_vocab()
    moved = [token for token, id_ in other.get_vocab().items() if ids.get(token, id_) != id_]
    shared = ids.keys() & other.get_vocab().keys()
    if moved or not shared:
        raise ModelError(
            f"baseline.path = {baseline.path!r}: its tokenizer is not that of {policy.path!r} (token "
            f"{(moved or ['any'])[0]!r} has another id): a log-ratio compares the log-probs of the same ids. "
            "Take the model that MODEL was trained from"
        )
