"""The reward that a preference-trained policy implies: its log-ratio to a reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PositiveFloat, PositiveInt

from prefopt.errors import SignalError
from prefopt.recipe.registry import signal
from prefopt.recipe.section import NoEffect
from prefopt.signals.base import Signal
from prefopt.types import Candidates

if TYPE_CHECKING:
    from prefopt.model.logps import LogpModel


@signal("implicit_reward", source="arXiv:2305.18290, section 4: β log π/π_ref")
def implicit_reward(
    *,
    path: str,
    reference: str | None = None,
    beta: PositiveFloat = 1.0,
    per_token: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Annotated[str | None, NoEffect()] = None,
    batch_tokens: PositiveInt = 16384,
    trust_remote_code: bool = False,
) -> Signal:
    """``β Σ_t [log π(y_t) - log π_ref(y_t)]`` of two frozen models. Loads both when it is made.

    They score the very token ids that were sampled, so both must have the tokenizer of the policy; that is
    tried on the first group. An empty response is NaN.

    Args:
        path: the model π, or a PEFT adapter of it.
        reference: the model π_ref; default: the base under the adapter ``path``.
        beta: β, in units of reward per nat.
        per_token: divide by the number of tokens (SimPO-like, no bias to long responses).
        dtype: of the weights.
        device: torch device; default: CUDA where there is one, else the CPU.
        batch_tokens: most tokens of one forward (a longer group goes alone).
        trust_remote_code: run model code from the hub repository or directory.

    Raises: SignalError if ``reference`` is missing or the tokenizer is another; ModelError if a model
        cannot be loaded.
    """
    from prefopt.model.frozen import default_device
    from prefopt.model.layouts import build_logp_model
    from prefopt.model.load import load_policy, load_tokenizer
    from prefopt.recipe.schema import ModelSection

    def load(model: str) -> LogpModel:
        section = ModelSection(path=model, dtype=dtype, trust_remote_code=trust_remote_code)
        loaded: Any = load_policy(section, None, seed=0, trainable=False).model
        return build_logp_model(loaded.to(default_device(device))).eval()

    tokenizer = load_tokenizer(ModelSection(path=path, trust_remote_code=trust_remote_code))
    models = load(path), load(reference or _base_of(path))
    return ImplicitReward(*models, tokenizer, beta, per_token, batch_tokens)


class ImplicitReward:
    """Two loaded models; see `implicit_reward`."""

    def __init__(
        self,
        policy: LogpModel,
        reference: LogpModel,
        tokenizer: Any,
        beta: float,
        per_token: bool,
        batch_tokens: int,
    ) -> None:
        self.policy: Any = policy
        self.reference: Any = reference
        self.tokenizer = tokenizer
        self.beta = beta
        self.per_token = per_token
        self.batch_tokens = batch_tokens
        self._checked = False

    def score(self, groups: Sequence[Candidates]) -> list[list[float]]:
        if self.policy is None:
            raise SignalError("the models of implicit_reward were closed")
        scored = [group for group in groups if any(group.ids)]
        if scored:
            self._check_tokenizer(scored[0])
        ratios = iter(self._log_ratios(scored))
        return [
            [next(ratios) if ids else float("nan") for ids in candidates.ids]
            for candidates in groups
        ]

    def close(self) -> None:
        self.policy = self.reference = None

    def _log_ratios(self, scored: Sequence[Candidates]) -> Iterator[float]:
        """β log-ratio of every response that is not empty, in order."""
        from prefopt.model.frozen import token_logps
        from prefopt.types import Group, Response

        groups = [
            Group(each.prompt.id, each.prompt.ids, tuple(Response(ids) for ids in each.ids if ids))
            for each in scored
        ]
        policy, reference = (
            token_logps(model, groups, self.batch_tokens) for model in (self.policy, self.reference)
        )
        for own, theirs in zip(policy, reference, strict=True):
            for a, b in zip(own, theirs, strict=True):
                ratio = float(a.sum(dtype="float64") - b.sum(dtype="float64"))
                yield self.beta * ratio / (len(a) if self.per_token else 1)

    def _check_tokenizer(self, group: Candidates) -> None:
        """Raises SignalError if the ids mean something else to these models than to the policy."""
        if self._checked:
            return
        for ids, text in zip(group.ids, group.texts, strict=True):
            decoded = self.tokenizer.decode(list(ids), skip_special_tokens=True)
            if "".join(decoded.split()) != "".join(text.split()):
                raise SignalError(
                    "signals implicit_reward.path: its tokenizer is not the policy's: the ids of "
                    f"{text[:40]!r} read {decoded[:40]!r}. Take a model of the policy's family"
                )
        self._checked = True


def _base_of(path: str) -> str:
    from prefopt.model.source import resolve_source

    source = resolve_source(path)
    if len(source.adapters) != 1:
        raise SignalError(
            f"signals implicit_reward.path = {path!r} is not one adapter on a base, so it has no reference "
            "of its own; set reference to the model it was trained from"
        )
    return source.name
