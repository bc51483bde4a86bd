"""Frozen hidden states of prompts: computed once, a few prompts in memory at a time.

Shape letters: B prompts, T prompt tokens (padded width), D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefopt.data.options import PLAIN, RenderOptions
from prefopt.data.render import RENDERER_VERSION, Renderer, Request
from prefopt.data.rows import Refused, Reject
from prefopt.data.tokenise import tokenizer_hash
from prefopt.errors import DataError
from prefopt.model.load import load_policy, load_tokenizer
from prefopt.model.logps import decoder_of, unwrap_causal_lm
from prefopt.recipe.schema import ModelSection

BATCH_TOKENS = 16384
"""Most tokens of one forward, padding included; a longer prompt goes alone."""


@dataclass(frozen=True)
class StateBatch:
    """The hidden states of some prompts, padded on the right."""

    indices: list[int]
    """Which prompts."""
    states: Tensor
    """(B, T, D) in the model's dtype."""
    mask: Tensor
    """(B, T) bool, True on prompt tokens."""


class FrozenReference:
    """A policy that is only read: prompts to token ids, token ids to the last layer's hidden states.

    Args:
        section: a model, or an adapter on one.
        device: torch device.
        batch_tokens: most tokens of one forward, padding included.

    Raises: ModelError if it cannot be loaded.
    """

    def __init__(self, section: ModelSection, *, device: str, batch_tokens: int) -> None:
        loaded = load_policy(section, None, seed=0, trainable=False)
        model: Any = loaded.model
        tokenizer = load_tokenizer(section)
        self.weights = loaded.weights_hash
        self.description = loaded.description
        self.renderer = Renderer(tokenizer)
        self.tokenizer = tokenizer_identity(tokenizer)
        self.device = torch.device(device)
        self.batch_tokens = batch_tokens
        causal_lm = unwrap_causal_lm(model.to(self.device))
        self._decoder = decoder_of(causal_lm)
        self.dtype = str(causal_lm.dtype).removeprefix("torch.")

    def prompt_ids(
        self, prompts: Sequence[Any], max_tokens: int, options: Sequence[RenderOptions] = ()
    ) -> list[tuple[int, ...] | Refused]:
        """The ids a policy generates after, of each prompt; why not, where it cannot be rendered or is longer than
        ``max_tokens``.

        Args:
            options: of each prompt; default: nothing beside its messages.
        """
        found: list[tuple[int, ...] | Refused] = []
        given = options or [PLAIN] * len(prompts)
        requests = [Request(p, (), options=o) for p, o in zip(prompts, given, strict=True)]
        for each in self.renderer.render_batch(requests):
            if isinstance(each, Refused):
                found.append(each)
            elif len(each.prompt_ids) > max_tokens:
                detail = f"{len(each.prompt_ids)} tokens, more than {max_tokens}"
                found.append(Refused(Reject.PROMPT_TOO_LONG, detail))
            else:
                found.append(each.prompt_ids)
        return found

    @torch.inference_mode()
    def states(self, prompts: Sequence[Sequence[int]]) -> Iterator[StateBatch]:
        """Hidden states of every prompt, longest prompts first: memory runs out at once or not at all.

        They are those after the last norm, as transformers' ``hidden_states[-1]``. Padding stands on the right,
        where a causal model cannot see it.
        """
        for indices in _batches([len(ids) for ids in prompts], self.batch_tokens):
            width = len(prompts[indices[0]])
            ids = torch.zeros(len(indices), width, dtype=torch.long)
            mask = torch.zeros(len(indices), width, dtype=torch.bool)
            for row, index in enumerate(indices):
                length = len(prompts[index])
                ids[row, :length] = torch.tensor(prompts[index])
                mask[row, :length] = True
            mask = mask.to(self.device)
            output = self._decoder(
                input_ids=ids.to(self.device), attention_mask=mask.long(), use_cache=False
            )
            yield StateBatch(indices, output.last_hidden_state, mask)


class StoredStates:
    """Hidden states of many prompts in a file, read a batch at a time.

    Args:
        path: of the file; it is made here, and deleted by `close`.
        lengths: tokens of each prompt.
        batches: states of every prompt, in any order.

    Raises: DataError if the disk is full.
    """

    def __init__(self, path: Path, lengths: Sequence[int], batches: Iterable[StateBatch]) -> None:
        self.path = path
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._stored: Tensor | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for batch in batches:
                self._write(batch)
        except BaseException as error:
            self.close()
            if not isinstance(error, OSError):
                raise
            raise DataError(
                f"{path}: cannot be written: {error.strerror or error}. It is to hold the hidden states of "
                f"{len(lengths):,} prompts, {self._starts[-1]:,} tokens; make room and run the same command again"
            ) from error

    @property
    def hidden_size(self) -> int:
        return self._open().shape[1]

    def batch(self, indices: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """``states (B, T, D)`` fp32 and ``mask (B, T)`` of some prompts."""
        stored = self._open()
        lengths = [int(self._starts[i + 1] - self._starts[i]) for i in indices]
        states = torch.zeros(len(indices), max(lengths), stored.shape[1])
        mask = torch.zeros(len(indices), max(lengths), dtype=torch.bool)
        for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
            start = int(self._starts[index])
            states[row, :length] = stored[start : start + length].float()
            mask[row, :length] = True
        return states.to(device), mask.to(device)

    def close(self) -> None:
        """Deletes the file. May be called twice."""
        self._stored = None
        self.path.unlink(missing_ok=True)

    def _write(self, batch: StateBatch) -> None:
        if self._stored is None:
            shape = int(self._starts[-1]), batch.states.shape[-1]
            self._stored = _mapped(self.path, shape, batch.states.dtype)
        for row, index in enumerate(batch.indices):
            start, end = int(self._starts[index]), int(self._starts[index + 1])
            self._stored[start:end] = batch.states[row, : end - start].cpu()

    def _open(self) -> Tensor:
        assert self._stored is not None, "no prompt, or closed"
        return self._stored


def counted(batches: Iterable[StateBatch], bar: Any) -> Iterator[StateBatch]:
    """``batches`` as they are, their prompts counted on a progress bar."""
    for batch in batches:
        yield batch
        bar.update(len(batch.indices))


def tokenizer_identity(tokenizer: Any) -> str:
    """Names everything that decides a prompt's token ids: tokenizer, chat template, our renderer."""
    return f"{tokenizer_hash(tokenizer)}/{RENDERER_VERSION}"


def _mapped(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file, so that what does not fit is on disk, in the dtype it has."""
    size = shape[0] * shape[1]
    with path.open("wb") as file:  # its room is taken now: a full disk would be a crash later
        _allocate(file.fileno(), size * torch.empty(0, dtype=dtype).element_size())
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def _allocate(descriptor: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, max(1, num_bytes))
    else:  # macOS
        os.ftruncate(descriptor, num_bytes)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, longest first; equal lengths in the order they came."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
