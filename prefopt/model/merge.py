"""The model that a saved adapter and its base make together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, TaskType
from torch import Tensor

from prefopt.errors import ModelError
from prefopt.model.adapters import merged_into_base, save_full, staged
from prefopt.model.end_tokens import add_end_tokens, end_token_ids, saved_end_ids
from prefopt.model.load import load_policy, load_tokenizer, num_embeddings
from prefopt.model.rehearsal import rehearse_saving
from prefopt.model.reward_model import load_saved_reward_model
from prefopt.model.source import load_config, resolve_source
from prefopt.recipe.schema import ModelSection
from prefopt.storage.checksums import write_sums
from prefopt.storage.model_files import ADAPTER_CONFIG, read_adapter_config
from prefopt.storage.run_files import RUN_FILE, read_run

log = logging.getLogger(__name__)

_MERGE_TOLERANCE = 1e-4
"""Largest difference of a merged model's logits, in fp32, as a share of the largest logit: W + BA is
added once instead of applied apart, which reorders sums and nothing else (measured: about 1e-6)."""


def merge_adapter(source: Path, output: Path, *, trust_remote_code: bool = False) -> None:
    """Writes the full model, adapter merged, with its tokenizer, to ``output``.

    Merged in fp32 and then rounded once to the base's dtype.

    Args:
        source: an adapter directory, or a run directory (its ``final`` is taken).
        output: a directory that does not exist yet, or is empty.
        trust_remote_code: run the model code of the base. A run that was trained so is merged so.

    Raises: ModelError if there is no adapter, the output is taken, the base cannot be found, or the merged
        model's logits are not the adapter model's (to 1e-4 of the largest logit, fp32).
    """
    adapter = _adapter_directory(source)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output} exists and is not empty: merge into a new directory")
    trusts = trust_remote_code or _run_trusts(source, adapter)
    model, tokenizer, dtype = load_merge_parts(adapter, trust_remote_code=trusts)
    base: Any = model.get_base_model()
    rehearse_saving(base, tokenizer, output.absolute().parent, "--output in")
    ids = _probe_ids(model)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        merged: Any = merged_into_base(model)
        found = merged(input_ids=ids, use_cache=False).logits
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= _MERGE_TOLERANCE:  # True for NaN
        raise ModelError(
            f"merging {adapter} changes the model: logits differ by {error:.2g} of the largest (limit "
            f"{_MERGE_TOLERANCE:g}). This adapter type cannot be merged exactly: serve it unmerged."
        )
    merged = merged.to(dtype)
    own = saved_end_ids(resolve_source(str(adapter)).from_the_top)
    add_end_tokens(merged, end_token_ids(tokenizer, own))
    with staged(output) as staging:
        save_full(merged, staging, None)
        tokenizer.save_pretrained(staging)
        write_sums(staging)
    log.info(
        "merged %s into %s: logits agree to %.1e of the largest (fp32)", adapter, output, error
    )


def load_merge_parts(
    adapter: Path, *, trust_remote_code: bool = False
) -> tuple[PeftModel, Any, torch.dtype]:
    """The adapter on its base in fp32, frozen, with tokenizer and the dtype the base was saved in."""
    source = resolve_source(str(adapter))
    section = ModelSection(path=str(adapter), dtype="float32", trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    saved: Any = config.get_text_config(decoder=True).dtype or config.dtype
    dtype = getattr(torch, saved) if isinstance(saved, str) else saved or torch.float32
    tokenizer = load_tokenizer(section)
    if read_adapter_config(adapter).get("task_type") == TaskType.SEQ_CLS.value:
        return load_saved_reward_model(source, section, tokenizer.pad_token_id), tokenizer, dtype
    loaded = load_policy(section, None, seed=0, trainable=False)
    assert isinstance(loaded.model, PeftModel)
    return loaded.model, tokenizer, dtype


def _run_trusts(source: Path, adapter: Path) -> bool:
    """Was the run whose directory (or ``final``) was named trained with the code of its model?"""
    for directory in dict.fromkeys((source, adapter.parent)):
        if (directory / RUN_FILE).is_file():
            return bool(read_run(directory, ModelError)["recipe"]["model"].get("trust_remote_code"))
    return False


def _adapter_directory(source: Path) -> Path:
    for candidate in (source, source / "final"):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    full = next((d for d in (source, source / "final") if (d / "config.json").is_file()), None)
    if full is not None:
        raise ModelError(f"{source}: {full} is a full model already, there is no adapter to merge")
    raise ModelError(
        f"{source}: no adapter here (no {ADAPTER_CONFIG}, no final/{ADAPTER_CONFIG}); give an adapter "
        "directory or the output directory of a finished run"
    )


def _probe_ids(model: PeftModel) -> Tensor:
    vocabulary = num_embeddings(model)
    return torch.randint(0, vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
