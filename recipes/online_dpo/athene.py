"""The reward model Athene-RM-8B as a signal: a plugin of bridging-chat.yaml.

Its checkpoint is a Llama with a scalar head named ``v_head``, read at a CLS token after the last turn. That is
transformers' sequence classifier under another name, so `prefopt.signals.reward_model` does the rest.
"""

from __future__ import annotations

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


@signal("athene", source="Nexusflow/Athene-RM-8B, as facebookresearch/fairseq2@2b03172 reads it")
def athene(
    *,
    path: str = "Nexusflow/Athene-RM-8B",
    revision: str = "main",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16",
    device: str | None = None,
    batch_size: PositiveInt = 8,
    max_length_tokens: PositiveInt = 4096,
) -> Signal:
    """Athene's scalar. A response that does not fit is NaN and counted, where their code cuts it.

    Args:
        path: directory or hub id.
        revision: hub revision.
        dtype: of the weights; theirs is bfloat16.
        device: torch device; default: CUDA where there is one, else the CPU.
        batch_size: responses in one forward.
        max_length_tokens: longest input, CLS included.

    Raises: SignalError for a checkpoint with other weights than a Llama and a ``v_head``.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(
        path,
        revision=revision,
        dtype=dtype,
        num_labels=1,
        key_mapping={r"^v_head\.": "score."},
        output_loading_info=True,
    )
    model, info = loaded
    if info["missing_keys"] or tokenizer.cls_token is None:
        raise SignalError(
            f"signals athene.path = {path!r}: no Athene checkpoint: {sorted(info['missing_keys'])[:3]} are in "
            f"no file, CLS token {tokenizer.cls_token!r}. Other reward models: signals reward_model"
        )
    model.requires_grad_(False).eval()
    model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    reader = cast(Any, _Reader(tokenizer))
    return RewardModel(model, reader, None, batch_size, max_length_tokens)


class _Reader:
    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.renderer = Renderer(tokenizer)

    def ids(self, prompt: Prompt, text: str) -> list[int] | Refused:
        """Chat template, then CLS. The tokenizer adds a second BOS, as in the code the model came with."""
        whole = self.renderer.whole_text(dialogue(prompt, text), RenderOptions(omits="history"))
        if isinstance(whole, Refused):
            return whole
        return self.tokenizer(f"{whole}{self.tokenizer.cls_token}", verbose=False)["input_ids"]
