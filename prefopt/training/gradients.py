"""Is a step's gradient fit to be taken: finite, and arrived where it was asked for.

A gradient of exactly 0 can be right: every group tied, every margin beyond a hinge. Then the objective asks
nothing of the log-probs. Where it asks, and no trainable weight hears of it, nothing connects the two: an adapter
that never applies, weights of a part that does not run, a precision in which every gradient is rounded away.
"""

from __future__ import annotations

import logging

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from prefopt.errors import TrainingError
from prefopt.model.distributed import max_over_processes
from prefopt.training.windows import Window

logger = logging.getLogger(__name__)

# An fp16 loss scale that halves this often in a row is not searching, it is overflowing.
_MAX_SKIPPED_STEPS = 20

_DEAD_STEPS = 3
"""Steps in a row whose gradient may be exactly 0 though the objective asked for one: rows may cancel once."""
_FIRST_STEPS = 5
"""Steps with a learning rate above 0 in which every trained tensor should have had a gradient. A new LoRA's A has
none before its B has moved."""


class GradientWatch:
    """Compares, step by step, the gradient that the objective asks for with the one that arrives.

    Args:
        model: the wrapped model; its trainable parameters are watched.
        accelerator: says whether a process sees gradients whole, and asks the others.
        precision: of training; fp16's loss scaler skips steps.
        num_steps: of the run; a shorter one is judged by all its steps.
    """

    def __init__(
        self, model: nn.Module, accelerator: Accelerator, *, precision: str, num_steps: int
    ) -> None:
        self._accelerator = accelerator
        self._precision = precision
        self._skipped = 0
        self._untouched = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._total = len(self._untouched)
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
            self._untouched.clear()
        self._asked: Tensor | None = None
        self._dead = 0
        self._dead_limit = min(_DEAD_STEPS, num_steps)
        self._moved = 0
        self._moved_limit = min(_FIRST_STEPS, num_steps)

    def listen(self, forward: Tensor) -> None:
        """Notes whether the backward pass asks this output of the model for anything; waits for nothing."""
        if forward.requires_grad:
            forward.register_hook(self._hear)

    def _hear(self, gradient: Tensor) -> None:
        asked = gradient.detach().abs().amax() if gradient.numel() else gradient.new_zeros(())
        self._asked = asked if self._asked is None else torch.maximum(self._asked, asked)

    def will_step(self, norm: Tensor | float | None, rate: float, window: Window) -> bool:
        """Will this step be taken? False where the fp16 loss scaler skips it.

        Args:
            norm: of the gradient over all trained weights and processes, after the backward pass; None where it is
                not known, and cannot be judged.
            rate: learning rate of the step.

        Raises: TrainingError for a gradient that is not finite, and after some steps in a row that asked for one
            and got exactly 0.
        """
        if norm is None:
            return True
        if not self._is_finite(norm, window):
            self._asked = None
            return False
        self._check_asked(float(norm), window.step)
        self._note_touched(rate)
        return True

    def _check_asked(self, norm: float, step: int) -> None:
        asked, self._asked = self._asked, None
        if norm != 0:
            self._dead = 0
            return
        local = 0.0 if asked is None else float(asked)
        (asked_anywhere,) = max_over_processes(self._accelerator, local)
        self._dead = self._dead + 1 if asked_anywhere > 0 else 0
        if self._dead and self._dead >= self._dead_limit:
            raise TrainingError(
                f"step {step + 1}: the gradient is exactly 0 for {self._dead} steps in a row, though the "
                f"objective asks for one: none of the {self._total} trained tensors has a part in the output "
                "for these rows, or every gradient is rounded to 0. Nothing was trained in these steps. Look at "
                "the peft section (does the adapter apply to these tokens and layers?) and at the precision of "
                "weights and training"
            )

    def _note_touched(self, rate: float) -> None:
        """Notes which tensors have a gradient, in the first steps, and warns of those that never had one.

        Where gradients are sharded (DeepSpeed, FSDP) no process sees them whole, and nothing is said.
        """
        if self._moved >= self._moved_limit or not self._untouched:
            return
        for name, parameter in list(self._untouched.items()):
            if parameter.grad is not None and bool(parameter.grad.any()):
                del self._untouched[name]
        self._moved += rate > 0
        if self._moved == self._moved_limit and 0 < len(self._untouched) < self._total:
            names = sorted(self._untouched)
            logger.warning(
                "%d of %d trained tensors have had no gradient in the first %d steps, e.g. %s: so far they stay "
                "as they were. Experts that no token has reached yet are such; for parts that text does not pass "
                "through (vision towers), name the others in peft.target_modules",
                len(names), self._total, self._moved, ", ".join(names[:3]),
            )  # fmt: skip

    def _is_finite(self, norm: Tensor | float, window: Window) -> bool:
        """False where the fp16 loss scaler skips the step; TrainingError where nothing does."""
        if torch.isfinite(torch.as_tensor(norm)):
            self._skipped = 0
            return True
        ids = [group.id for batch in window.micro_batches for group in batch.groups]
        if self._precision == "fp16" and self._skipped < _MAX_SKIPPED_STEPS:
            self._skipped += 1  # the loss scaler skips this step and halves its scale
            return False
        hint = (
            "fp16 overflows; set train.precision = bf16"
            if self._precision == "fp16"
            else "lower train.learning_rate or look at these rows with `prefopt show`"
        )
        raise TrainingError(
            f"step {window.step + 1}: the gradient norm is {float(norm)}; {hint}. Rows of this step on this "
            f"process: {', '.join(ids[:16])}{' …' if len(ids) > 16 else ''}"
        )
