"""From a recipe to its reference: stored before training, or computed as rollouts come."""

from __future__ import annotations

import logging
from typing import Any, cast

from accelerate import Accelerator

from prefopt.data.groups import GroupSource
from prefopt.model.fit import check_reference_tokens
from prefopt.model.layouts import build_logp_model
from prefopt.model.load import LoadedPolicy, load_policy
from prefopt.model.logps import LogpModel
from prefopt.model.micro_batches import SplitLimits
from prefopt.model.sweep import layout_fn
from prefopt.recipe.schema import CachedReferenceSection, ModelReference, Recipe
from prefopt.reference.base import Reference
from prefopt.reference.live import LiveReference, OutsideReference
from prefopt.reference.store import ReferenceStore
from prefopt.reference.stored import StoredReference
from prefopt.storage.cache import cache_root

logger = logging.getLogger(__name__)

SourceRows = list[tuple[GroupSource, list[int]]]


def stored_reference(
    recipe: Recipe,
    loaded: LoadedPolicy,
    model: Any,
    rows: SourceRows,
    limits: SplitLimits,
    accelerator: Accelerator,
    *,
    initial: bool,
) -> StoredReference:
    """Reference log-probs of every row the run will see, from the store or computed with ``model``."""
    cache_dir = None
    if isinstance(recipe.reference, CachedReferenceSection):
        cache_dir = recipe.reference.cache_dir
    root = cache_root(cache_dir or recipe.data.cache_dir)
    store = ReferenceStore(root, loaded.weights_hash, precision=recipe.train.precision)
    reference = StoredReference(store, is_initial_policy=initial)
    if accelerator.is_main_process:
        logger.info("reference: %s", loaded.description)
    for source, wanted in rows:
        reference.fill(model, source, wanted, limits, accelerator)
    return reference


def stored_outside_reference(
    recipe: Recipe, rows: SourceRows, limits: SplitLimits, accelerator: Accelerator
) -> StoredReference:
    """Log-probs of ``reference.path``; its weights are gone before the policy's optimizer exists."""
    loaded, model = _load_outside(recipe, limits, accelerator)
    return stored_reference(recipe, loaded, model, rows, limits, accelerator, initial=False)


def outside_model(recipe: Recipe, limits: SplitLimits, accelerator: Accelerator) -> LogpModel:
    """The model of ``reference.path``, to stay beside the policy."""
    return _load_outside(recipe, limits, accelerator)[1]


def live_reference(
    recipe: Recipe,
    model: Any,
    outside: LogpModel | None,
    limits: SplitLimits,
    accelerator: Accelerator,
) -> Reference:
    layout, device = layout_fn(packed=limits.packed), accelerator.device
    if outside is not None:
        return OutsideReference(outside, layout, device)
    section = recipe.reference
    return LiveReference(
        model,
        kind=cast(Any, recipe.reference_name),
        layout=layout,
        device=device,
        **(
            {} if section is None else section.model_dump(include={"ema_rate", "sync_every_pushes"})
        ),
    )


def _load_outside(
    recipe: Recipe, limits: SplitLimits, accelerator: Accelerator
) -> tuple[LoadedPolicy, LogpModel]:
    section = recipe.reference
    assert isinstance(section, ModelReference)  # the check has seen to it
    place = recipe.model.model_copy(update={"path": section.path, "revision": section.revision})
    loaded = load_policy(place, None, seed=0, trainable=False)
    check_reference_tokens(recipe.model, place, loaded.model)
    model = build_logp_model(loaded.model, "packed" if limits.packed else "padded")
    return loaded, model.to(accelerator.device)
