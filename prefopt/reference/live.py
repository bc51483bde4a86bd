"""References for rows that do not exist before the step that trains on them.

A rollout's reference log-probs cannot be stored beforehand. They are computed when its window arrives, by
the policy's own module: the reference's trainable weights (under LoRA a few MB) are kept beside the
policy's, and change places with them for one forward. That works under DDP, DeepSpeed and FSDP alike,
because a process only ever moves the shards it holds, and never needs a second model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefopt.model.memory import memory_for
from prefopt.model.sweep import LayoutFn
from prefopt.reference.base import FrozenReference
from prefopt.types import Group

Kind = Literal["initial", "behavior", "ema", "synced"]
_WHERE = "the reference is computed anew for every batch"


class OutsideReference(FrozenReference):
    """The weights of another model, held beside the policy (``reference.name: model``)."""

    is_initial_policy = False
    where = _WHERE

    def __init__(self, model: nn.Module, layout: LayoutFn, device: torch.device) -> None:
        self.model = model
        self._layout = layout
        self._device = device

    def logps(self, batches: Sequence[Sequence[Group]], version: int | None = None) -> list[Tensor]:
        return _computed(self.model, batches, self._layout, self._device)


class LiveReference:
    """An earlier self of the policy: as loaded, as it sampled, its moving average, or as last synced.

    Args:
        model: the prepared `LogpModel`, holding the initial weights.
        kind: which self (`ReferenceSection.name`).
        layout, device: how micro-batches are laid out, and where.
        ema_rate: with ``ema``: ref <- (1 - rate) ref + rate policy after every optimizer step.
        sync_every_pushes: with ``synced``: pushes between two updates.
    """

    is_initial_policy = True
    where = _WHERE

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: Kind,
        layout: LayoutFn,
        device: torch.device,
        ema_rate: float = 0.01,
        sync_every_pushes: int = 1,
    ) -> None:
        self.model = model
        self._layout = layout
        self._device = device
        self.kind = kind
        self.ema_rate = ema_rate
        self.sync_every_pushes = sync_every_pushes
        self._trainable = [p for p in model.parameters() if p.requires_grad]
        # One set of weights; under `behavior` one for each version that samples may still come from.
        self._held: dict[int, list[Tensor]] = {0: self._initial()}
        self._num_pushes = 0

    def logps(self, batches: Sequence[Sequence[Group]], version: int | None = None) -> list[Tensor]:
        """See `Reference`; under ``behavior``, rows that no policy sampled get the newest push."""
        key = 0
        if self.kind == "behavior":
            key = max(self._held) if version is None else version
            if version is not None:  # an evaluation says nothing of what is still to come
                self._held = {v: w for v, w in self._held.items() if v >= key}
        with self._holding(self._held[key]):
            return _computed(self.model, batches, self._layout, self._device)

    def after_push(self, version: int) -> None:
        if self.kind == "behavior":
            self._held[version] = self._snapshot()
        elif self.kind == "synced":
            # The first push is of the initial policy, which is what is held already.
            if self._num_pushes % self.sync_every_pushes == 0:
                self._held[0] = self._snapshot()
            self._num_pushes += 1

    def after_step(self) -> None:
        if self.kind == "ema":
            for held, now in zip(self._held[0], map(_local, self._trainable), strict=True):
                held.lerp_(now.to(held.dtype), self.ema_rate)

    def state(self) -> dict[str, Tensor]:
        if self.kind == "initial":
            return {}  # the policy as loaded gives it again
        tensors = {
            f"{version}.{index}": tensor
            for version, held in self._held.items()
            for index, tensor in enumerate(held)
        }
        return {**tensors, "num_pushes": torch.tensor([self._num_pushes])}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if self.kind == "initial":
            return
        tensors = dict(tensors)
        self._num_pushes = int(tensors.pop("num_pushes"))
        versions = {int(name.split(".")[0]) for name in tensors}
        self._held = {
            v: [tensors[f"{v}.{i}"].to(_local(p).device) for i, p in enumerate(self._trainable)]
            for v in versions
        }

    def _snapshot(self) -> list[Tensor]:
        return [_local(p).detach().clone() for p in self._trainable]

    def _initial(self) -> list[Tensor]:
        if self.kind != "ema":
            return self._snapshot()
        # A hundredth of a step rounds to nothing in half precision: bfloat16 went an eighth of the way.
        return [
            tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            for tensor in self._snapshot()
        ]

    @contextlib.contextmanager
    def _holding(self, weights: list[Tensor]) -> Iterator[None]:
        """The module computes with ``weights``. Copied in and out: optimizers hold views of its storage."""
        own = self._snapshot()
        self._put(weights)
        try:
            yield
        finally:
            self._put(own)

    def _put(self, weights: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._trainable, weights, strict=True):
                _local(parameter).copy_(value)
                _drop_gathered(parameter)


def _computed(
    model: nn.Module, batches: Sequence[Sequence[Group]], layout: LayoutFn, device: torch.device
) -> list[Tensor]:
    """The model's log-probs as it is now, in eval mode; zero outside the responses, as `LogpModel` gives them."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        found = []
        for groups in batches:
            with memory_for("in the reference's forward", groups):
                found.append(model(layout(groups).to(device)).float())
    model.train(was_training)
    return found


def _drop_gathered(parameter: Any) -> None:
    """Lets the next forward gather anew what ZeRO-3 keeps gathered: small parameters, beside their shards."""
    status = getattr(parameter, "ds_status", None)
    if status is not None and status.name == "AVAILABLE":
        parameter.partition(has_been_updated=False)


def _local(parameter: Any) -> Tensor:
    """The part of a parameter that this process stores: ZeRO-3's shard, FSDP2's, or all of it."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is not None:
        return shard
    to_local = getattr(parameter, "to_local", None)
    return to_local() if to_local is not None else parameter.data
