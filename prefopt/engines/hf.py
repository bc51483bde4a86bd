"""The embedded engine: Hugging Face `generate` on a copy of the trainer's policy that shares its frozen weights.

Slower than vLLM on a GPU, but it needs no second copy of the model, no server and no other package, and on
CPU in float32 a run that is resumed samples the same tokens again.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList

from prefopt.engines.base import Completion, PolicyFiles, Request, SamplingSpec
from prefopt.engines.checks import check_requests, check_sequences
from prefopt.engines.policy_copy import (
    generation_copy,
    load_adapter_files,
    load_model_files,
    prepared_for_generation,
)
from prefopt.engines.sampling import SeededSampler
from prefopt.errors import EngineError
from prefopt.model.load import load_policy
from prefopt.model.logps import unwrap_causal_lm
from prefopt.model.memory import memory_for_state
from prefopt.recipe.schema import ModelSection, PeftSection

# Logits of a scored batch are materialised: (rows, length, V) fp32.
_SCORE_ROWS = 8


@dataclass(frozen=True)
class _Row:
    """One response to sample, and where it goes in the result."""

    request: int
    number: int
    prompt_ids: tuple[int, ...]
    seed: int


class HFEngine:
    """Samples with `generate`; made with `sharing` (the trainer's policy) or `load` (from files).

    Args:
        model: causal LM or PEFT model that is this engine's own, already `prepared_for_generation`.
        pad_id: any token id; padding is masked.
        batch_size: most responses generated at once.
        dtype: what to compute in (autocast) where it is not the weights' own.
        timeout_s: longest one call may take.
        shares_weights: the weights in training are the model's too, so that there is never one to load.
    """

    name = "hf"

    def __init__(
        self,
        model: Any,
        *,
        pad_id: int,
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        timeout_s: float = 1800.0,
        shares_weights: bool = False,
    ) -> None:
        self.model: Any = model
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.dtype = dtype
        self.timeout_s = timeout_s
        self.shares_weights = shares_weights
        self._version: int | None = None

    @classmethod
    def sharing(
        cls,
        policy: nn.Module,
        *,
        share_trainable: bool,
        pad_id: int,
        half: Mapping[str, torch.dtype] = MappingProxyType({}),
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        timeout_s: float = 1800.0,
    ) -> HFEngine:
        """An engine on the trainer's policy; the frozen weights are not copied.

        Args:
            half: as `generation_copy`; where nothing is copied, what to compute in if ``dtype`` is left out.
            share_trainable: generate with the weights in training themselves (``sync_every = 1``, synchronous):
                what `load_policy` is given is then not read, but for its version.

        Raises: EngineError for a policy sharded by ZeRO-3 or FSDP.
        """
        if dtype is None and share_trainable:
            dtype = next(iter(half.values()), None)
        return cls(
            generation_copy(policy, share_trainable=share_trainable, half=half),
            pad_id=pad_id,
            batch_size=batch_size,
            dtype=dtype,
            timeout_s=timeout_s,
            shares_weights=share_trainable,
        )

    @classmethod
    def load(
        cls,
        model: ModelSection,
        peft: PeftSection | None,
        *,
        seed: int,
        pad_id: int,
        device: str | torch.device = "cpu",
        batch_size: int = 256,
        dtype: torch.dtype | None = None,
        timeout_s: float = 1800.0,
    ) -> HFEngine:
        """An engine with weights of its own, loaded just as the trainer loads its policy.

        Args:
            seed: ``train.seed``; a new adapter starts from the same values.

        Raises: ModelError, ConfigError as `prefopt.model.load.load_policy`.
        """
        loaded = load_policy(model, peft, seed=seed)
        policy: Any = loaded.model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(
            prepared_for_generation(policy),
            pad_id=pad_id,
            batch_size=batch_size,
            dtype=dtype,
            timeout_s=timeout_s,
        )

    @property
    def version(self) -> int | None:
        return self._version

    @property
    def context(self) -> int | None:
        """Longest prompt + response in tokens; None for a model without a limit."""
        config = unwrap_causal_lm(self.model).config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    def generate(self, requests: Sequence[Request], spec: SamplingSpec) -> list[list[Completion]]:
        """As `Engine.generate`; batches are made of prompts of like length, results are in order."""
        check_requests(requests, spec, self.context)
        deadline = time.monotonic() + self.timeout_s
        rows = [
            _Row(index, number, request.prompt_ids, seed)
            for index, request in enumerate(requests)
            for number, seed in enumerate(request.seeds)
        ]
        rows.sort(key=lambda row: -len(row.prompt_ids))  # the largest batch first: it fits or fails
        results: list[list[Any]] = [[None] * len(request.seeds) for request in requests]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            for row, completion in zip(batch, self._batch(batch, spec, deadline), strict=True):
                results[row.request][row.number] = completion
        return results

    def score(
        self, sequences: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> list[list[float]]:
        """As `Engine.score`: teacher-forced, a few rows at a time."""
        check_sequences(sequences, self.context)
        order = sorted(range(len(sequences)), key=lambda i: -sum(map(len, sequences[i])))
        results: list[list[float]] = [[] for _ in sequences]
        for start in range(0, len(order), _SCORE_ROWS):
            batch = order[start : start + _SCORE_ROWS]
            for index, logps in zip(batch, self._score([sequences[i] for i in batch]), strict=True):
                results[index] = logps
        return results

    def load_policy(self, policy: PolicyFiles) -> None:
        """Reads the files, except where the engine shares the weights in training: those are the policy.

        Raises: EngineError if they are missing, damaged or of another model.
        """
        if not self.shares_weights:
            if policy.is_adapter:
                self.model = prepared_for_generation(load_adapter_files(self.model, policy.path))
            elif isinstance(self.model, PeftModel):
                raise EngineError(
                    f"version {policy.version}: {policy.path} holds a full model, the engine runs an adapter"
                )
            else:
                load_model_files(self.model, policy.path, self.model.dtype)
        self._version = policy.version

    def close(self) -> None:
        self.model = None

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _context_manager(self) -> contextlib.AbstractContextManager[Any]:
        own = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        if self.dtype is None or own == {self.dtype}:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self.dtype)

    def _batch(self, rows: list[_Row], spec: SamplingSpec, deadline: float) -> list[Completion]:
        width = len(rows[0].prompt_ids)
        ids, mask = _padded([row.prompt_ids for row in rows], self.pad_id, left=True)
        sampler = SeededSampler(
            spec,
            [row.seed for row in rows],
            prompt_width=width,
            device=self._device,
            deadline=deadline,
        )
        remedy = (
            f"{len(rows)} responses of up to {width + spec.max_new_tokens:,} tokens were generated at once: lower "
            "engine.batch_size, or regime.max_new_tokens"
        )
        with (
            memory_for_state("while generating", remedy),
            torch.inference_mode(),
            self._context_manager(),
        ):
            output = unwrap_causal_lm(self.model).generate(
                input_ids=ids.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=self._generation_config(spec),
                logits_processor=LogitsProcessorList([sampler]),
            )
        new, logps = output[:, width:].tolist(), sampler.logps.tolist()
        stops = frozenset(spec.stop_token_ids)
        return [
            self._completion(tokens, values, stops)
            for tokens, values in zip(new, logps, strict=True)
        ]

    def _generation_config(self, spec: SamplingSpec) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=spec.max_new_tokens,
            do_sample=False,  # the sampler has left one token
            use_cache=True,
            eos_token_id=list(spec.stop_token_ids) or None,
            pad_token_id=self.pad_id,
        )

    def _completion(
        self, tokens: list[int], logps: list[float], stops: frozenset[int]
    ) -> Completion:
        end = next((i for i, token in enumerate(tokens) if token in stops), None)
        length = len(tokens) if end is None else end + 1
        values = tuple(logps[:length])
        if not all(map(math.isfinite, values)):
            raise EngineError(
                f"the hf engine's log-probs are not finite (policy version {self._version}): the policy has "
                "diverged, or overflows in its dtype. Lower train.learning_rate, or use bfloat16 or float32"
            )
        return Completion(tuple(tokens[:length]), values, "length" if end is None else "eos")

    def _score(self, batch: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[list[float]]:
        ids, mask = _padded([prompt + response for prompt, response in batch], self.pad_id)
        ids, mask = ids.to(self._device), mask.to(self._device)
        with torch.inference_mode(), self._context_manager():
            logits = unwrap_causal_lm(self.model)(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).logits
            logps = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return [
            row[len(prompt) - 1 :][: len(response)]
            for row, (prompt, response) in zip(logps.tolist(), batch, strict=True)
        ]


def _padded(
    rows: Sequence[tuple[int, ...]], pad_id: int, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """(R, L) ids and their attention mask, padded on the right unless ``left``."""
    width = max(map(len, rows))
    fill = [(width - len(row)) for row in rows]
    ids = [
        ([pad_id] * n + [*r]) if left else ([*r] + [pad_id] * n)
        for r, n in zip(rows, fill, strict=True)
    ]
    mask = [([0] * n + [1] * (width - n))[:: 1 if left else -1] for n in fill]
    return torch.tensor(ids), torch.tensor(mask)
