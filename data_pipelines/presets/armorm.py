"""The reward model ArmoRM-Llama3-8B as a signal: the plugin of simpo_v02.yaml.

Its checkpoint is a Llama with 19 regression outputs read at the last token, and a small network that, from the
prompt alone, weighs them. The class it comes with imports what transformers 5 no longer has, so this one reads the
same tensors; `prefopt.signals.reward_model` does the batching.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import PositiveInt

from prefopt.data.options import RenderOptions
from prefopt.data.render import Renderer
from prefopt.data.rows import Refused
from prefopt.errors import SignalError
from prefopt.recipe.registry import signal
from prefopt.signals.base import Signal
from prefopt.signals.reward_model import RewardModel, dialogue
from prefopt.types import Prompt

_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
"""Of Llama 3's template: where it begins, the model has read the prompt and nothing of the response."""
_HEAD = ("regression_layer.", "gating.", "reward_transform_matrix")
_INDEX = "model.safetensors.index.json"


@signal("armorm", source="RLHFlow/ArmoRM-Llama3-8B-v0.1 (arXiv:2406.12845), as SimPO v0.2 scores")
def armorm(
    *,
    path: str = "RLHFlow/ArmoRM-Llama3-8B-v0.1",
    revision: str = "main",
    header: str = _HEADER,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16",
    device: str | None = None,
    batch_size: PositiveInt = 8,
    max_length_tokens: PositiveInt = 8192,
) -> Signal:
    """ArmoRM's scalar: Σ_k gate_k(prompt) · (rewards · T)_k. A response that does not fit is NaN and counted.

    Args:
        path: directory or hub id.
        revision: hub revision.
        header: text at whose last occurrence the gate reads the prompt; other templates have another.
        dtype: of the weights; theirs is bfloat16.
        device: torch device; default: CUDA where there is one, else the CPU.
        batch_size: responses in one forward.
        max_length_tokens: longest input.

    Raises: SignalError for a checkpoint without ArmoRM's tensors.
    """
    import torch
    from transformers import AutoTokenizer, LlamaModel

    tokenizer: Any = AutoTokenizer.from_pretrained(path, revision=revision)
    loaded: Any = LlamaModel.from_pretrained(
        path, revision=revision, dtype=dtype, output_loading_info=True
    )
    backbone, info = loaded
    head = _head(path, revision)
    if info["missing_keys"] or "regression_layer.weight" not in head:
        raise SignalError(
            f"signals armorm.path = {path!r}: no ArmoRM checkpoint: it lacks "
            f"{(sorted(info['missing_keys']) or ['regression_layer.weight'])[:3]}. Other reward models: signals "
            "reward_model"
        )
    backbone.requires_grad_(False).eval()
    backbone.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    own = {name: tensor.to(backbone.device, backbone.dtype) for name, tensor in head.items()}
    pattern = tokenizer(header, add_special_tokens=False)["input_ids"]
    model = _ArmoRM(backbone, own, pattern)
    return RewardModel(
        cast(Any, model), cast(Any, _Reader(tokenizer)), None, batch_size, max_length_tokens
    )


@dataclass(frozen=True)
class _Output:
    logits: Any
    """(R, 1)."""


@dataclass(frozen=True)
class _ArmoRM:
    """Backbone and head; called as a sequence classifier with one output."""

    backbone: Any
    head: dict[str, Any]
    pattern: list[int]

    @property
    def config(self) -> Any:
        return self.backbone.config

    def parameters(self) -> Iterator[Any]:
        return self.backbone.parameters()

    def __call__(self, input_ids: Any, attention_mask: Any) -> _Output:
        import torch

        hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask)[0]  # (R, T, D)
        rows = torch.arange(len(hidden), device=hidden.device)
        last = attention_mask.sum(-1) - 1  # padded on the right
        rewards = hidden[rows, last] @ self.head["regression_layer.weight"].T  # (R, 19)
        starts = [_last_start(ids, self.pattern) for ids in input_ids.tolist()]
        gate = self._gate(hidden[rows, torch.tensor(starts, device=hidden.device)])
        score = (gate * (rewards @ self.head["reward_transform_matrix"])).sum(-1)
        return _Output(score[:, None])

    def _gate(self, prompt: Any) -> Any:
        """(R, 19) weights of the outputs, from the hidden state (R, D) at the prompt's end."""
        import torch.nn.functional as functional

        depth = 1 + max(int(name.split(".")[2]) for name in self.head if ".layers." in name)
        for index in range(depth):
            layer = f"gating.layers.{index}"
            weight, bias = self.head[f"{layer}.weight"], self.head.get(f"{layer}.bias")
            prompt = functional.linear(prompt, weight, bias)
            prompt = functional.relu(prompt) if index < depth - 1 else prompt
        temperature = getattr(self.config, "gating_temperature", 10)
        return (prompt / temperature).softmax(-1) * self.head["gating.logit_scale"]


class _Reader:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)

    def ids(self, prompt: Prompt, text: str) -> list[int] | Refused:
        """The chat template over prompt and response; refused where that would not render them."""
        whole = self.renderer.whole_text(dialogue(prompt, text), RenderOptions(omits="history"))
        if isinstance(whole, Refused):
            return whole
        return self.tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]


def _last_start(ids: Sequence[int], pattern: Sequence[int]) -> int:
    """Where ``pattern`` begins for the last time."""
    for start in range(len(ids) - len(pattern), -1, -1):
        if list(ids[start : start + len(pattern)]) == list(pattern):
            return start
    raise SignalError(
        "signals armorm.header: the chat template of its tokenizer writes no such header before a response, so "
        "there is no place to read the gate at. Take ArmoRM's own tokenizer, or set header to its template's"
    )


def _head(path: str, revision: str) -> dict[str, Any]:
    """The tensors beside the backbone, by name."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    def file(name: str, **keys: Any) -> str | None:
        return cached_file(path, name, revision=revision, **keys)

    index = file(_INDEX, _raise_exceptions_for_missing_entries=False)
    names = {"model.safetensors"}
    if index is not None:
        placed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = {shard for name, shard in placed.items() if name.startswith(_HEAD)}
    found: dict[str, Any] = {}
    for name in sorted(names):
        with safe_open(str(file(name)), framework="pt") as tensors:
            keys = [key for key in tensors.keys() if key.startswith(_HEAD)]  # noqa: SIM118 (no mapping)
            found |= {key: tensors.get_tensor(key) for key in keys}
    return found
