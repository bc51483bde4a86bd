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
    from torch import Tensor

    from prefopt.model.logps import LogpModel
    from prefopt.types import Group


@signal("implicit_reward", source="arXiv:2305.18290, section 4: β log π/π_ref")
def implicit_reward(
    *,
    path: str,
    reference: str | None = None,
    beta: PositiveFloat = 1.0,
    per_token: bool = False,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Annotated[str | None, NoEffect("rows")] = None,
    batch_tokens: PositiveInt = 16384,
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

    Raises: SignalError if ``reference`` is missing or the tokenizer is another; ModelError if a model
        cannot be loaded.
    """
    import torch

    from prefopt.model.layouts import build_logp_model
    from prefopt.model.load import load_policy, load_tokenizer
    from prefopt.recipe.schema import ModelSection

    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def load(model: str) -> LogpModel:
        section = ModelSection(path=model, dtype=dtype)
        loaded: Any = load_policy(section, None, seed=0, trainable=False).model
        return build_logp_model(loaded.to(chosen)).eval()

    tokenizer = load_tokenizer(ModelSection(path=path))
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
        scores = [[float("nan")] * len(group.ids) for group in groups]
        for batch in self._batches(groups):
            self._check_tokenizer(groups[batch[0][0]])
            values = iter(self._forward([group for _, group in batch]))
            for index, _ in batch:
                for number, ids in enumerate(groups[index].ids):
                    if ids:
                        scores[index][number] = next(values)
        return scores

    def close(self) -> None:
        self.policy = self.reference = None

    def _batches(self, groups: Sequence[Candidates]) -> Iterator[list[tuple[int, Group]]]:
        from prefopt.types import Group, Response

        batch: list[tuple[int, Group]] = []
        tokens = 0
        for index, candidates in enumerate(groups):
            responses = tuple(Response(ids) for ids in candidates.ids if ids)
            if not responses:
                continue
            prompt = candidates.prompt
            group = Group(prompt.id, prompt.ids, responses)
            # what the padded layout holds: never less than the packed one
            size = sum(len(prompt.ids) + len(response.ids) for response in responses)
            if batch and tokens + size > self.batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append((index, group))
            tokens += size
        if batch:
            yield batch

    def _forward(self, groups: list[Group]) -> list[float]:
        """β log-ratio of every response, row by row."""
        import torch

        lengths = [len(response.ids) for group in groups for response in group.responses]
        with torch.inference_mode():
            ratio = self._sums(self.policy, groups) - self._sums(self.reference, groups)  # (R,)
        if self.per_token:
            ratio = ratio / torch.tensor(lengths)
        return (self.beta * ratio).tolist()

    def _sums(self, model: LogpModel, groups: list[Group]) -> Tensor:
        from prefopt.model.collate import pack, pad

        layout = (pack if model.packed else pad)(groups)
        device = next(model.parameters()).device
        return model(layout.to(device)).double().sum(-1).cpu()

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
