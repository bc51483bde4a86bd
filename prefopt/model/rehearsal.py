"""Everything a run saves at its end but the weights, saved before its first step: what cannot be is found then."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from prefopt.errors import ModelError, TrainingError
from prefopt.model.adapters import SAVE_ERRORS, write_generation_config

log = logging.getLogger(__name__)


def rehearse_saving(
    model: PreTrainedModel | PeftModel, tokenizer: Any, directory: Path, key: str = "run.output_dir"
) -> None:
    """Returns if configuration, custom code and tokenizer can be saved under ``directory``; leaves nothing there.

    Args:
        key: what named the directory.

    Raises: TrainingError if ``directory`` cannot be written to; ModelError for what transformers or peft refuse.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=directory) as place:
            _save_settings(model, Path(place))
            _save_tokenizer(tokenizer, Path(place))
    except OSError as error:
        raise TrainingError(
            f"{key} = {directory}: cannot be written: {error.strerror or error}. The result is saved there at the "
            "end; make room, or choose another place"
        ) from error


def _save_settings(model: PreTrainedModel | PeftModel, place: Path) -> None:
    if isinstance(model, PeftModel):
        what, save = "the adapter's configuration", model.peft_config["default"].save_pretrained
    else:
        what, save = "the model's config.json", model.config.save_pretrained
    try:
        save(str(place))
        if not isinstance(model, PeftModel):
            if model.is_remote_code():
                config: Any = model.config
                custom_object_save(model, place, config=config)
            write_generation_config(model, place)
    except OSError:
        raise
    except SAVE_ERRORS as error:
        raise _refused(what, error, "Correct that file in a copy of the model") from error
    if not isinstance(model, PeftModel) and model.can_generate():
        _say_if_invalid(model)


def _say_if_invalid(model: Any) -> None:
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        log.warning(
            "%s: its generation_config.json contradicts itself (%s); it is saved as it is, and whoever generates "
            "with the model meets that",
            model.config._name_or_path, _first_sentence(error),
        )  # fmt: skip


def _save_tokenizer(tokenizer: Any, place: Path) -> None:
    try:
        tokenizer.save_pretrained(str(place))
    except OSError:
        raise
    except SAVE_ERRORS as error:
        advice = "Set model.tokenizer to a directory whose tokenizer can be saved"
        raise _refused("the tokenizer", error, advice) from error


def _refused(what: str, error: Exception, advice: str) -> ModelError:
    return ModelError(
        f"{what} cannot be saved, so what this run trains could not be at its end: {type(error).__name__}: "
        f"{_first_sentence(error)}. {advice}"
    )


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(". ")
