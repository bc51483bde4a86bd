"""What the trainer asks of a reference, wherever its log-probs come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from prefopt.types import Group


class Reference(Protocol):
    """The policy that an objective's log-ratios are taken against."""

    is_initial_policy: bool
    """At step 0 it must give the policy's own log-probs."""
    where: str
    """For error messages: what holds or computes them."""

    def logps(self, batches: Sequence[Sequence[Group]], version: int | None = None) -> list[Tensor]:
        """Per micro-batch (R, T) fp32, rows group by group, zero outside each response.

        A collective: as many batches on every process.

        Args:
            version: of the policy that sampled the batches, if one did.
        """
        ...

    def after_push(self, version: int) -> None:
        """The policy of this moment went to the engine as ``version``."""
        ...

    def after_step(self) -> None:
        """An optimizer step was taken."""
        ...

    def state(self) -> dict[str, Tensor]:
        """This process's tensors that a checkpoint must keep."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave."""
        ...


class FrozenReference:
    """The half of `Reference` of weights that never move."""

    def after_push(self, version: int) -> None:
        """Nothing changes."""

    def after_step(self) -> None:
        """Nothing changes."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing to load: a start of the run finds it where this one did."""
