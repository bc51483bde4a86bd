"""Loading what becomes a reward model: a language model's body, a new scalar head, perhaps an adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, TaskType, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from prefopt.errors import ConfigError, ModelError
from prefopt.model.load import disable_dropout, peft_config, resolve_source
from prefopt.recipe.schema import ModelSection, PeftSection

# What may be missing from a language model's files: the head this stage trains from scratch.
_HEADS = ("score.", "classifier.", "classification_head.")


def load_reward_model(
    model: ModelSection, peft: PeftSection | None, *, seed: int, pad_token_id: int
) -> PreTrainedModel | PeftModel:
    """Returns the model with one reward output, read at the last token that is not padding.

    The head is always trained in full, beside the adapter where there is one, and saved with it.

    Args:
        model: where the body comes from; an adapter directory is refused, because its head would be new.
        peft: the adapter to train, or None for full fine-tuning.
        seed: of the head's and the adapter's initial values; the global random state is left as it was.
        pad_token_id: tells the head where a padded row ends.

    Raises: ModelError if it cannot be loaded or lacks weights; ConfigError for a bad ``peft`` section.
    """
    source = resolve_source(model.path, model.revision)
    if source.adapters:
        raise ModelError(
            f"model.path = {model.path!r} is an adapter: a reward model starts from a full model. Run "
            f"`prefopt merge {model.path} MERGED` and set model.path = MERGED"
        )
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        loaded = _load_with_head(source.name, source.revision, model)
        loaded.config.get_text_config().pad_token_id = pad_token_id
        loaded.config.use_cache = False
        result = loaded if peft is None else _add_adapter(loaded, peft)
    if model.disable_dropout:
        disable_dropout(result)
    return result


def _load_with_head(name: str, revision: str | None, model: ModelSection) -> PreTrainedModel:
    try:
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            revision=revision or "main",
            num_labels=1,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"cannot load {name!r} as a reward model: {type(error).__name__}: {error}; the architecture must "
            "have a sequence-classification class in transformers"
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(_HEADS))
    if missing:
        raise ModelError(
            f"{name!r} lacks {len(missing)} parameters of {type(loaded).__name__}, e.g. {missing[:3]}: they "
            "would be random; the files are incomplete"
        )
    return loaded


def _add_adapter(model: PreTrainedModel, section: PeftSection) -> Any:
    # This task type makes peft leave the head out of the adapter and train and save it in full.
    options = {**section.options, "task_type": TaskType.SEQ_CLS.value}
    try:
        return get_peft_model(model, peft_config(PeftSection(type=section.type, **options)))
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"peft (type {section.type!r}) on {type(model).__name__}: {error}"
        ) from error
