"""A value head on disk: its weights, which model it belongs to, what it was trained on and how far off it is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from prefopt.data.options import RenderOptions
from prefopt.data.rows import Refused
from prefopt.errors import ModelError
from prefopt.model.hashing import state_hash
from prefopt.model.load import load_tokenizer
from prefopt.model.source import resolve_source
from prefopt.recipe.schema import ModelSection
from prefopt.storage.cache import AGAIN, atomic_directory, writing
from prefopt.storage.reading import (
    UnreadableError,
    as_object,
    load_json,
    log_rows,
    reading,
    sealed,
    unsealed,
)
from prefopt.values.features import BATCH_TOKENS, FrozenReference, tokenizer_identity
from prefopt.values.heads import make_head
from prefopt.values.training import Fit, FitSettings

HEAD_FILE = "head.json"
WEIGHTS_FILE = "head.safetensors"
PREDICTIONS_FILE = "predictions.jsonl"
FORMAT = 2
_SEALED_SINCE = 2

Normalize = Literal["none", "sigmoid"]
_ADVICE = "Restore the folder, or train the head anew with its `value` stage"
_NUMBER = (int, float)
_NUMBERS = {
    "epochs": list,
    **{f"validation.{name}": _NUMBER for name in ("mse", "constant_mse")},
    **{f"trained_on.{name}": int for name in ("prompts", "responses", "held_out")},
    **{f"trained_on.reward_{name}": _NUMBER for name in ("min", "max", "mean")},
}
_EPOCH = {"number": int, "train_mse": _NUMBER, "validation": dict, "validation.mse": _NUMBER}
"""What a reader takes out of the parts of ``head.json`` that have no class of their own."""


@dataclass(frozen=True)
class ReferenceRecord:
    """Which policy a head reads, as it was loaded."""

    path: str
    revision: str | None
    tokenizer_path: str | None
    chat_template: str | None
    dtype: str
    quantization: str | None
    content: str
    """Hash of its files, whatever dtype they are loaded in."""
    weights: str
    """Hash of the weights as loaded: dtype, quantisation and adapters included."""
    tokenizer: str
    """`tokenizer_identity`: what decides a prompt's token ids."""
    description: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def section(self) -> ModelSection:
        """How it is loaded again. Code from a hub repository is never run on the word of a head's file."""
        settings: dict[str, Any] = {"dtype": self.dtype, "quantization": self.quantization}
        return ModelSection(
            path=self.path,
            revision=self.revision,
            tokenizer=self.tokenizer_path,
            chat_template=self.chat_template,
            chat_template_kwargs=dict(self.chat_template_kwargs),
            **settings,
        )


@dataclass(frozen=True)
class HeadRecord:
    """Everything about a saved head but its weights: the content of ``head.json``."""

    reference: ReferenceRecord
    settings: FitSettings
    normalize_rewards: Normalize
    """What was done to a score before it was a reward."""
    hidden_size: int
    max_prompt_tokens: int
    trained_on: Mapping[str, Any]
    """Numbers of prompts and responses, range and mean of the rewards, hash of ids and rewards."""
    epochs: Sequence[Mapping[str, Any]]
    kept_epoch: int
    validation: Mapping[str, Any]
    """Of the held-out prompts: ``mse``, ``r2``, ``constant_mse``, ``num_prompts``."""
    content: str
    """Hash of the head's weights."""


_RECORD = TypeAdapter(HeadRecord)


def reference_record(section: ModelSection, reference: FrozenReference) -> ReferenceRecord:
    """The record of a reference that was loaded from ``section``."""
    return ReferenceRecord(
        path=section.path,
        revision=section.revision,
        tokenizer_path=section.tokenizer,
        chat_template=section.chat_template,
        dtype=reference.dtype,
        quantization=section.quantization,
        content=resolve_source(section.path, section.revision).content,
        weights=reference.weights,
        tokenizer=reference.tokenizer,
        description=reference.description,
        chat_template_kwargs=section.chat_template_kwargs,
    )


def save_head(
    directory: Path, fit: Fit, record: HeadRecord, predictions: Sequence[Mapping[str, Any]]
) -> None:
    """Writes head, record and predictions, whole or not at all; equal heads give equal bytes.

    Raises: DataError if they cannot be written.
    """
    with writing(directory, AGAIN), atomic_directory(directory) as temporary:
        save_file(_tensors(fit.head), temporary / WEIGHTS_FILE)
        text = json.dumps(sealed({"format": FORMAT, **dataclasses.asdict(record)}), indent=1)
        (temporary / HEAD_FILE).write_text(text + "\n", encoding="utf-8")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
        (temporary / PREDICTIONS_FILE).write_text("".join(lines), encoding="utf-8")


def head_hash(fit: Fit) -> str:
    """Hash of a trained head's weights."""
    return state_hash(_tensors(fit.head))


def is_head(directory: Path) -> bool:
    """Whether a directory holds a value head."""
    return (directory / HEAD_FILE).is_file()


def read_head(directory: Path) -> HeadRecord:
    """The record of a saved head. Raises: ModelError if there is none, or it is of another format."""
    path = directory / HEAD_FILE
    if not path.is_file():
        raise ModelError(
            f"{str(directory)!r}: holds no value head ({HEAD_FILE}). Name the folder `head` that a `value` stage "
            "left: OUTPUT_DIR/value/head"
        )
    with reading(path, "the record of a value head", _ADVICE, ModelError):
        raw = load_json(path, {"format": int, **_NUMBERS})
        if raw["format"] > FORMAT:
            raise UnreadableError(f"it has format {raw['format']}, and this version reads {FORMAT}")
        if raw["format"] >= _SEALED_SINCE:
            raw = unsealed(raw)
        for epoch in raw["epochs"]:
            as_object(epoch, _EPOCH)
        record = _RECORD.validate_python({k: v for k, v in raw.items() if k != "format"})
        if not record.settings.max_value > 0:
            raise UnreadableError(f"its settings.max_value is {record.settings.max_value}")
        return record


def read_predictions(directory: Path, max_value: float) -> list[dict[str, Any]]:
    """What a head says of each response's prompt, beside its reward, both within 0 to ``max_value``.

    Raises: ModelError naming file and line.
    """
    path = directory / PREDICTIONS_FILE
    keys = {"id": str, "prompt": str, "held_out": bool, "value": _NUMBER, "reward": _NUMBER}
    rows = list(log_rows(path, keys, _ADVICE, ModelError))
    for number, row in enumerate(rows, 1):
        if not all(0 <= row[name] <= max_value for name in ("value", "reward")):
            raise ModelError(f"{path}:{number}: has a number outside 0 to {max_value:g}. {_ADVICE}")
    return rows


def require_reference(directory: Path, record: HeadRecord, section: ModelSection) -> None:
    """Returns if ``section`` is the policy that a head was trained on, by content; nothing is loaded.

    Raises: ModelError naming both hashes, of weights or of the tokenizer.
    """
    reference = record.reference
    content = resolve_source(section.path, section.revision).content
    _require(directory, reference, section.path, "weights", reference.content, content)
    tokenizer = tokenizer_identity(load_tokenizer(section))
    what = "tokenizer, chat template or renderer"
    _require(directory, reference, section.path, what, reference.tokenizer, tokenizer)


class ValueModel:
    """A saved head on its loaded reference: prompts to values.

    Args:
        directory: of the head.
        section: its policy; default: where it lay when the head was trained.
        device: torch device.
        batch_tokens: most tokens of one forward, padding included.

    Raises: ModelError for a head that is damaged or belongs to another model.
    """

    def __init__(
        self,
        directory: Path,
        section: ModelSection | None = None,
        *,
        device: str,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        self.record = read_head(directory)
        section = section or self.record.reference.section
        require_reference(directory, self.record, section)
        self._head = _load_weights(directory, self.record)
        self._reference = FrozenReference(section, device=device, batch_tokens=batch_tokens)
        kept = self.record.reference
        _require(
            directory, kept, section.path, "weights as loaded (dtype, quantisation)", kept.weights,
            self._reference.weights,
        )  # fmt: skip
        self._head.to(self._reference.device)

    @torch.no_grad()
    def values(
        self, prompts: Sequence[Any], options: Sequence[RenderOptions] = ()
    ) -> list[float | Refused]:
        """V(x) of each prompt (text, or chat messages), in order.

        Refused: a prompt that cannot be rendered, or that is longer than those the head was trained on.
        """
        ids = self._reference.prompt_ids(prompts, self.record.max_prompt_tokens, options)
        readable = [index for index, each in enumerate(ids) if not isinstance(each, Refused)]
        given: list[Any] = [ids[index] for index in readable]
        values: dict[int, float] = {}
        for batch in self._reference.states(given):
            found = self._head(batch.states.float(), batch.mask).tolist()
            values |= {readable[i]: value for i, value in zip(batch.indices, found, strict=True)}
        return [
            each if isinstance(each, Refused) else values[index] for index, each in enumerate(ids)
        ]


def _load_weights(directory: Path, record: HeadRecord) -> nn.Module:
    head = make_head(record.settings.head, record.hidden_size, record.settings.max_value, seed=0)
    path = directory / WEIGHTS_FILE
    try:
        head.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{path}: cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    if state_hash(head.state_dict()) != record.content:
        raise ModelError(f"{path}: is not the head that {HEAD_FILE} describes (its hash differs)")
    return head.eval()


def _tensors(head: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}


def _require(
    directory: Path, reference: ReferenceRecord, path: str, what: str, was: str, now: str
) -> None:
    if was != now:
        raise ModelError(
            f"the value head {str(directory)!r} belongs to another model: it was trained on {reference.path!r} "
            f"({what}: {was[:12]}), and {path!r} has {now[:12]}. A head reads the hidden states of the very "
            "policy it was trained on. Name that policy under advantage.model, or train a head for this one with "
            "a `value` stage"
        )
